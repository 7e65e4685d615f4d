"""A figure as one HTML file that needs no network."""

from importlib.resources import files
from pathlib import Path

import plotly.graph_objects as go

from scope_lens.whole_file import whole_file


def write_html(figure: go.Figure, path: str | Path) -> None:
    """Write a figure to a self-contained HTML file (about 5 MB: plotly's script is in it), whole or not at all.

    In the file of an attribution graph, a click on a node pins it: its edges alone are shown then.

    Args:
        figure: What a function of `scope_lens.figures` returned.
        path: The file; an earlier one is replaced.
    """
    pins = "pin" in (figure.layout.meta or {})
    script = (files("scope_lens.figures") / "pin.js").read_text(encoding="utf-8") if pins else None
    with whole_file(Path(path)) as part:
        figure.write_html(part, include_plotlyjs=True, full_html=True, post_script=script)
