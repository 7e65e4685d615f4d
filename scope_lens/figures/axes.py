"""Ranges and ticks of axes, and names short enough for titles."""

import math
from collections.abc import Sequence
from typing import NamedTuple

_MARGIN = 0.06
_LONGEST = 24


class LogAxis(NamedTuple):
    """A logarithmic axis around positive values.

    Attributes:
        range: Its ends as powers of ten, as plotly takes them.
        ticks: Where it is labelled: at 1, 2 and 5 of every decade, or at round steps within one.
    """

    range: tuple[float, float]
    ticks: list[float]


def log_axis(values: Sequence[float]) -> LogAxis | None:
    """Fit an axis around the values that it can show; None where there are none."""
    shown = [value for value in values if 0 < value < math.inf]
    if not shown:
        return None
    low, high = math.log10(min(shown)), math.log10(max(shown))
    margin = max(_MARGIN * (high - low), 0.05)
    ends = (low - margin, high + margin)
    return LogAxis(ends, _ticks(*ends))


def linear_range(values: Sequence[float], *, from_zero: bool) -> tuple[float, float] | None:
    """Fit a linear axis around the finite values; None where there are none.

    Args:
        values: What is drawn.
        from_zero: Whether the axis contains zero, and begins there if nothing lies below.
    """
    shown = [value for value in values if math.isfinite(value)]
    if not shown:
        return None
    low, high = min([*shown, 0.0] if from_zero else shown), max([*shown, 0.0] if from_zero else shown)
    margin = _MARGIN * (high - low or abs(high) or 1.0)
    return (low if from_zero and low == 0 else low - margin, high + margin)


def elide(name: str) -> str:
    """Shorten a name to 24 characters by its middle: the ends tell hooks and folders apart."""
    if len(name) <= _LONGEST:
        return name
    head = (_LONGEST - 1) // 2
    return f"{name[:head]}…{name[head + 1 - _LONGEST :]}"


def _ticks(low: float, high: float) -> list[float]:
    """Labelled values between two powers of ten."""
    ends = (10**low, 10**high)
    if high - low >= 1:
        decades = range(math.floor(low), math.ceil(high) + 1)
        # Over many decades the labels of 2 and 5 would run into each other.
        steps = (1, 2, 5) if high - low < 3 else (1,)
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        return [tick for tick in ticks if ends[0] <= tick <= ends[1]]
    rough = (ends[1] - ends[0]) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.ceil(ends[0] / step), math.floor(ends[1] / step)
    return [round(number * step, 12) for number in range(first, last + 1)]
