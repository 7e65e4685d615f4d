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


class Errors(NamedTuple):
    """Mean over rows of squared errors.

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
) -> Errors:
    """Give the squared errors of `y_hat` and of the reconstructions from the first m latents.

    Args:
        sae: The dictionary.
        acts: Its latents.
        batch: Encoder inputs and targets.
        prefixes: Widths m, ascending and below the dictionary's; none for plain training.
    """
    x, y = batch
    if not prefixes:
        residual = y - sae.reconstruct(acts, x)
        whole = residual.pow(2).sum(-1).mean()
        return Errors(whole, whole, residual)
    residual = y - sae.b_dec
    if sae.W_skip is not None:
        residual = residual - x @ sae.W_skip
    errors: list[Tensor] = []
    for start, end in pairwise((0, *prefixes, sae.cfg.d_sae)):
        residual = residual - acts[:, start:end] @ sae.W_dec[start:end]
        errors.append(residual.pow(2).sum(-1).mean())
    total = errors[0]
    for error in errors[1:]:
        total = total + error
    return Errors(total, errors[-1], residual)
