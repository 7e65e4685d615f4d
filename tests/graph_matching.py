"""A graph of the package laid over one of the oracle: nodes are matched by what they are, never by their order."""

from typing import NamedTuple

import torch
from graph_oracle import DIRECTION, Node, OracleGraph
from torch import Tensor

from scope_lens.circuits.graph import AttributionGraph, Kind


def nodes_of(graph: AttributionGraph) -> list[Node]:
    """The nodes of a graph as the oracle names them."""
    columns = zip(
        graph.kind.tolist(), graph.site, graph.layer.tolist(), graph.pos.tolist(), graph.index.tolist(), graph.label,
        strict=True,
    )  # fmt: skip
    return [
        Node(Kind(kind).name, site, layer, pos, index, label if Kind(kind).name == DIRECTION else "")
        for kind, site, layer, pos, index, label in columns
    ]


class Laid(NamedTuple):
    """Columns of a graph in the oracle's order of nodes, in float64."""

    adjacency: Tensor
    bias: Tensor
    pre: Tensor
    activation: Tensor
    start: Tensor


def order_of(graph: AttributionGraph, nodes: list[Node]) -> Tensor:
    """For each of `nodes` its number in the graph; the two sets have to be the same."""
    mine = {node: number for number, node in enumerate(nodes_of(graph))}
    assert len(mine) == graph.n_nodes
    assert set(mine) == set(nodes), (sorted(set(mine) - set(nodes))[:5], sorted(set(nodes) - set(mine))[:5])
    return torch.tensor([mine[node] for node in nodes])


def laid_over(graph: AttributionGraph, nodes: list[Node]) -> Laid:
    """The graph's columns in the order of `nodes`."""
    order = order_of(graph, nodes)
    columns = (graph.bias, graph.pre_activation, graph.activation, graph.start)
    return Laid(graph.dense()[order][:, order].double(), *(column[order].double() for column in columns))


def assert_same(graph: AttributionGraph, oracle: OracleGraph, *, relative: float, absolute: float = 0.0) -> None:
    """Every edge, bias and pre-activation within `absolute + relative * max|row|`, the bias in the row; activations."""
    laid = laid_over(graph, oracle.nodes)
    target = ~oracle.pre.isnan()
    assert torch.equal(target, ~laid.pre.isnan())
    assert torch.equal(laid.adjacency[~target], oracle.adjacency[~target])
    row = torch.cat([oracle.adjacency, oracle.bias[:, None]], dim=1)[target]
    mine = torch.cat([laid.adjacency, laid.bias[:, None]], dim=1)[target]
    allowed = absolute + relative * row.abs().amax(1)
    assert bool(((mine - row).abs() <= allowed[:, None]).all()), ((mine - row).abs().amax(1) / allowed).max()
    assert bool(((laid.pre - oracle.pre)[target].abs() <= allowed).all())
    assert torch.allclose(laid.activation, oracle.activation, rtol=relative, atol=absolute, equal_nan=True)
