"""Fidelity by site: what the model loses by each dictionary, and how much each one reconstructs.

A suite with one dictionary a site and layer is drawn over layers, a panel for each quantity and a curve for each site.
Dictionaries that differ in their L0 at one site and layer are drawn over L0, as in Gemma Scope (arXiv 2408.05147,
section 4.1): a column of panels for each site and a curve for each layer and width.

1. A point for each result: the site and layer come from the hooks in the result's settings.
2. Curves and panels, as said.
3. One look for both: units in the titles, intervals from the standard errors, whole names on hover, and a note of what
   no axis can show.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from scope_lens.evaluation import EvalResult
from scope_lens.figures.axes import elide, linear_range, log_axis
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
    """One quantity: its name, its title with the unit, its value, and the format of its ticks."""

    name: str
    title: str
    value: Callable[[_Point], float]
    ticks: str = ""
    from_zero: bool = True
    interval: bool = False


_LOSS = _Panel("delta loss", "delta loss (nats per token)", lambda p: p.result.delta_loss, interval=True)
# Six digits without trailing zeros: ticks of a narrow range stay distinct.
_RECOVERED = _Panel(
    "loss recovered", "loss recovered", lambda p: p.result.loss_recovered, ticks=".6~p", from_zero=False
)
_FVU = _Panel("FVU", "variance unexplained (FVU)", lambda p: p.fvu)
_L0 = _Panel("L0", "L0 (active latents per token)", lambda p: p.l0)
_PANELS = (_LOSS, _RECOVERED, _FVU, _L0)
_WIDTH = 1180
# Pixels: a column, a character of its title, and what stands beside the columns.
_COLUMN, _CHARACTER, _BESIDE = 150, 9, 320


def fidelity(results: EvalResult | Sequence[EvalResult]) -> go.Figure:
    """Draw delta loss, loss recovered, FVU and L0 by site.

    Bars are 95 % intervals from the standard error, clustered by sequence. A result of several dictionaries spliced at
    once is one point, with the mean of their FVU and L0. Values that are not finite cannot be drawn; the subtitle
    counts them.

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
    return _dress(_over_layers(points) if over_layers else _over_l0(points), points, log_l0=not over_layers)


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
    sites = _sites(points)
    figure = make_subplots(rows=2, cols=2, subplot_titles=[p.title for p in _PANELS], vertical_spacing=0.13)
    for index, panel in enumerate(_PANELS):
        row, col = index // 2 + 1, index % 2 + 1
        for number, site in enumerate(sites):
            curve = sorted((p for p in points if p.site == site), key=lambda p: p.cell)
            # Sites stand side by side at a layer, so that no interval hides another.
            shift = 0.07 * (number - (len(sites) - 1) / 2)
            x = [p.cell[0] + shift for p in curve]
            trace = _trace(curve, panel, x=x, colour=_COLOURS.get(site, _OTHER), name=site, legend=index == 0)
            figure.add_trace(trace, row=row, col=col)
        figure.update_yaxes(tickformat=panel.ticks, range=_range(points, panel), row=row, col=col)
    layers = [point.cell[0] for point in points]
    ends = (min(layers) - 0.4, max(layers) + 0.4)
    figure.update_xaxes(dtick=max(1, len(set(layers)) // 12), range=ends, zeroline=False)
    figure.update_xaxes(title="layer", row=2)
    return figure.update_layout(height=820, width=_WIDTH)


def _over_l0(points: Sequence[_Point]) -> go.Figure:
    panels = (_LOSS, _FVU, _RECOVERED)
    sites = _sites(points)
    figure = make_subplots(
        rows=len(panels),
        cols=len(sites),
        column_titles=[elide(site) for site in sites],
        x_title=_L0.title,
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.02 if len(sites) < 8 else 0.005,
        vertical_spacing=0.05,
    )
    # The titles of the columns come first, then the one of all x axes.
    for title, site in zip(figure.select_annotations(), sites, strict=False):
        title.update(hovertext=site)
    cells = sorted({point.cell for point in points})
    widths = {width for _, width in cells}
    places = [index / max(1, len(cells) - 1) for index in range(len(cells))]
    colours = dict(zip(cells, map(str, sample_colorscale("Viridis", [0.9 * p for p in places])), strict=True))
    named: set[str] = set()
    for row, panel in enumerate(panels, start=1):
        for col, site in enumerate(sites, start=1):
            own = sorted((p for p in points if p.site == site), key=lambda p: (*p.cell, p.l0))
            for cell, group in groupby(own, key=lambda p: p.cell):
                curve = list(group)
                name = f"layer {cell[0]}" if cell[0] >= 0 else site
                if len(widths) > 1 and cell[1]:
                    name += f", {width_name(cell[1])}"
                x = [p.l0 for p in curve]
                trace = _trace(curve, panel, x=x, colour=colours[cell], name=name, legend=name not in named)
                named.add(name)
                figure.add_trace(trace, row=row, col=col)
        values = [panel.value(point) for point in points]
        axis = log_axis(_spread(points, panel))
        if panel is not _RECOVERED and axis is not None and _spans_a_decade(values):
            figure.update_yaxes(type="log", range=axis.range, tickvals=axis.ticks, row=row)
        else:
            figure.update_yaxes(range=_range(points, panel), tickformat=panel.ticks, row=row)
        figure.update_yaxes(title=panel.title, row=row, col=1)
    axis = log_axis([point.l0 for point in points])
    figure.update_xaxes(type="log", matches="x")
    if axis is not None:
        figure.update_xaxes(range=axis.range, tickvals=axis.ticks)
    column = max(_COLUMN, *(_CHARACTER * len(elide(site)) for site in sites))
    return figure.update_layout(height=900, width=max(_WIDTH, _BESIDE + column * len(sites)))


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
        name=elide(name),
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
            f"of {_model(result)}",
            f"{point.site}, layer {point.layer}, width {width_name(point.width)}" if point.width else point.site,
            f"L0 {point.l0:.1f}, FVU {point.fvu:.3f}",
            f"delta loss {result.delta_loss:.4f} ± {result.delta_loss_se:.4f} nats per token (standard error)",
            f"delta loss, splice-out {result.delta_loss_out:.4f}",
            f"loss recovered {result.loss_recovered:.2%}, KL {result.kl:.4f}",
        )
    )


def _spread(points: Sequence[_Point], panel: _Panel) -> list[float]:
    """Everything that is drawn of a quantity: its values, and both ends of their intervals."""
    sides = (-1, 1) if panel.interval else (0,)
    return [panel.value(point) + side * point.interval for point in points for side in sides]


def _range(points: Sequence[_Point], panel: _Panel) -> tuple[float, float] | None:
    return linear_range(_spread(points, panel), from_zero=panel.from_zero)


def _spans_a_decade(values: Sequence[float]) -> bool:
    """Whether a logarithmic axis shows the values better than one from zero."""
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) > 10 * min(finite)


def _missing(points: Sequence[_Point], *, log_l0: bool) -> list[str]:
    """What the axes leave out, a note for each quantity."""
    n = len(points)
    counts = [(panel.name, sum(not math.isfinite(panel.value(point)) for point in points)) for panel in _PANELS]
    notes = [f"{count} of {n} {'has' if count == 1 else 'have'} no finite {name}" for name, count in counts if count]
    silent = sum(point.l0 == 0 for point in points) if log_l0 else 0
    return [*notes, f"{silent} of {n} not drawn, with an L0 of 0"] if silent else notes


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _model(result: EvalResult) -> str:
    """The language model as the dictionaries name it, else as it was loaded, without the folders above it."""
    return str(result.settings["saes"][0]["model"] or result.settings["model"]).rstrip("/").rsplit("/", maxsplit=1)[-1]


def _dress(figure: go.Figure, points: Sequence[_Point], *, log_l0: bool) -> go.Figure:
    """Title, legend and one plain look."""
    n = len(points)
    names = sorted({_model(point.result) for point in points})
    models = ", ".join(map(elide, names)) if len(names) <= 3 else f"{len(names)} models"
    tokens = sorted({point.result.n_tokens for point in points})
    predictions = f"{tokens[0]:,}" if len(tokens) == 1 else f"{tokens[0]:,} to {tokens[-1]:,}"
    clean = _mean(point.result.ce_clean for point in points)
    alone = all(len(point.result.settings["saes"]) == 1 for point in points)
    figure.update_xaxes(showline=True, linecolor="#888", gridcolor="#eee", ticks="outside", tickcolor="#888")
    figure.update_yaxes(showline=True, linecolor="#888", gridcolor="#eee", zerolinecolor="#888", zerolinewidth=1)
    figure.update_annotations(font_size=16)
    figure.update_annotations(font_size=14, selector={"text": _L0.title, "yanchor": "top"})
    missing = "".join(f"; {note}" for note in _missing(points, log_l0=log_l0))
    return figure.update_layout(
        title={
            "text": f"<b>Fidelity by site: {n} {'dictionary' if n == 1 else 'dictionaries'} of {models}</b>",
            "subtitle": {
                "text": f"{'each spliced in by itself' if alone else 'spliced in'}; {predictions} predictions, clean "
                f"loss {clean:.3f} nats per token; bars are 95 % intervals{missing}"
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
    )
