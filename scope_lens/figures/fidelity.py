"""Fidelity by site: what the model loses by each dictionary, and how much each one reconstructs.

A suite with one dictionary a site and layer is drawn over layers, a panel for each quantity and a curve for each site.
Dictionaries that differ in their L0 at one site and layer are drawn over L0, as in Gemma Scope (arXiv 2408.05147,
section 4.1): a column of panels for each site and a curve for each layer and width.

1. A point for each result: the site and layer come from the hooks in the result's settings.
2. Curves and panels, as said.
3. One look for both: units in the titles, intervals from the standard errors, names of dictionaries on hover.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from scope_lens.evaluation import EvalResult
from scope_lens.releases import SITES, Hooks, place_of, width_name

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLOURS = {
    "residual": "#0072B2",
    "MLP output": "#D55E00",
    "attention output": "#009E73",
    "transcoder": "#CC79A7",
    "embedding": "#E69F00",
    "several at once": "#333333",
}
_OTHER = "#56B4E9"
_SITE_NAMES = dict(zip(SITES, ("residual", "MLP output", "attention output", "transcoder", "embedding"), strict=True))
_NORMAL_95 = 1.96


class _Point(NamedTuple):
    """What is drawn of one result."""

    site: str
    layer: int | None
    width: int
    name: str
    result: EvalResult

    @property
    def l0(self) -> float:
        return _mean(self.result.l0.values())

    @property
    def fvu(self) -> float:
        return _mean(self.result.fvu.values())

    @property
    def interval(self) -> float:
        se = self.result.delta_loss_se
        return 0.0 if math.isnan(se) else _NORMAL_95 * se

    @property
    def cell(self) -> tuple[int, int]:
        """Layer and width, with -1 for no layer."""
        return (-1 if self.layer is None else self.layer, self.width)


class _Panel(NamedTuple):
    """One quantity: its title with the unit, its value, and the format of its ticks."""

    title: str
    value: Callable[[_Point], float]
    ticks: str = ""
    range: str = "tozero"
    interval: bool = False


_LOSS = _Panel("delta loss (nats per token)", lambda p: p.result.delta_loss, interval=True)
_RECOVERED = _Panel("loss recovered", lambda p: p.result.loss_recovered, ticks=".0%", range="normal")
_FVU = _Panel("variance unexplained (FVU)", lambda p: p.fvu)
_L0 = _Panel("L0 (active latents per token)", lambda p: p.l0)


def fidelity(results: EvalResult | Sequence[EvalResult]) -> go.Figure:
    """Draw delta loss, loss recovered, FVU and L0 by site.

    Bars are 95 % intervals from the standard error, clustered by sequence. A result of several dictionaries spliced at
    once is one point, with the mean of their FVU and L0.

    Args:
        results: What `evaluate` returned, once or several times.

    Returns:
        Panels over layers; over L0 where a site and layer has several results.

    Raises:
        ValueError: There are no results.
    """
    points = [_point(result) for result in ([results] if isinstance(results, EvalResult) else results)]
    if not points:
        raise ValueError("There is nothing to draw: results is empty. Give what evaluate returned.")
    places = {(point.site, point.layer) for point in points}
    over_layers = len(places) == len(points) and all(point.layer is not None for point in points)
    return _dress(_over_layers(points) if over_layers else _over_l0(points), points)


def _point(result: EvalResult) -> _Point:
    saes: list[dict[str, Any]] = result.settings["saes"]
    if len(saes) > 1:
        return _Point("several at once", None, 0, f"{len(saes)} dictionaries", result)
    sae = saes[0]
    place = place_of(Hooks(sae["hook_in"], sae["hook_out"]))
    site = _SITE_NAMES[place.site] if place else sae["hook_out"]
    name = "/".join(part for part in (sae["release"], sae["path"]) if part) or sae["hook_out"]
    return _Point(site, place.layer if place else None, sae["d_sae"], name, result)


def _over_layers(points: Sequence[_Point]) -> go.Figure:
    panels = (_LOSS, _RECOVERED, _FVU, _L0)
    sites = _sites(points)
    figure = make_subplots(rows=2, cols=2, subplot_titles=[p.title for p in panels], vertical_spacing=0.13)
    for index, panel in enumerate(panels):
        row, col = index // 2 + 1, index % 2 + 1
        for number, site in enumerate(sites):
            curve = sorted((p for p in points if p.site == site), key=lambda p: p.cell)
            # Sites stand side by side at a layer, so that no interval hides another.
            shift = 0.07 * (number - (len(sites) - 1) / 2)
            x = [p.cell[0] + shift for p in curve]
            trace = _trace(curve, panel, x=x, colour=_COLOURS.get(site, _OTHER), name=site, legend=index == 0)
            figure.add_trace(trace, row=row, col=col)
        figure.update_yaxes(tickformat=panel.ticks, rangemode=panel.range, row=row, col=col)
    figure.update_xaxes(dtick=max(1, len({p.layer for p in points}) // 12), zeroline=False)
    figure.update_xaxes(title="layer", row=2)
    return figure.update_layout(height=820)


def _over_l0(points: Sequence[_Point]) -> go.Figure:
    panels = (_LOSS, _FVU, _RECOVERED)
    sites = _sites(points)
    figure = make_subplots(
        rows=len(panels),
        cols=len(sites),
        column_titles=sites,
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.02,
        vertical_spacing=0.05,
    )
    cells = sorted({point.cell for point in points})
    widths = {width for _, width in cells}
    places = [index / max(1, len(cells) - 1) for index in range(len(cells))]
    colours = dict(zip(cells, map(str, sample_colorscale("Viridis", [0.9 * p for p in places])), strict=True))
    named: set[tuple[int, int]] = set()
    for row, panel in enumerate(panels, start=1):
        for col, site in enumerate(sites, start=1):
            own = sorted((p for p in points if p.site == site), key=lambda p: (*p.cell, p.l0))
            for cell, group in groupby(own, key=lambda p: p.cell):
                curve = list(group)
                name = f"layer {cell[0]}" if cell[0] >= 0 else site
                if len(widths) > 1 and cell[1]:
                    name += f", {width_name(cell[1])}"
                x = [p.l0 for p in curve]
                trace = _trace(curve, panel, x=x, colour=colours[cell], name=name, legend=cell not in named)
                named.add(cell)
                figure.add_trace(trace, row=row, col=col)
        values = [panel.value(point) for point in points]
        if panel is not _RECOVERED and _spans_decades(values):
            figure.update_yaxes(type="log", tickvals=_ticks(values), row=row)
        else:
            figure.update_yaxes(rangemode=panel.range, tickformat=panel.ticks, row=row)
        figure.update_yaxes(title=panel.title, row=row, col=1)
    figure.update_xaxes(type="log", tickvals=_ticks([point.l0 for point in points]))
    figure.update_xaxes(title="L0 (active latents per token)", row=len(panels))
    return figure.update_layout(height=900)


def _sites(points: Sequence[_Point]) -> list[str]:
    """The sites that there are, Gemma Scope's in its order and others after them."""
    return [
        site for site in dict.fromkeys([*_COLOURS, *(p.site for p in points)]) if any(p.site == site for p in points)
    ]


def _trace(
    curve: Sequence[_Point], panel: _Panel, *, x: Sequence[float], colour: str, name: str, legend: bool
) -> go.Scatter:
    bars = {"array": [point.interval for point in curve], "thickness": 1.5, "width": 4}
    return go.Scatter(
        x=x,
        y=[panel.value(point) for point in curve],
        error_y=bars if panel.interval else None,
        mode="lines+markers",
        line={"color": colour, "width": 2},
        marker={"color": colour, "size": 9, "line": {"color": "white", "width": 1}},
        name=name,
        legendgroup=name,
        showlegend=legend,
        cliponaxis=False,
        hovertext=[_hover(point) for point in curve],
        hoverinfo="text",
    )


def _hover(point: _Point) -> str:
    result = point.result
    return "<br>".join(
        (
            f"<b>{point.name}</b>",
            f"{point.site}, layer {point.layer}, width {width_name(point.width)}" if point.width else point.site,
            f"L0 {point.l0:.1f}, FVU {point.fvu:.3f}",
            f"delta loss {result.delta_loss:.4f} ± {result.delta_loss_se:.4f} nats per token (standard error)",
            f"delta loss, splice-out {result.delta_loss_out:.4f}",
            f"loss recovered {result.loss_recovered:.2%}, KL {result.kl:.4f}",
        )
    )


def _spans_decades(values: Sequence[float]) -> bool:
    """Whether a logarithmic axis shows the values better than one from zero."""
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) > 10 * min(finite)


def _ticks(values: Sequence[float]) -> list[float]:
    """1, 2 and 5 of every decade near the values, for a logarithmic axis."""
    finite = [value for value in values if 0 < value < math.inf]
    if not finite:
        return []
    decades = range(math.floor(math.log10(min(finite))), math.ceil(math.log10(max(finite))) + 1)
    return [step * 10.0**decade for decade in decades for step in (1, 2, 5)]


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _model(result: EvalResult) -> str:
    """The language model as the dictionaries name it, else as it was loaded, without the folders above it."""
    return str(result.settings["saes"][0]["model"] or result.settings["model"]).rstrip("/").rsplit("/", maxsplit=1)[-1]


def _dress(figure: go.Figure, points: Sequence[_Point]) -> go.Figure:
    """Title, legend and one plain look."""
    n = len(points)
    models = ", ".join(sorted({_model(point.result) for point in points}))
    tokens = sorted({point.result.n_tokens for point in points})
    predictions = f"{tokens[0]:,}" if len(tokens) == 1 else f"{tokens[0]:,} to {tokens[-1]:,}"
    clean = _mean(point.result.ce_clean for point in points)
    alone = all(len(point.result.settings["saes"]) == 1 for point in points)
    figure.update_xaxes(showline=True, linecolor="#888", gridcolor="#eee", ticks="outside", tickcolor="#888")
    figure.update_yaxes(showline=True, linecolor="#888", gridcolor="#eee", zerolinecolor="#888", zerolinewidth=1)
    figure.update_annotations(font_size=16)
    return figure.update_layout(
        title={
            "text": f"<b>Fidelity by site: {n} {'dictionary' if n == 1 else 'dictionaries'} of {models}</b>",
            "subtitle": {
                "text": f"{'each spliced in by itself' if alone else 'spliced in'}; {predictions} predictions, clean "
                f"loss {clean:.3f} nats per token; bars are 95 % intervals"
            },
            "x": 0.01,
            "yref": "container",
            "y": 0.965,
        },
        legend={"orientation": "v", "x": 1.02, "y": 1, "tracegroupgap": 4},
        template="plotly_white",
        font={"family": "Helvetica, Arial, sans-serif", "size": 14, "color": "#222"},
        hoverlabel={"bgcolor": "white", "font_size": 13, "align": "left"},
        margin={"t": 125, "r": 40, "l": 70, "b": 60},
        width=1180,
    )
