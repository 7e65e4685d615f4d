"""Every figure: a function that takes a result and returns a plotly Figure; `write_html` puts one into a file."""

from scope_lens.figures.fidelity import fidelity
from scope_lens.figures.html import write_html

__all__ = ["fidelity", "write_html"]
