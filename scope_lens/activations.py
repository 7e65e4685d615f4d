"""The activation functions of sparse dictionaries, as plain functions on pre-activations.

Each takes `pre` of shape (..., d_sae) and returns the latents of the same shape, zero where a latent is silent.

- ReLU: `f = max(pre, 0)`.
- JumpReLU (arXiv 2407.14435, Gemma Scope Eq. 3): `f = pre * (pre > threshold)`. The comparison is strict.
- TopK (arXiv 2406.04093): the k largest of each row, then ReLU.
- BatchTopK (arXiv 2412.06410): the k * rows largest of the whole batch, then ReLU.

NaN propagates through every one of them: a silent zero would hide a broken model.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def relu(pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
    """`f = max(pre, 0)`."""
    # clamp, unlike relu, needs its input for the gradient and not its output, so a hook may edit the latents in place.
    return pre.clamp(min=0)


def jumprelu(pre: Float[Tensor, "*batch d_sae"], threshold: Float[Tensor, " d_sae"]) -> Float[Tensor, "*batch d_sae"]:
    """`f = pre * (pre > threshold)`: strict, so a pre-activation equal to its threshold is silent.

    The gradient passes through `pre` where the latent fires; the threshold gets none (training uses the
    straight-through estimator of `scope_lens.training.losses`).
    """
    return pre * (pre > threshold)


def topk(pre: Float[Tensor, "*batch d_sae"], k: int) -> Float[Tensor, "*batch d_sae"]:
    """Keep the k largest of each row, then apply ReLU. Ties go as `torch.topk` breaks them."""
    values, indices = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, indices, torch.relu(values))


def batchtopk(pre: Float[Tensor, "*batch d_sae"], k: int) -> Float[Tensor, "*batch d_sae"]:
    """Keep the k * rows largest of the whole batch, then apply ReLU.

    A row's latents depend on the other rows of the batch; a trained dictionary is therefore exported as JumpReLU.
    """
    flat = pre.reshape(-1)
    rows = flat.numel() // pre.shape[-1]
    values, indices = flat.topk(k * rows)
    return torch.zeros_like(flat).scatter(0, indices, torch.relu(values)).reshape(pre.shape)
