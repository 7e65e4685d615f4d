"""Gradients of the targets of one position, on their way back through the written-out layers.

`PullBack` holds the gradient at the residual stream, a row for each target. Rows are numbered from the highest stage
down, and a row joins where its target reads; that alone says which rows and positions can be other than zero:

* Rows that have not joined are zero.
* Rows that no attention has spread yet are zero but at the position that their targets read.
* Behind a residual site with a dictionary, all rows are zero but where it is not trained.

Products leave these zeros out. The stream also leaves out the first position where no dictionary is trained on it
(BOS): it attends to itself alone and nothing but its token writes there, so one matrix for each layer (`to_first`)
takes what arrives there straight to that token. Rows come first in memory, (row, pos, d), so that rows and positions
fold into one axis without a copy, and every product is one matrix product.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from scope_lens.circuits.layers import Cut, Layer
from scope_lens.circuits.linear import TOKENS, Absorb


class Branch(NamedTuple):
    """Gradient of some rows at a place inside attention; it is zero for the others.

    Attributes:
        row: Number of the first of these rows.
        spread: Rows at the stream's positions, from the first on; zero at those behind.
        fresh: The rows behind those, at the position that the targets read; zero elsewhere.
    """

    row: int
    spread: Float[Tensor, "row reach d"]
    fresh: Float[Tensor, "row d"]


class PullBack:
    """The rows of one sweep.

    Args:
        pos: Position that the targets read.
        cotangents: What they read, by the stage of the reader.
        like: Any tensor of the stream's width, dtype and device.
        to_first: By layer, what takes the gradient at the first position's values to its token; None where a dictionary
            is trained on that position.
        absorb: Takes the gradients; see `linear.Absorb`.
    """

    def __init__(
        self,
        pos: int,
        cotangents: Mapping[int, Float[Tensor, "_ _"]],
        *,
        like: Tensor,
        to_first: Sequence[Float[Tensor, "groups_d_head d_model"]] | None,
        absorb: Absorb,
    ) -> None:
        self._absorb = absorb
        self._cotangents = cotangents
        self._to_first = None if pos == 0 else to_first
        self._positions = slice(0 if self._to_first is None else 1, pos + 1)  # those of the stream
        self._at = pos - self._positions.start  # where the targets read, counted in the stream
        self._last_row: dict[int, int] = {}
        rows = 0
        for stage in sorted(cotangents, reverse=True):
            rows += len(cotangents[stage])
            self._last_row[stage] = rows
        self._stream = like.new_zeros(rows, self._at + 1, like.shape[-1])
        self._at_first_token = like.new_zeros(rows, like.shape[-1])  # if the stream leaves it out
        self._joined = 0  # rows from here on have not joined
        self._spread = 0  # rows from here on are fresh
        self._reach = self._at + 1  # positions from here on are zero in the rows that are not fresh

    # ---- the residual stream ----

    def join(self, stage: int, scale: Tensor | None = None) -> None:
        """Let the targets of a reader in.

        Args:
            stage: Of the reader.
            scale: What takes the gradient at the reader to the residual stream; None for a reader of a constant.
        """
        rows = self._admit(stage)
        if scale is not None and rows is not None:
            self._stream[rows, self._at] = self._cotangents[stage] * scale

    def hand_out(self, stage: int) -> None:
        """Give the gradient at the residual stream to a stage that writes there."""
        if self._joined:
            self._give(stage, self._stream[: self._joined, : self._extent()])

    def finish(self) -> None:
        """Give the gradient at the embeddings to the tokens."""
        gradient = self._stream[:, : self._extent()]
        if self._to_first is not None:
            gradient = torch.cat([rearrange(self._at_first_token, "row d -> row 1 d"), gradient], dim=1)
        self._absorb(TOKENS, self._joined, rearrange(gradient, "row pos d -> pos row d"), first=0)

    def _give(self, stage: int, gradient: Float[Tensor, "row pos d"]) -> None:
        first = self._positions.start
        self._absorb(stage, self._joined, rearrange(gradient, "row pos d -> pos row d"), first=first)

    def cut_stream(self, cut: Cut | None) -> None:
        """Pass a dictionary at the residual stream or the embeddings."""
        if cut is None:
            return
        self.hand_out(cut.place.stage)
        trained = cut.place.trained[self._positions]
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
            trained = cut.place.trained[self._positions]
            rows = self._stream[: self._joined]
            rows[:, trained] += rows[:, trained] @ cut.skip.T * scale[self._positions][trained]

    # ---- attention ----

    def through_attention(self, number: int, layer: Layer, *, at_out: Cut | None, at_z: Cut | None) -> None:
        """Add what attention pulls back to the residual stream before it.

        Args:
            number: The layer's number.
            layer: Its constants.
            at_out: A dictionary at what attention adds.
            at_z: A dictionary at the heads' outputs.
        """
        rows = self._stream[: self._joined]
        branch = Branch(0, rows[: self._spread, : self._reach], rows[self._spread :, self._at])
        if at_out is not None:
            branch = self._cut_branch(at_out, branch)
        branch = Branch(branch.row, branch.spread @ layer.out, branch.fresh @ layer.out)
        if at_z is not None:
            branch = self._cut_branch(at_z, branch, scale=layer.scale_z)
        fresh = branch.row + len(branch.spread)
        weights = layer.spread[:, :, self._positions]
        if len(branch.spread):
            z = rearrange(branch.spread, "row query (group head d) -> row query group head d", **_heads(layer))
            weights_here = weights[:, :, : self._reach, : self._positions.start + self._reach]
            values = einsum(weights_here, z, "group head query key, row query group head d -> row key group d")
            self._add_values(slice(branch.row, fresh), number, layer, values)
        if len(branch.fresh):
            z = rearrange(branch.fresh, "row (group head d) -> row group head d", **_heads(layer))
            weights_here = weights[:, :, self._at, : self._positions.stop]
            values = einsum(weights_here, z, "group head key, row group head d -> row key group d")
            self._add_values(slice(fresh, self._joined), number, layer, values)
            self._spread, self._reach = self._joined, self._at + 1

    def _add_values(
        self, rows: slice, number: int, layer: Layer, values: Float[Tensor, "row key group d_head"]
    ) -> None:
        """Add what the gradient at the values, from position 0 on, gives at the stream."""
        left_out = self._positions.start
        reach = values.shape[1] - left_out
        _add_product(self._stream[rows, :reach], values[:, left_out:], layer.value)
        if self._to_first is not None:
            _add_product(self._at_first_token[rows, None], values[:, :left_out], self._to_first[number])

    def _cut_branch(self, cut: Cut, branch: Branch, *, scale: Float[Tensor, "pos 1"] | None = None) -> Branch:
        """Pass a dictionary inside attention; `scale` is what the branch is too large by."""
        stage, before = cut.place.stage, self._joined
        scale = None if scale is None else scale[self._positions]
        trained = rearrange(cut.place.trained[self._positions], "pos -> pos 1")
        if before:
            whole = branch.spread.new_zeros(before, self._at + 1, branch.spread.shape[-1])
            fresh = branch.row + len(branch.spread)
            whole[branch.row : fresh, : branch.spread.shape[1]] = branch.spread
            whole[fresh:, self._at] = branch.fresh
            self._give(stage, whole if scale is None else whole / scale)
        rows = self._admit(stage)
        joining = branch.fresh[:0] if rows is None else self._cotangents[stage]
        if scale is not None:
            joining = joining * scale[self._at]
        if cut.skip is None:
            return Branch(before, branch.spread[:0], joining)
        spread = branch.spread * trained[: branch.spread.shape[1]] @ cut.skip.T
        return Branch(branch.row, spread, torch.cat([branch.fresh * trained[self._at] @ cut.skip.T, joining]))

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
        return self._at + 1 if self._spread < self._joined else self._reach


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
