"""Gradients of the targets of one position, on their way back through the written-out layers.

`PullBack` holds the gradient at the residual stream, a row for each target. Rows are numbered from the highest stage
down, and a row joins where its target reads; that alone says which rows and positions can be other than zero:

* Rows that have not joined are zero.
* Rows that no attention has spread yet are zero but at the position that their targets read.
* Behind a residual site with a dictionary, all rows are zero but where it is not trained, which is BOS as a rule.

Products leave these zeros out. Rows come first in memory, (row, pos, d), so that rows and positions fold into one axis
without a copy: every product is one matrix product.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from scope_lens.circuits.layers import Cut, Layer
from scope_lens.circuits.linear import TOKENS, Absorb


class Branch(NamedTuple):
    """Gradient of rows `first` to `first + len(spread) + len(fresh)` at a place inside attention.

    Attributes:
        first: The first row; those before it are zero.
        spread: Rows at the positions from 0 on; zero behind them.
        fresh: The rows behind those, at the position that the targets read; zero elsewhere.
    """

    first: int
    spread: Float[Tensor, "row reach d"]
    fresh: Float[Tensor, "row d"]


class PullBack:
    """The rows of one sweep.

    Args:
        pos: Position that the targets read.
        cotangents: What they read, by the stage of the reader.
        like: Any tensor of the stream's width, dtype and device.
        absorb: Takes the gradients; see `linear.Absorb`.
    """

    def __init__(
        self, pos: int, cotangents: Mapping[int, Float[Tensor, "_ _"]], *, like: Tensor, absorb: Absorb
    ) -> None:
        self.pos = pos
        self._absorb = absorb
        self._cotangents = cotangents
        self._last_row: dict[int, int] = {}
        rows = 0
        for stage in sorted(cotangents, reverse=True):
            rows += len(cotangents[stage])
            self._last_row[stage] = rows
        self._stream = like.new_zeros(rows, pos + 1, like.shape[-1])
        self._joined = 0  # rows from here on have not joined
        self._spread = 0  # rows from here on are fresh
        self._reach = pos + 1  # positions from here on are zero in the rows that are not fresh

    # ---- the residual stream ----

    def join(self, stage: int, scale: Tensor | None = None) -> None:
        """Let the targets of a reader in.

        Args:
            stage: Of the reader.
            scale: What takes the gradient at the reader to the residual stream; None for a reader of a constant.
        """
        rows = self._admit(stage)
        if scale is not None and rows is not None:
            self._stream[rows, self.pos] = self._cotangents[stage] * scale

    def hand_out(self, stage: int) -> None:
        """Give the gradient at the residual stream to a stage that writes there."""
        if self._joined or stage == TOKENS:
            gradient = self._stream[: self._joined, : self._extent()]
            self._absorb(stage, self._joined, rearrange(gradient, "row pos d -> pos row d"))

    def cut_stream(self, cut: Cut | None) -> None:
        """Pass a dictionary at the residual stream or the embeddings."""
        if cut is None:
            return
        self.hand_out(cut.place.stage)
        trained = cut.place.trained[: self.pos + 1]
        rows = self._stream[: self._joined]
        if cut.skip is None:
            rows[:, trained] = 0
            untrained = (~trained[: self._extent()]).nonzero()
            self._reach = int(untrained[-1]) + 1 if len(untrained) else 0
            self._spread = self._joined
        else:
            rows[:, trained] = rows[:, trained] @ cut.skip.T
        self.join(cut.place.stage, torch.ones_like(self._stream[0, 0]))

    def add_skip(self, cut: Cut, scale: Float[Tensor, "pos d_model"]) -> None:
        """Add what reaches the residual stream through the skip term of a transcoder.

        Args:
            cut: The transcoder.
            scale: What takes the gradient at what it reads to the residual stream.
        """
        if cut.skip is not None:
            trained = cut.place.trained[: self.pos + 1]
            rows = self._stream[: self._joined]
            rows[:, trained] += rows[:, trained] @ cut.skip.T * scale[: self.pos + 1][trained]

    # ---- attention ----

    def through_attention(self, layer: Layer, *, at_out: Cut | None, at_z: Cut | None) -> None:
        """Add what attention pulls back to the residual stream before it.

        Args:
            layer: The layer.
            at_out: A dictionary at what attention adds.
            at_z: A dictionary at the heads' outputs.
        """
        rows = self._stream[: self._joined]
        branch = Branch(0, rows[: self._spread, : self._reach], rows[self._spread :, self.pos])
        if at_out is not None:
            branch = self._cut_branch(at_out, branch)
        branch = Branch(branch.first, branch.spread @ layer.out, branch.fresh @ layer.out)
        if at_z is not None:
            branch = self._cut_branch(at_z, branch, scale=layer.scale_z)
        first, fresh = branch.first, branch.first + len(branch.spread)
        if len(branch.spread):
            weights = layer.spread[:, :, : self._reach, : self._reach]
            z = rearrange(branch.spread, "row query (group head d) -> row query group head d", **_heads(layer))
            values = einsum(weights, z, "group head query key, row query group head d -> row key group d")
            _add_product(self._stream[first:fresh, : self._reach], values, layer.value)
        if len(branch.fresh):
            weights = layer.spread[:, :, self.pos, : self.pos + 1]
            z = rearrange(branch.fresh, "row (group head d) -> row group head d", **_heads(layer))
            values = einsum(weights, z, "group head key, row group head d -> row key group d")
            _add_product(self._stream[fresh : self._joined], values, layer.value)
            self._spread, self._reach = self._joined, self.pos + 1

    def _cut_branch(self, cut: Cut, branch: Branch, *, scale: Float[Tensor, "pos 1"] | None = None) -> Branch:
        """Pass a dictionary inside attention; `scale` is what the branch is too large by."""
        stage, trained, before = cut.place.stage, cut.place.trained[: self.pos + 1], self._joined
        if before:
            whole = branch.spread.new_zeros(before, self.pos + 1, branch.spread.shape[-1])
            fresh = branch.first + len(branch.spread)
            whole[branch.first : fresh, : branch.spread.shape[1]] = branch.spread
            whole[fresh:, self.pos] = branch.fresh
            if scale is not None:
                whole /= scale[: self.pos + 1]
            self._absorb(stage, before, rearrange(whole, "row pos d -> pos row d"))
        rows = self._admit(stage)
        joining = branch.fresh[:0] if rows is None else self._cotangents[stage]
        if scale is not None:
            joining = joining * scale[self.pos]
        if cut.skip is None:
            return Branch(before, branch.spread[:0], joining)
        spread = branch.spread * rearrange(trained[: branch.spread.shape[1]], "pos -> pos 1") @ cut.skip.T
        return Branch(branch.first, spread, torch.cat([branch.fresh * trained[self.pos] @ cut.skip.T, joining]))

    # ---- rows ----

    def _admit(self, stage: int) -> slice | None:
        """Count the rows of a reader as joined; None where it has no targets."""
        if stage not in self._last_row:
            return None
        rows = slice(self._joined, self._last_row[stage])
        self._joined = rows.stop
        return rows

    def _extent(self) -> int:
        """Positions from here on are zero in all rows."""
        return self.pos + 1 if self._spread < self._joined else self._reach


def _heads(layer: Layer) -> dict[str, int]:
    return {"group": layer.spread.shape[0], "head": layer.spread.shape[1]}


def _add_product(
    into: Float[Tensor, "row pos d_model"],
    values: Float[Tensor, "row pos group d_head"],
    matrix: Float[Tensor, "groups_d_head d_model"],
) -> None:
    """`into += values @ matrix`, in one pass over `into` where it is contiguous."""
    flat = rearrange(values, "row pos group d -> (row pos) (group d)")
    if into.is_contiguous():
        into.view(-1, into.shape[-1]).addmm_(flat, matrix)
    else:
        into += (flat @ matrix).view(into.shape)
