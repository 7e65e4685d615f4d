"""The edges of a graph as compressed rows, one row a target: only what is not zero takes memory.

1. `Edges` holds row starts, sources and weights; `check` refuses what is no such form.
2. `row_sums` adds up a value of every edge by its target, `targets_of` names every edge's target.
3. `rows_of`, `kept` and `part` make the edges of a smaller graph.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

_BLOCK = 1 << 19  # edges looked at together, so that what is computed of each is never held for all of them


class Edges(NamedTuple):
    """Direct effects, target-major. Row t has the sources `source[row_start[t] : row_start[t + 1]]`, ascending.

    Attributes:
        row_start: Where each node's row begins, and the number of edges last, (node + 1,), int64. A node that is no
            target has an empty row.
        source: Node number of every edge's source, (edge,), int32.
        weight: Direct effect of the source on the target's pre-activation, (edge,).
    """

    row_start: Int[Tensor, " node_plus_1"]
    source: Int[Tensor, " edge"]
    weight: Float[Tensor, " edge"]

    @property
    def n_nodes(self) -> int:
        """Number of rows."""
        return len(self.row_start) - 1

    @property
    def row_lengths(self) -> Int[Tensor, " node"]:
        """Number of edges into every node."""
        return self.row_start.diff()


class Part(NamedTuple):
    """The edges of a graph of fewer nodes.

    Attributes:
        edges: Those between the nodes that stay, numbered anew.
        lost: Sum of the weights that left the row of each of them, in float64.
    """

    edges: Edges
    lost: Float[Tensor, " kept"]


def row_blocks(edges: Edges, first: int, last: int) -> Iterator[tuple[slice, slice]]:
    """Cut the rows `first` to `last - 1` into slices of rows and of their edges, half a million each or one row."""
    while first < last:
        begin = int(edges.row_start[first])
        fits = int(torch.searchsorted(edges.row_start, begin + _BLOCK, right=True)) - 1
        end = min(last, max(fits, first + 1))
        yield slice(first, end), slice(begin, int(edges.row_start[end]))
        first = end


def targets_of(edges: Edges) -> Int[Tensor, " edge"]:
    """Node number of every edge's target, int32."""
    nodes = torch.arange(edges.n_nodes, dtype=torch.int32, device=edges.source.device)
    return nodes.repeat_interleave(edges.row_lengths, output_size=len(edges.source))


def row_sums(edges: Edges, value: Shaped[Tensor, " edge"]) -> Float[Tensor, " node"]:
    """Sum of a value of every edge over each target's row, in float64.

    Args:
        edges: Says which edges are of one row.
        value: One number or truth value an edge.
    """
    sums = torch.zeros(edges.n_nodes, dtype=torch.float64, device=value.device)
    for rows, span in row_blocks(edges, 0, edges.n_nodes):
        sums[rows] = torch.segment_reduce(value[span].double(), "sum", lengths=edges.row_lengths[rows])
    return sums


def rows_of(edges: Edges, nodes: Int[Tensor, " row"]) -> Edges:
    """Copy the rows of some nodes, one after the other as `nodes` has them; sources keep their numbers."""
    spans = [*zip(edges.row_start[nodes].tolist(), edges.row_start[nodes + 1].tolist(), strict=True)]
    return Edges(
        _starts(edges.row_lengths[nodes]),
        torch.cat([edges.source[:0], *(edges.source[first:end] for first, end in spans)]),
        torch.cat([edges.weight[:0], *(edges.weight[first:end] for first, end in spans)]),
    )


def kept(edges: Edges, keep: Bool[Tensor, " edge"]) -> Edges:
    """Give the edges that `keep` marks, between the same nodes."""
    if bool(keep.all()):
        return edges
    return Edges(_starts(row_sums(edges, keep).long()), edges.source[keep], edges.weight[keep])


def part(edges: Edges, nodes: Int[Tensor, " kept"]) -> Part:
    """Give the edges between some nodes alone, and what their rows lose.

    Args:
        edges: Between all nodes.
        nodes: Ascending.
    """
    number = torch.full((edges.n_nodes,), -1, dtype=torch.int32, device=nodes.device)
    number[nodes] = torch.arange(len(nodes), dtype=torch.int32, device=nodes.device)
    rows = rows_of(edges, nodes)
    source = number.index_select(0, rows.source)
    stays = source >= 0
    return Part(kept(Edges(rows.row_start, source, rows.weight), stays), row_sums(rows, rows.weight * ~stays))


def check(edges: Edges, stage: Int[Tensor, " node"]) -> None:
    """Refuse edges that are no compressed rows, or that run backwards.

    Args:
        edges: Edges between the nodes of `stage`.
        stage: Place of every node in the order of the graph.

    Raises:
        ValueError: Rows that do not divide the edges, a source that is no node, sources of a row that do not ascend, or
            an edge whose source does not come before its target.
    """
    n_nodes, n_edges = len(stage), len(edges.source)
    row_start, source = edges.row_start, edges.source
    whole = len(row_start) == n_nodes + 1 and int(row_start[0]) == 0 and int(row_start[-1]) == n_edges
    if not whole or bool((edges.row_lengths < 0).any()) or len(edges.weight) != n_edges:
        raise ValueError(
            f"edges.row_start must ascend from 0 to the number of edges, one entry a node and one more. There are "
            f"{n_nodes} nodes, {len(row_start)} entries of row_start, {n_edges} of source and {len(edges.weight)} of "
            "weight."
        )
    if source.dtype != torch.int32 or row_start.dtype != torch.int64:
        raise ValueError(f"edges.source must be int32 and row_start int64; they are {source.dtype}, {row_start.dtype}.")
    if n_edges and not 0 <= int(source.min()) <= int(source.max()) < n_nodes:
        raise ValueError(
            f"Sources of edges must be node numbers from 0 to {n_nodes - 1}; they go from {int(source.min())} to "
            f"{int(source.max())}."
        )
    for rows, span in row_blocks(edges, 0, n_nodes):
        _check_block(edges, stage.float(), rows, span)


def _check_block(edges: Edges, stage: Tensor, rows: slice, span: slice) -> None:
    source = edges.source[span]
    ascends = source.diff() > 0
    ends = edges.row_start[rows][1:] - span.start  # where a row begins, the source may fall
    ascends[ends[(ends > 0) & (ends < len(source))] - 1] = True
    if not bool(ascends.all()):
        raise ValueError("The sources of each row of edges must ascend, none twice; sort them by (target, source).")
    before = stage.index_select(0, source)
    latest = torch.segment_reduce(before, "max", lengths=edges.row_lengths[rows])
    backward = latest >= stage[rows]
    if bool(backward.any()):
        target = rows.start + int(backward.nonzero()[0])
        row = slice(int(edges.row_start[target]), int(edges.row_start[target + 1]))
        origin = int(edges.source[row][stage[edges.source[row].long()].argmax()])
        raise ValueError(
            f"An edge must run from a smaller to a larger stage; that from node {origin} (stage {int(stage[origin])}) "
            f"to node {target} (stage {int(stage[target])}) does not."
        )


def _starts(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
