"""Curves of a training run: loss, FVU, L0 and dead latents over the updates, and what held-out text says.

1. The results, from a list or from the run's `log.jsonl`; one colour a dictionary.
2. Panels. Loss and FVU fall over orders of magnitude, L0 too, so their axes are logarithmic where the values allow.
3. Long runs are thinned: every curve has at most 2,000 points, the first and the last among them. A point is a result
   as it was made, no mean.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from scope_lens.evaluation import EvalResult
from scope_lens.figures.axes import linear_range, log_axis
from scope_lens.training import StepResult, read_log

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
_MOST_POINTS = 2_000


class _Panel(NamedTuple):
    """One quantity: its title, its value, and whether its axis is logarithmic."""

    title: str
    value: Callable[[StepResult], float]
    log: bool
    held_out: bool = False


def _of_evaluation(value: Callable[[EvalResult], float]) -> Callable[[StepResult], float]:
    def read(result: StepResult) -> float:
        assert result.evaluation is not None
        return value(result.evaluation)

    return read


_TRAINING = (
    _Panel("loss (normalised units)", lambda r: r.loss, log=True),
    _Panel("variance unexplained (FVU)", lambda r: r.fvu, log=True),
    _Panel("L0 (active latents per token)", lambda r: r.l0, log=True),
    _Panel("dead latents (fraction)", lambda r: r.dead, log=False),
)
_HELD_OUT = (
    _Panel("held-out delta loss (nats per token)", _of_evaluation(lambda e: e.delta_loss), log=False, held_out=True),
    _Panel("held-out loss recovered", _of_evaluation(lambda e: e.loss_recovered), log=False, held_out=True),
)


def training_curves(results: Sequence[StepResult] | str | Path) -> go.Figure:
    """Draw loss, FVU, L0 and dead latents over the updates, and the held-out evaluations if there are any.

    Args:
        results: What `Trainer.run` yielded, or a run's `log.jsonl`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: There are no results.
    """
    results = read_log(results) if isinstance(results, str | Path) else list(results)
    if not results:
        raise ValueError("There is nothing to draw: no results. Give what Trainer.run yielded, or its log.jsonl.")
    panels = _TRAINING + (_HELD_OUT if any(r.evaluation for r in results) else ())
    rows = len(panels) // 2
    figure = make_subplots(
        rows=rows, cols=2, subplot_titles=[panel.title for panel in panels], vertical_spacing=0.26 / rows
    )
    names = list(dict.fromkeys((r.index, r.name) for r in results))
    for number, panel in enumerate(panels):
        row, col = number // 2 + 1, number % 2 + 1
        shown = [r for r in results if r.evaluation is not None] if panel.held_out else results
        for index, name in names:
            curve = _thinned([r for r in shown if r.index == index])
            figure.add_trace(
                go.Scatter(
                    x=[r.step for r in curve],
                    y=[panel.value(r) for r in curve],
                    mode="lines+markers" if panel.held_out or len(curve) == 1 else "lines",
                    line={"color": _COLOURS[index % len(_COLOURS)], "width": 1.5},
                    name=name or str(index),
                    legendgroup=str(index),
                    showlegend=number == 0,
                    hovertemplate=f"<b>{name}</b><br>update %{{x:,}}<br>%{{y:.4g}}<extra></extra>",
                ),
                row=row,
                col=col,
            )
        values = [panel.value(r) for r in shown]
        axis = log_axis(values) if panel.log and min(values) > 0 else None
        if axis is not None:
            figure.update_yaxes(type="log", range=axis.range, tickvals=axis.ticks, row=row, col=col)
        else:
            figure.update_yaxes(range=linear_range(values, from_zero=True), row=row, col=col)
    last = max(r.step for r in results)
    figure.update_xaxes(range=(0, 1.02 * last), showline=True, linecolor="#888", gridcolor="#eee", ticks="outside")
    figure.update_xaxes(title="update", row=rows)
    figure.update_yaxes(showline=True, linecolor="#888", gridcolor="#eee", zerolinecolor="#888")
    figure.update_annotations(font_size=15)
    return figure.update_layout(
        title={
            "text": f"<b>Training: {len(names)} {'dictionary' if len(names) == 1 else 'dictionaries'}</b>",
            "subtitle": {"text": f"{last:,} updates; numbers of a batch are those before its update"},
            "x": 0.01,
        },
        height=340 * rows + 190,
        width=1180,
        legend={"orientation": "h", "x": 0, "y": -90 / (340 * rows), "yanchor": "top"},
        template="plotly_white",
        font={"family": "Helvetica, Arial, sans-serif", "size": 14, "color": "#222"},
        margin={"t": 110, "r": 40, "l": 70, "b": 130},
    )


def _thinned(curve: Sequence[StepResult]) -> list[StepResult]:
    """Every n-th result, counted from the last, with the first."""
    step = -(-len(curve) // _MOST_POINTS)
    kept = list(curve[::-1][::step])[::-1]
    return kept if not curve or kept[0] is curve[0] else [curve[0], *kept]
