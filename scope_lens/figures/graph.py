"""An attribution graph: positions from left to right, tokens below, layers above them, what was asked for on top.

1. Every node has a place (`graph_layout`): its column is its position, its row its site.
2. Edges are coloured by sign and as wide as their weight (`graph_edges`). A slider shows more or fewer of them.
3. The mouse shows what a node is, its activation and influence, and its strongest edges (`graph_names`).
4. Pinned nodes show their edges alone, all of them. `pinned` says which they are at first; in a page that `write_html`
   made, a click on a node pins or frees it (`pin.js`).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go
from jaxtyping import Int
from torch import Tensor

from scope_lens.circuits.graph import AttributionGraph, Kind
from scope_lens.circuits.merging import node_numbers
from scope_lens.figures.axes import elide
from scope_lens.figures.graph_edges import NEGATIVE, POSITIVE, Band, bands, edges_of, pinned_traces, styles
from scope_lens.figures.graph_layout import Cell, Layout, lay_out, stand_upright
from scope_lens.figures.graph_names import bias_text, hover_texts, html, names, site_name, visible
from scope_lens.figures.graph_nodes import FAINT, legend, node_traces, ring, rings

_MOST_NODES = 1_500
_SHOWN_AT_FIRST = 200
_ENTRY = 190  # pixels of one entry of the legend
_LEFT, _RIGHT, _TOP = 125, 100, 160
_ENDS = {Kind.LOGIT, Kind.DIRECTION}
_TOKENS, _ASKED = -2, 2**31  # rows below and above those of sites


def graph(
    graph: AttributionGraph,
    *,
    labels: Mapping[tuple[str, int], str] | None = None,
    pinned: Sequence[int] | Int[Tensor, " pinned"] = (),
    groups: Mapping[str, Sequence[int] | Int[Tensor, " grouped"]] | None = None,
) -> go.Figure:
    """Draw an attribution graph.

    Args:
        graph: The graph, pruned: at most 1,500 nodes.
        labels: Texts for latents, by site (as `graph.sites` spells it) and number.
        pinned: Node numbers. The edges into and out of them are drawn alone, and what they do not touch is faint.
        groups: Node numbers by a name. Each group gets a ring of its own colour and its name; `AttributionGraph.merge`
            makes one node of a group instead.

    Raises:
        ValueError: No nodes, more than can be read, or a node number that the graph does not have.
    """
    if not 0 < graph.n_nodes <= _MOST_NODES:
        raise ValueError(
            f"A graph of {graph.n_nodes:,} nodes cannot be read in a figure, which takes 1 to {_MOST_NODES:,}. Prune "
            "it first: graph.prune(node_mass=...)."
        )
    chosen = node_numbers(graph.n_nodes, pinned)
    named = {name: node_numbers(graph.n_nodes, members) for name, members in (groups or {}).items()}
    if empty := [name for name, members in named.items() if not members]:
        raise ValueError(f"Groups {empty} have no nodes.")
    influence = graph.influence()
    targets = graph.targets
    bias_at = graph.pos[targets][graph.bias[targets] != 0].unique().tolist()
    bias_nodes = {pos: graph.n_nodes + number for number, pos in enumerate(bias_at)}
    rows = _rows(graph, bias=bool(bias_at))
    cells = [*map(Cell, rows.of, graph.pos.tolist()), *(Cell(0, pos) for pos in bias_at)]
    words = [elide(visible(token)) for token in graph.token_strings]
    place = lay_out(cells, [*influence.tolist(), *(0.0 for _ in bias_at)], words=words)
    edges = edges_of(graph, influence, bias_nodes)
    called = [*names(graph, labels or {}), *("bias" for _ in bias_at)]
    hover = hover_texts(graph, called, edges, influence.tolist())
    hover += [
        bias_text(pos, [edge for edge in edges if edge.source == node], called) for pos, node in bias_nodes.items()
    ]

    style = styles(edges)
    drawn = bands(edges, style, place)
    pins = {*chosen}
    own = [number for number, edge in enumerate(edges) if {edge.source, edge.target} & pins]
    seen = pins | {end for number in own for end in (edges[number].source, edges[number].target)}
    nodes = node_traces(graph, place, hover=hover, influence=influence.tolist(), seen=seen if pins else None)
    in_bands = [trace for band in drawn for trace in band.traces]
    of_pinned = pinned_traces([edges[number] for number in own], [style[number] for number in own], place)
    before_nodes = [*in_bands, *of_pinned, ring(chosen, place)]
    figure = go.Figure([*before_nodes, *(one.trace for one in nodes), *legend(nodes), *rings(named, place)])
    clicks = {
        "x": place.x,
        "y": place.y,
        "source": [edge.source for edge in edges],
        "target": [edge.target for edge in edges],
        "style": style,
        "pinned": chosen,
        "nodes": [one.nodes for one in nodes],
        "faint": FAINT,
        "firstStyle": len(in_bands),
        "ring": len(before_nodes) - 1,
        "firstNode": len(before_nodes),
    }
    figure.update_layout(meta={"pin": clicks})
    _axes(figure, place, rows.names, words)
    _name_ends(figure, graph, place)
    _slide(figure, drawn, hidden=bool(pins))
    return _dress(figure, graph, place, words=words, n_entries=len(nodes) + len(named))


class _Rows(NamedTuple):
    """The rows of the figure, from below.

    Attributes:
        names: Of every row.
        of: Row of every node.
    """

    names: list[str]
    of: list[int]


def _rows(graph: AttributionGraph, *, bias: bool) -> _Rows:
    """One row for the bias, the tokens, each site in the order of the graph, and what was asked for."""
    columns = zip(graph.kind.tolist(), graph.layer.tolist(), graph.stage.tolist(), graph.site, strict=True)
    keys: list[tuple[int, str]] = []
    heights: dict[tuple[int, str], int] = {}
    for kind, layer, stage, site in columns:
        if kind == Kind.TOKEN:
            key, height = (_TOKENS, "tokens"), _TOKENS
        elif kind in _ENDS:
            key, height = (_ASKED, ""), _ASKED
        else:
            key, height = (layer, site_name(site)), stage
        keys.append(key)
        heights[key] = min(heights.get(key, height), height)
    order = sorted(heights, key=lambda key: heights[key])
    one_kind = len({site for layer, site in order if 0 <= layer < _ASKED}) == 1

    def name(layer: int, site: str) -> str:
        if not 0 <= layer < _ASKED:
            return site
        return f"layer {layer}" if one_kind else f"L{layer} {elide(site)}"

    below = ["bias"] if bias else []
    number = {key: row for row, key in enumerate(order, start=len(below))}
    return _Rows([*below, *(name(*key) for key in order)], [number[key] for key in keys])


def _axes(figure: go.Figure, place: Layout, rows: Sequence[str], words: Sequence[str]) -> None:
    between = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "line": {"color": "#eeeeee", "width": 1}}
    figure.update_layout(shapes=[{**between, "y0": line, "y1": line, "layer": "below"} for line in place.lines])
    figure.update_xaxes(showgrid=False, zeroline=False, ticks="")
    figure.update_yaxes(showgrid=False, zeroline=False, ticks="")
    angle = -90 if stand_upright(words) else 0
    figure.update_xaxes(range=(0, place.width), tickvals=place.columns, ticktext=[*map(html, words)], tickangle=angle)
    figure.update_yaxes(range=(0, place.height), tickvals=place.rows, ticktext=[*rows])


def _name_ends(figure: go.Figure, graph: AttributionGraph, place: Layout) -> None:
    """Write what was asked for above the nodes on top, and the names of merged groups."""
    notes: list[dict[str, Any]] = []
    for node, kind in enumerate(graph.kind.tolist()):
        if kind in _ENDS:
            word = html(graph.label[node])
            text = f"“{word}” {float(graph.activation[node]):.0%}" if kind == Kind.LOGIT else word
            notes.append({"x": place.x[node], "y": place.y[node] + 7, "text": text})
        elif kind != Kind.TOKEN and graph.label[node]:
            name = html(graph.label[node])
            place_of_name = {"textangle": 0, "xanchor": "center", "font": {"size": 12, "weight": 600}}
            notes.append({"x": place.x[node], "y": place.y[node] + 5, "text": name, **place_of_name})
    look = {"showarrow": False, "textangle": -45, "xanchor": "left", "yanchor": "bottom", "font": {"size": 12}}
    figure.update_layout(annotations=[{**look, **note} for note in notes])


def _slide(figure: go.Figure, drawn: Sequence[Band], *, hidden: bool) -> None:
    """Add the slider, whose steps show the bands up to one, and show what it stands at.

    Args:
        figure: Its first traces are those of the bands.
        drawn: The bands.
        hidden: Whether no band is shown until the slider is moved.
    """
    ends = [0]
    for band in drawn:
        ends.append(ends[-1] + len(band.traces))
    traces = list(range(ends[-1]))
    steps = [
        {
            "label": f"{band.upto:,}",
            "method": "restyle",
            "args": [{"visible": [trace < end for trace in traces]}, traces],
        }
        for band, end in zip(drawn, ends[1:], strict=True)
    ]
    active = next((n for n, band in enumerate(drawn) if band.upto >= _SHOWN_AT_FIRST), len(drawn) - 1)
    for trace in traces:
        figure.data[trace].visible = not hidden and trace < ends[active + 1]
    if len(steps) > 1:
        current = {"prefix": "strongest edges shown: ", "font": {"size": 13}}
        figure.update_layout(sliders=[{"active": active, "steps": steps, "currentvalue": current, "len": 0.62}])


def _dress(
    figure: go.Figure, graph: AttributionGraph, place: Layout, *, words: Sequence[str], n_entries: int
) -> go.Figure:
    """Title, legend and one plain look, in a size that leaves room for all of it.

    Args:
        figure: What is dressed.
        graph: What it draws.
        place: Where.
        words: What stands under the columns.
        n_entries: Entries of the legend.
    """
    under = 8 * max(map(len, words)) if stand_upright(words) else 20
    legend = 22 * -(-n_entries // max(1, int(place.width // _ENTRY)))
    slider = 90 if figure.layout.sliders else 0
    scores = graph.scores()
    n_edges, n_biases = len(graph.edges.source), int((graph.bias[graph.targets] != 0).sum())
    figure.update_layout(
        title={
            "text": f"<b>Attribution graph: {html(elide(graph.model.rstrip('/').rsplit('/', maxsplit=1)[-1]))}</b>",
            "subtitle": {
                "text": f"{graph.n_nodes:,} nodes, {n_edges:,} edges, {n_biases:,} biases; "
                f"replacement {scores.replacement:.2f}, completeness {scores.completeness:.2f}; "
                f"<span style='color:{POSITIVE}'>positive</span> and "
                f"<span style='color:{NEGATIVE}'>negative</span> effects, as wide as their weight"
            },
            "x": 0.01,
            "yref": "container",
            "y": 1 - 30 / (place.height + _TOP + under + legend + slider + 30),
            "yanchor": "top",
        },
        width=place.width + _LEFT + _RIGHT,
        height=place.height + _TOP + under + legend + slider + 30,
        margin={"t": _TOP, "b": under + legend + slider + 30, "l": _LEFT, "r": _RIGHT, "autoexpand": False},
        legend={
            "orientation": "h",
            "x": 0,
            "y": -(under + 12) / place.height,
            "yanchor": "top",
            "entrywidth": _ENTRY - 45,
            "tracegroupgap": 0,
        },
        template="plotly_white",
        hovermode="closest",
        font={"family": "Helvetica, Arial, sans-serif", "size": 13, "color": "#222"},
        hoverlabel={"bgcolor": "white", "font_size": 12, "align": "left"},
    )
    if slider:
        figure.layout.sliders[0].update(y=-(under + legend + 26) / place.height, x=0, pad={"t": 0})
    return figure
