"""A whole JumpReLU update in bare eager torch: the baseline of the training benchmarks, without any package.

What a good engineer writes in an hour: one autograd function for the activation and its pseudo-derivatives, masks kept
as floats (faster than booleans), the pre-encoder bias taken out of the matrix product, Adam fused. `in_place=True` also
overwrites saved tensors inside the backward pass, which is a fifth faster and spoils a second backward.
"""

import torch
from torch import Tensor


class EagerJumpReLU(torch.autograd.Function):
    """`f = pre * (pre > threshold)`, each row's L0, and which latents fired."""

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth, in_place):
        active = (pre > threshold).to(pre.dtype)
        ctx.save_for_backward(pre, threshold, active)
        ctx.bandwidth, ctx.in_place = bandwidth, in_place
        fired = active.amax(0) > 0
        ctx.mark_non_differentiable(fired)
        return pre * active, active.sum(-1), fired

    @staticmethod
    def backward(ctx, grad_acts, grad_l0, _):
        pre, threshold, active = ctx.saved_tensors
        gap = pre.sub_(threshold).abs_() if ctx.in_place else (pre - threshold).abs()
        window = (gap < ctx.bandwidth / 2).to(pre.dtype)
        grad_threshold = -((window * grad_acts).sum(0) * threshold + grad_l0 @ window) / ctx.bandwidth
        return grad_acts.mul_(active) if ctx.in_place else grad_acts * active, grad_threshold, None, None


class EagerLearner:
    """A dictionary with unit decoder rows, its Adam and its counters; an autoencoder has a pre-encoder bias."""

    def __init__(self, d_in, d_sae, *, d_out=None, threshold, scale, lr, sparsity, bandwidth, in_place=False):
        self.autoencoder, self.scale = d_out is None, scale
        self.sparsity, self.bandwidth, self.in_place = sparsity, bandwidth, in_place
        generator = torch.Generator().manual_seed(0)
        self.W_dec = torch.randn(d_sae, d_out or d_in, generator=generator)
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)
        self.W_enc = self.W_dec.T.clone() if self.autoencoder else torch.randn(d_in, d_sae, generator=generator)
        self.W_enc /= self.W_enc.norm(dim=0, keepdim=True)
        self.b_enc, self.b_dec = torch.zeros(d_sae), torch.zeros(d_out or d_in)
        self.threshold = torch.full((d_sae,), threshold)
        self.parameters = [self.W_enc, self.b_enc, self.W_dec, self.b_dec, self.threshold]
        for parameter in self.parameters:
            parameter.requires_grad_()
        self.adam = torch.optim.Adam(self.parameters, lr=lr, betas=(0.0, 0.999), eps=1e-8, fused=True)
        self.last_fired = torch.zeros(d_sae, dtype=torch.int64)
        self.rows = 0

    @torch.enable_grad()
    def update(self, x: Tensor, y: Tensor) -> Tensor:
        """One update on raw rows: normalise, loss, gradients, projection, Adam, unit rows, counters."""
        same = y is x
        x = x / self.scale
        y = x if same else y / self.scale
        self.adam.zero_grad()
        bias = self.b_enc - self.b_dec @ self.W_enc if self.autoencoder else self.b_enc
        acts, l0, fired = EagerJumpReLU.apply(x @ self.W_enc + bias, self.threshold, self.bandwidth, self.in_place)
        squared_error = (y - (acts @ self.W_dec + self.b_dec)).pow(2).sum(-1).mean()
        loss = squared_error + self.sparsity * l0.mean()
        loss.backward()
        with torch.no_grad():
            grad = self.W_dec.grad
            grad.addcmul_((grad * self.W_dec).sum(1, keepdim=True), self.W_dec, value=-1)
            self.adam.step()
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)
            self.rows += len(x)
            self.last_fired.masked_fill_(fired, self.rows)
        return loss.detach()
