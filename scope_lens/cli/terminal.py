"""Lines and tables on standard output, complaints on standard error."""

import sys
from collections.abc import Sequence


def say(line: str) -> None:
    """Write one line to standard output."""
    sys.stdout.write(line + "\n")


def complain(message: str) -> None:
    """Write a message to standard error, as one line."""
    sys.stderr.write(f"scope-lens: {' '.join(message.split())}\n")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int]) -> None:
    """Print rows in columns, numbers to the right.

    Args:
        header: Names of the columns.
        rows: Their cells.
        left: Columns that stand to the left.
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = (
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        say("  ".join(cells).rstrip())
