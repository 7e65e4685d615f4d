"""From a batch's entries to its reconstruction, and from the reconstruction's error back to each entry.

1. `x_hat = sum of act * W_dec[latent] + b_dec` over the row's entries.
2. `d_recons = 2 (x_hat + skip - y) / rows`, the gradient of the mean squared error over `rows` rows.
3. `d_act = d_recons . W_dec[latent]` at the entries alone: active ones need it for the weights' gradients, those inside
   the window for the threshold's.

This is the twin: torch's own operations on the stored entries, one behind the other. It asks the device how many there
are, which the fused kernels with the same signatures, in `decode_triton.py`, do not. A row's slots behind `count` are
padding and are never looked at.

Source: the formulas of `scope_lens.training.jumprelu_step`; JumpReLU SAEs (arXiv 2407.14435).
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import embedding_bag

from scope_lens.training.kernels.entries import Entries

_GATHERED = 2**18  # weights gathered at a time: 1 MiB in float32, which stays in a processor's cache


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
    stored, weights = _stored(entries), W_dec
    latent, act = entries.latent[stored].long(), entries.act[stored]
    if W_dec.dtype != act.dtype:
        used, latent = latent.unique(return_inverse=True)
        weights = W_dec[used].to(act.dtype)
    ends = stored.sum(-1).cumsum(0)
    recons = embedding_bag(latent, weights, ends - stored.sum(-1), mode="sum", per_sample_weights=act)
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
    stored = _stored(entries)
    row, latent = stored.nonzero()[:, 0], entries.latent[stored].long()
    gathered = max(1, _GATHERED // W_dec.shape[1])
    products = [
        (W_dec[latents].to(entries.act.dtype) * d_recons[rows]).sum(-1)
        for rows, latents in zip(row.split(gathered), latent.split(gathered), strict=True)
    ]
    d_act = torch.zeros_like(entries.act)
    d_act[stored] = torch.cat(products)
    return d_act


def _stored(entries: Entries) -> Bool[Tensor, "batch capacity"]:
    """Which slots hold an entry."""
    slots = torch.arange(entries.latent.shape[1], device=entries.count.device)
    return slots < entries.count[:, None]
