"""From gradients to compressed rows: the edges of targets that are read at one position.

1. `batches` cuts the targets of each position into sweeps, the latest readers first.
2. `edges_of` sweeps one of them. As each stage's gradient arrives, one matrix product a position gives the edges from
   all that the stage wrote there.
3. `Piece`s are rows of one reader without the columns that none of them has; `assemble` compresses them all, in the
   order of the nodes.
"""

from collections.abc import Iterator, Mapping
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scope_lens.circuits.edges import Edges
from scope_lens.circuits.linear import TOKENS, LinearModel
from scope_lens.circuits.sources import Sources


class Ends(NamedTuple):
    """The logits and directions of a graph, in the order of their nodes.

    Attributes:
        pos: Where each is read.
        vectors: What each reads at the final norm's output.
    """

    pos: Int[Tensor, " end"]
    vectors: Float[Tensor, "end d_model"]


class Reads(NamedTuple):
    """Targets of one position and one reader.

    Attributes:
        nodes: Their numbers, ascending.
        vectors: What they read.
    """

    nodes: Int[Tensor, " row"]
    vectors: Float[Tensor, "row d"]


class Piece(NamedTuple):
    """Rows of targets of one reader and position.

    Attributes:
        rows: Node of each row, ascending.
        columns: Node of each column, ascending, int32.
        block: Direct effect of each column's node on each row's; zeros may be among them.
    """

    rows: Int[Tensor, " row"]
    columns: Int[Tensor, " column"]
    block: Float[Tensor, "row column"]


def batches(
    sources: Sources, latents: Int[Tensor, " row"], ends: Ends | None, *, at_once: int
) -> Iterator[tuple[int, dict[int, Reads]]]:
    """Cut targets into sweeps: the position of each, and its targets by the stage of their reader.

    Args:
        sources: All that writes.
        latents: Nodes of the latents that are targets, ascending.
        ends: The logits and directions; None for none.
        at_once: Targets of a sweep, at most.
    """
    by_stage = [latents[(latents >= first) & (latents < end)] - first for first, end in pairwise(sources.first_latent)]
    for pos in range(sources.n_pos):
        batch: dict[int, Reads] = {}
        room = at_once
        for stage in range(len(sources.parts), -1, -1):
            if batch and sources.parts[stage].place.passes:
                # A cut of the residual stream leaves next to nothing of these rows; later ones go without them.
                yield pos, batch
                batch, room = {}, at_once
            if stage == len(sources.parts):
                here = latents[:0] if ends is None else (ends.pos == pos).nonzero()[:, 0]
            else:
                here = by_stage[stage][sources.parts[stage].pos[by_stage[stage]] == pos]
            while len(here):
                batch[stage] = _reads(sources, stage, here[:room], ends)
                room, here = room - len(batch[stage].nodes), here[room:]
                if room == 0:
                    yield pos, batch
                    batch, room = {}, at_once
        if batch:
            yield pos, batch


def _reads(sources: Sources, stage: int, here: Int[Tensor, " row"], ends: Ends | None) -> Reads:
    if stage < len(sources.parts):
        return Reads(sources.first_latent[stage] + here, sources.parts[stage].encoder_rows(here))
    assert ends is not None
    return Reads(sources.n_nodes + here, ends.vectors[here])


def edges_of(linear: LinearModel, sources: Sources, *, pos: int, reads: Mapping[int, Reads]) -> list[Piece]:
    """Sweep some targets of one position.

    Args:
        linear: The linear model.
        sources: All that writes.
        pos: Where the targets read.
        reads: The targets by the stage of their reader.
    """
    readers = sorted(reads, reverse=True)
    parts, embed = sources.parts, sources.embed
    # Columns: the tokens up to here, then what each stage wrote up to here.
    lengths = [part.starts[pos + 1] for part in parts[: readers[0]]]
    begins = list(accumulate(lengths, initial=pos + 1))
    columns = torch.cat(
        [
            sources.first_token + torch.arange(pos + 1, device=embed.device),
            *(nodes[:length] for nodes, length in zip(sources.nodes, lengths, strict=False)),
        ]
    )
    block = embed.new_zeros(sum(len(found.nodes) for found in reads.values()), len(columns))

    def absorb(stage: int, rows: int, gradient: Float[Tensor, "reached row d_out"], *, first: int = 0) -> None:
        here = range(first, first + len(gradient))
        if stage == TOKENS:
            vectors, starts, begin = embed, range(pos + 2), 0
        else:
            vectors, starts, begin = parts[stage].vectors, parts[stage].starts, begins[stage]
        for at in here:
            written = slice(starts[at], starts[at + 1])
            if written.stop > written.start:
                into = block[:rows, begin + written.start : begin + written.stop]
                torch.mm(gradient[at - first], vectors[written].T, out=into)

    linear.sweep(pos, {reader: reads[reader].vectors for reader in readers}, absorb)
    pieces: list[Piece] = []
    first = 0
    for reader in readers:
        rows = reads[reader].nodes
        ascending, order = columns[: begins[reader]].sort()
        pieces.append(piece(rows, ascending, block[first : first + len(rows)].index_select(1, order)))
        first += len(rows)
    return pieces


def piece(rows: Int[Tensor, " row"], columns: Int[Tensor, " column"], block: Float[Tensor, "row column"]) -> Piece:
    """Drop the columns that are all zero: what a cut site or a window hides from one of the rows, it hides from all.

    Args:
        rows: Node of each row, ascending.
        columns: Node of each column, ascending.
        block: Direct effects.
    """
    columns = columns.to(torch.int32)
    if int(block.count_nonzero()) < block.numel():
        reached = (block != 0).any(0)
        columns, block = columns[reached], block[:, reached]
    return Piece(rows, columns, block)


def assemble(pieces: list[Piece], n_nodes: int) -> Edges:
    """Compress rows and put them in the order of their nodes.

    Args:
        pieces: Every row once; the list is emptied on the way, so that no row is held twice for long.
        n_nodes: Number of nodes.
    """
    device = pieces[0].rows.device
    row_start = torch.zeros(n_nodes + 1, dtype=torch.long, device=device)
    for rows, _, block in pieces:
        row_start[rows + 1] = block.count_nonzero(1)
    row_start = row_start.cumsum(0)
    n_edges = int(row_start[-1])
    source = torch.empty(n_edges, dtype=torch.int32, device=device)
    weight = pieces[0].block.new_empty(n_edges)
    while pieces:
        rows, columns, block = pieces.pop()
        for run in _runs(rows):
            part = block[run]
            span = slice(int(row_start[rows[run.start]]), int(row_start[rows[run.stop - 1] + 1]))
            whole = span.stop - span.start == part.numel()
            there = ... if whole else part != 0
            source[span] = columns.expand_as(part)[there].reshape(-1)
            weight[span] = part[there].reshape(-1)
    return Edges(row_start, source, weight)


def _runs(rows: Int[Tensor, " row"]) -> list[slice]:
    """Cut where the nodes do not follow each other."""
    breaks = (rows.diff() != 1).nonzero()[:, 0] + 1
    return [slice(first, last) for first, last in pairwise([0, *breaks.tolist(), len(rows)])]
