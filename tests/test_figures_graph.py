"""The figure of an attribution graph: every node in its place, every edge drawn once, and a page that pins nodes."""

import json
from itertools import pairwise

import plotly.graph_objects as go
import pytest
import torch
from test_circuits_export import NAN, every_site, graph_of, graph_of_page

from scope_lens import figures
from scope_lens.circuits.graph import AttributionGraph, Kind

MLP = "blocks.0.hook_mlp_out"


@pytest.fixture(scope="module")
def addition(shared_data) -> AttributionGraph:
    """circuit-tracer's graph of "3 + 5 = " in Gemma 2 2B: 558 nodes, 22,789 edges."""
    return graph_of_page(shared_data / "attribution-graphs/3plus5-plt.json.gz")


@pytest.fixture(scope="module")
def core(addition) -> AttributionGraph:
    """Its 106 strongest nodes."""
    return addition.prune(node_mass=0.65, edge_mass=0.95)


@pytest.fixture(scope="module")
def winter(shared_data) -> AttributionGraph:
    return graph_of_page(shared_data / "attribution-graphs/sun-clt-hp.json.gz")


def small(**fields) -> AttributionGraph:
    """A token, two latents above it, an error, two logits."""
    nodes = [
        (Kind.LATENT, 0, 1, 4, MLP, "", 2.5, 0.0, 0.3),
        (Kind.LATENT, 0, 1, 7, MLP, "", 1.5, 0.0, 0.6),
        (Kind.ERROR, 0, 1, -1, MLP, "", NAN, 0.0, 0.9),
        (Kind.TOKEN, -1, 0, 2, "hook_embed", "<bos>", NAN, 0.0, 0.2),
        (Kind.TOKEN, -1, 1, 9, "hook_embed", " a&b", NAN, 0.0, 0.1),
        (Kind.LOGIT, 1, 1, 8, "ln_final.hook_out", "\n", 0.75, 0.75, NAN),
        (Kind.LOGIT, 1, 1, 3, "ln_final.hook_out", " no", 0.25, 0.25, NAN),
    ]
    weights = {(0, 4): 3.0, (0, 3): -1.0, (1, 4): 0.5, (5, 0): 2.0, (5, 1): -1.0, (5, 2): 0.5, (6, 0): -0.25}
    return graph_of(
        nodes, weights, tokens=[2, 9], strings=["<bos>", " a&b"], n_layers=1, sites=[MLP], model="me/tiny", **fields
    )


def places(figure) -> dict[int, tuple[float, float]]:
    """Where each node stands, as the traces draw it."""
    pin = figure.layout.meta["pin"]
    found = {}
    for number, nodes in enumerate(pin["nodes"]):
        trace = figure.data[pin["firstNode"] + number]
        found |= {node: (x, y) for node, x, y in zip(nodes, trace.x, trace.y, strict=True)}
    return found


def hover_of(figure, node) -> str:
    pin = figure.layout.meta["pin"]
    number = next(n for n, nodes in enumerate(pin["nodes"]) if node in nodes)
    return figure.data[pin["firstNode"] + number].hovertext[pin["nodes"][number].index(node)]


def segments(traces) -> list[tuple[tuple[float, float], tuple[float, float], str]]:
    """Ends and colour of every line that some traces draw."""
    return [
        ((trace.x[n], trace.y[n]), (trace.x[n + 1], trace.y[n + 1]), trace.line.color)
        for trace in traces
        for n in range(0, len(trace.x), 3)
    ]


def band_traces(figure):
    return figure.data[: figure.layout.meta["pin"]["firstStyle"]]


def pinned_traces(figure):
    pin = figure.layout.meta["pin"]
    return figure.data[pin["firstStyle"] : pin["ring"]]


# ---- nodes ----


def test_rows_are_sites_and_columns_are_positions():
    figure = figures.graph(every_site(layers=2, pos=4))
    rows = [
        "bias", "tokens", "embedding", "L0 attention", "L0 MLP", "L0 residual", "L0 mlp.hook_odd", "L1 attention",
        "L1 MLP", "L1 residual", "L1 mlp.hook_odd", "",
    ]  # fmt: skip
    assert list(figure.layout.yaxis.ticktext) == rows
    assert list(figure.layout.xaxis.ticktext) == ["a"] * 4
    graph, place = every_site(layers=2, pos=4), places(figure)
    heights, columns = figure.layout.yaxis.tickvals, figure.layout.xaxis.tickvals
    assert list(heights) == sorted(heights)
    lines = sorted(shape.y0 for shape in figure.layout.shapes)
    for node in range(graph.n_nodes):
        row = next(n for n, line in enumerate([*lines, 1e9]) if place[node][1] < line)
        kind, layer = int(graph.kind[node]), int(graph.layer[node])
        if kind == Kind.TOKEN:
            assert rows[row] == "tokens"
        elif kind in (Kind.LOGIT, Kind.DIRECTION):
            assert rows[row] == ""
        else:
            assert rows[row].startswith("embedding" if layer < 0 else f"L{layer} ")
        nearest = min(range(4), key=lambda pos: abs(columns[pos] - place[node][0]))
        assert nearest == int(graph.pos[node])


@pytest.mark.parametrize("name", ["addition", "winter"])
def test_real_graphs_fit_a_page_and_no_node_hides_another(name, request):
    graph = request.getfixturevalue(name)
    figure = figures.graph(graph)
    place = places(figure)
    assert {*range(graph.n_nodes)} <= place.keys()  # behind them the biases
    points = torch.tensor([*place.values()])
    apart = torch.cdist(points, points).fill_diagonal_(99)
    assert float(apart.min()) >= 10  # pixels; nodes are 7 to 14 wide
    inside = (points > 0) & (points < torch.tensor([figure.layout.xaxis.range[1], figure.layout.yaxis.range[1]]))
    assert bool(inside.all())
    assert figure.layout.width < 1300
    assert figure.layout.height < 1400
    # One unit of the axes is one pixel.
    margin = figure.layout.margin
    assert figure.layout.width - margin.l - margin.r == pytest.approx(figure.layout.xaxis.range[1])
    assert figure.layout.height - margin.t - margin.b == pytest.approx(figure.layout.yaxis.range[1])


@pytest.mark.parametrize(("n_pos", "angle"), [(1, 0), (12, 0), (64, -90), (200, -90)])
def test_short_and_long_prompts(n_pos, angle):
    sites = [MLP]
    nodes = [(Kind.LATENT, 0, pos, 3, MLP, "", 1.0, 0.0, 0.5) for pos in range(n_pos)]
    nodes += [(Kind.TOKEN, -1, pos, 5, "hook_embed", " token", NAN, 0.0, 0.5) for pos in range(n_pos)]
    nodes += [(Kind.LOGIT, 1, n_pos - 1, 5, "ln_final.hook_out", " token", 1.0, 1.0, NAN)]
    weights = {(pos, n_pos + pos): 1.0 for pos in range(n_pos)} | {(2 * n_pos, pos): 1.0 for pos in range(n_pos)}
    graph = graph_of(nodes, weights, tokens=[5] * n_pos, strings=[" token"] * n_pos, n_layers=1, sites=sites)
    figure = figures.graph(graph)
    assert figure.layout.xaxis.tickangle == angle
    assert 760 < figure.layout.width < max(1_200, 22 * n_pos + 500)
    columns = list(figure.layout.xaxis.tickvals)
    assert all(after - before >= 15 for before, after in pairwise(columns))


def test_what_the_mouse_shows():
    graph = small()
    figure = figures.graph(graph, labels={(MLP, 4): "says <b>"})
    shown = hover_of(figure, 0).split("<br>")
    influence = graph.influence()
    assert shown[0] == "<b>L0 MLP #4 says &lt;b&gt;</b>"
    assert shown[1:5] == [
        "at position 1, “a&amp;b”",
        "activation 2.5",
        f"influence {float(influence[0]):.3g} (with all above it 30%)",
        "pre-activation 2.25",
    ]
    assert shown[5:] == [
        "<i>from</i>", "  +3  token “a&amp;b”", "  -1  token “&lt;bos&gt;”", "  +0.25  bias",
        "<i>to</i>", "  +2  logit “↵”", "  -0.25  logit “no”",
    ]  # fmt: skip
    assert "probability 75.0%" in hover_of(figure, 5)
    assert "activation" not in hover_of(figure, 2).replace("pre-activation", "")
    assert list(figure.layout.xaxis.ticktext) == ["&lt;bos&gt;", "a&amp;b"]
    assert [note.text for note in figure.layout.annotations] == ["“↵” 75%", "“no” 25%"]


def test_what_pruning_dropped_is_told():
    pruned = every_site(layers=2, pos=4).prune(node_mass=0.6, edge_mass=0.8)
    node = int(pruned.targets[pruned.dropped[pruned.targets].abs().argmax()])
    assert f", of which {float(pruned.dropped[node]):.3g} was pruned" in hover_of(figures.graph(pruned), node)


def test_hover_lists_the_strongest_edges_alone(core):
    node = int(core.find(kind=Kind.LOGIT)[0])
    row = core.dense()[node].abs()
    listed = hover_of(figures.graph(core), node).split("<i>from</i>")[1].split("<br>")[1:]
    assert [abs(float(line.split()[0])) for line in listed[:5]] == pytest.approx(row.topk(5).values.tolist(), rel=5e-3)
    assert listed[5] == f"  and {int((row > 0).sum()) + 1 - 5:,} more"  # the bias is one of them


# ---- edges ----


def test_every_edge_is_drawn_once_in_the_colour_of_its_sign():
    graph = small()
    figure = figures.graph(graph)
    place = places(figure)
    dense = graph.dense()
    expected = sorted(
        (place[int(s)], place[int(t)], "#2a7fb8" if dense[t, s] > 0 else "#d1603d") for t, s in dense.nonzero()
    )
    drawn = sorted(segments(band_traces(figure)))
    bias = [line for line in drawn if line[0][1] < 25]
    assert [line for line in drawn if line not in bias] == expected
    assert len(bias) == len(graph.targets)


def test_the_slider_shows_the_strongest_edges_as_pruning_ranks_them(core):
    figure = figures.graph(core)
    (slider,) = figure.layout.sliders
    n_edges = len(core.edges.source) + len(core.targets)
    assert [step.label for step in slider.steps] == ["25", "50", "100", "200", "400", "800", f"{n_edges:,}"]
    traces = band_traces(figure)
    # M[t, s] (I_t + w_t), from the dense matrix.
    dense = core.dense().double().abs()
    influence, start = core.influence(), core.start.double()
    through = dense / dense.sum(1, keepdim=True).clamp(min=1e-10) * (influence + start)[:, None]
    place = places(figure)
    by_ends = {(place[int(s)], place[int(t)]): float(through[t, s]) for t, s in dense.nonzero()}
    for step in slider.steps:
        (shown,), indices = [step.args[0]["visible"]], step.args[1]
        assert list(indices) == list(range(len(traces)))
        lines = segments(trace for trace, there in zip(traces, shown, strict=True) if there)
        assert len(lines) == int(step.label.replace(",", ""))
        without_bias = [by_ends[a, b] for a, b, _ in lines if (a, b) in by_ends]
        weakest, n = min(without_bias), len(without_bias)
        assert sum(value > weakest * (1 + 1e-9) for value in by_ends.values()) <= n
    assert slider.steps[slider.active].label == "200"
    assert [trace.visible for trace in traces] == list(slider.steps[slider.active].args[0]["visible"])


def test_of_very_many_edges_the_strongest_are_drawn(addition):
    figure = figures.graph(addition)
    assert [step.label for step in figure.layout.sliders[0].steps] == [f"{25 * 2**n:,}" for n in range(9)]
    assert sum(len(trace.x) for trace in band_traces(figure)) == 3 * 6_400
    assert len(figure.layout.meta["pin"]["source"]) == 22_789 + len(addition.targets)  # a click shows the others too


def test_wider_is_heavier(core):
    figure = figures.graph(core)
    place = places(figure)
    dense = core.dense().abs()
    weight = {(place[int(s)], place[int(t)]): float(dense[t, s]) for t, s in dense.nonzero()}
    ranges = {}
    for trace in band_traces(figure):
        for a, b, _ in segments([trace]):
            if (a, b) in weight:
                low, high = ranges.get(trace.line.width, (9e9, 0.0))
                ranges[trace.line.width] = (min(low, weight[a, b]), max(high, weight[a, b]))
    widths = sorted(ranges)
    assert len(widths) >= 3
    for thin, thick in pairwise(widths):
        assert ranges[thin][1] <= ranges[thick][0]


# ---- pins and groups ----


def test_pinned_nodes_show_their_edges_alone():
    graph = small()
    figure = figures.graph(graph, pinned=[1])
    place = places(figure)
    assert not any(trace.visible for trace in band_traces(figure))
    drawn = [(a, b) for a, b, _ in segments(pinned_traces(figure))]
    bias = next(end for end, _ in drawn if end not in [place[n] for n in range(graph.n_nodes)])
    assert sorted(drawn) == sorted([(place[4], place[1]), (place[1], place[5]), (bias, place[1])])
    pin = figure.layout.meta["pin"]
    assert (list(figure.data[pin["ring"]].x), list(figure.data[pin["ring"]].y)) == tuple([at] for at in place[1])
    faint = {
        node
        for number, nodes in enumerate(pin["nodes"])
        for node, opacity in zip(nodes, figure.data[pin["firstNode"] + number].marker.opacity, strict=True)
        if opacity < 1
    }
    assert faint == {0, 2, 3, 6}
    assert figures.graph(graph, pinned=torch.tensor([1])).to_json() == figure.to_json()


def test_nothing_is_pinned_at_first():
    figure = figures.graph(small())
    pin = figure.layout.meta["pin"]
    assert segments(pinned_traces(figure)) == []
    assert len(figure.data[pin["ring"]].x) == 0
    opacities = [o for n in range(len(pin["nodes"])) for o in figure.data[pin["firstNode"] + n].marker.opacity]
    assert {*opacities} == {1.0}


def test_groups_have_rings_of_their_own_and_their_names():
    figure = figures.graph(small(), groups={"both": [0, 1], "<end>": [5]})
    place = places(figure)
    rings = {trace.name: trace for trace in figure.data if trace.name in ("both", "&lt;end&gt;")}
    assert [*zip(rings["both"].x, rings["both"].y, strict=True)] == [place[0], place[1]]
    assert [*rings["both"].text].count("both") == 1
    assert rings["both"].marker.color != rings["&lt;end&gt;"].marker.color
    assert rings["both"].showlegend


def test_merged_groups_are_drawn_by_their_names():
    graph = every_site(layers=2, pos=4)
    group = graph.find(kind=Kind.LATENT, site="blocks.1.hook_mlp_out", pos=2).tolist()
    merged = graph.merge({"my group": group, "errors": graph.find(kind=Kind.ERROR, layer=1, pos=2).tolist()})
    figure = figures.graph(merged)
    assert {"my group", "errors"} <= {note.text for note in figure.layout.annotations}
    assert "<b>my group</b>" in hover_of(figure, merged.label.index("my group"))
    assert any(
        row.endswith("groups") for row in figure.layout.yaxis.ticktext
    )  # errors of several sites have no one site


def test_a_page_pins_by_clicks_and_other_figures_have_no_script(tmp_path):
    figures.write_html(figures.graph(small()), tmp_path / "graph.html")
    page = (tmp_path / "graph.html").read_text()
    script = page[page.index("A click on a node pins it") :]
    assert 'figure.on("plotly_click"' in script
    assert "{plot_id}" not in page
    figures.write_html(go.Figure(go.Scatter(y=[1, 2])), tmp_path / "other.html")
    assert 'plotly_click", (event)' not in (tmp_path / "other.html").read_text()


def test_what_the_script_reads_survives_json():
    figure = json.loads(figures.graph(small(), pinned=[0]).to_json())
    pin = figure["layout"]["meta"]["pin"]
    graph = small()
    assert sorted(zip(pin["target"], pin["source"], strict=True))[: len(graph.edges.source)]
    assert len(pin["source"]) == len(pin["target"]) == len(pin["style"]) == len(graph.edges.source) + len(graph.targets)
    assert len(pin["x"]) == len(pin["y"]) == 1 + max(max(nodes) for nodes in pin["nodes"])
    assert all(0 <= style < pin["ring"] - pin["firstStyle"] for style in pin["style"])
    # Curves are numbered from the first trace; the first of nodes is the one behind the ring.
    assert figure["data"][pin["firstNode"]]["mode"] == "markers"
    assert pin["pinned"] == [0]


# ---- what cannot be drawn ----


def test_too_many_nodes_and_none_are_refused():
    sites = [MLP]
    nodes = [(Kind.LATENT, 0, 0, index, MLP, "", 1.0, 0.0, 0.5) for index in range(1_501)]
    graph = graph_of(nodes, {}, tokens=[5], strings=["a"], n_layers=1, sites=sites)
    with pytest.raises(ValueError, match=r"A graph of 1,501 nodes cannot be read in a figure.*graph.prune"):
        figures.graph(graph)
    with pytest.raises(ValueError, match="A graph of 0 nodes"):
        figures.graph(graph.subgraph([]))


@pytest.mark.parametrize("settings", [{"pinned": [7]}, {"pinned": [-1]}, {"groups": {"a": [0, 7]}}])
def test_nodes_that_are_not_there_are_refused(settings):
    with pytest.raises(ValueError, match=r"Node (7|-1) is not in this graph; its nodes are numbered 0 to 6"):
        figures.graph(small(), **settings)


def test_a_group_without_nodes_is_refused():
    with pytest.raises(ValueError, match=r"Groups \['a'\] have no nodes"):
        figures.graph(small(), groups={"a": [], "b": [1]})


def test_a_graph_without_edges_is_drawn():
    nodes = [(Kind.TOKEN, -1, 0, 5, "hook_embed", "a", NAN, 0.0, 0.5)]
    figure = figures.graph(graph_of(nodes, {}, tokens=[5], strings=["a"], n_layers=1, sites=[MLP]))
    assert not figure.layout.sliders
    assert places(figure).keys() == {0}
