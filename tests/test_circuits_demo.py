"""Graphs of the embedded model, at every mix of sites that Gemma Scope has."""

import pytest
import torch

from scope_lens import HookedSAE, ScopeModel, demo
from scope_lens.circuits import AttributionGraph, Kind, attribute, verify

PROMPT = "Once upon a time, a little dog"
MIXES = {
    "transcoders": ("transcoder",),
    "attention and MLP": ("att", "transcoder"),
    "residual at every layer": ("res",),
    "all at once": ("att", "mlp", "transcoder", "res"),
}
CONSERVED = {torch.float32: 1e-4, torch.float64: 1e-9}


@pytest.fixture(scope="module")
def model() -> ScopeModel:
    return demo.load_model()


@pytest.fixture(scope="module")
def suite() -> dict[str, list[HookedSAE]]:
    return {site: demo.load_saes(sites=site) for site in ("att", "mlp", "res", "transcoder")}


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


@pytest.mark.parametrize("dtype", CONSERVED, ids=["float32", "float64"])
@pytest.mark.parametrize("mix", MIXES)
def test_every_row_adds_up(model, suite, mix, dtype):
    saes = dictionaries(suite, mix)
    graph = attribute(model, PROMPT, saes=saes, dtype=dtype, progress=False)
    assert unaccounted(graph) < CONSERVED[dtype]
    assert graph.checks.conservation < CONSERVED[dtype]
    assert graph.checks.logits < CONSERVED[dtype]
    assert graph.checks.forward_only
    latents = graph.find(kind=Kind.LATENT)
    assert len(latents) > 100
    assert {graph.site[i] for i in latents.tolist()} == {sae.cfg.hook_out for sae in saes}
    if dtype == torch.float32:
        # What the linear model reads is what the model itself shows: the activations of its own forward pass.
        sae = saes[-1]
        with model.saes(saes, use_error_term=True):
            name = f"{sae.cfg.hook_out}.hook_sae_acts_post"
            _, cache = model.run_with_cache(graph.tokens[None], names_filter=name)
        mine = graph.find(kind=Kind.LATENT, site=sae.cfg.hook_out)
        acts = cache[name][0]
        torch.testing.assert_close(
            graph.activation[mine], acts[graph.pos[mine], graph.index[mine]], rtol=1e-4, atol=1e-4
        )
        assert len(mine) == int((acts[1:] != 0).sum())
        assert graph.pos[mine].min() >= 1


@pytest.mark.parametrize("mix", MIXES)
def test_direct_effects_are_what_interventions_measure(model, suite, mix):
    saes = dictionaries(suite, mix)
    graph = attribute(model, PROMPT, saes=saes, max_logits=3, progress=False)
    found = verify(graph, model, saes=saes, n=6, mode="direct")
    assert len(found.predicted) > 20
    assert found.slope == pytest.approx(1, abs=1e-4)
    assert found.r2 == pytest.approx(1, abs=1e-4)


def test_pruning_loses_nothing(model, suite):
    graph = attribute(model, PROMPT, saes=dictionaries(suite, "attention and MLP"), progress=False)
    small = graph.prune(node_mass=0.6, edge_mass=0.9)
    assert small.n_nodes < graph.n_nodes / 5
    assert unaccounted(small) < 1e-4


def test_a_shuffled_decoder_explains_less(model, suite):
    """The baseline: how much of the scores comes from the dictionaries' directions."""
    for mix in ("transcoders", "residual at every layer"):
        saes = dictionaries(suite, mix)
        shuffled = []
        for sae in saes:
            state = {name: value.detach().clone() for name, value in sae.named_parameters()}
            state["W_dec"] = state["W_dec"].roll(1, dims=0)
            shuffled.append(HookedSAE.from_tensors(sae.cfg, state, source="shuffled"))
        real = attribute(model, PROMPT, saes=saes, progress=False).scores()
        baseline = attribute(model, PROMPT, saes=shuffled, progress=False).scores()
        assert baseline.replacement < real.replacement - 0.25
        assert baseline.completeness < real.completeness - 0.1
