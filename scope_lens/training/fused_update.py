"""One update on the kernels: loss, gradients, projection, Adam and unit rows, of a batch or of a rank's share of it.

A sparse update looks at the entries that matter alone, active ones and those in the estimator's window:

1. `encode`: one product, with the decision and the compaction in its epilogue.
2. `residual`: reconstruction, error, and each entry's gradient, from gathered rows of `W_dec`.
3. `columns_of`, `latent_sums`: the entries by latents, and the sums that the biases' and thresholds' gradients need.
4. `update_rows`: each latent's two rows, from gradient to shadow in one pass. Others are not touched.

A dense one goes through the latents in blocks, which bound the memory: 1 and 2 by `encode_dense` and products, then
`dense_gradients`, the products that give the weights' gradients, and `update_rows`.

A TopK dictionary's entries are the k largest of each row; it has no window and no threshold. The sparse way takes them
from candidates above a floor, the dense way goes through all latents in blocks.

The formulas are those of `scope_lens.training.jumprelu_step`. Nothing here waits for the device.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scope_lens.sae import HookedSAE
from scope_lens.training.config import TrainConfig
from scope_lens.training.fused_state import FusedState
from scope_lens.training.in_flight import InFlight
from scope_lens.training.kernels.dense import DenseActs
from scope_lens.training.kernels.entries import Entries, columns_of
from scope_lens.training.kernels.kernel_set import Kernels
from scope_lens.training.kernels.sums import LatentSums
from scope_lens.training.kernels.topk_blocks import topk_by_blocks
from scope_lens.training.kernels.update import FromEntries
from scope_lens.training.objectives import JumpReLUObjective, Objective
from scope_lens.training.ranks import Ranks

BLOCK_BYTES = 2**28  # of one block's latents, for all rows
KEPT_BYTES = 2**30  # of all latents' activations; beyond, the backward pass computes them again
_FLOOR = 0.8  # times the smallest latent kept: from there on the next batch's candidates are taken


class Trained(NamedTuple):
    """What an update is about.

    Attributes:
        sae: The dictionary in its training form, or a rank's latents of it.
        cfg: Settings.
        objective: Thresholds and constraints.
        state: Weights and Adam's memory.
        last_fired: Rows seen when each latent last fired.
        floor: Of a TopK dictionary's candidates.
        kernels: The set to call.
        ranks: Which rows and latents this process has.
    """

    sae: HookedSAE
    cfg: TrainConfig
    objective: Objective
    state: FusedState
    last_fired: Int[Tensor, " d_sae"]
    floor: Float[Tensor, "1"]
    kernels: Kernels
    ranks: Ranks


@torch.no_grad()
def launch(trained: Trained, flight: InFlight, *, capacity: int | None) -> Int[Tensor, "2"]:
    """Launch an update, and count the entries that matter: in the fullest row, and over all rows of this rank.

    Of TopK the first is about the candidates and the second about the active latents. On several ranks each count is
    the largest that any of them has.

    Args:
        trained: What is updated.
        flight: The batch, and where the loss goes.
        capacity: Room for entries in a row, for TopK for candidates; None works densely.
    """
    update = _Update(trained, flight)
    if capacity is None and trained.cfg.activation == "jumprelu":
        return update.dense()
    return update.sparse(capacity)


class _Update:
    """A batch and what is computed from it."""

    def __init__(self, trained: Trained, flight: InFlight) -> None:
        self.trained, self.flight = trained, flight
        self.cfg, self.state, self.kernels, self.ranks = trained.cfg, trained.state, trained.kernels, trained.ranks
        self.sae = trained.sae
        self.x, self.y = flight.batch
        self.rows = len(self.x) * self.ranks.n_data  # of the whole batch
        # What the encoder sees; a dictionary with a skip term has no pre-encoder bias, so its skip term sees it too.
        seen = self.x - self.sae.b_dec if self.sae.cfg.pre_encoder_bias else self.x
        self.seen = seen.to(self.state.operands)
        self.threshold = trained.objective.threshold() if isinstance(trained.objective, JumpReLUObjective) else None
        self.half = self.cfg.bandwidth / 2
        self.term = self.cfg.sparsity_term_at(flight.step)

    # ---- sparse ----

    def sparse(self, capacity: int | None) -> Int[Tensor, "2"]:
        entries, needed, missed = self._entries(capacity)
        self.state.halted |= self.ranks.largest_(missed.int())
        l0 = self.ranks.sum_over_latents_(entries.l0.float())
        d_recons, d_act, squared_error = self._residual(entries)
        columns = columns_of(entries, self.sae.cfg.d_sae)
        sums = self.kernels.latent_sums(entries, d_act, columns, self.threshold, self._slope(l0), half_window=self.half)
        encoder_part = self._encoder_part(self.state.operand("W_enc"), sums.d_pre)
        d_pre = d_act * (entries.act != 0)
        for name, coefficient, rows in (("W_dec", entries.act, d_recons), ("W_enc", d_pre, self.seen)):
            source = FromEntries(columns, coefficient, rows)
            if self.ranks.n_data > 1:
                gradient = self.kernels.weight_gradients(source, self.sae.cfg.d_sae)
                source = self.ranks.sum_over_rows_(gradient)
            self._update_rows(name, source)
        self._finish(sums, d_recons, encoder_part, l0, squared_error)
        # A TopK row's candidates need room, but only k of them are worked on.
        worked_on = needed.sum() if self.cfg.k is None else entries.l0.sum()
        return self.ranks.largest_(torch.stack([needed.max(), worked_on]).long())

    def _entries(self, capacity: int | None) -> tuple[Entries, Tensor, Tensor]:
        """The entries that matter; each row's number of those that need room; whether some were left out."""
        W_enc, k = self.state.operand("W_enc"), self.cfg.k
        if self.threshold is not None:
            assert capacity is not None
            entries = self.kernels.encode(
                self.seen, W_enc, self.sae.b_enc, self.threshold, half_window=self.half, capacity=capacity
            )
            return entries, entries.count, (entries.count > capacity).any()
        assert k is not None
        floor = self.trained.floor
        if capacity is None:
            entries, candidates = topk_by_blocks(
                self.seen,
                W_enc,
                self.sae.b_enc,
                k=k,
                floor=floor,
                block=self._block(4),
                product=self.kernels.product,
            )
            missed = torch.zeros((), dtype=torch.bool, device=floor.device)
        else:
            room = max(capacity, k)
            entries = self.kernels.topk_encode(self.seen, W_enc, self.sae.b_enc, k=k, floor=floor, capacity=room)
            candidates = entries.count
            # Fewer candidates than k are all that matter where the floor is 0: what lies below becomes 0.
            missed = ((candidates < k) & (floor > 0)).any() | (candidates > room).any()
        # Where a row was missed, the floor stays for what has been launched by now, which comes to nothing anyway.
        smallest = self.ranks.smallest(torch.where(missed, torch.nan, entries.act.amin())) * _FLOOR
        floor.copy_(torch.where(smallest.isfinite(), smallest, floor))
        return entries, candidates, missed

    def _residual(self, entries: Entries) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of the reconstruction and of the latents at the entries, and each row's squared error."""
        W_dec, skip = self.state.operand("W_dec"), self._skip()
        if self.ranks.n_latent == 1:
            return self.kernels.residual(entries, W_dec, self.sae.b_dec, self.y, rows=self.rows, skip=skip)
        recons = self.ranks.sum_over_latents_(self.kernels.decode(entries, W_dec, None))
        d_recons, squared_error = self._error(recons)
        return d_recons, self.kernels.latent_gradients(entries, W_dec, d_recons), squared_error

    # ---- dense ----

    def dense(self) -> Int[Tensor, "2"]:
        kernels, state = self.kernels, self.state
        assert self.threshold is not None
        recons = torch.empty_like(self.y)
        l0 = torch.zeros(len(self.x), dtype=torch.int32, device=self.x.device)
        width = self.sae.cfg.d_sae
        kept = len(self.x) * width * self._entry_bytes() <= KEPT_BYTES
        encoded: list[DenseActs] = []
        for index, block in enumerate(self._blocks()):
            acts = self._encode_dense(block)
            kernels.product(acts.acts, state.operand("W_dec")[block], out=recons, add=index > 0)
            l0 += acts.l0
            if kept:
                encoded.append(acts)
        self.ranks.sum_over_latents_(recons)
        row_l0 = self.ranks.sum_over_latents_(l0.float())
        d_recons, squared_error = self._error(recons)
        slope = self._slope(row_l0)
        found: list[LatentSums] = []
        encoder_part = torch.zeros(self.x.shape[1], device=self.x.device)
        for index, block in enumerate(self._blocks()):
            acts = encoded[index] if kept else self._encode_dense(block)
            d_pre, sums = kernels.dense_gradients(d_recons, state.operand("W_dec")[block], acts, slope)
            found.append(sums)
            encoder_part += self._encoder_part(state.operand("W_enc")[block], sums.d_pre)
            for name, left, right in (("W_dec", acts.acts, d_recons), ("W_enc", d_pre, self.seen)):
                self._update_rows(name, self.ranks.sum_over_rows_(kernels.product(left.T, right)), latents=block)
        sums = LatentSums(*(torch.cat(parts) for parts in zip(*found, strict=True)))
        self._finish(sums, d_recons, encoder_part, row_l0, squared_error)
        return self.ranks.largest_(_estimate(l0, sums))

    def _encode_dense(self, block: slice) -> DenseActs:
        assert self.threshold is not None
        W_enc = self.state.operand("W_enc")[block]
        return self.kernels.encode_dense(
            self.seen, W_enc, self.sae.b_enc[block], self.threshold[block], half_window=self.half
        )

    def _entry_bytes(self) -> int:
        """Of an entry of a block: f, and as much again for d pre."""
        return 2 * self.state.operands.itemsize

    def _blocks(self) -> Iterator[slice]:
        width, block = self.sae.cfg.d_sae, self._block(self._entry_bytes())
        return (slice(start, min(start + block, width)) for start in range(0, width, block))

    def _block(self, entry_bytes: int) -> int:
        """Latents of a block, of which an entry for a row takes so many bytes."""
        return max(1, BLOCK_BYTES // (entry_bytes * len(self.x)) // 128) * 128

    # ---- both ----

    def _skip(self) -> Tensor | None:
        if self.sae.W_skip is None:
            return None
        return self.kernels.product(self.seen, self.sae.W_skip.to(self.state.operands))

    def _error(self, recons: Tensor) -> tuple[Tensor, Tensor]:
        """`2 (y_hat - y) / rows` and each row's squared error, from what the latents write."""
        return self.kernels.dense_residual(
            recons, self.sae.b_dec, self.y, rows=self.rows, operands=self.state.operands, skip=self._skip()
        )

    def _slope(self, l0: Tensor) -> Tensor:
        """`d sparsity / d L0` of each row."""
        term = self.term
        if term.target_l0 is None:
            return torch.full_like(l0, term.coefficient / self.rows)
        return (l0 - term.target_l0) * (2 * term.coefficient * term.quadratic_factor / self.rows)

    def _encoder_part(self, W_enc: Tensor, d_pre: Tensor) -> Tensor:
        """`W_enc @ d b_enc`, what the pre-encoder bias takes from the gradient of `b_dec`."""
        if not self.sae.cfg.pre_encoder_bias:
            return torch.zeros(W_enc.shape[1], device=W_enc.device)
        return self.kernels.weighted_rows(W_enc, d_pre)

    def _update_rows(self, name: str, source: FromEntries | Tensor, latents: slice | None = None) -> None:
        self.kernels.update_rows(
            self.state.weights[name],
            self.state.adam[name],
            source,
            shadow=self.state.shadows[name],
            unit_rows=name == "W_dec",
            step=self.flight.step + 1,
            lr=self.cfg.learning_rate_at(self.flight.step),
            betas=self.cfg.betas,
            eps=self.cfg.adam_eps,
            halted=self.state.halted,
            latents=latents,
        )

    def _finish(
        self, sums: LatentSums, d_recons: Tensor, encoder_part: Tensor, l0: Tensor, squared_error: Tensor
    ) -> None:
        """The gradients of all that is no weight matrix, their update, and the loss."""
        sae, ranks, vectors, parts = self.sae, self.ranks, self.state.vectors, self.flight.parts
        sums = LatentSums(*ranks.sum_over_rows_(torch.stack(sums)).unbind())
        vectors["b_enc"].grad = sums.d_pre
        d_b_dec = d_recons.sum(0, dtype=torch.float32)
        if sae.cfg.pre_encoder_bias:
            d_b_dec -= ranks.sum_over_latents_(encoder_part)
        vectors["b_dec"].grad = ranks.sum_over_rows_(d_b_dec)
        if sae.W_skip is not None:
            vectors["W_skip"].grad = ranks.sum_over_rows_(self.kernels.product(self.seen.T, d_recons))
        frequency = sums.fired / self.rows
        if self.threshold is not None:
            vectors["theta"].grad = self._d_theta(sums, frequency)
        self.state.update_vectors(lr=self.cfg.learning_rate_at(self.flight.step))
        self.trained.objective.constrain()

        # This rank's shares, as every loss is.
        error = ranks.part(squared_error.mean())
        price = self.term.value(l0, frequency, ranks=ranks)
        for slot, value in zip(parts[:3], (error + price, error, ranks.part(l0.mean())), strict=True):
            slot.copy_(value)
        torch.gt(sums.fired, 0, out=parts.fired)
        made = parts.fired & (self.state.halted == 0)
        self.trained.last_fired.masked_fill_(made, (self.flight.step + 1) * self.cfg.batch_size)

    def _d_theta(self, sums: LatentSums, frequency: Tensor) -> Tensor:
        assert self.threshold is not None
        price = 2 * self.term.frequency / self.term.limit * frequency / self.rows
        slope = self.threshold * sums.d_act_inside + sums.slope + price * sums.inside
        gradient = slope / -self.cfg.bandwidth
        return gradient * self.threshold if self.cfg.threshold == "log" else gradient


def _estimate(l0: Tensor, sums: LatentSums) -> Tensor:
    """The two counts of a dense update, which counts active latents by rows and the window by latents alone.

    Half of what is inside the window is active. The fullest row is taken to have its share of the window, all of which
    might be silent.
    """
    active, inside = sums.fired.sum(), sums.inside.sum()
    most = (l0.max() * (1 + inside / active.clamp(min=1))).clamp(max=len(sums.fired))
    return torch.stack([most.ceil(), active + inside / 2]).long()
