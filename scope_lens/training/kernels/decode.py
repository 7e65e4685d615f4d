"""From a batch's entries to its reconstruction, and from the reconstruction's error back to each entry.

1. `x_hat = sum of act * W_dec[latent] + b_dec` over the row's entries.
2. `d_recons = 2 (x_hat + skip - y) / rows`, the gradient of the mean squared error over `rows` rows.
3. `d_act = d_recons . W_dec[latent]` at the entries alone: active ones need it for the weights' gradients, those inside
   the window for the threshold's.

This is the twin: torch's own operations, in blocks of rows, so that the gathered weights stay small. The fused kernels
with the same signatures stand in `decode_triton.py`. A row's slots behind `count` are padding and are never looked at.

Source: the formulas of `scope_lens.training.jumprelu_step`; JumpReLU SAEs (arXiv 2407.14435).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from scope_lens.training.kernels.entries import Entries

_GATHERED = 2**22  # weights gathered at a time: 16 MiB in float32


class Residual(NamedTuple):
    """What the error of a reconstruction gives.

    Attributes:
        d_recons: Gradient with respect to the reconstruction, in the dtype of the weights it was made with.
        d_act: float32 gradient with respect to each entry's activation, made from the unrounded `d_recons`; 0 in the
            padding.
        squared_error: float32 `||x_hat + skip - y||^2` of each row.
    """

    d_recons: Float[Tensor, "batch d_out"]
    d_act: Float[Tensor, "batch capacity"]
    squared_error: Float[Tensor, " batch"]


@torch.no_grad()
def decode(
    entries: Entries, W_dec: Float[Tensor, "d_sae d_out"], b_dec: Float[Tensor, " d_out"] | None
) -> Float[Tensor, "batch d_out"]:
    """Give `x_hat = sum of act * W_dec[latent] (+ b_dec)` for each row, in float32.

    Args:
        entries: The entries of a batch.
        W_dec: Decoder, one row for each latent, contiguous.
        b_dec: Bias; None for a part of the latents, whose sums are added up elsewhere.
    """
    recons = entries.act.new_empty(len(entries.count), W_dec.shape[1])
    for rows, picked in _picked(entries, W_dec):
        recons[rows] = einsum(_valid_acts(entries)[rows], picked, "row entry, row entry d_out -> row d_out")
    return recons if b_dec is None else recons + b_dec


@torch.no_grad()
def residual(
    entries: Entries,
    W_dec: Float[Tensor, "d_sae d_out"],
    b_dec: Float[Tensor, " d_out"] | None,
    y: Float[Tensor, "batch d_out"],
    *,
    rows: int,
    skip: Float[Tensor, "batch d_out"] | None = None,
) -> Residual:
    """Reconstruct, compare with the target, and give the gradient at each entry.

    Args:
        entries: The entries of a batch.
        W_dec: Decoder, one row for each latent, contiguous.
        b_dec: Bias.
        y: Targets, float32.
        rows: Rows over which the loss is the mean; more than the batch has, where others hold the rest.
        skip: The skip term `x @ W_skip`, float32.
    """
    recons = decode(entries, W_dec, b_dec)
    gap = (recons if skip is None else recons + skip) - y
    d_recons = gap * (2 / rows)
    return Residual(d_recons.to(W_dec.dtype), latent_gradients(entries, W_dec, d_recons), gap.square().sum(-1))


@torch.no_grad()
def latent_gradients(
    entries: Entries, W_dec: Float[Tensor, "d_sae d_out"], d_recons: Float[Tensor, "batch d_out"]
) -> Float[Tensor, "batch capacity"]:
    """Give `d_act = d_recons . W_dec[latent]` at each entry, in float32; 0 in the padding.

    Args:
        entries: The entries of a batch.
        W_dec: Decoder, one row for each latent, contiguous.
        d_recons: Gradient with respect to the reconstruction, in any dtype.
    """
    d_act = torch.empty_like(entries.act)
    for rows, picked in _picked(entries, W_dec):
        d_act[rows] = einsum(d_recons[rows].to(picked.dtype), picked, "row d_out, row entry d_out -> row entry")
    return d_act.masked_fill_(~_valid(entries), 0)


def _picked(entries: Entries, weights: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows with each one's weight rows `(row, entry, d)`, zero where there is no entry."""
    batch, capacity = entries.latent.shape
    block = max(1, _GATHERED // (capacity * weights.shape[1]))
    latents = entries.latent.long().masked_fill(~_valid(entries), 0)
    valid = _valid(entries)[:, :, None]
    for first in range(0, batch, block):
        rows = slice(first, first + block)
        yield rows, weights[latents[rows]].to(entries.act.dtype).masked_fill_(~valid[rows], 0)


def _valid(entries: Entries) -> Tensor:
    """Which slots hold an entry."""
    slots = torch.arange(entries.latent.shape[1], device=entries.count.device)
    return slots < entries.count[:, None]


def _valid_acts(entries: Entries) -> Tensor:
    return entries.act.masked_fill(~_valid(entries), 0)
