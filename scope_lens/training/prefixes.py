"""Reconstruction errors of nested prefixes of a dictionary (Matryoshka training).

    loss = sum over m of mean_b ||y - (f[:m] @ W_dec[:m] + b_dec (+ x @ W_skip))||^2,   m = prefixes..., d_sae

Each prefix has to reconstruct alone, so the first latents stay general where a plain dictionary splits them. Every
prefix has the decoder bias and the skip term. The prefixes share one pass over the decoder: each block of latents adds
its part to the reconstruction of the prefix before it.

Source: Learning multi-level features with Matryoshka sparse autoencoders (arXiv 2503.17547), section 3.
"""

from itertools import pairwise
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from scope_lens.sae import HookedSAE
from scope_lens.training.ranks import ALONE, Ranks


class Errors(NamedTuple):
    """Mean over rows of squared errors; on several ranks, this one's share of the means.

    Attributes:
        total: Summed over all prefixes, the whole dictionary included.
        whole: Of the whole dictionary.
        residual: `y - y_hat` of the whole dictionary.
    """

    total: Float[Tensor, ""]
    whole: Float[Tensor, ""]
    residual: Float[Tensor, "batch d_out"]


def prefix_errors(
    sae: HookedSAE,
    acts: Float[Tensor, "batch d_sae"],
    batch: tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch d_out"]],
    prefixes: tuple[int, ...],
    *,
    ranks: Ranks = ALONE,
) -> Errors:
    """Give the squared errors of `y_hat` and of the reconstructions from the first m latents.

    Args:
        sae: The dictionary, or this rank's shard of it.
        acts: Its latents.
        batch: Encoder inputs and targets.
        prefixes: Widths m of the whole dictionary, ascending and below its own; none for plain training.
        ranks: Whose rows and latents these are.
    """
    x, y = batch
    if not prefixes:
        residual = y - reconstruction(sae, acts, x, ranks=ranks)
        whole = ranks.part(residual.pow(2).sum(-1).mean())
        return Errors(whole, whole, residual)
    residual = y - sae.b_dec
    if sae.W_skip is not None:
        residual = residual - x @ sae.W_skip
    errors: list[Tensor] = []
    width = sae.cfg.d_sae * ranks.n_latent
    first = ranks.latents(width).start
    for block in pairwise((0, *prefixes, width)):
        start, end = (min(max(edge - first, 0), sae.cfg.d_sae) for edge in block)
        residual = residual - ranks.join(acts[:, start:end] @ sae.W_dec[start:end])
        errors.append(ranks.part(residual.pow(2).sum(-1).mean()))
    total = errors[0]
    for error in errors[1:]:
        total = total + error
    return Errors(total, errors[-1], residual)


def reconstruction(
    sae: HookedSAE,
    acts: Float[Tensor, "batch d_sae"],
    x: Float[Tensor, "batch d_in"],
    *,
    ranks: Ranks = ALONE,
) -> Float[Tensor, "batch d_out"]:
    """`f @ W_dec + b_dec (+ x @ W_skip)`, summed over the shards that hold the latents.

    Args:
        sae: The dictionary, or this rank's shard of it.
        acts: Its latents.
        x: Encoder inputs.
        ranks: Whose rows and latents these are.
    """
    if ranks.n_latent == 1:
        return sae.reconstruct(acts, x)
    recons = ranks.join(acts @ sae.W_dec) + sae.b_dec
    return recons if sae.W_skip is None else recons + x @ sae.W_skip
