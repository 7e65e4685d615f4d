"""The JumpReLU loss and its straight-through estimator.

    loss = mean over rows of ||y - y_hat||^2 + sparsity * mean over rows of L0

The squared error is summed over dimensions. L0 counts `pre > threshold`, so its derivative is zero almost everywhere;
training replaces the derivative with respect to the threshold by an estimate from the rows that fall into a window of
width `bandwidth` around it, with the rectangle kernel K(u) = 1 for |u| < 1/2:

1. d JumpReLU / d threshold = -(threshold / bandwidth) * K((pre - threshold) / bandwidth)
2. d step / d threshold     = -(1 / bandwidth) * K((pre - threshold) / bandwidth)
3. d JumpReLU / d pre       = 1 where pre > threshold; the step passes no gradient to `pre`.

The step acts on the pre-activation, not on the latent: the latter would see only the upper half of the window.

Sources: JumpReLU SAEs (arXiv 2407.14435), Gemma Scope (arXiv 2408.05147), section 2.2 and Eq. 4.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from scope_lens.sae import HookedSAE


class LossParts(NamedTuple):
    """One evaluation of the loss.

    Attributes:
        loss: What is differentiated.
        squared_error: Mean over rows of ||y - y_hat||^2.
        l0: Mean number of active latents of a row.
        acts: Latents.
    """

    loss: Float[Tensor, ""]
    squared_error: Float[Tensor, ""]
    l0: Float[Tensor, ""]
    acts: Float[Tensor, "batch d_sae"]


class _JumpReLUWithL0(torch.autograd.Function):
    """`f = pre * (pre > threshold)` and each row's L0, with the pseudo-derivatives of the module docstring."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        active = pre > threshold
        ctx.save_for_backward(pre, threshold, active)
        ctx.bandwidth = bandwidth
        return pre * active, active.sum(-1, dtype=pre.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_acts, grad_l0 = grads
        pre, threshold, active = ctx.saved_tensors
        window = ((pre - threshold).abs() < ctx.bandwidth / 2).to(pre.dtype)
        grad_threshold = -((window * grad_acts).sum(0) * threshold + grad_l0 @ window) / ctx.bandwidth
        return grad_acts * active, grad_threshold, None


def jumprelu_with_l0(
    pre: Float[Tensor, "batch d_sae"], threshold: Float[Tensor, " d_sae"], bandwidth: float
) -> tuple[Float[Tensor, "batch d_sae"], Float[Tensor, " batch"]]:
    """`f = pre * (pre > threshold)` and the number of active latents of each row, differentiable in the threshold.

    Args:
        pre: Pre-activations.
        threshold: Thresholds.
        bandwidth: Width of the window that the straight-through estimator looks at, in the units of `pre`.
    """
    acts, l0 = _JumpReLUWithL0.apply(pre, threshold, bandwidth)
    return acts, l0


def jumprelu_loss(
    sae: HookedSAE,
    batch: tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch d_out"]],
    *,
    threshold: Float[Tensor, " d_sae"],
    sparsity: float,
    bandwidth: float,
) -> LossParts:
    """`mean ||y - y_hat||^2 + sparsity * mean L0`.

    Args:
        sae: The dictionary in its training form.
        batch: Encoder inputs and targets, normalised; the same tensor twice for an autoencoder.
        threshold: Thresholds; a tensor of its own, so that they may be trained directly or as a logarithm.
        sparsity: The coefficient of L0.
        bandwidth: Width of the estimator's window, in units of the normalised pre-activation.
    """
    x, y = batch
    bias = sae.b_enc
    if sae.cfg.pre_encoder_bias:
        # (x - b_dec) @ W_enc, with the product by b_dec taken once and not for every row of the backward pass.
        bias = bias - sae.b_dec @ sae.W_enc
    acts, l0 = jumprelu_with_l0(x @ sae.W_enc + bias, threshold, bandwidth)
    squared_error = (y - sae.reconstruct(acts, x)).pow(2).sum(-1).mean()
    mean_l0 = l0.mean()
    return LossParts(squared_error + sparsity * mean_l0, squared_error, mean_l0, acts)
