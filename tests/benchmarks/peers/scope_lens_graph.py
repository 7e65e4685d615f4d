"""This package's attribution, pruning and JSON on the weights of bench_graph.py; see graph_arm.py."""

from pathlib import Path

import torch
from graph_arm import ERROR, LATENT, LOGIT, TOKEN, GraphArm, hf_model, main
from torch import Tensor
from transformers import AutoTokenizer

from scope_lens.circuits import attribute
from scope_lens.circuits.export import neuronpedia
from scope_lens.circuits.graph import AttributionGraph, Kind
from scope_lens.model import ScopeModel
from scope_lens.releases import hooks_for, read_npz

KINDS = {Kind.LATENT: LATENT, Kind.ERROR: ERROR, Kind.TOKEN: TOKEN, Kind.LOGIT: LOGIT}


def make(folder: Path, plan: dict) -> GraphArm:
    model = ScopeModel.from_hf(hf_model(folder, plan), AutoTokenizer.from_pretrained(folder))
    saes = []
    for layer in range(plan["config"]["num_hidden_layers"]):
        hooks = hooks_for("transcoder", layer)
        file = folder / f"layer_{layer}"
        saes.append(read_npz(file, hook_in=hooks.hook_in, hook_out=hooks.hook_out, device=plan["device"]))
    tokens = torch.tensor(plan["tokens"], device=plan["device"])
    state: dict[str, AttributionGraph] = {}

    def make_graph() -> None:
        state.clear()
        state["graph"] = attribute(model, tokens, saes=saes, progress=False)

    def prune() -> None:
        state["pruned"] = state["graph"].prune()

    def result() -> dict[str, Tensor]:
        graph, pruned = state["graph"], state["pruned"]
        nodes, kept_nodes = nodes_of(graph), nodes_of(pruned)
        number = {tuple(node): i for i, node in enumerate(nodes.tolist())}
        renumbered = torch.tensor([number[tuple(node)] for node in kept_nodes.tolist()])
        target, source, weight = coordinates(graph)
        kept_target, kept_source, _ = coordinates(pruned)
        return {
            "nodes": nodes, "activation": graph.activation, "target": target, "source": source, "weight": weight,
            "kept": torch.zeros(len(nodes), dtype=torch.bool).index_fill(0, renumbered, True),
            "kept_target": renumbered[kept_target].int(), "kept_source": renumbered[kept_source].int(),
            "scores": torch.tensor(graph.scores()),
        }  # fmt: skip

    return GraphArm(make_graph, prune, lambda own: neuronpedia(state["pruned"], own, slug="graph"), result)


def nodes_of(graph: AttributionGraph) -> Tensor:
    """(node, 4): kind, layer, position, index."""
    kind = torch.tensor([KINDS[Kind(kind)] for kind in graph.kind.tolist()])
    return torch.stack([kind, graph.layer.cpu(), graph.pos.cpu(), graph.index.cpu()], dim=1)


def coordinates(graph: AttributionGraph) -> tuple[Tensor, Tensor, Tensor]:
    """Targets, sources and weights of a graph's edges."""
    edges = graph.edges
    target = torch.repeat_interleave(torch.arange(graph.n_nodes), edges.row_start.diff().cpu())
    return target.int(), edges.source.cpu(), edges.weight.cpu()


if __name__ == "__main__":
    main(make, ("transformer-lens", "transformers", "torch"))
