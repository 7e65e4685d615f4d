"""Edges of an attribution graph as a few traces, such that a slider can show more or fewer of them.

1. Rank the edges by what runs through them, M[t, s] (I_t + w_t), as pruning does; a target's bias counts as a source.
2. Cut the ranking into bands: the strongest 25, the next 25, the next 50, and so on, each as many as all before.
3. A band is one trace for each sign and width, since a trace has one width. The slider shows the bands up to one.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from scope_lens.circuits.edges import row_sums, targets_of
from scope_lens.circuits.graph import AttributionGraph
from scope_lens.circuits.influence import edge_influence
from scope_lens.figures.graph_layout import Layout

POSITIVE, NEGATIVE = "#2a7fb8", "#d1603d"
_FIRST_BAND = 25
_MOST_DRAWN = 6_400
_WIDTHS = (0.5, 0.8, 1.3, 2.0, 3.0)  # pixels


class Edge(NamedTuple):
    """One edge.

    Attributes:
        source: Node number; those of bias nodes follow the graph's.
        target: Node number.
        weight: Direct effect.
        through: Influence that runs through it.
    """

    source: int
    target: int
    weight: float
    through: float


class Band(NamedTuple):
    """Edges of neighbouring ranks.

    Attributes:
        upto: Rank of the last one, counted from 1.
        traces: Their traces.
    """

    upto: int
    traces: list[go.Scatter]


def edges_of(graph: AttributionGraph, influence: Float[Tensor, " node"], bias_nodes: Mapping[int, int]) -> list[Edge]:
    """All edges and biases, strongest first.

    Args:
        graph: The graph.
        influence: Of every node.
        bias_nodes: Number of the bias node of each position that has one.
    """
    through = edge_influence(graph.edges, influence, graph.start)
    columns = (graph.edges.source, targets_of(graph.edges), graph.edges.weight, through)
    edges = [Edge(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
    targets = graph.targets
    bias = graph.bias[targets].double()
    # Bias is no part of a row when influence is shared out; here it is measured against the row.
    size = row_sums(graph.edges, graph.edges.weight.abs())[targets]
    share = bias.abs() / torch.where(size > 0, size, bias.abs().clamp(min=1e-30))
    through = share * (influence + graph.start.double())[targets]
    positions = graph.pos[targets]
    for target, pos, weight, passes in zip(
        targets.tolist(), positions.tolist(), bias.tolist(), through.tolist(), strict=True
    ):
        if weight:
            edges.append(Edge(bias_nodes[pos], target, weight, passes))
    return sorted(edges, key=lambda edge: -edge.through)


def styles(edges: Sequence[Edge]) -> list[int]:
    """Which of `pinned_traces` each edge belongs to, by its sign and its weight beside the largest one."""
    largest = max((abs(edge.weight) for edge in edges), default=1.0)
    n = len(_WIDTHS)
    return [n * (edge.weight > 0) + min(n - 1, int(n * math.sqrt(abs(edge.weight) / largest))) for edge in edges]


def bands(edges: Sequence[Edge], style: Sequence[int], place: Layout) -> list[Band]:
    """Traces of the strongest edges, band by band; behind the 6,400th none is drawn.

    Args:
        edges: Strongest first.
        style: Their styles.
        place: Where the nodes stand.
    """
    drawn = edges[:_MOST_DRAWN]
    found: list[Band] = []
    first, upto = 0, _FIRST_BAND
    while first < len(drawn):
        if len(drawn) - upto < upto / 2:
            upto = len(drawn)  # a last band of a few would be a step of the slider that changes nothing
        alike: defaultdict[int, list[Edge]] = defaultdict(list)
        for edge, own in zip(drawn[first:upto], style[first:upto], strict=True):
            alike[own].append(edge)
        opacity = max(0.22, 0.85 - 0.11 * len(found))
        traces = [_trace(alike[own], place, style=own, opacity=opacity) for own in sorted(alike)]
        found.append(Band(upto, traces))
        first, upto = upto, 2 * upto
    return found


def pinned_traces(edges: Sequence[Edge], style: Sequence[int], place: Layout) -> list[go.Scatter]:
    """One trace for each style, some without edges: those of pinned nodes, which `pin.js` fills.

    Args:
        edges: Those that are drawn.
        style: Their styles.
        place: Where the nodes stand.
    """
    own = list(zip(edges, style, strict=True))
    return [
        _trace([edge for edge, its in own if its == number], place, style=number, opacity=0.8)
        for number in range(2 * len(_WIDTHS))
    ]


def _trace(edges: Sequence[Edge], place: Layout, *, style: int, opacity: float) -> go.Scatter:
    positive, width = divmod(style, len(_WIDTHS))
    return go.Scatter(
        x=[at for edge in edges for at in (place.x[edge.source], place.x[edge.target], None)],
        y=[at for edge in edges for at in (place.y[edge.source], place.y[edge.target], None)],
        mode="lines",
        line={"color": POSITIVE if positive else NEGATIVE, "width": _WIDTHS[width]},
        opacity=opacity,
        hoverinfo="skip",
        showlegend=False,
    )
