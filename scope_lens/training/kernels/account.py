"""The memory of an update on the kernels, item by item, in bytes: what has to fit on the device.

What a dictionary holds between updates, but for two batches of rows, grows with its width: 10 bytes for each weight in
Gemma Scope's recipe (float32 weights and second moments, bfloat16 shadows; no first moment, because its beta is 0).
What an update needs beside it hardly grows: no array has an entry for every row and latent, but a dense update's, which
are cut into blocks of latents once they would be too large.

The sum is an upper bound: an update lets go of some arrays before it makes others. `docs/benchmarks/memory.md` sets it
beside the tensors that updates really make.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from scope_lens.training.fused_update import BLOCK_BYTES, KEPT_BYTES
from scope_lens.training.in_flight import LAG

_FLOAT = 4  # bytes; also of an int32
_ALIGNED = 16  # bytes at which the encoder's rows begin where the copy engine reads them; others are padded
_GATHER = 256  # columns of the decoder that a program gathers, each with a part of every entry's gradient


@dataclass(frozen=True, kw_only=True)
class MemoryAccount:
    """Bytes of an update, by item.

    Attributes:
        held: What stays between updates.
        sparse: What an update over the entries that matter makes beside it.
        dense: What a dense update makes beside it.
    """

    held: Mapping[str, int]
    sparse: Mapping[str, int]
    dense: Mapping[str, int]

    @property
    def peak(self) -> int:
        """Give the bytes that either kind of update needs at most."""
        return sum(self.held.values()) + max(sum(self.sparse.values()), sum(self.dense.values()))


def memory_account(
    *,
    d_in: int,
    d_sae: int,
    d_out: int | None = None,
    batch_size: int = 4096,
    capacity: int = 256,
    operands: torch.dtype = torch.bfloat16,
    momentum: bool = False,
) -> MemoryAccount:
    """Add up what training a JumpReLU dictionary on the kernels takes on its device.

    This is for one update: a checkpoint, an evaluation or `Trainer.result` has a copy of the weights beside what is
    held. The raw batch is the caller's and left out, as are the scratch space of sorts and products and what the
    allocator and the kernels' code take. Ranks that share the rows of a batch have a whole float32 gradient of each
    weight in turn, too.

    Args:
        d_in: Width of the encoder's input.
        d_sae: Number of latents, or those of one rank that shares them.
        d_out: Width of the target; None means an autoencoder.
        batch_size: Rows of an update.
        capacity: Room for entries in a row.
        operands: dtype of what is multiplied.
        momentum: Whether Adam's beta1 is above 0.
    """
    shapes = _Shapes(
        d_in=d_in,
        d_out=d_in if d_out is None else d_out,
        d_sae=d_sae,
        rows=batch_size,
        normalised=d_in if d_out is None else d_in + d_out,
        item=operands.itemsize,
    )
    return MemoryAccount(
        held=shapes.held(shadows=operands != torch.float32, momentum=momentum),
        sparse=shapes.sparse(capacity),
        dense=shapes.dense(),
    )


@dataclass(frozen=True, kw_only=True)
class _Shapes:
    d_in: int
    d_out: int
    d_sae: int
    rows: int
    normalised: int  # numbers of a row that the learner divides by the scale
    item: int  # bytes of an operand

    def held(self, *, shadows: bool, momentum: bool) -> dict[str, int]:
        weights = self.d_sae * (self.d_in + self.d_out)
        vectors = 4 * (2 * self.d_sae + self.d_out)  # b_enc, theta and b_dec: value, gradient, two moments
        return {
            "weights, float32": _FLOAT * weights,
            "second moments": _FLOAT * weights,
            "first moments": _FLOAT * weights if momentum else 0,
            "shadows of the weights": self.item * weights if shadows else 0,
            # The threshold itself, when each row was last updated (twice), and when the latent last fired (int64).
            "biases, thresholds, counters": _FLOAT * (vectors + 5 * self.d_sae),
            "normalised rows in flight": _FLOAT * LAG * self.rows * self.normalised,
        }

    def sparse(self, capacity: int) -> dict[str, int]:
        slots = self.rows * capacity
        parts = -(-self.d_out // _GATHER)
        padded = -(-self.d_in * self.item // _ALIGNED) * _ALIGNED  # bytes of a row
        return {
            "rows as operands": self._rows_as_operands(),
            "padded encoder": 0 if padded == self.d_in * self.item else padded * (self.d_sae + self.rows),
            "entries": slots * (3 * _FLOAT + 8),  # latent, pre, act, and the words they are sorted as
            "gradients of entries": slots * _FLOAT * (2 + parts),
            "entries by latents": slots * (2 * _FLOAT + 8) + 2 * _FLOAT * self.d_sae,
            "sums by latents": self._sums(),
        }

    def dense(self) -> dict[str, int]:
        entry = 2 * self.item
        block = min(max(1, BLOCK_BYTES // (entry * self.rows) // 128) * 128, self.d_sae)
        kept = self.d_sae if self.rows * self.d_sae * entry <= KEPT_BYTES else block
        bits = 2 * _FLOAT * -(-self.rows // 32)  # of a latent: active, inside the window
        return {
            "rows as operands": self._rows_as_operands(),
            "reconstructions": 2 * _FLOAT * self.rows * self.d_out,
            "activations": kept * (self.item * self.rows + bits),
            "a block's gradients": block * (self.item * self.rows + _FLOAT * max(self.d_in, self.d_out)),
            "sums by latents": self._sums(),
        }

    def _rows_as_operands(self) -> int:
        """What the encoder sees, and the gradient of the reconstruction; the former from a float32 difference."""
        return self.rows * (self.item * (self.d_in + self.d_out) + _FLOAT * self.d_in)

    def _sums(self) -> int:
        """Five sums, stacked for the ranks, and what becomes of them."""
        return _FLOAT * 16 * self.d_sae
