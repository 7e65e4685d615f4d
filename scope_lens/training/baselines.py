"""The losses of the baselines: TopK, BatchTopK, ReLU with an L1 penalty, and Gated dictionaries.

All errors are summed over dimensions and averaged over rows, as in `scope_lens.training.losses`.

- TopK, BatchTopK: `||y - y_hat||^2 + aux_coefficient * AuxK`; k sets the sparsity (arXiv 2406.04093, 2412.06410).
- ReLU: `||y - y_hat||^2 + sparsity * ||f||_1`, decoder rows of unit norm (arXiv 2309.08600).
- Gated: a gate decides which latents fire, a second affine map with tied directions says how strongly:

      gate = (x - b_dec) @ W_enc + b_gate         mag = exp(r_mag) * ((x - b_dec) @ W_enc) + b_mag
      f    = 1[gate > 0] * max(mag, 0)
      loss = ||y - y_hat(f)||^2 + sparsity * ||max(gate, 0)||_1 + ||y - y_hat_frozen(max(gate, 0))||^2

  The last term trains the gate, to which the step passes no gradient; its decoder and bias are constants
  (arXiv 2404.16014, section 3.2).
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from scope_lens.activations import batchtopk, relu, topk
from scope_lens.sae import HookedSAE
from scope_lens.training.losses import LossParts, training_pre
from scope_lens.training.prefixes import prefix_errors, reconstruction
from scope_lens.training.ranks import ALONE, Ranks

Batch = tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch d_out"]]


class AuxK(NamedTuple):
    """What the auxiliary loss of dead latents needs.

    Attributes:
        dead: Which latents are dead.
        k: Dead latents that reconstruct the residual of a row.
        coefficient: Of the auxiliary loss.
    """

    dead: Bool[Tensor, " d_sae"]
    k: int
    coefficient: float


def topk_loss(
    sae: HookedSAE,
    batch: Batch,
    *,
    prefixes: tuple[int, ...] = (),
    aux: AuxK | None = None,
    ranks: Ranks = ALONE,
) -> tuple[LossParts, Float[Tensor, ""]]:
    """`mean ||y - y_hat||^2 + coefficient * mean ||e - e_hat||^2`, and the smallest active latent of the batch.

    `e = y - y_hat` is taken as a constant, and `e_hat` is its reconstruction from the k largest pre-activations of dead
    latents, without bias. The auxiliary term is zero where no latent is dead.

    Args:
        sae: A TopK or BatchTopK dictionary in its training form, or this rank's shard of it.
        batch: Encoder inputs and targets, normalised.
        prefixes: Widths of the nested prefixes of Matryoshka training.
        aux: The auxiliary loss; None leaves it out.
        ranks: Whose rows and latents these are.

    Returns:
        The loss, and the smallest positive latent (infinite where none is), from which a BatchTopK dictionary learns
        the threshold of its inference form.

    Source: Scaling and evaluating sparse autoencoders (arXiv 2406.04093), Appendix A.2; BatchTopK (arXiv 2412.06410).
    """
    x, y = batch
    assert sae.cfg.k is not None
    pre = training_pre(sae, x, ranks=ranks)
    largest = topk_of_all if sae.cfg.activation == "topk" else batchtopk_of_all
    acts = largest(pre, sae.cfg.k, ranks=ranks)
    errors = prefix_errors(sae, acts, (x, y), prefixes, ranks=ranks)
    loss = errors.total
    if aux is not None:
        revived = topk_of_all(pre.masked_fill(~aux.dead, -torch.inf), aux.k, ranks=ranks)
        error = (errors.residual.detach() - ranks.join(revived @ sae.W_dec)).pow(2).sum(-1).mean()
        any_dead = ranks.sum_over_latents_(aux.dead.any().to(error.dtype)) > 0
        loss = loss + aux.coefficient * ranks.part(error) * any_dead
    active = acts > 0
    smallest = ranks.smallest(torch.where(active, acts.detach(), torch.inf).amin())
    return _parts(loss, errors.whole, active, ranks), smallest


def topk_of_all(pre: Float[Tensor, "batch d_sae"], k: int, *, ranks: Ranks = ALONE) -> Float[Tensor, "batch d_sae"]:
    """Keep the k largest of each row over all shards, then apply ReLU.

    Args:
        pre: Pre-activations of this rank's latents.
        k: Latents kept of the whole dictionary.
        ranks: Whose rows and latents these are.
    """
    if ranks.n_latent == 1:
        return topk(pre, k)
    values, indices = pre.topk(min(k, pre.shape[1]), dim=1)
    last = ranks.gather_latents(values.detach()).topk(k, dim=1).values[:, -1:]
    # Not `>=`, which would turn NaN into a silent zero.
    kept = torch.relu(values) * ~(values < last)
    return torch.zeros_like(pre).scatter(1, indices, kept)


def batchtopk_of_all(
    pre: Float[Tensor, "batch d_sae"], k: int, *, ranks: Ranks = ALONE
) -> Float[Tensor, "batch d_sae"]:
    """Keep the k * rows largest of the whole batch over all ranks, then apply ReLU.

    Args:
        pre: Pre-activations of this rank's rows and latents.
        k: Latents kept of a row, on average.
        ranks: Whose rows and latents these are.
    """
    if ranks.alone:
        return batchtopk(pre, k)
    flat, total = pre.reshape(-1), k * len(pre) * ranks.n_data
    values, indices = flat.topk(min(total, flat.numel()))
    last = ranks.gather_all(values.detach()).topk(total).values[-1]
    kept = torch.relu(values) * ~(values < last)
    return torch.zeros_like(flat).scatter(0, indices, kept).reshape(pre.shape)


def relu_loss(
    sae: HookedSAE, batch: Batch, *, sparsity: float, prefixes: tuple[int, ...] = (), ranks: Ranks = ALONE
) -> LossParts:
    """`mean ||y - y_hat||^2 + sparsity * mean ||f||_1`.

    Args:
        sae: A ReLU dictionary in its training form, or this rank's shard; its decoder rows have unit norm.
        batch: Encoder inputs and targets, normalised.
        sparsity: Coefficient of the L1 norm.
        prefixes: Widths of the nested prefixes of Matryoshka training.
        ranks: Whose rows and latents these are.

    Source: Sparse autoencoders find highly interpretable features (arXiv 2309.08600), section 2.
    """
    x, y = batch
    acts = relu(training_pre(sae, x, ranks=ranks))
    errors = prefix_errors(sae, acts, (x, y), prefixes, ranks=ranks)
    norm = ranks.part(ranks.join(acts.sum(-1)).mean())
    return _parts(errors.total + sparsity * norm, errors.whole, acts > 0, ranks)


def gated_loss(
    sae: HookedSAE,
    batch: Batch,
    *,
    r_mag: Float[Tensor, " d_sae"],
    b_mag: Float[Tensor, " d_sae"],
    sparsity: float,
    ranks: Ranks = ALONE,
) -> LossParts:
    """Give the loss of a Gated dictionary, with its L1 penalty on the gate and its auxiliary reconstruction.

    Args:
        sae: The dictionary in its training form, or this rank's shard; its `b_enc` is the gate's bias.
        batch: Encoder inputs and targets, normalised.
        r_mag: Logarithm of the ratio of the magnitudes' encoder to the gate's.
        b_mag: Bias of the magnitudes.
        sparsity: Coefficient of the L1 norm.
        ranks: Whose rows and latents these are.

    Source: Improving dictionary learning with gated sparse autoencoders (arXiv 2404.16014), section 3.2.
    """
    x, y = batch
    gate = training_pre(sae, x, ranks=ranks)
    magnitude = r_mag.exp() * (gate - sae.b_enc) + b_mag
    acts = relu(magnitude) * (gate > 0)
    squared_error = ranks.part((y - reconstruction(sae, acts, x, ranks=ranks)).pow(2).sum(-1).mean())
    opened = relu(gate)
    if ranks.n_latent == 1:
        frozen = torch.nn.functional.linear(opened, sae.W_dec.detach().T, sae.b_dec.detach())
    else:
        frozen = ranks.join(opened @ sae.W_dec.detach()) + sae.b_dec.detach()
    if sae.W_skip is not None:
        frozen = frozen + x @ sae.W_skip.detach()
    auxiliary = ranks.part((y - frozen).pow(2).sum(-1).mean())
    norm = ranks.part(ranks.join(opened.sum(-1)).mean())
    return _parts(squared_error + sparsity * norm + auxiliary, squared_error, acts > 0, ranks)


def _parts(loss: Tensor, squared_error: Tensor, active: Tensor, ranks: Ranks) -> LossParts:
    l0 = ranks.part(ranks.sum_over_latents_(active.sum(dtype=loss.dtype)) / len(active))
    return LossParts(loss=loss, squared_error=squared_error, l0=l0, fired=active.any(0))
