"""The JumpReLU loss and its straight-through estimator.

    loss = mean over rows of ||y - y_hat||^2 + the sparsity term (`scope_lens.training.sparsity`)

The squared error is summed over dimensions. Whether a latent fires, `pre > threshold`, has a derivative of zero almost
everywhere; training replaces the derivative with respect to the threshold by an estimate from the rows that fall into a
window of width `bandwidth` around it, with the rectangle kernel K(u) = 1 for |u| < 1/2:

1. d JumpReLU / d threshold = -(threshold / bandwidth) * K((pre - threshold) / bandwidth)
2. d step / d threshold     = -(1 / bandwidth) * K((pre - threshold) / bandwidth)
3. d JumpReLU / d pre       = 1 where pre > threshold; the step passes no gradient to `pre`.

The step acts on the pre-activation, not on the latent: the latter would see only the upper half of the window.

Sources: JumpReLU SAEs (arXiv 2407.14435), Gemma Scope (arXiv 2408.05147), section 2.2 and Eq. 4.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from scope_lens.sae import HookedSAE
from scope_lens.training.prefixes import prefix_errors
from scope_lens.training.ranks import ALONE, Ranks
from scope_lens.training.sparsity import SparsityTerm


class LossParts(NamedTuple):
    """One evaluation of the loss; what an update gives is detached.

    On several ranks the three numbers are this rank's shares: over the ranks with other rows they sum to those of the
    whole batch. `fired` is about this rank's latents.

    Attributes:
        loss: What is differentiated.
        squared_error: Mean over rows of ||y - y_hat||^2, of the whole dictionary.
        l0: Mean number of active latents of a row.
        fired: Which latents fired in this batch.
    """

    loss: Float[Tensor, ""]
    squared_error: Float[Tensor, ""]
    l0: Float[Tensor, ""]
    fired: Bool[Tensor, " d_sae"]

    def detached(self) -> "LossParts":
        """Give the same numbers without their graph."""
        return LossParts(self.loss.detach(), self.squared_error.detach(), self.l0.detach(), self.fired)


class Firing(NamedTuple):
    """Latents and how often they fire, differentiable in the threshold.

    Attributes:
        acts: Latents.
        l0: Number of active latents of each row.
        frequency: Fraction of the rows in which each latent is active.
    """

    acts: Float[Tensor, "batch d_sae"]
    l0: Float[Tensor, " batch"]
    frequency: Float[Tensor, " d_sae"]


class _JumpReLU(torch.autograd.Function):
    """`f = pre * (pre > threshold)`, each row's L0 and each latent's frequency, with the module's derivatives."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor, Tensor]:
        active = pre > threshold
        ctx.save_for_backward(pre, threshold, active)
        ctx.bandwidth = bandwidth
        ctx.set_materialize_grads(False)  # the frequency is mostly not asked for
        return pre * active, active.sum(-1, dtype=pre.dtype), active.sum(0, dtype=pre.dtype) / len(pre)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor, None]:
        grad_acts, grad_l0, grad_frequency = grads
        pre, threshold, active = ctx.saved_tensors
        window = ((pre - threshold).abs() < ctx.bandwidth / 2).to(pre.dtype)
        total = torch.zeros_like(threshold)
        if grad_acts is not None:
            total = total + (window * grad_acts).sum(0) * threshold
        if grad_l0 is not None:
            total = total + grad_l0 @ window
        if grad_frequency is not None:
            total = total + grad_frequency * window.sum(0) / len(pre)
        return None if grad_acts is None else grad_acts * active, -total / ctx.bandwidth, None


def jumprelu_firing(pre: Float[Tensor, "batch d_sae"], threshold: Float[Tensor, " d_sae"], bandwidth: float) -> Firing:
    """`f = pre * (pre > threshold)` and how often that fires, differentiable in the threshold.

    Args:
        pre: Pre-activations.
        threshold: Thresholds.
        bandwidth: Width of the window that the straight-through estimator looks at, in the units of `pre`.
    """
    return Firing(*_JumpReLU.apply(pre, threshold, bandwidth))


def training_pre(
    sae: HookedSAE, x: Float[Tensor, "batch d_in"], *, ranks: Ranks = ALONE
) -> Float[Tensor, "batch d_sae"]:
    """`pre = (x - b_dec) @ W_enc + b_enc`; without the pre-encoder bias `x @ W_enc + b_enc`.

    The product of `b_dec` and `W_enc` is taken once and not for every row of the backward pass.

    Args:
        sae: The dictionary in its training form, or this rank's shard of it.
        x: Encoder inputs, normalised.
        ranks: Whose rows and latents these are.
    """
    bias = sae.b_enc
    if sae.cfg.pre_encoder_bias:
        bias = bias - ranks.share(sae.b_dec) @ sae.W_enc
    return torch.nn.functional.linear(x, sae.W_enc.T, bias)


def jumprelu_loss(
    sae: HookedSAE,
    batch: tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch d_out"]],
    *,
    threshold: Float[Tensor, " d_sae"],
    sparsity: SparsityTerm,
    bandwidth: float,
    prefixes: tuple[int, ...] = (),
    ranks: Ranks = ALONE,
) -> LossParts:
    """`mean ||y - y_hat||^2 + sparsity`, and the errors of nested prefixes where there are any.

    Args:
        sae: The dictionary in its training form, or this rank's shard of it.
        batch: Encoder inputs and targets, normalised; the same tensor twice for an autoencoder.
        threshold: Thresholds; a tensor of its own, so that they may be trained directly or as a logarithm.
        sparsity: The sparsity term with its coefficients.
        bandwidth: Width of the estimator's window, in units of the normalised pre-activation.
        prefixes: Widths of the nested prefixes of Matryoshka training.
        ranks: Whose rows and latents these are.
    """
    x, y = batch
    firing = jumprelu_firing(training_pre(sae, x, ranks=ranks), threshold, bandwidth)
    errors = prefix_errors(sae, firing.acts, (x, y), prefixes, ranks=ranks)
    l0, frequency = ranks.join(firing.l0), firing.frequency
    if sparsity.frequency:
        frequency = ranks.join_rows(frequency)
    return LossParts(
        loss=errors.total + sparsity.value(l0, frequency, ranks=ranks),
        squared_error=errors.whole,
        l0=ranks.part(l0.mean()),
        fired=firing.frequency > 0,
    )
