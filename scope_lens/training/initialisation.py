"""How a dictionary starts, and the two operations that keep its decoder rows on the unit sphere.

Before Adam the part of each row's gradient that is parallel to the row is taken out, since it could only change the
norm; after Adam the row is rescaled to norm 1.

Source: Gemma Scope (arXiv 2408.05147), section 3.2 and Appendix B.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scope_lens.sae import HookedSAE


@torch.no_grad()
def initialise(sae: HookedSAE, *, seed: int) -> None:
    """Set a dictionary's weights and biases to their initial values, in place.

    `W_dec` is He-uniform with its rows rescaled to unit norm; an autoencoder's `W_enc` is its transpose; biases and a
    skip term are zero. A transcoder's `W_enc` is an independent draw of unit columns, because the text says only that
    it is not tied.

    Args:
        sae: The dictionary in its training form, on the CPU.
        seed: Of the draw.

    Source: Gemma Scope, section 3.2 and Appendix B.
    """
    generator = torch.Generator().manual_seed(seed)
    _unit_rows(sae.W_dec, generator)
    if sae.cfg.is_autoencoder:
        sae.W_enc.copy_(sae.W_dec.T)
    else:
        rows = torch.empty_like(sae.W_enc.T)
        _unit_rows(rows, generator)
        sae.W_enc.copy_(rows.T)
    sae.b_enc.zero_()
    sae.b_dec.zero_()
    if sae.W_skip is not None:
        sae.W_skip.zero_()


@torch.no_grad()
def project_out_rows(weight: Float[Tensor, "d_sae d_out"]) -> None:
    """`g - (g . w) w` for each row w of unit norm and its gradient g, in place in `weight.grad`.

    Raises:
        ValueError: `weight` has no gradient.
    """
    if weight.grad is None:
        raise ValueError("project_out_rows works on weight.grad, which is None; call backward first.")
    along = (weight.grad * weight).sum(1, keepdim=True)
    weight.grad.addcmul_(along, weight, value=-1)


@torch.no_grad()
def normalise_rows(weight: Float[Tensor, "d_sae d_out"]) -> None:
    """Rescale each row to unit norm, in place."""
    weight.div_(weight.norm(dim=1, keepdim=True))


def _unit_rows(weight: Tensor, generator: torch.Generator) -> None:
    nn.init.kaiming_uniform_(weight, generator=generator)
    normalise_rows(weight)
