"""The benchmark of graphs finds what differs between two graphs, and its page is its record."""

import json
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent / "benchmarks"
PAGES = Path(__file__).parents[1] / "docs" / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_graph

    return bench_graph


def saved_graph() -> dict[str, torch.Tensor]:
    """Two latents, an error, a token and a logit: (kind, layer, position, index)."""
    nodes = [[0, 0, 1, 7], [0, 1, 1, 3], [1, 0, 1, -1], [2, -1, 1, 5], [3, 2, 1, 9]]
    edges = [(0, 3, 0.5), (1, 0, -1.0), (1, 2, 0.25), (1, 3, 2.0), (4, 1, 3.0), (4, 3, 0.5)]
    target, source, weight = (torch.tensor(column) for column in zip(*edges, strict=True))
    return {
        "nodes": torch.tensor(nodes), "activation": torch.tensor([1.5, 0.5, torch.nan, torch.nan, 0.9]),
        "target": target, "source": source, "weight": weight,
        "kept": torch.tensor([True, True, False, True, True]), "kept_target": target[[0, 1, 4]],
        "kept_source": source[[0, 1, 4]], "scores": torch.tensor([0.75, 0.875]),
    }  # fmt: skip


def renumbered(graph: dict[str, torch.Tensor], order: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same graph with its nodes in another order."""
    place = order.argsort()
    ends = {name: place[graph[name]] for name in ("target", "source", "kept_target", "kept_source")}
    return graph | ends | {name: graph[name][order] for name in ("nodes", "activation", "kept")}


def test_a_graph_agrees_with_itself_in_another_order(bench):
    graph = saved_graph()
    found = bench.compare(renumbered(graph, torch.tensor([3, 0, 4, 2, 1])), graph)
    assert (found["nodes"], found["nodes kept by pruning"], found["edges kept by pruning"]) == (5, 4, 3)
    assert all(
        value == 0
        for name, value in found.items()
        if name not in {"nodes", "nodes kept by pruning", "edges kept by pruning"}
    )


@pytest.mark.parametrize(
    ("change", "name", "value"),
    [
        ({"weight": [0.5, -1.0, 0.25, 2.2, 3.0, 0.5]}, "adjacency, largest difference beside its row's largest", 0.1),
        ({"weight": [0.5, -1.0, 0.25, 2.0, 3.0, 0.5 + 0.3816]}, "adjacency, relative Frobenius norm", 0.1),
        ({"activation": [1.5, 0.6, torch.nan, torch.nan, 0.9]}, "activations and probabilities", 0.2),
        ({"kept": [True, True, True, True, True]}, "nodes kept in one graph alone", 1),
        ({"kept_source": [3, 0, 3]}, "edges kept in one graph alone", 2),
        ({"scores": [0.5, 0.875]}, "replacement score", 0.25),
        ({"scores": [0.75, 1.0]}, "completeness score", 0.12),
        ({"nodes": [[0, 0, 1, 8], [0, 1, 1, 3], [1, 0, 1, -1], [2, -1, 1, 5], [3, 2, 1, 9]]}, "nodes of one graph", 2),
    ],
)  # fmt: skip
def test_what_differs_is_found(bench, change, name, value):
    graph = saved_graph()
    found = bench.compare(graph | {key: torch.tensor(tensor) for key, tensor in change.items()}, graph)
    assert next(number for key, number in found.items() if key.startswith(name)) == pytest.approx(value, rel=0.05)


def test_ratios_are_of_pairs_of_turns(bench):
    def turns(*seconds: float) -> list[dict]:
        return [{"wall": value, "cpu": 2 * value, "peak_mib": 10 * value} for value in seconds]

    ours = {"prune": turns(1, 2, 1), "export": turns(1, 1, 1)}
    theirs = {"prune": turns(5, 9, 4), "export": turns(1, 3, 4)}
    row = bench.row("prune and export", {"scope_lens": ours, "circuit_tracer": theirs})
    assert row["wall_ratio"] == 4
    assert (row["wall_low"], row["wall_high"]) == (3, 4)
    assert (row["wall_scope_lens"], row["cpu_circuit_tracer"], row["peak_mib_circuit_tracer"]) == (2, 16, 50)


def test_the_committed_page_is_its_record(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from graph_page import page

    record = json.loads((PAGES / "graph.json").read_text())
    assert (PAGES / "graph.md").read_text() == page(record)
    # No GPU's numbers without the GPU's name.
    assert all("NVIDIA" in record["measured"][name]["device"] for name in record["needs"] if name in record["measured"])
