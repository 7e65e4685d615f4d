"""A graph for networkx, an optional dependency: `pip install 'scope-lens[graph]'`."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from scope_lens.circuits.edges import Edges, targets_of

if TYPE_CHECKING:
    from networkx import DiGraph


def networkx_graph(columns: Mapping[str, Sequence[Any]], edges: Edges) -> "DiGraph[int]":
    """Give nodes by their number with their columns as attributes, and edges with `weight`.

    Args:
        columns: One value a node, by name; a value that is NaN is left out.
        edges: Between the nodes.

    Raises:
        ImportError: networkx is not installed.
    """
    try:
        from networkx import DiGraph
    except ImportError as error:
        raise ImportError("to_networkx needs networkx: pip install 'scope-lens[graph]'.") from error
    graph: DiGraph[int] = DiGraph()
    for node in range(edges.n_nodes):
        values = {name: column[node] for name, column in columns.items()}
        known = {name: value for name, value in values.items() if not (isinstance(value, float) and math.isnan(value))}
        graph.add_node(node, **known)
    weighted = zip(edges.source.tolist(), targets_of(edges).tolist(), edges.weight.tolist(), strict=True)
    graph.add_weighted_edges_from(weighted)
    return graph
