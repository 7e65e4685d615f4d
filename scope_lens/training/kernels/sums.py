"""What each latent's entries add up to: the bias' gradient, and what the threshold's gradient is made of.

    d b_enc     = sum of d_act over the rows in which the latent is active
    d threshold = - (theta * sum of d_act + sum of the row's d sparsity / d L0 + price * number) / bandwidth,
                  each over the rows in which the latent is inside the window |pre - theta| < bandwidth / 2

Every sum runs over one stretch of `Columns`, in a fixed order, so it has the same bits on every run. This is the twin;
the fused kernel with the same signature stands in `sums_triton.py`.

Source: the formulas of `scope_lens.training.jumprelu_step`; JumpReLU SAEs (arXiv 2407.14435).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from scope_lens.training.kernels.entries import Columns, Entries


class LatentSums(NamedTuple):
    """Sums over the rows of a batch for each latent, float32.

    Attributes:
        fired: Rows in which the latent is active.
        inside: Rows in which it is inside the window.
        slope: Sum of `d sparsity / d L0` of the row, inside the window.
        d_act_inside: Sum of `d_act`, inside the window.
        d_pre: Sum of `d_act` where the latent is active.
    """

    fired: Float[Tensor, " d_sae"]
    inside: Float[Tensor, " d_sae"]
    slope: Float[Tensor, " d_sae"]
    d_act_inside: Float[Tensor, " d_sae"]
    d_pre: Float[Tensor, " d_sae"]


@torch.no_grad()
def latent_sums(
    entries: Entries,
    d_act: Float[Tensor, "batch capacity"],
    columns: Columns,
    threshold: Float[Tensor, " d_sae"] | None,
    slope: Float[Tensor, " batch"],
    *,
    half_window: float,
) -> LatentSums:
    """Sum over each latent's entries. An entry is active where `act` is not 0: the decision is not taken again.

    Args:
        entries: The entries of a batch.
        d_act: Gradient at each entry.
        columns: The same entries in the order of the latents.
        threshold: Thresholds, none negative; None where nothing is inside a window (TopK).
        slope: `d sparsity / d L0` of each row.
        half_window: Half the width of the estimator's window; its edges are outside.
    """
    slot = columns.slot.long()
    latent, pre, act, gradient = (column.flatten()[slot] for column in (*entries[:3], d_act))
    active = act != 0
    if threshold is None:
        inside = torch.zeros_like(active)
    else:
        known = latent.clamp(max=len(threshold) - 1)  # the padding's stretch is behind the last offset
        inside = (pre - threshold[known]).abs() < half_window
    row = slot // entries.latent.shape[1]
    summands = (
        active.to(act.dtype),
        inside.to(act.dtype),
        torch.where(inside, slope[row], 0),
        torch.where(inside, gradient, 0),
        torch.where(active, gradient, 0),
    )
    sums = torch.segment_reduce(torch.stack(summands, dim=1), "sum", offsets=columns.offsets, axis=0)
    return LatentSums(*sums.T.contiguous())
