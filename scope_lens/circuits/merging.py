"""Merging: several nodes of a graph as one, such that its rows still add up.

1. Rows and columns of a group are summed: the group's pre-activation, bias and `dropped` are the sums of its members',
   and what it does to another node is what its members do together.
2. An edge inside a group is no edge any more; its weight goes to the group's `dropped`.
3. Members may stand at several stages. The stages are then counted again along the edges; where a path leaves a group
   and comes back, no order exists and the merge is refused.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from scope_lens.circuits.edges import Edges, kept, rows_of, targets_of

_PLACES = 4_000_000  # sums held together, in float64


class Groups(NamedTuple):
    """A number for every group of nodes; a node outside of all is one by itself.

    Attributes:
        of: The group of every node.
        leaders: The first node of every group; groups are numbered in its order.
    """

    of: Int[Tensor, " node"]
    leaders: Int[Tensor, " group"]

    def largest(self, column: Shaped[Tensor, " node"]) -> Shaped[Tensor, " group"]:
        """Largest value of the members."""
        return column[self.leaders].scatter_reduce(0, self.of, column, "amax")

    def smallest(self, column: Shaped[Tensor, " node"]) -> Shaped[Tensor, " group"]:
        """Smallest value of the members."""
        return column[self.leaders].scatter_reduce(0, self.of, column, "amin")

    def shared(self, column: Int[Tensor, " node"]) -> Int[Tensor, " group"]:
        """The value that all members have, -1 where they differ."""
        least = self.smallest(column)
        return torch.where(least == self.largest(column), least, -1)

    def total(self, column: Float[Tensor, " node"]) -> Float[Tensor, " group"]:
        """Sum over the members that have a value, in float64; NaN where none has."""
        value = column.nan_to_num(0).double()
        sums = value.new_zeros(len(self.leaders)).index_add_(0, self.of, value)
        valued = torch.zeros_like(sums, dtype=torch.bool)
        valued[self.of[~column.isnan()]] = True
        return torch.where(valued, sums, torch.nan)


def groups_of(firsts: Int[Tensor, " node"]) -> Groups:
    """Number the groups.

    Args:
        firsts: The first member of every node's group.
    """
    leaders, group = firsts.unique(return_inverse=True)
    return Groups(group, leaders)


def node_numbers(n_nodes: int, nodes: Sequence[int] | Int[Tensor, " member"]) -> list[int]:
    """Node numbers that someone chose, as they stand there.

    Args:
        n_nodes: Number of nodes of the graph.
        nodes: Their numbers.

    Raises:
        ValueError: A mask in place of numbers, or a number that is no node.
    """
    given = torch.as_tensor(nodes, device="cpu")
    if len(given) and (given.dtype == torch.bool or given.is_floating_point()):
        raise ValueError(f"Nodes are given by number; found {given.dtype}. Of a mask, pass mask.nonzero()[:, 0].")
    numbers: list[int] = given.tolist()
    for node in numbers:
        if not 0 <= node < n_nodes:
            raise ValueError(f"Node {node} is not in this graph; its nodes are numbered 0 to {n_nodes - 1}.")
    return numbers


def firsts_of_groups(n_nodes: int, groups: Mapping[str, Sequence[int]]) -> Int[Tensor, " node"]:
    """Give every node the smallest number in its group, its own outside of all groups.

    Args:
        n_nodes: Number of nodes.
        groups: Node numbers by the group's name.

    Raises:
        ValueError: A group without nodes, or a node in two groups.
    """
    firsts = torch.arange(n_nodes, device="cpu")
    owner: dict[int, str] = {}
    for name, members in groups.items():
        if not len(members):
            raise ValueError(f"Group {name!r} has no nodes.")
        for node in members:
            if owner.setdefault(node, name) != name:
                raise ValueError(f"Node {node} is in the groups {owner[node]!r} and {name!r}; a node can be in one.")
        firsts[[*members]] = min(members)
    return firsts


def span_ends(n_pos: int, spans: Sequence[tuple[int, int]]) -> Int[Tensor, " pos"]:
    """Give every position the last one of its span, its own outside of all spans.

    Args:
        n_pos: Length of the prompt.
        spans: First position and the one after the last, of each span.

    Raises:
        ValueError: A span that is empty or outside the prompt, or two that overlap.
    """
    ends = torch.arange(n_pos, device="cpu")
    taken = torch.zeros_like(ends, dtype=torch.bool)
    for first, end in spans:
        if not 0 <= first < end <= n_pos:
            raise ValueError(
                f"Span ({first}, {end}) must hold a position of the prompt: 0 <= first < end <= {n_pos}, its number of "
                "tokens."
            )
        if bool(taken[first:end].any()):
            raise ValueError(f"Span ({first}, {end}) overlaps another one; a position can be in one.")
        taken[first:end] = True
        ends[first:end] = end - 1
    return ends


class Merged(NamedTuple):
    """Edges between groups.

    Attributes:
        edges: Their sums.
        inside: What edges inside each group carried, in float64.
    """

    edges: Edges
    inside: Float[Tensor, " group"]


def merged_edges(edges: Edges, groups: Groups) -> Merged:
    """Sum the edges between groups of nodes.

    Args:
        edges: Between the nodes.
        groups: Of the nodes.
    """
    n_groups = len(groups.leaders)
    rows = (edges.row_lengths > 0).nonzero()[:, 0]
    rows = rows[groups.of[rows].argsort(stable=True)]
    inside = torch.zeros_like(groups.leaders, dtype=torch.float64)
    lengths = torch.zeros_like(groups.leaders)
    sources, weights = [edges.source[:0]], [edges.weight[:0]]
    # A few groups at a time, each with a place for every source: no sort of all edges.
    few = max(1, _PLACES // max(1, n_groups))
    for first in range(0, n_groups, few):
        numbers = torch.arange(first, min(first + few, n_groups), device=rows.device)
        members = rows[torch.isin(groups.of[rows], numbers)]
        taken = rows_of(edges, members)
        place = (groups.of[members] - first).repeat_interleave(taken.row_lengths) * n_groups
        place += groups.of.index_select(0, taken.source)
        sums = inside.new_zeros(len(numbers), n_groups)
        sums.view(-1).index_add_(0, place, taken.weight.double())
        own = numbers - first, numbers
        inside[numbers] = sums[own]
        sums[own] = 0
        group, source = sums.nonzero(as_tuple=True)
        lengths[numbers] = torch.bincount(group, minlength=len(numbers))
        sources.append(source.to(torch.int32))
        weights.append(sums[group, source].to(edges.weight.dtype))
    row_start = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return Merged(Edges(row_start, torch.cat(sources), torch.cat(weights)), inside)


def stages_along(edges: Edges, stage: Int[Tensor, " node"], names: Sequence[str]) -> Int[Tensor, " node"]:
    """Raise stages where they must be for every edge to run to a larger one, and no further.

    Args:
        edges: Between the nodes.
        stage: The smallest that each node may have.
        names: Of the nodes that the error may name; empty for others.

    Raises:
        ValueError: Edges form a circle.
    """
    target, source = targets_of(edges), edges.source
    stage = stage.clone()
    backward = stage.index_select(0, source) >= stage.index_select(0, target)
    if bool(backward.any()):
        _refuse_circles(edges, names)
    while bool(backward.any()):
        stage.scatter_reduce_(0, target[backward].long(), stage[source[backward]] + 1, "amax")
        backward = stage.index_select(0, source) >= stage.index_select(0, target)
    return stage


def _refuse_circles(edges: Edges, names: Sequence[str]) -> None:
    """Take away nodes that nothing enters or leaves until none is left; what remains goes round."""
    left = edges
    while True:
        gets = left.row_lengths > 0
        leads = torch.zeros_like(gets)
        leads[left.source.long()] = True
        keep = leads[targets_of(left)] & gets.index_select(0, left.source)
        if bool(keep.all()):
            break
        left = kept(left, keep)
    if len(left.source):
        round_trip = [name for name, gets in zip(names, (left.row_lengths > 0).tolist(), strict=True) if gets and name]
        raise ValueError(
            f"Merging {round_trip} would make a circle: a path leaves such a group and comes back to it, so that no "
            "order of the nodes is left. Group nodes of one site, prune the graph first, or take the nodes between "
            "into the group."
        )
