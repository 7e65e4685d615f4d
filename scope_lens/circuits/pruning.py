"""Pruning: the nodes, and between them the edges, that hold most of the influence.

The definition is that of circuit-tracer (Hanna and Piotrowski, after Ameisen et al. 2025), so that results compare:

1. Nodes by influence, most influential first, until their sum reaches `node_mass` of all influence; ties stay together.
   Tokens and start targets stay whatever they have.
2. Rows are normalised again over what is left, and edges stay by M[t, s] (I_t + w_t) until they reach `edge_mass`.
3. Latents and errors that lead nowhere any more go, and so do latents that lost every input, until none does.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from scope_lens.circuits.edges import Edges, Part, kept, part, row_sums, targets_of
from scope_lens.circuits.influence import edge_influence, influence


class Pruned(NamedTuple):
    """What stays.

    Attributes:
        nodes: Numbers of the nodes, ascending.
        part: The edges between them, and what their rows lose.
        cumulative: Share of all influence held by the nodes up to each one, most influential first; of all nodes.
    """

    nodes: Int[Tensor, " kept"]
    part: Part
    cumulative: Float[Tensor, " node"]


def prune(
    edges: Edges,
    stage: Int[Tensor, " node"],
    start: Float[Tensor, " node"],
    *,
    always: Bool[Tensor, " node"],
    fed: Bool[Tensor, " node"],
    node_mass: float,
    edge_mass: float,
) -> Pruned:
    """Choose the nodes and edges that stay.

    Args:
        edges: Direct effects.
        stage: Place of every node in the order of the graph.
        start: Start weight of every node.
        always: Nodes that stay whatever they have.
        fed: Nodes that go when they have no edge into them.
        node_mass: Share of all influence that the nodes which stay reach, from 0 to 1; 1 keeps all.
        edge_mass: The same of edges.

    Raises:
        ValueError: A mass that is no share.
    """
    check_masses(node_mass=node_mass, edge_mass=edge_mass)
    received = influence(edges, stage, start)
    likely = (holds_mass(received, node_mass) | always).nonzero()[:, 0]
    stage, start, always, fed = stage[likely], start[likely], always[likely], fed[likely]
    inner, lost = part(edges, likely)
    chosen = holds_mass(edge_influence(inner, influence(inner, stage, start), start), edge_mass)
    lost += row_sums(inner, inner.weight * ~chosen)
    inner = kept(inner, chosen)
    stay = _connected(inner, always=always, fed=fed)
    edges, more = part(inner, stay)
    return Pruned(likely[stay], Part(edges, lost[stay] + more), cumulative(received))


def check_masses(*, node_mass: float, edge_mass: float) -> None:
    """Refuse masses that are no shares of all influence.

    Raises:
        ValueError: One that is not from 0 to 1.
    """
    for name, mass in (("node_mass", node_mass), ("edge_mass", edge_mass)):
        if not 0 <= mass <= 1:
            raise ValueError(f"{name} is a share of all influence, from 0 to 1; it is {mass}.")


def holds_mass(scores: Float[Tensor, " score"], mass: float) -> Bool[Tensor, " score"]:
    """Mark the largest scores that together reach `mass` of the sum, ties included; all where `mass` is 1.

    No score of zero is marked otherwise.

    Args:
        scores: None negative.
        mass: Share of their sum.
    """
    if mass == 1:
        return torch.ones_like(scores, dtype=torch.bool)
    if not bool((scores > 0).any()):
        return torch.zeros_like(scores, dtype=torch.bool)
    # Only the scores near the threshold are sorted: the leading bits of a positive float order it among the others.
    bins = scores.float().view(torch.int32) >> 16
    from_above = torch.bincount(bins, weights=scores.double()).flip(0).cumsum(0).flip(0)
    goal = mass * float(from_above[0])
    at = int((from_above >= goal).nonzero()[-1])
    near = scores[bins == at].double().sort(descending=True).values
    above = float(from_above[at + 1]) if at + 1 < len(from_above) else 0.0
    number = int(torch.searchsorted(above + near.cumsum(0), goal))
    threshold = near[min(number, len(near) - 1)]
    return (scores >= threshold) & (scores > 0)


def cumulative(scores: Float[Tensor, " score"]) -> Float[Tensor, " score"]:
    """Share of the sum held by the scores up to each one, the largest first; NaN where all are zero."""
    ordered, order = scores.double().sort(descending=True, stable=True)
    return torch.empty_like(ordered).index_copy_(0, order, ordered.cumsum(0) / ordered.sum())


def _connected(edges: Edges, *, always: Tensor, fed: Tensor) -> Tensor:
    """Take away nodes without an edge out of them, and fed ones without one into them, until all others have them."""
    stay = torch.ones_like(always)
    target, source = targets_of(edges), edges.source
    while True:
        leads, gets = torch.zeros_like(stay), torch.zeros_like(stay)
        leads[source.long()] = True
        gets[target.long()] = True
        left = stay & (always | (leads & (gets | ~fed)))
        if torch.equal(left, stay):
            return stay.nonzero()[:, 0]
        stay = left
        alive = stay.index_select(0, source) & stay.index_select(0, target)
        source, target = source[alive], target[alive]
