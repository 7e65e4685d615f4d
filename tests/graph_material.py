"""Attribution graphs for tests: random ones of every kind of node, and the peer's stored ones."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from scope_lens.circuits.graph import AttributionGraph, Edges, GraphChecks, Kind

SITES = ["blocks.0.attn.hook_z", "blocks.0.hook_mlp_out", "blocks.1.hook_resid_post"]
NAN = float("nan")


def csr(dense: torch.Tensor) -> Edges:
    row_start = torch.zeros(len(dense) + 1, dtype=torch.int64)
    row_start[1:] = (dense != 0).sum(1).cumsum(0)
    return Edges(row_start, dense.nonzero()[:, 1].int(), dense[dense != 0])


def random_graph(*, seed: int = 0, dtype: torch.dtype = torch.float64, shuffle: bool = False, **changed: Any):
    """Four positions, three sites, every kind of node; one latent that bias alone feeds, one target of latent kind."""
    random = torch.Generator().manual_seed(seed)
    nodes: list[tuple[int, int, int, int, int, str, str]] = []  # kind, layer, pos, index, stage, site, label
    for stage, site in enumerate(SITES):
        layer = int(site.split(".")[1])
        nodes += [(Kind.LATENT, layer, pos, 7 * i + pos, stage, site, "") for pos in (1, 2, 3) for i in range(3)]
        nodes += [(Kind.REST, layer, 2, -1, stage, site, "")]
        nodes += [(Kind.ERROR, layer, pos, -1, stage, site, "") for pos in range(4)]
    nodes += [(Kind.TOKEN, -1, pos, 10 + pos, -1, "hook_embed", f"t{pos}") for pos in range(4)]
    nodes += [(Kind.LOGIT, 2, 3, 50 + i, 3, "ln_final.hook_out", f"y{i}") for i in range(3)]
    nodes += [(Kind.DIRECTION, 2, 2, -1, 3, "ln_final.hook_out", "up - down")]
    if shuffle:
        nodes = [nodes[i] for i in torch.randperm(len(nodes), generator=random)]
    kind, layer, pos, index, stage = torch.tensor([node[:5] for node in nodes]).T
    target = (kind == Kind.LATENT) | (kind == Kind.LOGIT) | (kind == Kind.DIRECTION)
    alone = target & (index == 8) & (stage == 1)  # the latent 8 of the second site: all of it is bias
    dense = torch.randn(len(nodes), len(nodes), generator=random, dtype=dtype)
    dense *= torch.rand(dense.shape, generator=random) < 0.7
    dense *= target[:, None] & ~alone[:, None] & (stage[:, None] > stage) & (pos[:, None] >= pos)
    idle = torch.where(target, 0.0, NAN).to(dtype)
    bias = torch.randn(len(nodes), generator=random, dtype=dtype) + idle
    columns = {
        "tokens": torch.arange(10, 14),
        "kind": kind, "layer": layer, "pos": pos, "index": index, "stage": stage,
        "site": [node[5] for node in nodes],
        "label": [node[6] for node in nodes],
        "activation": torch.where(kind == Kind.LATENT, torch.rand(len(nodes), generator=random), NAN).to(dtype),
        "start": ((kind == Kind.LOGIT) * (0.1 * index - 4.8) + (kind == Kind.DIRECTION)).to(dtype),
        "bias": bias,
        "pre_activation": dense.sum(1) + bias,
        "dropped": idle,
        "cumulative": torch.full_like(bias, NAN),
        "directions": torch.randn(1, 3, generator=random, dtype=dtype),
        "edges": csr(dense),
        "token_strings": ["t0", "t1", "t2", "t3"],
        "n_layers": 2, "d_vocab": 60, "model": "toy", "sites": SITES, "sources": ["a/b", "", "c/d"],
        "checks": GraphChecks(1e-7, 2e-8, True),
        "settings": {"logit_mass": 0.95, "max_latents": None, "dtype": "float64", "deep": True},
    }  # fmt: skip
    return AttributionGraph(**(columns | changed))


def stored(folder: Path) -> tuple[AttributionGraph, dict[str, torch.Tensor], dict[str, Any]]:
    """The graph that circuit-tracer made of a fixture, its tensors and its scores."""
    tensors = load_file(folder / "graph.safetensors")
    meta = json.loads((folder / "meta.json").read_text())
    dense, features = tensors["adjacency"], tensors["active_features"][tensors["selected_features"]]
    n_pos, n_layers = len(tensors["tokens"]), int(features[:, 0].max()) + 1
    rows = [(Kind.LATENT, layer, pos, index, layer) for layer, pos, index in features.tolist()]
    rows += [(Kind.ERROR, layer, pos, -1, layer) for layer in range(n_layers) for pos in range(n_pos)]
    rows += [(Kind.TOKEN, -1, pos, int(token), -1) for pos, token in enumerate(tensors["tokens"])]
    rows += [(Kind.LOGIT, n_layers, n_pos - 1, int(token), n_layers) for token in tensors["logit_tokens"]]
    kind, layer, pos, index, stage = torch.tensor(rows).T
    sites = [f"blocks.{layer}.hook_mlp_out" for layer in range(n_layers)]
    nowhere = torch.full((len(rows),), NAN)
    target = (kind == Kind.LATENT) | (kind == Kind.LOGIT)
    start, activation = torch.zeros(len(rows)), nowhere.clone()
    start[kind == Kind.LOGIT] = activation[kind == Kind.LOGIT] = tensors["logit_probs"]
    activation[kind == Kind.LATENT] = tensors["activation_values"][tensors["selected_features"]]
    graph = AttributionGraph(
        tokens=tensors["tokens"], kind=kind, layer=layer, pos=pos, index=index, stage=stage,
        site=["hook_embed" if s < 0 else "ln_final.hook_out" if s == n_layers else sites[s] for s in stage.tolist()],
        label=[""] * len(rows), activation=activation, start=start,
        bias=torch.where(target, 0.0, NAN), dropped=torch.where(target, 0.0, NAN), cumulative=nowhere,
        directions=torch.zeros(0, 3),
        pre_activation=torch.where(target, dense.sum(1), NAN), edges=csr(dense),
        token_strings=[str(int(token)) for token in tensors["tokens"]], n_layers=n_layers, d_vocab=64,
        model="crosscheck-nano", sites=sites, sources=[""] * n_layers, checks=GraphChecks(0.0, 0.0, True), settings={},
    )  # fmt: skip
    return graph, tensors, meta
