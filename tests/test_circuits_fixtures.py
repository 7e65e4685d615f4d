"""Attribution graphs against stored ones: circuit-tracer's, and a float64 computation without autograd."""

import copy
import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import make_hf, make_sae
from graph_matching import assert_same, laid_over, nodes_of
from graph_oracle import ERROR, LATENT, LOGIT, TOKEN, Node, dictionary_of, influence, pruned, scores, top_logits, trace
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from scope_lens import HookedSAE, ScopeModel
from scope_lens.circuits import AttributionGraph, attribute, verify
from scope_lens.releases import read_npz

PROMPTS = ["len6", "len9"]
MLP = "blocks.{}.hook_mlp_out"
Z = "blocks.{}.attn.hook_z"


class Nano(NamedTuple):
    folder: Path
    model: ScopeModel
    hf: PreTrainedModel
    transcoders: list[HookedSAE]
    attention: list[HookedSAE]

    def stored(self, prompt: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "expected" / prompt / "graph.safetensors")

    def meta(self, prompt: str) -> dict:
        return json.loads((self.folder / "expected" / prompt / "meta.json").read_text())


@pytest.fixture(scope="module")
def nano(shared_data) -> Nano:
    folder = shared_data / "graph-crosscheck" / "nano"
    return Nano(
        folder,
        ScopeModel.from_pretrained(str(folder / "hf_model")),
        AutoModelForCausalLM.from_pretrained(folder / "hf_model").eval(),
        [
            read_npz(
                folder / f"transcoders/layer_{layer}",
                hook_in=f"blocks.{layer}.ln2.hook_normalized",
                hook_out=MLP.format(layer),
            )
            for layer in range(2)
        ],
        [read_npz(folder / f"saes/z_{layer}", hook_in=Z.format(layer), hook_out=Z.format(layer)) for layer in range(2)],
    )


@pytest.fixture(scope="module", params=PROMPTS)
def peers(request, nano) -> tuple[str, dict[str, torch.Tensor], AttributionGraph, list[Node]]:
    """A stored graph of the peer, ours of the same prompt, and the peer's nodes in its order."""
    stored = nano.stored(request.param)
    graph = attribute(nano.model, stored["tokens"], saes=nano.transcoders, progress=False)
    tokens = stored["tokens"].tolist()
    nodes = [Node(LATENT, MLP.format(layer), layer, pos, i) for layer, pos, i in stored["active_features"].tolist()]
    nodes += [Node(ERROR, MLP.format(layer), layer, pos, -1) for layer in range(2) for pos in range(len(tokens))]
    nodes += [Node(TOKEN, "hook_embed", -1, pos, token) for pos, token in enumerate(tokens)]
    nodes += [Node(LOGIT, "ln_final.hook_out", 2, len(tokens) - 1, y) for y in stored["logit_tokens"].tolist()]
    return request.param, stored, graph, nodes


def test_edges_and_activations_are_the_peers(peers):
    _, stored, graph, nodes = peers
    laid = laid_over(graph, nodes)
    allowed = 1e-4 + 1e-3 * stored["adjacency"].abs().amax(1, keepdim=True)
    assert bool(((laid.adjacency - stored["adjacency"]).abs() <= allowed).all())
    # Far inside what was asked: both are float32.
    error = (laid.adjacency - stored["adjacency"]).norm() / stored["adjacency"].norm()
    assert error < 3e-6
    active = len(stored["active_features"])
    torch.testing.assert_close(laid.activation[:active].float(), stored["activation_values"], rtol=1e-4, atol=1e-5)


def test_logits_are_the_peers(peers):
    _, stored, graph, nodes = peers
    laid = laid_over(graph, nodes)
    count = len(stored["logit_tokens"])
    torch.testing.assert_close(laid.activation[-count:].float(), stored["logit_probs"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(laid.start[-count:].float(), stored["logit_probs"], rtol=1e-4, atol=1e-6)
    # A logit's pre-activation has no soft cap and the vocabulary's mean taken off.
    raw = 30 * torch.atanh(stored["logits"] / 30)
    expected = raw[stored["logit_tokens"]] - raw.mean()
    torch.testing.assert_close(laid.pre[-count:].float(), expected, rtol=1e-4, atol=1e-4)


def test_influence_and_scores_are_the_peers(peers, nano):
    prompt, stored, graph, nodes = peers
    mine = dict(zip(nodes_of(graph), graph.influence().tolist(), strict=True))
    torch.testing.assert_close(
        torch.tensor([mine[node] for node in nodes]), stored["node_influence"], rtol=1e-3, atol=1e-5
    )
    meta = nano.meta(prompt)
    assert graph.scores().replacement == pytest.approx(meta["replacement_score"], abs=1e-5)
    assert graph.scores().completeness == pytest.approx(meta["completeness_score"], abs=1e-5)


def test_pruning_keeps_the_peers_nodes_and_edges(peers):
    _, stored, graph, nodes = peers
    small = graph.prune(node_mass=0.8, edge_mass=0.98)
    kept = {node for node, keep in zip(nodes, stored["node_mask"].tolist(), strict=True) if keep}
    assert set(nodes_of(small)) == kept
    names = nodes_of(small)
    edges = {(names[t], names[s]) for t, s in small.dense().nonzero().tolist()}
    assert edges == {(nodes[t], nodes[s]) for t, s in stored["edge_mask"].nonzero().tolist()}
    assert small.conservation().max() < 1e-4


def test_attention_and_mlp_in_one_graph_to_the_ninth_digit(nano):
    stored = load_file(nano.folder / "expected" / "len9" / "attention-and-mlp.safetensors")
    tokens = stored["tokens"]
    columns = stored["nodes"].tolist()
    logits = [index for kind, _, _, index in columns if kind == 30]
    graph = attribute(
        nano.model, tokens, saes=[*nano.transcoders, *nano.attention], targets=logits, dtype=torch.float64,
        progress=False,
    )  # fmt: skip

    def node(kind: int, layer: int, pos: int, index: int) -> Node:
        if kind in (20, 30):
            where = (TOKEN, "hook_embed", -1) if kind == 20 else (LOGIT, "ln_final.hook_out", 2)
            return Node(*where, pos, index)
        site = (Z if kind % 10 == 0 else MLP).format(layer)
        return Node(LATENT if kind < 10 else ERROR, site, layer, pos, index if kind < 10 else -1)

    nodes = [node(*column) for column in columns]
    nodes = [n._replace(index=int(tokens[n.pos])) if n.kind == TOKEN else n for n in nodes]
    laid = laid_over(graph, nodes)
    at = stored["targets"]
    size = torch.cat([stored["adjacency"], stored["bias"].nan_to_num()[:, None]], dim=1).abs().amax(1)
    assert bool(((laid.adjacency - stored["adjacency"]).abs() <= 1e-9 * size[:, None]).all())
    assert bool(((laid.bias - stored["bias"])[at].abs() <= 1e-9 * size[at]).all())
    assert bool(((laid.pre - stored["pre"])[at].abs() <= 1e-9 * size[at]).all())
    torch.testing.assert_close(laid.activation[-len(logits) :], stored["logit_probs"], rtol=1e-9, atol=0)
    assert graph.conservation().max() < 1e-9
    assert graph.checks.conservation < 1e-9
    assert graph.checks.logits < 1e-9
    assert graph.checks.forward_only


def test_the_oracle_agrees_with_everything_stored(nano):
    """The independent reference of the other tests, checked by itself."""
    ids = load_file(nano.folder / "expected" / "len9" / "attention-and-mlp.safetensors")
    both = [dictionary_of(sae, nano.hf, ids["tokens"]) for sae in (*nano.transcoders, *nano.attention)]
    logits = [(pos, index) for kind, _, pos, index in ids["nodes"].tolist() if kind == 30]
    graph = trace(nano.hf, ids["tokens"], both, logits=logits)
    torch.testing.assert_close(graph.logits[-1], ids["logits"], rtol=1e-12, atol=1e-12)
    # Sums over the whole matrix stand for it here; the test above compares every entry of ours.
    torch.testing.assert_close(graph.adjacency.norm(), ids["adjacency"].norm(), rtol=1e-12, atol=0)
    torch.testing.assert_close(graph.bias.nansum(), ids["bias"][ids["targets"]].sum(), rtol=1e-12, atol=0)
    for prompt in PROMPTS:
        stored, meta = nano.stored(prompt), nano.meta(prompt)
        ours = [dictionary_of(sae, nano.hf, stored["tokens"]) for sae in nano.transcoders]
        chosen = top_logits(trace(nano.hf, stored["tokens"], []))
        assert [token for _, token in chosen] == stored["logit_tokens"].tolist()
        graph = trace(nano.hf, stored["tokens"], ours, logits=chosen)
        kinds = [node.kind for node in graph.nodes]
        start = torch.where(torch.tensor([kind == LOGIT for kind in kinds]), graph.activation, 0.0)
        replacement, completeness = scores(graph.adjacency, start, kinds)
        assert replacement == pytest.approx(meta["replacement_score"], abs=1e-6)
        assert completeness == pytest.approx(meta["completeness_score"], abs=1e-6)
        nodes, edges = pruned(graph.adjacency, start, kinds)
        assert int(nodes.sum()) == meta["kept_nodes"]
        assert int(edges.sum()) == meta["kept_edges"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_direct_effect_is_what_an_intervention_measures(nano, prompt):
    tokens = nano.stored(prompt)["tokens"]
    for saes in (nano.transcoders, [*nano.transcoders, *nano.attention]):
        graph = attribute(nano.model, tokens, saes=saes, progress=False)
        found = verify(graph, nano.model, saes=saes, n=8, mode="direct")
        assert found.slope == pytest.approx(1, abs=1e-4)
        assert found.r2 == pytest.approx(1, abs=1e-4)


# ---- a fixture of the same make, larger, with skip terms; the oracle is its truth ----


class Large(NamedTuple):
    hf: PreTrainedModel
    model: ScopeModel
    saes: list[HookedSAE]


@pytest.fixture(scope="module")
def large() -> Large:
    hf = make_hf(
        "gemma2", num_hidden_layers=4, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, sliding_window=4,
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    torch.manual_seed(5)
    saes = [
        make_sae(f"blocks.{layer}.ln2.hook_normalized", f"blocks.{layer}.hook_mlp_out", d_in=64, d_sae=256, skip=True)
        for layer in range(4)
    ]
    with torch.no_grad():
        for sae in saes:
            sae.threshold += 3.0
            sae.W_skip /= 4
    return Large(hf, ScopeModel.from_hf(copy.deepcopy(hf)), saes)


@pytest.mark.parametrize("length", [5, 14])
def test_a_larger_model_with_skip_terms(large, length):
    """circuit-tracer's graph of such a model is the same but for one column: it lets a skip act at BOS too."""
    tokens = torch.cat([torch.tensor([2]), torch.randint(3, large.hf.config.vocab_size, (length - 1,))])
    dictionaries = [dictionary_of(sae, large.hf, tokens) for sae in large.saes]
    chosen = top_logits(trace(large.hf, tokens, []))
    oracle = trace(large.hf, tokens, dictionaries, logits=chosen)
    single = attribute(large.model, tokens, saes=large.saes, progress=False)
    assert_same(single, oracle, relative=1e-3, absolute=1e-4)
    double = attribute(large.model, tokens, saes=large.saes, dtype=torch.float64, progress=False)
    assert_same(double, oracle, relative=1e-9)

    kinds = [node.kind for node in oracle.nodes]
    start = torch.where(torch.tensor([kind == LOGIT for kind in kinds]), oracle.activation, 0.0)
    assert tuple(double.scores()) == pytest.approx(scores(oracle.adjacency, start, kinds), abs=1e-9)
    mine = dict(zip(nodes_of(double), double.influence().tolist(), strict=True))
    expected = influence(oracle.adjacency, start)
    torch.testing.assert_close(
        torch.tensor([mine[node] for node in oracle.nodes], dtype=torch.float64), expected, rtol=1e-9, atol=1e-12
    )
    nodes, edges = pruned(oracle.adjacency, start, kinds)
    small = double.prune()
    assert set(nodes_of(small)) == {oracle.nodes[i] for i in nodes.nonzero()[:, 0].tolist()}
    names = nodes_of(small)
    kept = {(names[t], names[s]) for t, s in small.dense().nonzero().tolist()}
    assert kept == {(oracle.nodes[t], oracle.nodes[s]) for t, s in edges.nonzero().tolist()}


def test_what_max_latents_folds_is_the_oracles_sum(large):
    tokens = torch.tensor([40, 50, 2, 60, 70, 80])  # BOS is not in front, so that the first position has latents too
    dictionaries = [dictionary_of(sae, large.hf, tokens) for sae in large.saes]
    oracle = trace(large.hf, tokens, dictionaries, logits=[(-1, 9)])
    graph = attribute(
        large.model, tokens, saes=large.saes, targets=[9], max_latents=20, dtype=torch.float64, progress=False
    )
    mine = nodes_of(graph)
    number = {node: i for i, node in enumerate(oracle.nodes)}
    kept = [node for node in mine if node.kind == LATENT]
    assert len(kept) == 20
    assert {node.pos for node in oracle.nodes if node.kind == LATENT} >= {0, 1}
    folded = [node for node in oracle.nodes if node.kind == LATENT and node not in kept]
    assert {(node.site, node.pos) for node in mine if node.kind == "REST"} == {(n.site, n.pos) for n in folded}
    dense, rows = graph.dense(), [mine.index(node) for node in mine if node.kind in (LATENT, LOGIT)]
    for column, node in enumerate(mine):
        if node.kind == "REST":
            sources = [number[n] for n in folded if (n.site, n.pos) == (node.site, node.pos)]
        else:
            sources = [number[node]]
        expected = oracle.adjacency[[number[mine[row]] for row in rows]][:, sources].sum(1)
        torch.testing.assert_close(dense[rows, column], expected, rtol=1e-9, atol=1e-12)


def test_the_larger_model_by_intervention(large):
    tokens = torch.cat([torch.tensor([2]), torch.randint(3, large.hf.config.vocab_size, (9,))])
    graph = attribute(large.model, tokens, saes=large.saes, progress=False)
    found = verify(graph, large.model, saes=large.saes, n=8, mode="direct")
    assert found.slope == pytest.approx(1, abs=1e-4)
    assert found.r2 == pytest.approx(1, abs=1e-4)
