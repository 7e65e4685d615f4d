"""The JumpReLU loss and all its gradients in one pass written by hand, for the CPU.

The same numbers as `scope_lens.training.losses.jumprelu_loss` followed by `backward`, without a graph. Eager code
spends half of its time outside the matrix products, on fresh tensors with an entry for every row and latent. Here a
batch is taken in chunks of rows whose pre-activations stay in the cache:

1. `pre = (x - b_dec) @ W_enc + b_enc` of the chunk, and its entries that matter: active ones, and those inside the
   window of the straight-through estimator. All others add nothing to the loss or to any gradient.
2. Few of them (a trained dictionary): reconstruction and gradients are weighted sums of rows over these entries alone.
   Many (the first steps): dense products, with element-wise passes over buffers that are kept.
3. At the end the entries are brought into the order of the latents, and each latent's gradients are summed.

With n rows and K = 1 inside the window |pre - theta| < bandwidth / 2, 0 outside:

    d y_hat = 2 (y_hat - y) / n             d f   = d y_hat @ W_dec^T
    d W_dec = f^T @ d y_hat                 d pre = d f * (pre > theta)
    d W_enc = (x - b_dec)^T @ d pre         d b_enc = sum over rows of d pre
    d b_dec = sum over rows of d y_hat, and with a pre-encoder bias - W_enc @ d b_enc
    d theta = - sum over rows of K (theta d f + d sparsity / d L0 of the row + d sparsity / d frequency / n) / bandwidth

The choice in 2 looks at the chunk alone, so the numbers depend on the batch and on nothing before it. What all this
saves is measured in docs/benchmarks/train_step.md.

Sources: JumpReLU SAEs (arXiv 2407.14435), Gemma Scope (arXiv 2408.05147), section 2.2 and Eq. 4.
"""

import warnings
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import embedding_bag

from scope_lens.sae import HookedSAE
from scope_lens.training.losses import LossParts
from scope_lens.training.ranks import ALONE, Ranks
from scope_lens.training.sparsity import SparsityTerm

_CHUNK_ENTRIES = 2**21  # pre-activations of a chunk: 8 MB in float32
_CHUNK_ROWS = 512  # at least, so that adding to the weights' gradients costs little beside the products
_SPARSE_DENSITY = 0.125  # share of entries that matter, up to which sums over them beat dense products
_LATENT_BLOCK = 512  # latents whose gradients are summed at a time: they stay in the cache until they are stored

# Element-wise kernels of the library's own backward passes: one vectorised pass where a mask would take three.
_where_positive = torch.ops.aten.threshold_backward.grad_input  # a where gap > 0, else 0
_where_between = torch.ops.aten.hardtanh_backward.grad_input  # a where low < gap < high, else 0


class StepWorkspace:
    """Buffers of `jumprelu_step`, kept from one update to the next; they carry no numbers over.

    Args:
        sae: The dictionary, or one of the same width and dtype.
        chunk_rows: Rows that are worked on at a time; None takes as many as the cache holds.
    """

    def __init__(self, sae: HookedSAE, *, chunk_rows: int | None = None) -> None:
        self.chunk_rows = chunk_rows or max(_CHUNK_ROWS, _CHUNK_ENTRIES // sae.cfg.d_sae)
        shape = (self.chunk_rows, sae.cfg.d_sae)
        self.pre, self.gap, self.spare = (torch.empty(shape, dtype=sae.dtype) for _ in range(3))
        self.matters = torch.empty(shape, dtype=torch.bool)
        # Torch says once in a process that CSR tensors are in beta, which a user of the trainer can do nothing about.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            torch.sparse_csr_tensor([0, 1], [0], [0.0], (1, 1), check_invariants=False)


@torch.no_grad()
def jumprelu_step(
    sae: HookedSAE,
    batch: tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch d_out"]],
    *,
    threshold: Float[Tensor, " d_sae"],
    threshold_grad: Float[Tensor, " d_sae"],
    sparsity: SparsityTerm,
    bandwidth: float,
    workspace: StepWorkspace,
    ranks: Ranks = ALONE,
) -> LossParts:
    """`mean ||y - y_hat||^2 + sparsity`, and its gradients in the place of what the weights' `.grad` held.

    Args:
        sae: The dictionary in its training form, or this rank's shard of it, on the CPU.
        batch: Encoder inputs and targets, normalised; the same tensor twice for an autoencoder.
        threshold: Thresholds, none negative.
        threshold_grad: Where the gradient with respect to `threshold` is written.
        sparsity: The sparsity term with its coefficients.
        bandwidth: Width of the estimator's window, in units of the normalised pre-activation.
        workspace: Buffers made for this dictionary.
        ranks: Whose rows and latents these are; the gradients are those of this rank's rows.
    """
    step = _Step(sae, batch, threshold=threshold, sparsity=sparsity, bandwidth=bandwidth, ranks=ranks)
    for start in range(0, step.count, workspace.chunk_rows):
        step.add_chunk(slice(start, start + workspace.chunk_rows), workspace)
    step.add_entries()
    return step.finish(threshold_grad)


class _Entries(NamedTuple):
    """The entries of some rows that matter, row by row: 1-d tensors, one number for each entry."""

    row: Tensor
    latent: Tensor
    act: Tensor
    d_act: Tensor
    active: Tensor
    inside: Tensor


class _Totals:
    """Sums over rows for each latent."""

    def __init__(self, like: Tensor) -> None:
        self.fired = torch.zeros_like(like)  # rows in which the latent is active
        self.inside = torch.zeros_like(like)  # rows in which it is inside the window
        self.slope = torch.zeros_like(like)  # sum of d sparsity / d L0 of the row, inside the window
        self.d_act = torch.zeros_like(like)  # sum of d f, inside the window


class _Step:
    """One batch: what its chunks share, and what they add to."""

    def __init__(
        self,
        sae: HookedSAE,
        batch: tuple[Tensor, Tensor],
        *,
        threshold: Tensor,
        sparsity: SparsityTerm,
        bandwidth: float,
        ranks: Ranks,
    ) -> None:
        self.sae, self.threshold, self.sparsity, self.bandwidth = sae, threshold, sparsity, bandwidth
        self.ranks = ranks
        self.x, self.y = batch
        self.count = len(self.x)
        self.total = self.count * ranks.n_data  # n: rows of the whole batch
        # Reconstructions are summed over the shards, and so the first one alone adds what all of them have.
        self.adds_bias = ranks.latent_rank == 0
        self.bias = sae.b_dec if self.adds_bias else torch.zeros_like(sae.b_dec)
        self.seen = self.x - sae.b_dec if sae.cfg.pre_encoder_bias else self.x
        # At or below this a latent is silent and outside the window, however the difference is rounded.
        self.low = threshold - bandwidth / 2 - (threshold + bandwidth) * 1e-6
        self.grads = {name: _grad_buffer(p) for name, p in sae.named_parameters() if name != "threshold"}
        self.grads["b_enc"].zero_()
        self.weights_begun = False  # what stands in the weights' gradients is this batch's
        self.d_recons = torch.empty_like(self.y)
        self.l0 = self.y.new_empty(self.count)
        self.totals = _Totals(threshold)
        self.entries: list[_Entries] = []

    # ---- one chunk of rows ----

    def add_chunk(self, rows: slice, workspace: StepWorkspace) -> None:
        """Work through some rows, by whichever way is faster for them."""
        seen = self.seen[rows]
        pre, gap, spare, matters = (
            buffer[: len(seen)] for buffer in (workspace.pre, workspace.gap, workspace.spare, workspace.matters)
        )
        torch.addmm(self.sae.b_enc, seen, self.sae.W_enc, out=pre)
        # NumPy compares and finds several times faster than torch. The negation lets NaN through, into the loss.
        mask = matters.numpy()
        np.less_equal(pre.numpy(), self.low.numpy(), out=mask)
        np.logical_not(mask, out=mask)
        if np.count_nonzero(mask) <= _SPARSE_DENSITY * mask.size:
            self._add_sparse(rows, pre, torch.from_numpy(np.flatnonzero(mask)))
        else:
            self._add_dense(rows, pre, gap, spare)

    def _add_sparse(self, rows: slice, pre: Tensor, where: Tensor) -> None:
        """`where` holds the flat indices of the entries that matter, in order."""
        count, d_sae = pre.shape
        row = where // d_sae
        latent = where - row * d_sae
        values = pre.view(-1).index_select(0, where)
        gap = values - self.threshold.index_select(0, latent)
        active = (gap > 0).to(values.dtype)
        inside = (gap.abs() < self.bandwidth / 2).to(values.dtype)
        self.l0[rows] = _sums(row, active, count)
        offsets = torch.searchsorted(row, torch.arange(count + 1))
        act = values * active
        recons = embedding_bag(latent, self.sae.W_dec, offsets[:-1], mode="sum", per_sample_weights=act)
        d_recons = self._d_recons(rows, recons.add_(self.bias))
        # d f = d y_hat @ W_dec^T at the entries alone.
        where_only = torch.sparse_csr_tensor(offsets, latent, act, (count, d_sae), check_invariants=False)
        d_act = torch.sparse.sampled_addmm(where_only, d_recons, self.sae.W_dec.T, beta=0.0).values()
        self.entries.append(_Entries(row + rows.start, latent, act, d_act, active, inside))

    def _add_dense(self, rows: slice, pre: Tensor, gap: Tensor, spare: Tensor) -> None:
        """Overwrite the three buffers: `pre` becomes f, d f and d pre; `spare` the active mask and the window."""
        totals, half = self.totals, self.bandwidth / 2
        ones = pre.new_ones(len(pre))
        torch.sub(pre, self.threshold, out=gap)
        active = torch.gt(gap, 0, out=spare)
        torch.mv(active, pre.new_ones(pre.shape[1]), out=self.l0[rows])
        totals.fired.addmv_(active.T, ones)
        acts = _where_positive(pre, gap, 0.0, grad_input=pre)
        d_recons = self._d_recons(rows, torch.addmm(self.bias, acts, self.sae.W_dec))
        beta = int(self.weights_begun)
        self.grads["W_dec"].addmm_(acts.T, d_recons, beta=beta)
        inside = _where_between(pre.new_ones(1, 1), gap, -half, half, grad_input=spare)
        totals.inside.addmv_(inside.T, ones)
        totals.slope.addmv_(inside.T, self._slopes(self.l0[rows]))
        d_acts = torch.mm(d_recons, self.sae.W_dec.T, out=pre)
        totals.d_act.addmv_(inside.mul_(d_acts).T, ones)
        d_pre = _where_positive(d_acts, gap, 0.0, grad_input=d_acts)
        self.grads["b_enc"].addmv_(d_pre.T, ones)
        self.grads["W_enc"].addmm_(self.seen[rows].T, d_pre, beta=beta)
        self.weights_begun = True

    def _d_recons(self, rows: slice, recons: Tensor) -> Tensor:
        """`2 (y_hat - y) / n`, from this shard's reconstruction without a skip term, which is overwritten.

        The rows' L0 is summed over the shards too.
        """
        if self.sae.W_skip is not None and self.adds_bias:
            recons.addmm_(self.x[rows], self.sae.W_skip)
        self.ranks.sum_over_latents_(recons)
        self.ranks.sum_over_latents_(self.l0[rows])
        recons.sub_(self.y[rows])
        return torch.mul(recons, 2 / self.total, out=self.d_recons[rows])

    def _slopes(self, l0: Tensor) -> Tensor:
        """`d sparsity / d L0` of each row."""
        term = self.sparsity
        if term.target_l0 is None:
            return torch.full_like(l0, term.coefficient / self.total)
        return (l0 - term.target_l0) * (2 * term.coefficient * term.quadratic_factor / self.total)

    # ---- the batch ----

    def add_entries(self) -> None:
        """Add what the entries of the sparse chunks add to each latent's gradients and totals."""
        if not self.entries:
            return
        row, latent, act, d_act, active, inside = (torch.cat(parts) for parts in zip(*self.entries, strict=True))
        d_sae, totals = len(self.threshold), self.totals
        d_pre = d_act * active
        totals.fired += _sums(latent, active, d_sae)
        totals.inside += _sums(latent, inside, d_sae)
        totals.slope += _sums(latent, inside * self._slopes(self.l0).index_select(0, row), d_sae)
        totals.d_act += _sums(latent, inside * d_act, d_sae)
        self.grads["b_enc"] += _sums(latent, d_pre, d_sae)
        # In the order of the latents, each one's rows ascending, so that its gradients are sums over one stretch.
        latent, order = torch.sort(latent, stable=True)
        row, act, d_pre = (values.index_select(0, order) for values in (row, act, d_pre))
        ends = torch.searchsorted(latent, torch.arange(d_sae + 1))
        sums = (
            (self.grads["W_dec"], self.d_recons, act),
            (self.grads["W_enc"].T, self.seen, d_pre),
        )
        for first in range(0, d_sae, _LATENT_BLOCK):
            block = slice(first, min(first + _LATENT_BLOCK, d_sae))
            begin, end = int(ends[block.start]), int(ends[block.stop])
            bags = ends[block] - begin
            for grad, source, weights in sums:
                added = embedding_bag(row[begin:end], source, bags, mode="sum", per_sample_weights=weights[begin:end])
                (grad[block].add_ if self.weights_begun else grad[block].copy_)(added)

    def finish(self, threshold_grad: Tensor) -> LossParts:
        """Write the gradients that need the whole batch, and give the loss."""
        totals, ranks, fired = self.totals, self.ranks, self.totals.fired > 0
        if self.sparsity.frequency:
            ranks.sum_over_rows_(totals.fired)
        frequency = totals.fired / self.total
        # frequency_penalty / limit * sum_i p_i^2, with p_i = fired / n
        price = 2 * self.sparsity.frequency / self.sparsity.limit * frequency / self.total
        slope = self.threshold * totals.d_act + totals.slope + price * totals.inside
        torch.mul(slope, -1 / self.bandwidth, out=threshold_grad)
        torch.sum(self.d_recons, 0, out=self.grads["b_dec"])
        if self.sae.cfg.pre_encoder_bias:
            if not self.adds_bias:
                self.grads["b_dec"].zero_()
            self.grads["b_dec"].addmv_(self.sae.W_enc, self.grads["b_enc"], alpha=-1)
            ranks.sum_over_latents_(self.grads["b_dec"])
        if self.sae.W_skip is not None:
            torch.mm(self.x.T, self.d_recons, out=self.grads["W_skip"])
        squared_error = self.d_recons.square().sum() * (self.total / 4)
        loss = squared_error + self.sparsity.value(self.l0, frequency, ranks=ranks)
        return LossParts(loss, squared_error, ranks.part(self.l0.mean()), fired)


def _grad_buffer(parameter: Tensor) -> Tensor:
    """A parameter's gradient, in the memory it had before, holding anything."""
    if parameter.grad is None:
        parameter.grad = torch.empty_like(parameter)
    return parameter.grad


def _sums(index: Tensor, values: Tensor, size: int) -> Tensor:
    """`out[i] = sum of the values whose index is i`, in the order of the entries, so the same on any day."""
    return torch.bincount(index, weights=values, minlength=size).to(values.dtype)
