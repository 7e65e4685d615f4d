"""The calls of design section 8 as a script writes them, and what must not matter to them."""

import copy

import pytest
import torch
from conftest import make_hf, make_sae
from graph_matching import nodes_of
from graph_oracle import LATENT, Node

import scope_lens
from scope_lens import HookedSAE, ScopeModel
from scope_lens.circuits import (
    AttributionGraph,
    GraphScores,
    Intervention,
    Kind,
    Target,
    Verification,
    attribute,
    export,
    run_with_interventions,
    verify,
)
from scope_lens.releases import read_npz


@pytest.fixture(scope="module")
def nano(shared_data) -> tuple[ScopeModel, list[HookedSAE]]:
    folder = shared_data / "graph-crosscheck" / "nano"
    model = ScopeModel.from_pretrained(str(folder / "hf_model"))
    saes = [
        read_npz(
            folder / f"transcoders/layer_{layer}" / "params.npz",
            hook_in=f"blocks.{layer}.ln2.hook_normalized",
            hook_out=f"blocks.{layer}.ln2_post.hook_out",  # the canonical name of hook_mlp_out
        )
        for layer in range(2)
    ]
    return model, saes


TOKENS = [2, 31, 21, 36, 21, 37, 55, 40, 27]


def test_from_a_prompt_to_a_file_and_back(nano, tmp_path):
    model, saes = nano
    graph = attribute(
        model,
        torch.tensor(TOKENS),
        saes=saes,
        targets=[
            8,
            model.tokenizer.decode([9]),
            Target("eight over nine", -1, model.W_U[:, 8] - model.W_U[:, 9]),
            Target("a latent", 5, None, ("blocks.1.hook_mlp_out", 3)),
        ],
        logit_mass=0.9,
        max_logits=4,
        max_latents=40,
        dtype=torch.float32,
        progress=False,
    )
    assert isinstance(graph, AttributionGraph)
    count = len(graph.kind)
    for column in (graph.layer, graph.pos, graph.index, graph.activation, graph.bias, graph.dropped):
        assert column.shape == (count,)
    assert len(graph.site) == count
    assert graph.tokens.tolist() == TOKENS
    assert graph.dense().shape == (count, count)
    targets = ~graph.pre_activation.isnan()
    rows = graph.dense().sum(1) + graph.bias + graph.dropped
    torch.testing.assert_close(rows[targets], graph.pre_activation[targets], rtol=1e-4, atol=1e-5)
    assert not graph.dense()[~targets].any()

    kinds = graph.kind.tolist()
    assert kinds.count(Kind.LOGIT) == 2
    assert kinds.count(Kind.DIRECTION) == 1
    assert Kind.REST in kinds
    assert {graph.index[i].item() for i in range(count) if kinds[i] == Kind.LOGIT} == {8, 9}
    # As its config spells the site, not as the target did.
    asked = Node(LATENT, "blocks.1.ln2_post.hook_out", 1, 5, 3)
    assert graph.start[nodes_of(graph).index(asked)] == 1
    difference = graph.dense()[kinds.index(Kind.DIRECTION)]
    logits = {graph.index[i].item(): graph.dense()[i] for i in range(count) if kinds[i] == Kind.LOGIT}
    torch.testing.assert_close(difference, logits[8] - logits[9], rtol=1e-4, atol=1e-5)

    small = graph.prune(node_mass=0.8, edge_mass=0.98)
    assert len(small.kind) < count
    scores = graph.scores()
    assert isinstance(scores, GraphScores)
    assert 0 < scores.replacement < 1
    assert 0 < scores.completeness < 1
    assert graph.influence().shape == (count,)
    small.save(tmp_path / "graph.safetensors")
    again = AttributionGraph.load(tmp_path / "graph.safetensors")
    assert torch.equal(again.dense(), small.dense())
    assert nodes_of(again) == nodes_of(small)
    export.neuronpedia(again, tmp_path / "graph.json", slug="nano")
    assert (tmp_path / "graph.json").stat().st_size > 1000
    assert scope_lens.figures.graph(again).data
    assert again.to_networkx().number_of_nodes() == len(again.kind)

    for mode in ("direct", "total"):
        found = verify(again, model, saes=saes, n=5, mode=mode)
        assert isinstance(found, Verification)
        assert found.predicted.shape == found.measured.shape
        if mode == "direct":
            assert found.slope == pytest.approx(1, abs=1e-4)
            assert found.r2 == pytest.approx(1, abs=1e-4)


def test_text_is_a_prompt_with_bos(nano):
    model, saes = nano
    text = model.tokenizer.decode(TOKENS[1:])
    graph = attribute(model, text, saes=saes, progress=False)
    assert graph.tokens.tolist() == model.to_tokens(text)[0].tolist()
    assert graph.tokens[0] == 2


def test_a_site_has_one_meaning_under_every_name(nano):
    model, saes = nano
    tokens = torch.tensor(TOKENS)
    logits = {}
    for site in ("blocks.0.hook_mlp_out", "blocks.0.ln2_post.hook_out"):
        edits = [Intervention(site, 85, slice(3, None), 0.0), Intervention(site, 85, -1, 2.0, "add")]
        logits[site] = run_with_interventions(
            model, tokens[None], saes=saes, interventions=edits, freeze=("patterns", "norms", "mlps")
        )
    one, other = logits.values()
    assert one.shape == (1, 9, 64)
    assert torch.equal(one, other)
    longer = run_with_interventions(model, tokens, saes=saes, interventions=edits, generate=3)
    assert longer.flatten()[:9].tolist() == TOKENS
    assert longer.numel() == 12


@pytest.mark.parametrize("architecture", ["gemma2", "gpt2"])
def test_inference_mode_and_autocast_change_nothing(architecture):
    def load() -> tuple[ScopeModel, list[HookedSAE]]:
        torch.manual_seed(0)
        model = ScopeModel.from_hf(make_hf(architecture))
        return model, [make_sae("blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out", d_in=48, d_sae=24)]

    model, saes = load()
    tokens = torch.tensor([2, 5, 6, 7])
    plain = attribute(model, tokens, saes=saes, progress=False)
    with torch.inference_mode():
        other = attribute(model, tokens, saes=saes, progress=False)
        model, saes = load()
        loaded_there = attribute(model, tokens, saes=saes, progress=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = attribute(model, tokens, saes=saes, progress=False)
    assert torch.equal(plain.dense(), other.dense())
    assert torch.equal(plain.dense(), cast.dense())
    assert torch.equal(plain.dense(), loaded_there.dense())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_folding_the_gain_into_the_mlp_changes_nothing():
    hf = make_hf("gemma2")
    saes = [
        make_sae(f"blocks.{i}.ln2.hook_normalized", f"blocks.{i}.hook_mlp_out", d_in=48, d_sae=24) for i in range(3)
    ]
    tokens = torch.tensor([2, 5, 6, 7])
    graphs = []
    for change in (None, "fold", "compatibility mode"):
        model = ScopeModel.from_hf(copy.deepcopy(hf))
        if change == "fold":
            scope_lens.fold_mlp_norm(model)
        elif change:
            model.enable_compatibility_mode()
        graphs.append(attribute(model, tokens, saes=saes, targets=[11], progress=False))
    plain, *others = graphs
    for graph in others:
        assert nodes_of(graph) == nodes_of(plain)
        torch.testing.assert_close(graph.dense(), plain.dense(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(graph.bias, plain.bias, rtol=1e-3, atol=1e-5, equal_nan=True)
