"""One update of weights that are kept latent-major: gradient, projection, Adam, unit rows and shadow in one pass.

For each latent, with its row w of the weights and its gradient g:

1. `g = sum over its entries of coefficient * row` (`FromEntries`), or a row of a dense gradient.
2. Unit rows: `g - (g . w) w`, as `scope_lens.training.initialisation.project_out_rows`.
3. Adam (arXiv 1412.6980), as torch.optim.Adam: `m = beta1 m + (1 - beta1) g`, `v = beta2 v + (1 - beta2) g^2`,
   `w = w - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)`. With beta1 = 0, Gemma Scope's recipe, m is g and is
   not kept.
4. Unit rows: `w / ||w||`, as `normalise_rows`.
5. The shadow, a copy of w in the dtype of the products' operands, is written.

**Lazy rows.** With beta1 = 0 a row whose gradient is zero is not moved by Adam; only its v decays. A latent without
entries in the batch is therefore not touched at all: `RowAdam.last` holds the update up to which its v stands, and the
next touch multiplies v by `beta2^(updates since)`. Against the update of every row this differs by rounding alone: v is
rounded once and not once for each update, and a unit row is not divided by its norm, 1 up to rounding, again. With
beta1 > 0 a row moves for as long as its m has not decayed, and every update takes all rows.

The twin here is torch alone and waits for the device; `update_triton` does not.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from scope_lens.training.kernels.entries import Columns

_BLOCK = 4096  # latents whose gradients the twin holds at a time


class RowAdam(NamedTuple):
    """Adam's state of one latent-major weight; `update_rows` changes its tensors in place.

    Attributes:
        second: Second moment v.
        first: First moment m; None where beta1 is 0.
        last: int32, the number of updates up to which a row's v stands.
    """

    second: Float[Tensor, "d_sae d"]
    first: Float[Tensor, "d_sae d"] | None
    last: Int[Tensor, " d_sae"]


class FromEntries(NamedTuple):
    """A gradient as weighted sums: that of latent i is the sum of `coefficient * row` over i's entries.

    Attributes:
        columns: The entries in the order of the latents.
        coefficient: float32, one for each slot: latents for the decoder's gradient, gradients with respect to the
            pre-activations for the encoder's. What it holds in the padding is not read.
        rows: What is summed: gradients with respect to the reconstruction, or the rows that the encoder saw.
    """

    columns: Columns
    coefficient: Float[Tensor, "batch capacity"]
    rows: Float[Tensor, "batch d"]


@torch.no_grad()
def update_rows(
    weight: Float[Tensor, "d_sae d"],
    state: RowAdam,
    gradient: FromEntries | Float[Tensor, "block d"],
    *,
    shadow: Float[Tensor, "d_sae d"] | None,
    unit_rows: bool,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    halted: Int[Tensor, "1"],
    latents: slice | None = None,
) -> None:
    """Make update `step` of a weight, in place: the module's five steps.

    A gradient that is not finite reaches the weights.

    Args:
        weight: Master weights, float32, a latent's row contiguous in memory.
        state: Adam's state of `weight`.
        gradient: Its gradient. From entries, and with beta1 = 0, rows without entries are left as they are.
        shadow: Where the new weights are written a second time, in its own dtype.
        unit_rows: Whether the rows are kept on the unit sphere (steps 2 and 4).
        step: Number of this update, counted from 1.
        lr: Learning rate.
        betas: Decay of Adam's moments.
        eps: Adam's epsilon.
        halted: On the device; nothing is written where it is not 0.
        latents: The latents whose dense gradient is given; None for all.

    Raises:
        ValueError: The gradient has other rows than the latents named, a first moment is missing or superfluous, or
            rows are not contiguous.
    """
    weight, state, shadow = checked_rows(weight, state, gradient, shadow=shadow, betas=betas, latents=latents)
    if halted.item():
        return
    size, correction = lr / (1 - betas[0] ** step), math.sqrt(1 - betas[1] ** step)
    if isinstance(gradient, FromEntries):
        gradient = _widened(gradient)
    for start in range(0, len(weight), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(weight)))
        w, v, last = weight[block], state.second[block], state.last[block]
        m = None if state.first is None else state.first[block]
        g = gradient[block] if isinstance(gradient, Tensor) else _sums(gradient, block)
        if unit_rows:
            g = g - (g * w).sum(1, keepdim=True) * w
        decay = torch.exp2((step - last).double() * log2_decay(betas[1])).to(v.dtype)
        new_v = (v * decay[:, None]).addcmul_(g, g, value=1 - betas[1])
        new_m = g if m is None else m.lerp(g, 1 - betas[0])
        new_w = torch.addcdiv(w, new_m, new_v.sqrt().div_(correction).add_(eps), value=-size)
        if unit_rows:
            new_w /= new_w.norm(dim=1, keepdim=True)
        touched = torch.ones_like(last, dtype=torch.bool)
        if not isinstance(gradient, Tensor) and m is None:
            touched = gradient.columns.offsets[block.start : block.stop + 1].diff() > 0
        for old, new in ((w, new_w), (v, new_v), (m, new_m), (None if shadow is None else shadow[block], new_w)):
            if old is not None:
                old.copy_(torch.where(touched[:, None], new.to(old.dtype), old))
        last.masked_fill_(touched, step)


@torch.no_grad()
def weight_gradients(source: FromEntries, d_sae: int) -> Float[Tensor, "d_sae d"]:
    """Give the gradient alone, float32, zero for latents without entries: what ranks with other rows add up.

    Args:
        source: What is summed.
        d_sae: Number of latents.
    """
    return _sums(_widened(source), slice(0, d_sae))


@torch.no_grad()
def catch_up(state: RowAdam, step: int, beta2: float) -> None:
    """`v = beta2^(step - last) v` for every row, in place: the state as it stands after `step` updates.

    What is saved after it no longer depends on which rows were touched when. It rounds v once more for rows that lagged
    behind, so a run that catches up on its way follows one that does not to rounding. Torch alone, for both sets of
    kernels, and without waiting for the device.

    Args:
        state: Adam's state of one weight.
        step: Updates made.
        beta2: Decay of the second moment.
    """
    missed = (step - state.last).double()
    decay = torch.where(missed == 0, 1.0, torch.exp2(missed * log2_decay(beta2)))  # 0 * log2(0) is no number
    state.second.mul_(decay.to(state.second.dtype)[:, None])
    state.last.fill_(step)


def log2_decay(beta2: float) -> float:
    """Give log2 of `beta2`, taken in float64: powers of a rounded beta2 would drift from torch's over many updates."""
    return math.log2(beta2) if beta2 else -math.inf


def checked_rows(
    weight: Tensor,
    state: RowAdam,
    gradient: FromEntries | Tensor,
    *,
    shadow: Tensor | None,
    betas: tuple[float, float],
    latents: slice | None,
) -> tuple[Tensor, RowAdam, Tensor | None]:
    """Give the weight, its state and its shadow for the latents that an update concerns: views.

    Raises:
        ValueError: As `update_rows`.
    """
    if (state.first is None) != (betas[0] == 0):
        found = "no" if state.first is None else "a"
        raise ValueError(f"betas[0] is {betas[0]}, but the state has {found} first moment; make it with these betas.")
    if isinstance(gradient, FromEntries):
        if latents is not None:
            raise ValueError("latents belongs to a dense gradient; a gradient from entries covers all latents.")
        if len(gradient.columns.offsets) != len(weight) + 1:
            raise ValueError(
                f"the entries are of {len(gradient.columns.offsets) - 1} latents, the weight has {len(weight)} rows. "
                f"Order them with columns_of(entries, {len(weight)})."
            )
    else:
        latents = latents or slice(0, len(weight))
        weight, shadow = weight[latents], None if shadow is None else shadow[latents]
        state = RowAdam(
            state.second[latents], None if state.first is None else state.first[latents], state.last[latents]
        )
        if len(gradient) != len(weight):
            raise ValueError(
                f"the gradient has {len(gradient)} rows for the {len(weight)} latents of {latents}. Pass latents= with "
                "the latents that it is of."
            )
    wide = gradient.rows if isinstance(gradient, FromEntries) else gradient
    tensors = {"weight": weight, "second": state.second, "first": state.first, "shadow": shadow, "gradient": wide}
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.shape[1] != weight.shape[1] or not tensor.is_contiguous()):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; expected contiguous rows of "
                f"{weight.shape[1]} numbers. A weight kept as (d, d_sae) is given as its transpose."
            )
    return weight, state, shadow


def _widened(source: FromEntries) -> FromEntries:
    """The same with rows of at least float32."""
    return source._replace(rows=source.rows.to(torch.promote_types(source.rows.dtype, torch.float32)))


def _sums(source: FromEntries, latents: slice) -> Tensor:
    """Gradients of a stretch of latents."""
    offsets = source.columns.offsets[latents.start : latents.stop + 1]
    slot = source.columns.slot[int(offsets[0]) : int(offsets[-1])]
    return embedding_bag(
        slot // source.coefficient.shape[1],
        source.rows,
        offsets[:-1] - offsets[0],
        mode="sum",
        per_sample_weights=source.coefficient.flatten()[slot].to(source.rows.dtype),
    )
