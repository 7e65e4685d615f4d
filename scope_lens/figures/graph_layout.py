"""Where the nodes of an attribution graph stand: one column a position, one row a site, in pixels.

1. Rows from below: bias, tokens, each site in the order of the graph, and what the graph was asked for on top.
2. A cell, one row at one position, is as wide as its column, and breaks its nodes into lines. Columns share the page by
   how crowded their cells are.
3. Rows are as high as their fullest cell needs.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_SLOT = 15.0  # pixels of one node, both ways
_GAP = 10.0  # between cells, both ways
_PAGE = 950.0  # what the columns may take together
_LEAST_PAGE = 560.0  # what they take at least, for the title above them
_FOR_CROWDS = 250.0  # what they may take beyond the page where the prompt alone fills it
_MOST_SPARE = 60.0  # pixels added to each column of a page that is not full
_LETTER = 7.5
_LONGEST = 14  # letters of a word beside others
# Rows stand a little beside each other, else an edge upwards runs through the nodes between and into other edges.
_NUDGES = (-5.0, 0.0, 4.0, -2.0, 2.0, -4.0, 1.0, 5.0, -1.0, 3.0, -3.0)
_SHARES = [*(1.15**-power for power in range(40)), 0.0]


class Cell(NamedTuple):
    """Where a node belongs: its row, from below, and its position."""

    row: int
    pos: int


class Layout(NamedTuple):
    """Places in pixels, y upwards.

    Attributes:
        x: Of every node.
        y: Of every node.
        columns: Middle of every position's column.
        rows: Middle of every row.
        lines: Where one row ends and the next begins, one less than rows.
        width: Of all columns.
        height: Of all rows.
    """

    x: list[float]
    y: list[float]
    columns: list[float]
    rows: list[float]
    lines: list[float]
    width: float
    height: float


def lay_out(cells: Sequence[Cell], order: Sequence[float], *, words: Sequence[str]) -> Layout:
    """Give every node a place.

    Args:
        cells: The cell of every node.
        order: Nodes of a cell stand by this, largest first.
        words: What is written under each position's column.
    """
    members: defaultdict[Cell, list[int]] = defaultdict(list)
    for node in sorted(range(len(cells)), key=lambda node: -order[node]):
        members[cells[node]].append(node)
    sizes = {cell: len(nodes) for cell, nodes in members.items()}
    gap = _GAP / 2 if stand_upright(words) else _GAP
    least = [0.0 if stand_upright(words) else _LETTER * min(len(word), _LONGEST) for word in words]
    slots = _slots(sizes, least, gap)
    widths = _widths(slots, least, gap)
    if (spare := _PAGE - sum(widths)) > 0:
        each = max(min(spare / len(widths), _MOST_SPARE), (_LEAST_PAGE - sum(widths)) / len(widths))
        widths = [width + each for width in widths]
    n_rows = 1 + max(cell.row for cell in members)
    depth = [1] * n_rows
    for cell, size in sizes.items():
        depth[cell.row] = max(depth[cell.row], math.ceil(size / slots[cell.pos]))
    heights = [_SLOT * lines + _GAP for lines in depth]
    left, bottom = _starts(widths), _starts(heights)
    columns = [start + width / 2 for start, width in zip(left, widths, strict=False)]
    rows = [start + height / 2 for start, height in zip(bottom, heights, strict=False)]
    x, y = [0.0] * len(cells), [0.0] * len(cells)
    for cell, nodes in members.items():
        n_lines = math.ceil(len(nodes) / slots[cell.pos])
        per_line = math.ceil(len(nodes) / n_lines)
        for place, node in enumerate(nodes):
            line, slot = divmod(place, per_line)
            in_line = min(per_line, len(nodes) - line * per_line)
            pitch = min(1.6 * _SLOT, (widths[cell.pos] - gap) / in_line)
            x[node] = columns[cell.pos] + pitch * (slot - (in_line - 1) / 2) + _NUDGES[cell.row % len(_NUDGES)]
            y[node] = rows[cell.row] - _SLOT * (line - (n_lines - 1) / 2)
    x, y = [round(at, 1) for at in x], [round(at, 1) for at in y]
    return Layout(x, y, columns, rows, bottom[1:-1], sum(widths), sum(heights))


def _slots(sizes: Mapping[Cell, int], least: Sequence[float], gap: float) -> list[int]:
    """Nodes that stand side by side in each column."""
    top = max(cell.row for cell in sizes)
    fullest, squares, ends = ([0] * len(least) for _ in range(3))
    for (row, pos), size in sizes.items():
        fullest[pos] = max(fullest[pos], size)
        squares[pos] += size**2
        if row == top:
            ends[pos] = size
    crowding = [math.sqrt(square) for square in squares]

    def slots(share: float) -> list[int]:
        # What was asked for stands in one line, since it is labelled.
        shares = (math.ceil(share * crowded) for crowded in crowding)
        return [max(1, end, min(most, part)) for end, most, part in zip(ends, fullest, shares, strict=True)]

    page = max(_PAGE, sum(_widths(slots(0), least, gap)) + _FOR_CROWDS)
    return next(slots(share) for share in _SHARES if sum(_widths(slots(share), least, gap)) <= page)


def _widths(slots: Sequence[int], least: Sequence[float], gap: float) -> list[float]:
    return [max(_SLOT * n, width) + gap for n, width in zip(slots, least, strict=True)]


def stand_upright(words: Sequence[str]) -> bool:
    """Whether words under the columns are written upwards, because side by side they would not fit the page."""
    return sum(_LETTER * min(len(word), _LONGEST) + _GAP for word in words) > 0.8 * _PAGE


def _starts(sizes: Sequence[float]) -> list[float]:
    """Where each of several sizes in a row begins, and where the last one ends."""
    starts = [0.0]
    for size in sizes:
        starts.append(starts[-1] + size)
    return starts
