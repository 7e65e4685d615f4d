"""Nodes of an attribution graph as traces: one for each kind of node at each kind of site, and rings around some."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go

from scope_lens.circuits.graph import AttributionGraph, Kind
from scope_lens.figures.graph_layout import Layout
from scope_lens.figures.graph_names import html, site_name

FAINT = 0.12
# Sites as in the figure of fidelity: Okabe and Ito's palette.
_COLOURS = {"MLP": "#CC79A7", "attention": "#009E73", "residual": "#0072B2", "embedding": "#E69F00"}
_OTHERS = ("#56B4E9", "#8c6bb1", "#a6761d", "#666666")
_INK = "#333333"
_SYMBOLS = {
    Kind.LATENT: "circle",
    Kind.ERROR: "diamond",
    Kind.REST: "diamond-tall",
    Kind.TOKEN: "square",
    Kind.LOGIT: "square",
    Kind.DIRECTION: "star",
}
_NO_SITE = {Kind.TOKEN, Kind.LOGIT, Kind.DIRECTION}
_RINGS = ("#d4a900", "#4d9221", "#6a51a3", "#c51b7d", "#1b7837", "#8c510a")


class NodeTrace(NamedTuple):
    """The nodes of one kind at one kind of site.

    Attributes:
        name: In the legend.
        marker: How they are drawn.
        nodes: Their numbers.
        trace: Their trace, with a point for each in this order.
    """

    name: str
    marker: dict[str, Any]
    nodes: list[int]
    trace: go.Scatter


def node_traces(
    graph: AttributionGraph,
    place: Layout,
    *,
    hover: Sequence[str],
    influence: Sequence[float],
    seen: set[int] | None,
) -> list[NodeTrace]:
    """One trace for each kind of node at each kind of site. Latents are as large as their influence.

    Args:
        graph: The graph.
        place: Where its nodes stand, and after them the biases.
        hover: What the mouse shows of each.
        influence: Of every node of the graph.
        seen: The others are drawn faint; None draws none so.
    """
    alike: defaultdict[tuple[int, str], list[int]] = defaultdict(list)
    for node, (kind, site) in enumerate(zip(graph.kind.tolist(), graph.site, strict=True)):
        alike[kind, "" if kind in _NO_SITE else site_name(site)].append(node)
    unknown = [site for site in dict.fromkeys(map(site_name, graph.site)) if site not in _COLOURS]
    colours = _COLOURS | {site: _OTHERS[number % len(_OTHERS)] for number, site in enumerate(unknown)} | {"": _INK}
    largest = max([*influence, 1e-30])
    found: list[NodeTrace] = []
    for (number, site), nodes in sorted(alike.items()):
        kind, colour = Kind(number), colours[site]
        hollow = kind in {Kind.ERROR, Kind.REST}
        marker: dict[str, Any] = {
            "symbol": _SYMBOLS[kind],
            "size": [6.5 + 8 * (influence[node] / largest) ** 0.5 if kind == Kind.LATENT else 8.5 for node in nodes],
            "color": "white" if hollow else colour,
            "line": {"color": colour if hollow else "white", "width": 1.5 if hollow else 0.8},
        }
        plural = {Kind.REST: "other latents"}.get(kind, f"{kind.name.lower()}s")
        found.append(_trace(nodes, place, hover, seen, name=f"{site} {plural}".strip(), marker=marker))
    biases = list(range(graph.n_nodes, len(place.x)))
    if biases:
        marker = {"symbol": "cross", "size": 8, "color": "#888888", "line": {"color": "white", "width": 0.8}}
        found.append(_trace(biases, place, hover, seen, name="bias", marker=marker))
    return found


def legend(traces: Sequence[NodeTrace]) -> list[go.Scatter]:
    """Entries of the legend, which stay as they are when nodes turn faint."""
    return [
        go.Scatter(
            x=[None],
            y=[None],
            mode="markers",
            marker={**one.marker, "size": 8},
            name=one.name,
            legendgroup=one.name,
        )
        for one in traces
    ]


def rings(groups: Mapping[str, Sequence[int]], place: Layout) -> list[go.Scatter]:
    """A ring around every node of a group, in the group's colour, and the group's name at its highest node."""
    traces: list[go.Scatter] = []
    for number, (name, nodes) in enumerate(groups.items()):
        colour = _RINGS[number % len(_RINGS)]
        highest = max(nodes, key=lambda node: place.y[node])
        traces.append(
            ring(
                nodes,
                place,
                colour=colour,
                name=html(name),
                mode="markers+text",
                text=[html(name) if node == highest else "" for node in nodes],
                textposition="top center",
                textfont={"color": colour, "size": 13},
            )
        )
    return traces


def ring(nodes: Sequence[int], place: Layout, *, colour: str = _INK, **settings: Any) -> go.Scatter:
    """A ring around some nodes."""
    settings = (
        {"mode": "markers", "showlegend": False} | settings | ({"showlegend": True} if "name" in settings else {})
    )
    return go.Scatter(
        x=[place.x[node] for node in nodes],
        y=[place.y[node] for node in nodes],
        marker={"symbol": "circle-open", "size": 19, "color": colour, "line": {"width": 2.2}},
        hoverinfo="skip",
        **settings,
    )


def _trace(
    nodes: list[int],
    place: Layout,
    hover: Sequence[str],
    seen: set[int] | None,
    *,
    name: str,
    marker: dict[str, Any],
) -> NodeTrace:
    opacity = [1.0 if seen is None or node in seen else FAINT for node in nodes]
    trace = go.Scatter(
        x=[place.x[node] for node in nodes],
        y=[place.y[node] for node in nodes],
        mode="markers",
        marker={**marker, "opacity": opacity},
        name=name,
        legendgroup=name,
        showlegend=False,
        hovertext=[hover[node] for node in nodes],
        hoverinfo="text",
    )
    return NodeTrace(name, marker, nodes, trace)
