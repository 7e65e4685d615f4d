"""Every figure: a function that takes a result and returns a plotly Figure; `write_html` puts one into a file."""

from scope_lens.figures.fidelity import fidelity
from scope_lens.figures.graph import graph
from scope_lens.figures.html import write_html
from scope_lens.figures.training import training_curves

__all__ = ["fidelity", "graph", "training_curves", "write_html"]
