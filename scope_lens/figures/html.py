"""A figure as one HTML file that needs no network."""

from pathlib import Path

import plotly.graph_objects as go

from scope_lens.whole_file import whole_file


def write_html(figure: go.Figure, path: str | Path) -> None:
    """Write a figure to a self-contained HTML file (about 5 MB: plotly's script is in it), whole or not at all.

    Args:
        figure: What a function of `scope_lens.figures` returned.
        path: The file; an earlier one is replaced.
    """
    with whole_file(Path(path)) as part:
        figure.write_html(part, include_plotlyjs=True, full_html=True)
