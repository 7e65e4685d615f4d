"""Figures: what is drawn is what the results say."""

import dataclasses
import json
from pathlib import Path

import plotly.graph_objects as go
import pytest

from scope_lens import figures
from scope_lens.evaluation import EvalResult
from scope_lens.releases import hooks_for


def result(site="res", layer=0, *, delta=0.1, se=0.01, fvu=0.2, l0=20.0, recovered=0.9, width=1024):
    hooks = hooks_for(site, layer)
    sae = {
        **hooks._asdict(),
        "d_sae": width,
        "model": "google/gemma-2-2b",
        "release": "a/b",
        "path": f"layer_{layer}/x",
    }
    return EvalResult(
        ce_clean=2.0, ce_spliced=2.0 + delta, ce_spliced_out=2.3, ce_ablated=4.0, delta_loss=delta, delta_loss_se=se,
        delta_loss_out=0.3, loss_recovered=recovered, kl=0.05, fvu={hooks.hook_out: fvu}, l0={hooks.hook_out: l0},
        dead={hooks.hook_out: 0.0}, n_tokens=1234, n_masked=5, tokens_hash="sha256:0",
        settings={"model": "somewhere/else", "saes": [sae]},
    )  # fmt: skip


def drawn(figure, name, panel):
    """The trace of a curve in the panel of this number."""
    axis = "y" if panel == 0 else f"y{panel + 1}"
    (trace,) = (trace for trace in figure.data if trace.name == name and trace.yaxis == axis)
    return trace


def test_a_suite_is_drawn_over_layers():
    results = [
        result(site, layer, delta=0.1 * layer + shift, fvu=0.3 + shift)
        for site, shift in (("res", 0.0), ("transcoder", 0.01))
        for layer in (1, 0)
    ]
    figure = figures.fidelity(results)
    assert {trace.name for trace in figure.data} == {"residual", "transcoder"}
    assert len(figure.data) == 2 * 4
    loss = drawn(figure, "transcoder", 0)
    assert [round(x) for x in loss.x] == [0, 1]
    assert list(loss.y) == pytest.approx([0.01, 0.11])
    assert list(loss.error_y.array) == pytest.approx([0.0196, 0.0196])
    assert list(drawn(figure, "residual", 1).y) == [0.9, 0.9]
    assert list(drawn(figure, "transcoder", 2).y) == [0.31, 0.31]
    assert list(drawn(figure, "residual", 3).y) == [20.0, 20.0]
    titles = [note.text for note in figure.layout.annotations]
    assert titles[0] == "delta loss (nats per token)"
    assert "4 dictionaries of gemma-2-2b" in figure.layout.title.text
    assert "1,234 predictions, clean loss 2.000" in figure.layout.title.subtitle.text
    assert "<b>a/b/layer_1/x</b>" in loss.hovertext[1]


def test_a_ladder_is_drawn_over_l0_on_logarithmic_axes():
    ladder = [result("mlp", 3, l0=l0, delta=2 / l0) for l0 in (160.0, 10.0, 40.0)]
    figure = figures.fidelity([*ladder, result("res", 5, l0=30.0)])
    curve = next(trace for trace in figure.data if trace.name == "layer 3")
    assert list(curve.x) == [10.0, 40.0, 160.0]
    assert list(curve.y) == pytest.approx([0.2, 0.05, 0.0125])
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log"
    titles = [note.text for note in figure.layout.annotations]
    assert titles == ["residual", "MLP output", "L0 (active latents per token)"]


def x_axes(figure):
    return [figure.layout[name] for name in figure.layout if name.startswith("xaxis")]


@pytest.mark.parametrize("l0s", [(10.0, 160.0), (31.0, 38.0), (30.0, 30.0), (0.9, 2000.0)])
def test_columns_share_one_labelled_range_of_l0(l0s):
    figure = figures.fidelity([result("mlp", 3, l0=l0) for l0 in l0s] + [result("res", 5, l0=l0s[0])])
    axes = x_axes(figure)
    assert len(axes) == 6
    assert all(axis.matches == "x" for axis in axes[1:])
    assert [axis.showticklabels for axis in axes].count(False) == 4  # the bottom row keeps its labels
    (low, high), ticks = axes[0].range, axes[0].tickvals
    assert 10**low < min(l0s)
    assert max(l0s) < 10**high
    assert len(ticks) >= 3
    assert all(10**low <= tick <= 10**high for tick in ticks)


def test_a_narrow_range_of_fractions_keeps_its_ticks_apart():
    figure = figures.fidelity([result(layer=layer, recovered=0.985 + 0.004 * layer) for layer in range(3)])
    axis = figure.layout.yaxis2
    assert axis.tickformat == ".6~p"
    assert 0.98 < axis.range[0] < 0.985
    assert 0.993 < axis.range[1] < 0.995


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_cannot_be_drawn_are_counted(value):
    given = [result(layer=layer, fvu=value if layer else 0.2, recovered=value) for layer in range(3)]
    subtitle = figures.fidelity(given).layout.title.subtitle.text
    assert subtitle.endswith("intervals; 3 of 3 have no finite loss recovered; 2 of 3 have no finite FVU")
    silent = figures.fidelity([result(l0=0.0), result(l0=9.0)]).layout.title.subtitle.text
    assert silent.endswith("; 1 of 2 not drawn, with an L0 of 0")


def test_long_names_are_short_in_titles_and_whole_on_hover():
    hook, model = "blocks.12.attn.a_hook_with_a_long_name.hook_out", "me/a-model-whose-name-does-not-end-soon"
    odd = result("res", 1)
    (sae,) = odd.settings["saes"]
    changed = {"hook_in": hook, "hook_out": hook, "model": model}
    odd = dataclasses.replace(odd, settings={**odd.settings, "saes": [sae | changed]})
    figure = figures.fidelity([odd, result("att", 2)])
    short = next(note for note in figure.layout.annotations if note.text.startswith("blocks"))
    assert short.text == "blocks.12.a…ame.hook_out"
    assert len(short.text) == 24
    assert short.hovertext == hook
    trace = next(trace for trace in figure.data if trace.name == short.text)
    assert hook in trace.hovertext[0]
    assert "a-model-whose-name-does-not-end-soon" in trace.hovertext[0]
    assert "gemma-2-2b" in figure.layout.title.text
    assert "a-model-who…not-end-soon" in figure.layout.title.text


def test_widths_of_one_layer_are_curves_of_their_own():
    results = [result(l0=l0, width=width) for width in (16384, 65536) for l0 in (10.0, 20.0)]
    assert {trace.name for trace in figures.fidelity(results).data} == {"layer 0, 16k", "layer 0, 65k"}


def test_one_result_and_odd_ones():
    assert len(figures.fidelity(result()).data) == 4
    worse = result(delta=-0.01, se=float("nan"), recovered=float("nan"))
    assert list(figures.fidelity(worse).data[0].error_y.array) == [0.0]
    figure = figures.fidelity([result("embedding", None), result("res", 2)])
    assert {trace.name for trace in figure.data} == {"embedding", "layer 2"}


def test_several_dictionaries_at_once_are_one_point():
    both = result("res", 1)
    both = dataclasses.replace(
        both, settings={**both.settings, "saes": both.settings["saes"] * 2}, l0={"a": 10.0, "b": 30.0}
    )
    (trace, *_) = figures.fidelity(both).data
    assert trace.name == "several at once"
    assert list(trace.x) == [20.0]


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="results is empty"):
        figures.fidelity([])


@pytest.mark.parametrize("as_given", [str, Path])
def test_html_is_whole_and_needs_no_network(tmp_path, as_given):
    file = tmp_path / "figure.html"
    figures.write_html(go.Figure(go.Scatter(y=[1, 2])), as_given(file))
    page = file.read_text()
    assert page.rstrip().endswith("</html>")
    assert '<script src="http' not in page
    assert [entry.name for entry in tmp_path.iterdir()] == ["figure.html"]


def test_figures_survive_json():
    figure = figures.fidelity([result(), result("att", 1)])
    assert len(json.loads(figure.to_json())["data"]) == 8
