"""From gradients to compressed rows: the edges of all targets read at one position, then of all positions.

1. `edges_of` sweeps the targets of one position. As each stage's gradient arrives, one matrix product a position gives
   the edges from what the stage wrote there.
2. `Piece`s are the rows of one reader, without zeros.
3. `assemble` puts them in the order of the nodes.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from scope_lens.circuits.edges import Edges
from scope_lens.circuits.linear import TOKENS, LinearModel
from scope_lens.circuits.sources import Numbering, Written


class Reads(NamedTuple):
    """Targets of one position and one reader.

    Attributes:
        nodes: Their numbers, ascending.
        vectors: What they read, (row, d).
    """

    nodes: Int[Tensor, " row"]
    vectors: Float[Tensor, "row d"]


class Piece(NamedTuple):
    """Compressed rows.

    Attributes:
        rows: Node of each row, ascending.
        lengths: Edges of each row.
        source: Node of every edge's source, int32, ascending within a row.
        weight: Direct effect.
        total: Sum of each row.
        size: Sum of each row's absolute values.
    """

    rows: Int[Tensor, " row"]
    lengths: Int[Tensor, " row"]
    source: Int[Tensor, " edge"]
    weight: Float[Tensor, " edge"]
    total: Float[Tensor, " row"]
    size: Float[Tensor, " row"]


def edges_of(
    linear: LinearModel,
    parts: Sequence[Written],
    embed: Float[Tensor, "pos d_model"],
    numbering: Numbering,
    *,
    pos: int,
    reads: Mapping[int, Reads],
) -> list[Piece]:
    """Sweep the targets of one position.

    Args:
        linear: The linear model.
        parts: What the dictionaries write, by stage.
        embed: What the tokens write.
        numbering: The nodes of the sources.
        pos: Where the targets read.
        reads: The targets by the stage of their reader.
    """
    readers = sorted(reads, reverse=True)
    highest = parts[: readers[0]]
    # Columns: the tokens up to here, then what each stage wrote up to here.
    ends = list(accumulate([part.starts[pos + 1] for part in highest], initial=pos + 1))
    nodes = torch.cat(
        [
            numbering.tokens + torch.arange(pos + 1, device=embed.device),
            *(numbering.vectors[stage][: part.starts[pos + 1]] for stage, part in enumerate(highest)),
        ]
    )
    block = embed.new_zeros(sum(len(found.nodes) for found in reads.values()), ends[-1])

    def absorb(stage: int, rows: int, gradient: Float[Tensor, "reached row d_out"]) -> None:
        if stage == TOKENS:
            block[:rows, : len(gradient)] = einsum(
                gradient, embed[: len(gradient)], "reached row d, reached d -> row reached"
            )
            return
        part = parts[stage]
        for at, here in enumerate(gradient):
            begin, end = part.starts[at : at + 2]
            if end > begin:
                torch.mm(here, part.vectors[begin:end].T, out=block[:rows, ends[stage] + begin : ends[stage] + end])

    linear.sweep(pos, {reader: reads[reader].vectors for reader in readers}, absorb)
    pieces: list[Piece] = []
    first = 0
    for reader in readers:
        last = first + len(reads[reader].nodes)
        columns, order = nodes[: ends[reader]].sort()
        pieces.append(_compressed(reads[reader].nodes, columns, block[first:last].index_select(1, order)))
        first = last
    return pieces


def assemble(pieces: Sequence[Piece], n_nodes: int) -> Edges:
    """Put rows in the order of their nodes.

    Args:
        pieces: Every row once.
        n_nodes: Number of nodes.
    """
    runs = sorted((run for piece in pieces for run in _runs(piece)), key=lambda run: run[0])
    device = pieces[0].rows.device
    lengths = torch.zeros(n_nodes, dtype=torch.long, device=device)
    for piece in pieces:
        lengths[piece.rows] = piece.lengths
    row_start = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return Edges(row_start, torch.cat([source for _, source, _ in runs]), torch.cat([weight for _, _, weight in runs]))


def _compressed(
    rows: Int[Tensor, " row"], columns: Int[Tensor, " column"], block: Float[Tensor, "row column"]
) -> Piece:
    """Rows without their zeros."""
    there = block != 0
    lengths = there.sum(1)
    source = columns.to(torch.int32).expand(len(rows), -1)
    return Piece(rows, lengths, source[there], block[there], block.sum(1), block.abs().sum(1))


def _runs(piece: Piece) -> list[tuple[int, Tensor, Tensor]]:
    """Cut a piece where its rows do not follow each other: (first row, sources, weights) each."""
    breaks = (piece.rows.diff() != 1).nonzero()[:, 0] + 1
    starts = [0, *breaks.tolist()]
    edges = torch.cat([piece.lengths.new_zeros(1), piece.lengths.cumsum(0)])[torch.tensor(starts)]
    sizes = torch.cat([edges, piece.lengths.sum()[None]]).diff().tolist()
    firsts = piece.rows[torch.tensor(starts)].tolist()
    return list(zip(firsts, piece.source.split(sizes), piece.weight.split(sizes), strict=True))
