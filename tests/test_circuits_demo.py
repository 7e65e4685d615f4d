"""Graphs of the embedded model, at every mix of sites that Gemma Scope has."""

import pytest
import torch

from scope_lens import HookedSAE, ScopeModel, demo
from scope_lens.circuits import AttributionGraph, Kind, attribute, verify

PROMPT = "Once upon a time, a dog"
MIXES = {
    "transcoders": ("transcoder",),
    "attention and MLP": ("att", "transcoder"),
    "residual at every layer": ("res",),
    "all at once": ("att", "mlp", "transcoder", "res"),
}


@pytest.fixture(scope="module")
def model() -> ScopeModel:
    return demo.load_model()


@pytest.fixture(scope="module")
def suite() -> dict[str, list[HookedSAE]]:
    return {site: demo.load_saes(sites=site) for site in ("att", "mlp", "res", "transcoder")}


@pytest.fixture(scope="module")
def graphs(model, suite) -> dict[str, AttributionGraph]:
    """One graph in float32 of each mix."""
    return {mix: attribute(model, PROMPT, saes=dictionaries(suite, mix), progress=False) for mix in MIXES}


def dictionaries(suite, mix: str) -> list[HookedSAE]:
    sites = [site for site in MIXES[mix] if not (site == "mlp" and "transcoder" in MIXES[mix])]
    saes = [sae for site in sites for sae in suite[site]]
    if "mlp" in MIXES[mix]:
        # One dictionary writes a site, so the last MLP has its autoencoder in the transcoder's place.
        saes.remove(suite["transcoder"][-1])
        saes.append(suite["mlp"][-1])
    return saes


def unaccounted(graph: AttributionGraph) -> float:
    """Largest |sum of a row + bias + dropped - pre-activation| over the row's |A| and |bias|, from the dense matrix."""
    at = graph.targets
    row = graph.dense()[at].double()
    bias, pre = graph.bias[at].double(), graph.pre_activation[at].double()
    residual = (row.sum(1) + bias + graph.dropped[at].double() - pre).abs()
    return (residual / (row.abs().sum(1) + bias.abs())).max().item()


@pytest.mark.parametrize("mix", MIXES)
def test_every_row_adds_up(model, suite, graphs, mix):
    saes = dictionaries(suite, mix)
    double = attribute(model, PROMPT, saes=saes, dtype=torch.float64, progress=False)
    for graph, bound in ((graphs[mix], 1e-4), (double, 1e-9)):
        assert unaccounted(graph) < bound
        assert graph.checks.conservation < bound
        assert graph.checks.logits < bound
        assert graph.checks.forward_only
        assert len(graph.find(kind=Kind.LATENT)) > 100
        assert {graph.site[i] for i in graph.find(kind=Kind.LATENT).tolist()} == {sae.cfg.hook_out for sae in saes}


@pytest.mark.parametrize("mix", MIXES)
def test_latents_are_those_of_the_models_own_pass(model, suite, graphs, mix):
    graph, saes = graphs[mix], dictionaries(suite, mix)
    names = {f"{sae.cfg.hook_out}.hook_sae_acts_post" for sae in saes}
    _, cache = model.run_with_cache_with_saes(
        graph.tokens[None], saes=saes, use_error_term=True, names_filter=lambda name: name in names
    )
    for sae in saes:
        mine = graph.find(kind=Kind.LATENT, site=sae.cfg.hook_out)
        acts = cache[f"{sae.cfg.hook_out}.hook_sae_acts_post"][0]
        shown = acts[graph.pos[mine], graph.index[mine]]
        torch.testing.assert_close(graph.activation[mine], shown, rtol=1e-4, atol=1e-4)
        assert len(mine) == int((acts[1:] != 0).sum())
        assert graph.pos[mine].min() >= 1


@pytest.mark.parametrize("mix", MIXES)
def test_direct_effects_are_what_interventions_measure(model, suite, graphs, mix):
    found = verify(graphs[mix], model, saes=dictionaries(suite, mix), n=6, mode="direct")
    assert len(found.predicted) > 20
    assert found.slope == pytest.approx(1, abs=1e-4)
    assert found.r2 == pytest.approx(1, abs=1e-4)


def test_pruning_loses_nothing(graphs):
    graph = graphs["attention and MLP"]
    small = graph.prune(node_mass=0.6, edge_mass=0.9)
    assert small.n_nodes < graph.n_nodes / 5
    assert unaccounted(small) < 1e-4


def test_a_shuffled_decoder_explains_less(model, suite, graphs):
    """The baseline: how much of the scores comes from the dictionaries' directions."""
    for mix in ("transcoders", "residual at every layer"):
        shuffled = []
        for sae in dictionaries(suite, mix):
            state = {name: value.detach().clone() for name, value in sae.named_parameters()}
            state["W_dec"] = state["W_dec"].roll(1, dims=0)
            shuffled.append(HookedSAE.from_tensors(sae.cfg, state, source="shuffled"))
        real = graphs[mix].scores()
        baseline = attribute(model, PROMPT, saes=shuffled, progress=False).scores()
        assert baseline.replacement < real.replacement - 0.25
        assert baseline.completeness < real.completeness - 0.1
