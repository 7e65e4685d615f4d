"""`verify`: right graphs agree with the model, wrong ones do not, and what is measured is what was said."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import make_hf, make_sae
from hf_reference import width

from scope_lens.circuits import Intervention, Kind, Target, attribute, run_with_interventions, verify
from scope_lens.circuits.frozen import frozen_points, holding, record
from scope_lens.circuits.verification import total_effects
from scope_lens.model import ScopeModel

PROMPT = torch.tensor([2, 31, 100, 36, 21, 37, 155])


def sites(reference, architecture, layers=(0, 1)):
    """Dictionaries at attention, MLP (transcoders, with and without a skip term) and residual sites."""
    read = "ln2.hook_out" if architecture == "gpt2" else "ln2.hook_normalized"
    saes = []
    for layer in layers:
        block = f"blocks.{layer}"
        saes += [
            make_sae(f"{block}.attn.hook_z", d_in=width(reference, "att"), d_sae=24),
            make_sae(f"{block}.{read}", f"{block}.hook_mlp_out", d_in=48, d_sae=24, skip=layer == 1),
            make_sae(f"{block}.hook_resid_post", d_in=48, d_sae=24),
        ]
    return saes


def material(architecture, **kw):
    reference = make_hf(architecture, num_hidden_layers=2, **kw)
    return ScopeModel.from_hf(copy.deepcopy(reference)), sites(reference, architecture)


@pytest.fixture(scope="module")
def llama():
    """A model, its dictionaries and their graph, for tests that change none of them."""
    model, saes = material("llama")
    return model, saes, attribute(model, PROMPT, saes=saes, progress=False)


# ---- direct ----


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "llama", "gpt2"])
def test_direct_effects_agree_for_every_source_at_any_mix_of_sites(architecture):
    model, saes = material(architecture)
    saes = saes[::-1][:5]  # in no order, the first attention site has none
    graph = attribute(model, PROMPT, saes=saes, progress=False)
    found = verify(graph, model, saes=saes, n=60)
    assert len(found.predicted) > 200
    assert abs(found.slope - 1) < 1e-5
    assert abs(found.r2 - 1) < 1e-9
    torch.testing.assert_close(found.measured, found.predicted, atol=5e-5, rtol=1e-4)
    kinds = graph.kind[graph.influence().argsort(descending=True)[:60]]
    assert {Kind.LATENT, Kind.ERROR, Kind.TOKEN} <= {*kinds.tolist()}


def test_direct_effects_of_a_graph_in_float64_agree_in_float64():
    model, saes = material("gemma2")
    graph = attribute(model, PROMPT, saes=saes, dtype=torch.float64, progress=False)
    found = verify(graph, model, saes=saes, n=12)
    torch.testing.assert_close(found.measured, found.predicted, atol=1e-13, rtol=1e-10)
    assert abs(found.slope - 1) < 1e-13
    assert 1 - found.r2 < 1e-13


@pytest.mark.parametrize("sae_dtype", [torch.float32, torch.bfloat16])
def test_direct_effects_in_a_half_precision_model(hf_model, sae_dtype):
    reference = hf_model("gemma2", num_hidden_layers=2).to(torch.bfloat16)
    model = ScopeModel.from_hf(copy.deepcopy(reference))
    saes = [sae.to(sae_dtype) for sae in sites(reference, "gemma2")]
    graph = attribute(model, PROMPT, saes=saes, progress=False)
    found = verify(graph, model, saes=saes, n=12)
    assert abs(found.slope - 1) < 1e-3  # what an autoencoder encodes is rounded to bfloat16 in one of the two
    assert abs(found.r2 - 1) < 1e-4
    assert next(model.parameters()).dtype == torch.bfloat16
    assert saes[0].dtype == sae_dtype


def test_mlp_saes_and_embedding_dictionaries(random_sae):
    """What reads an MLP output reads a constant; what reads the embeddings is read before the cut."""
    model, _ = material("gemma2")
    saes = [random_sae("hook_embed", d_in=48), random_sae("blocks.0.hook_mlp_out", d_in=48, skip=True)]
    saes.append(random_sae("blocks.1.hook_resid_mid", "blocks.1.hook_resid_post", d_in=48, skip=True))
    graph = attribute(model, PROMPT, saes=saes, progress=False)
    found = verify(graph, model, saes=saes, n=80)
    torch.testing.assert_close(found.measured, found.predicted, atol=1e-4, rtol=1e-4)


def test_pruned_and_folded_graphs_agree_where_they_have_edges(llama):
    model, saes, graph = llama
    whole, pruned = (verify(g, model, saes=saes, n=12) for g in (graph, graph.prune(node_mass=0.5, edge_mass=0.8)))
    assert len(pruned.predicted) < len(whole.predicted) / 2
    folded = verify(attribute(model, PROMPT, saes=saes, max_latents=30, progress=False), model, saes=saes, n=12)
    for found in (pruned, folded):
        assert abs(found.slope - 1) < 1e-5
        assert abs(found.r2 - 1) < 1e-9


def test_a_graph_without_dictionaries_is_of_tokens_alone(hf_model):
    model = ScopeModel.from_hf(hf_model("gemma2"))
    graph = attribute(model, PROMPT, saes=[], progress=False)
    found = verify(graph, model, saes=[])
    assert abs(found.slope - 1) < 1e-5
    assert found.r2 > 1 - 1e-5
    assert len(found.predicted) == len(graph.edges.source)


def test_a_wrong_graph_is_seen(llama):
    model, saes, graph = llama
    right = verify(graph, model, saes=saes, n=8)

    def with_weights(weight):
        return replace(graph, edges=graph.edges._replace(weight=weight))

    weight = graph.edges.weight
    doubled = verify(with_weights(2 * weight), model, saes=saes, n=8)
    assert doubled.slope == pytest.approx(0.5, abs=1e-5)
    shuffled = verify(with_weights(weight[torch.randperm(len(weight))]), model, saes=saes, n=8)
    assert shuffled.r2 < 0.5
    # An edge that is missing: nothing is predicted, something is measured.
    gone = verify(with_weights(torch.where(torch.rand_like(weight) < 0.3, 0, weight)), model, saes=saes, n=8)
    assert gone.r2 < right.r2 - 0.05


# ---- total ----


def test_total_effects_are_the_sum_over_all_paths(llama):
    model, saes, _ = llama
    graph = attribute(model, PROMPT, saes=saes, dtype=torch.float64, progress=False)
    dense = graph.dense()
    latent = (graph.kind == Kind.LATENT) & (graph.activation != 0)
    passes = torch.where(latent, 1 / graph.activation, 0)
    # T = A + T D A
    want = torch.linalg.solve(torch.eye(graph.n_nodes, dtype=torch.float64) - (passes[:, None] * dense).T, dense.T).T
    ends = (graph.start > 0).nonzero()[:, 0]
    torch.testing.assert_close(total_effects(graph, ends), want[ends], atol=1e-12, rtol=1e-9)


def test_total_effects_are_those_of_a_model_whose_latents_are_linear():
    """Hooks that hold all but the active latents, and let these move with their pre-activations."""
    model, saes = material("gemma2")
    saes = [sae for sae in saes if "resid" not in sae.cfg.hook_out]
    graph = attribute(model, PROMPT, saes=saes, progress=False)
    bridge, final = model.model, "ln_final.hook_out"
    names = [name for sae in saes for name in (sae.cfg.hook_in, sae.cfg.hook_out)]
    _, seen = record(bridge, PROMPT[None], dict.fromkeys([*frozen_points(bridge), *names, final]))
    constants = {name: seen[name] for name in frozen_points(bridge)}

    def hooks_of(sae, without):
        cfg, reads = sae.cfg, {}
        clean = sae.pre_activation(seen[cfg.hook_in].reshape(1, -1, cfg.d_in))
        active = (sae.activate(clean) != 0) & (PROMPT != 2)[None, :, None]

        def write(tensor, hook):
            pre = sae.pre_activation(reads["x"].reshape(1, -1, cfg.d_in))
            change = (pre - clean) * active
            if cfg.hook_out == without[0]:
                change[0, without[1], without[2]] = -clean[0, without[1], without[2]]
            skip = 0
            if sae.W_skip is not None:
                skip = (reads["x"] - seen[cfg.hook_in]) @ sae.W_skip
                skip[:, 0] = 0
            return (seen[cfg.hook_out].reshape(1, -1, cfg.d_out) + change @ sae.W_dec + skip).reshape(tensor.shape)

        return [(cfg.hook_in, lambda x, hook: reads.update(x=x)), (cfg.hook_out, write)]

    ends = graph.find(kind=Kind.LOGIT)
    latents = graph.find(kind=Kind.LATENT)
    predicted = total_effects(graph, ends)
    unembed = bridge.W_U - bridge.W_U.mean(1, keepdim=True)
    for node in latents[graph.influence()[latents].argsort(descending=True)[:4]].tolist():
        out = {}
        gone = (graph.site[node], int(graph.pos[node]), int(graph.index[node]))
        hooks = [*holding(constants), *(hook for sae in saes for hook in hooks_of(sae, gone))]
        hooks.append((final, lambda x, hook, out=out: out.update(x=x)))
        with torch.no_grad():
            bridge.run_with_hooks(PROMPT[None], fwd_hooks=hooks)
            measured = (seen[final] - out["x"])[0, -1] @ unembed[:, graph.index[ends]]
        torch.testing.assert_close(predicted[:, node].float(), measured, atol=2e-5, rtol=1e-4)


def test_total_measures_the_free_model(llama):
    model, saes, _ = llama  # without a soft cap: logits are what targets read
    graph = attribute(model, PROMPT, saes=saes, targets=[7, 9], progress=False)
    found = verify(graph, model, saes=saes, n=10, mode="total")
    by_influence = graph.influence().argsort(descending=True, stable=True).tolist()
    sources = [node for node in by_influence if graph.kind[node] in (Kind.LATENT, Kind.ERROR, Kind.TOKEN)][:10]
    latents = [column for column, node in enumerate(sources) if graph.kind[node] == Kind.LATENT]
    assert len(latents) > 1
    measured = found.measured.reshape(2, 10)  # every pair is possible: the logits come last
    with torch.no_grad():
        clean = model(PROMPT[None])[0, -1]
        for column in latents:
            node = sources[column]
            edit = Intervention(graph.site[node], int(graph.index[node]), int(graph.pos[node]), 0.0)
            change = clean - run_with_interventions(model, PROMPT, saes=saes, interventions=[edit])[0, -1]
            want = (change - change.mean())[graph.index[graph.find(kind=Kind.LOGIT)]]
            torch.testing.assert_close(measured[:, column].float(), want, atol=1e-5, rtol=1e-5)
    assert not 0.99 < found.slope < 1.01


def test_total_effects_on_a_latent_that_is_asked_for(llama):
    model, saes, _ = llama
    site = "blocks.1.hook_resid_post"
    latent = 5
    graph = attribute(model, PROMPT, saes=saes, targets=[Target("seen", 4, latent=(site, latent))], progress=False)
    found = verify(graph, model, saes=saes, n=4, mode="total")
    source = int(graph.influence().argmax())
    reads = {}
    with model.hooks(fwd_hooks=[(site, lambda x, hook: reads.setdefault("clean", x.clone()))]):
        model(PROMPT[None])

    def zero(error, hook):
        error[0, graph.pos[source]] = 0

    sae = next(sae for sae in saes if sae.cfg.hook_out == graph.site[source])
    hooks = [(f"{sae.cfg.hook_out}.hook_sae_error", zero), (site, lambda x, hook: reads.update(edited=x))]
    assert graph.kind[source] == Kind.ERROR
    model.run_with_hooks_with_saes(PROMPT[None], saes=[sae], use_error_term=True, fwd_hooks=hooks)
    change = ((reads["clean"] - reads["edited"])[0, 4] @ saes[-1].W_enc[:, latent]).detach()
    torch.testing.assert_close(found.measured[0].float(), change, atol=1e-5, rtol=1e-5)


# ---- directions ----


def test_directions_are_compared_as_well(llama):
    model, saes, _ = llama
    targets = [Target("difference", -1, vector=model.W_U[:, 7] - model.W_U[:, 9])]
    graph = attribute(model, PROMPT, saes=saes, targets=targets, progress=False)
    (direction,) = graph.find(kind=Kind.DIRECTION).tolist()
    found = verify(graph, model, saes=saes, n=graph.n_nodes)
    for edge in graph.dense()[direction].double().unique():
        assert (found.predicted == edge).any()
    assert abs(found.slope - 1) < 1e-5
    assert verify(graph, model, saes=saes, n=8, mode="total").predicted.shape == (8,)
    with pytest.raises(ValueError, match="no target to measure"):
        verify(graph.subgraph(graph.find(kind=Kind.TOKEN)), model, saes=saes)


# ---- the model is left as it was found ----


def test_the_model_is_left_as_it_was_found_also_on_exceptions():
    model, saes = material("gpt2", resid_pdrop=0.5)
    graph = attribute(model, PROMPT, saes=saes, progress=False)
    want = verify(graph, model, saes=saes, n=3)
    model.add_sae(saes[1])
    before = {name: len(point.fwd_hooks) for name, point in model.model.hook_dict.items()}
    spliced = model(PROMPT[None])
    model.model.original_model.train()
    for mode in ("direct", "total"):
        found = verify(graph, model, saes=saes, n=3, mode=mode)
        if mode == "direct":
            assert torch.equal(found.measured, want.measured)

    def breaks(tensor, hook):
        raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"), model.hooks(fwd_hooks=[("blocks.0.hook_out", breaks)]):
        verify(graph, model, saes=saes, n=3)
    assert model.model.original_model.training
    model.model.original_model.eval()
    assert {name: len(point.fwd_hooks) for name, point in model.model.hook_dict.items()} == before
    assert list(model.attached) == [saes[1].cfg.hook_out]
    assert torch.equal(model(PROMPT[None]), spliced)


# ---- input that is refused ----


def test_bad_input_is_refused_with_what_to_do(llama, hf_model, random_sae):
    model, saes, graph = llama
    plain = verify.__wrapped__.__wrapped__
    narrow = [saes[0], random_sae(saes[1].cfg.hook_in, saes[1].cfg.hook_out, d_in=48, d_sae=3), *saes[2:]]
    other = ScopeModel.from_hf(hf_model("llama", num_hidden_layers=1))
    merged = graph.merge({"two": graph.find(kind=Kind.ERROR)[:2].tolist()})
    cases = [
        ((graph, model), {"mode": "indirect"}, "mode is 'indirect'; expected 'direct' or 'total'"),
        ((graph, model), {"n": 0}, "n is 0; at least one source"),
        ((graph, model), {"saes": saes[:1]}, r"those given write \['blocks.0.attn.hook_z'\]. Pass the ones it was"),
        ((graph, model), {"saes": [*saes, random_sae("hook_embed", d_in=48)]}, "Pass the ones it was made with"),
        ((graph, model), {"saes": narrow}, "latents that these dictionaries do not have"),
        ((graph, other), {}, "a model with 2 layers and 199 tokens .* this one has 1 and 199"),
        ((merged, model), {}, "The graph was merged"),
    ]
    for arguments, keywords, text in cases:
        with pytest.raises(ValueError, match=text):
            plain(*arguments, **{"saes": saes} | keywords)
