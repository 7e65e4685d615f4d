"""The dense step: every latent of every row, in matrix products whose epilogues take the decisions.

For dictionaries on which no sums over entries pay: any at the start of a run, when half of the latents are active, and
narrow ones for good. With M latents and n rows, all weights latent-major:

1. `encode_dense`:    pre = x @ W_enc^T + b_enc, decided in float32 on the accumulators; f goes to memory, rounded to
                      the operands' dtype, with two bits: active, and inside the window.
2. `product`:         f @ W_dec, from which `dense_residual` takes d y_hat = 2 (y_hat - y) / n and the loss.
3. `dense_gradients`: d f = d y_hat @ W_dec^T, which never goes to memory; d pre = d f where active does, and the sums
                      over the rows that the biases and the thresholds need.
4. `product`:         d W_dec = f^T @ d y_hat and d W_enc = d pre^T @ seen.

Wide dictionaries are worked on in blocks of latents: 1 and 3 take rows of the weights, 2 adds to what is there. Batches
need not be blocked: f of a block is n numbers a latent.

The functions here are the twins in torch; `scope_lens.training.kernels.dense_triton` has the kernels. The formulas are
those of `scope_lens.training.jumprelu_step`.

Source: JumpReLU SAEs (arXiv 2407.14435), Gemma Scope (arXiv 2408.05147), section 2.2.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from scope_lens.training.kernels.sums import LatentSums

WORD = 32  # rows whose decisions share an integer
_STRETCHES = 64

# cuBLAS multiplies bfloat16 and writes the float32 it has summed up in; torch has passed that on since 2.8.
_MIXED_PRODUCT = "dtype_out" in torch.ops.aten.mm.overloads()


class DenseActs(NamedTuple):
    """A block of latents on a batch.

    Attributes:
        acts: Latents, rounded to the dtype of the operands; 0 where `pre <= threshold`, so NaN stays. The kernels give
            a transposed view of latents that are stored one after the other.
        active: int32, a bit for each entry, 1 where not `pre <= threshold`: decided on float32, before anything is
            rounded. Bit i of word w is row 32 w + i. `unpack` gives a mask.
        inside: int32, likewise, 1 where `|pre - threshold| < half_window`.
        l0: int32, active latents of each row.
    """

    acts: Float[Tensor, "batch block"]
    active: Int[Tensor, "word block"]
    inside: Int[Tensor, "word block"]
    l0: Int[Tensor, " batch"]


def encode_dense(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "block d_in"],
    b_enc: Float[Tensor, " block"],
    threshold: Float[Tensor, " block"],
    *,
    half_window: float,
) -> DenseActs:
    """`pre = x @ W_enc^T + b_enc` in float32, and what JumpReLU makes of it.

    Args:
        x: Encoder inputs, bfloat16 or float32.
        W_enc: Encoder rows of a block of latents, in the dtype of `x`.
        b_enc: Their biases, float32.
        threshold: Their thresholds, float32, none negative; zeros make it a ReLU.
        half_window: Half the width of the estimator's window; 0 for none.
    """
    pre = product(x, W_enc.T) + b_enc
    active = ~(pre <= threshold)
    inside = (pre - threshold).abs() < half_window
    acts = torch.where(active, pre, 0.0).to(x.dtype)
    return DenseActs(acts, pack(active), pack(inside), active.sum(1, dtype=torch.int32))


def dense_residual(
    recons: Float[Tensor, "batch d_out"],
    b_dec: Float[Tensor, " d_out"],
    y: Float[Tensor, "batch d_out"],
    *,
    rows: int,
    operands: torch.dtype,
    skip: Float[Tensor, "batch d_out"] | None = None,
) -> tuple[Float[Tensor, "batch d_out"], Float[Tensor, " batch"]]:
    """`d y_hat = 2 (y_hat - y) / rows` rounded to the operands' dtype, and each row's `||y - y_hat||^2` in float32.

    Args:
        recons: What the latents write, float32.
        b_dec: Decoder bias, float32.
        y: Targets, float32.
        rows: Rows of the whole batch, of which these may be a part.
        operands: dtype of the gradient.
        skip: What a skip term writes, float32.
    """
    error = recons + b_dec - y if skip is None else recons + skip + b_dec - y
    return (error * (2 / rows)).to(operands), error.square().sum(1)


def dense_gradients(
    d_recons: Float[Tensor, "batch d_out"],
    W_dec: Float[Tensor, "block d_out"],
    acts: DenseActs,
    slope: Float[Tensor, " batch"],
) -> tuple[Float[Tensor, "batch block"], LatentSums]:
    """`d pre = (d y_hat @ W_dec^T) * active`, in the dtype of the operands, and the sums over the rows in float32.

    Args:
        d_recons: Gradient of the reconstruction, in the dtype of `W_dec`.
        W_dec: Decoder rows of a block of latents.
        acts: What `encode_dense` gave for that block.
        slope: `d sparsity / d L0` of each row, float32.
    """
    d_acts = product(d_recons, W_dec.T)
    active, inside = unpack(acts.active, len(d_acts)), unpack(acts.inside, len(d_acts))
    d_pre = torch.where(active, d_acts, 0.0)
    sums = LatentSums(
        fired=active.sum(0, dtype=torch.float32),
        inside=inside.sum(0, dtype=torch.float32),
        slope=torch.where(inside, slope[:, None], 0.0).sum(0),
        d_act_inside=torch.where(inside, d_acts, 0.0).sum(0),
        d_pre=d_pre.sum(0),
    )
    return d_pre.to(d_recons.dtype), sums


def weighted_rows(weights: Float[Tensor, "block d"], coefficient: Float[Tensor, " block"]) -> Float[Tensor, " d"]:
    """`coefficient @ weights` in float32: torch alone, for both sets of kernels.

    The coefficients are split in two parts of the weights' dtype, so that the weights are read as they are. The sum
    over the latents is cut into stretches: as one product it would be a single row of tiles, too few for a GPU.

    Args:
        weights: Rows of latents, bfloat16 or float32.
        coefficient: One float32 number for each.
    """
    high = coefficient.to(weights.dtype)
    low = (coefficient - high).to(weights.dtype)
    stretches = math.gcd(len(weights), _STRETCHES)
    columns = torch.stack([high, low]).view(2, stretches, -1).transpose(0, 1)
    rows = weights.view(stretches, -1, weights.shape[1])
    if weights.is_cuda and weights.dtype == torch.bfloat16 and _MIXED_PRODUCT:
        return torch.bmm(columns, rows, torch.float32).sum((0, 1))
    return (columns.float() @ rows.float()).sum((0, 1))


def pack(mask: Bool[Tensor, "batch block"]) -> Int[Tensor, "word block"]:
    """Put 32 rows of a mask into one int32 for each latent: row 32 w + i becomes bit i of word w."""
    short = -len(mask) % WORD
    rows = torch.nn.functional.pad(mask, (0, 0, 0, short)).view(-1, WORD, mask.shape[1])
    place = torch.arange(WORD, dtype=torch.int32, device=mask.device)
    return (rows.int() << place[:, None]).sum(1, dtype=torch.int32)


def unpack(words: Int[Tensor, "word block"], rows: int) -> Bool[Tensor, "batch block"]:
    """Give the mask of `rows` rows that `pack` or the kernels have packed."""
    place = torch.arange(WORD, dtype=torch.int32, device=words.device)
    return ((words[:, None] >> place[:, None]) & 1).view(-1, words.shape[1])[:rows] != 0


def product(
    a: Float[Tensor, "rows inner"],
    b: Float[Tensor, "inner columns"],
    *,
    out: Float[Tensor, "rows columns"] | None = None,
    add: bool = False,
) -> Float[Tensor, "rows columns"]:
    """`a @ b` in float32, of bfloat16 or float32 operands; transposed views are taken as they are.

    Args:
        a: Left operand.
        b: Right operand; the product is fast where both have one dtype.
        out: float32 tensor to write into; None makes one.
        add: Whether to add to what `out` holds.

    Raises:
        ValueError: `add` without `out`.
    """
    if out is None:
        if add:
            raise ValueError("product(add=True) has nothing to add to; pass out=.")
        out = torch.empty((a.shape[0], b.shape[1]), dtype=torch.float32, device=a.device)
    if a.is_cuda and a.dtype == b.dtype == torch.bfloat16 and _MIXED_PRODUCT:
        # addmm takes a float32 `out` beside bfloat16 factors only since torch 2.10, so the sum is a pass of its own.
        return out.add_(torch.mm(a, b, torch.float32)) if add else torch.mm(a, b, torch.float32, out=out)
    a, b = a.float(), b.float()
    return out.addmm_(a, b) if add else torch.mm(a, b, out=out)
