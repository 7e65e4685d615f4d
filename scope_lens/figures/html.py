"""A figure as one HTML file that needs no network."""

from pathlib import Path

import plotly.graph_objects as go


def write_html(figure: go.Figure, path: str | Path) -> None:
    """Write a figure to a self-contained HTML file (about 5 MB: plotly's script is in it), whole or not at all.

    Args:
        figure: What a function of `scope_lens.figures` returned.
        path: The file; an earlier one is replaced.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        figure.write_html(part, include_plotlyjs=True, full_html=True)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
