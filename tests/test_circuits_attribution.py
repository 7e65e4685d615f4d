"""`attribute`: what it explains, what it refuses, what it folds, what memory it asks for, and what it leaves behind."""

import subprocess
import sys

import pytest
import torch
from conftest import VOCAB, make_hf, make_sae
from torch import Tensor
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from scope_lens import HookedSAE, ScopeModel
from scope_lens.circuits import (
    AttributionGraph,
    Kind,
    Target,
    attribute,
    memory,
    run_with_interventions,
    verify,
)
from scope_lens.circuits import attribution as attribution_module
from scope_lens.circuits.prompt import token_ids

D = 48
PROMPT = torch.tensor([2, 17, 101, 9, 64, 33, 150])
RESULT = torch.float64


def suite(kinds: str, layers=range(3), **fields) -> list[HookedSAE]:
    """Dictionaries of some kinds (t transcoder, z attention, r residual, m MLP output), 24 latents each."""
    made = []
    for layer in layers:
        block = f"blocks.{layer}"
        hooks = {
            "t": (f"{block}.ln2.hook_normalized", f"{block}.hook_mlp_out"),
            "z": (f"{block}.attn.hook_z", None),
            "r": (f"{block}.hook_resid_post", None),
            "m": (f"{block}.hook_mlp_out", None),
        }
        for kind in kinds:
            width = 80 if kind == "z" else D
            made.append(make_sae(*hooks[kind], d_in=width, d_sae=24, **fields))
    return made


@pytest.fixture(scope="module")
def model() -> ScopeModel:
    return ScopeModel.from_hf(make_hf("gemma2"))


@pytest.fixture(scope="module")
def transcoders() -> list[HookedSAE]:
    """For tests that do not change them."""
    torch.manual_seed(0)
    return suite("t")


def run(model: ScopeModel, saes: list[HookedSAE], tokens: Tensor = PROMPT, **settings) -> AttributionGraph:
    return attribute(model, tokens, saes=saes, progress=False, **settings)


def row(graph: AttributionGraph, **node) -> Tensor:
    (number,) = graph.find(**node)
    return graph.dense()[number]


@pytest.fixture(scope="module")
def whole(model, transcoders) -> AttributionGraph:
    return run(model, transcoders, dtype=RESULT)


@pytest.fixture(scope="module")
def of_two_kinds(model) -> tuple[list[HookedSAE], AttributionGraph]:
    torch.manual_seed(0)
    saes = suite("tz")
    return saes, run(model, saes, dtype=RESULT)


# ---- what is explained ----


def test_the_logits_of_a_mass_are_the_fewest_that_reach_it(model, transcoders):
    probabilities = model(PROMPT[None])[0, -1].softmax(-1)
    mass, tokens = probabilities.sort(descending=True)
    graph = run(model, transcoders, logit_mass=0.03, max_logits=50)
    logits = graph.find(kind=Kind.LOGIT)
    count = len(logits)
    assert mass[: count - 1].sum() < 0.03 <= mass[:count].sum()
    assert graph.index[logits].tolist() == tokens[:count].tolist()
    torch.testing.assert_close(graph.activation[logits], mass[:count])
    torch.testing.assert_close(graph.start[logits], mass[:count])
    assert graph.start.count_nonzero() == count
    assert len(run(model, transcoders, logit_mass=1.0, max_logits=4).find(kind=Kind.LOGIT)) == 4


def test_a_logit_difference_is_the_difference_of_two_rows(model, transcoders):
    both = run(model, transcoders, targets=[5, 90], dtype=RESULT)
    vector = model.W_U[:, 5].double() - model.W_U[:, 90].double()
    one = run(model, transcoders, targets=[Target("5 over 90", -1, vector=vector)], dtype=RESULT)
    (direction,) = one.find(kind=Kind.DIRECTION)
    assert (one.label[direction], int(one.pos[direction]), int(one.layer[direction])) == ("5 over 90", 6, 3)
    assert float(one.start[direction]) == float(one.activation[direction]) == 1
    sources = both.n_nodes - 2
    expected = row(both, kind=Kind.LOGIT, index=5) - row(both, kind=Kind.LOGIT, index=90)
    torch.testing.assert_close(one.dense()[direction][:sources], expected[:sources], rtol=1e-9, atol=1e-9)


def test_a_direction_at_an_earlier_position_sees_nothing_behind_it(model, transcoders):
    vector = torch.randn(D)
    graph = run(model, transcoders, targets=[Target("early", 3, vector=vector)], dtype=RESULT)
    (early,) = graph.find(kind=Kind.DIRECTION)
    assert int(graph.pos[early]) == 3
    reached = graph.pos[graph.dense()[early] != 0]
    assert reached.max() == 3
    shorter = run(model, transcoders, PROMPT[:4], targets=[Target("early", -1, vector=vector)], dtype=RESULT)
    expected = shorter.pre_activation[shorter.find(kind=Kind.DIRECTION)]
    torch.testing.assert_close(graph.pre_activation[early][None], expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("site", ["blocks.1.hook_mlp_out", "blocks.1.ln2_post.hook_out"])
def test_an_active_latent_asked_for_is_its_node_with_a_weight(model, transcoders, whole, site):
    latent = int(whole.find(kind=Kind.LATENT, layer=1, pos=5)[0])
    index = int(whole.index[latent])
    graph = run(model, transcoders, targets=[Target("it", 5, latent=(site, index))], dtype=RESULT)
    assert len(graph.find(kind=Kind.LOGIT)) == 0
    (node,) = graph.find(kind=Kind.LATENT, layer=1, pos=5, index=index)
    assert graph.start.nonzero()[:, 0].tolist() == [int(node)]
    assert float(graph.start[node]) == 1
    torch.testing.assert_close(graph.dense()[node], whole.dense()[latent][: graph.n_nodes])


def test_a_silent_latent_asked_for_is_a_node_that_writes_nothing(model, transcoders, whole):
    active = set(whole.index[whole.find(kind=Kind.LATENT, layer=1, pos=5)].tolist())
    silent = min(set(range(24)) - active)
    graph = run(model, transcoders, targets=[Target("it", 5, latent=("blocks.1.hook_mlp_out", silent))], dtype=RESULT)
    (node,) = graph.find(kind=Kind.LATENT, layer=1, pos=5, index=silent)
    assert float(graph.activation[node]) == 0
    assert not graph.dense()[:, node].any()
    x = model.run_with_cache(PROMPT[None], names_filter="blocks.1.ln2.hook_normalized")[1]
    pre = transcoders[1].pre_activation(x["blocks.1.ln2.hook_normalized"][0, 5])[silent].detach()
    assert float(graph.pre_activation[node]) == pytest.approx(float(pre), rel=1e-4)
    assert graph.conservation().max() < 1e-12


def test_text_and_tokens_as_text(shared_data):
    from scope_lens import demo

    model = demo.load_model()
    saes = demo.load_saes("transcoder", layers=3)
    graph = run(model, saes, "Once upon a time", targets=[" there"])
    ids = model.to_tokens("Once upon a time")[0]
    assert graph.tokens.tolist() == ids.tolist()
    assert list(graph.token_strings) == [model.tokenizer.decode([token]) for token in ids.tolist()]
    (logit,) = graph.find(kind=Kind.LOGIT)
    assert graph.label[logit] == " there"
    assert graph.label[int(graph.find(kind=Kind.TOKEN, pos=1)[0])] == graph.token_strings[1]
    assert list(graph.sources) == ["transcoder/layer_3/width_1k/average_l0_47"]
    with pytest.raises(ValueError, match=r"The target ' there was' is 2 tokens, \[' there', ' was'\]; a logit is of"):
        run(model, saes, "Once upon a time", targets=[" there was"])


def test_a_graph_without_dictionaries_is_of_tokens(model):
    graph = run(model, [], targets=[7], dtype=RESULT)
    assert graph.kind.tolist() == [Kind.TOKEN] * 7 + [Kind.LOGIT]
    assert graph.conservation().max() < 1e-12


# ---- what is refused ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": torch.empty(0, dtype=torch.long)}, "The prompt is empty"),
        ({"tokens": torch.tensor([2])}, r"The prompt is special tokens alone, \[2\]"),
        ({"tokens": torch.tensor([2, 1, 0])}, r"special tokens alone, \[2, 1, 0\]"),
        ({"tokens": torch.tensor([2, 999])}, "token ids from 2 to 999; the model's vocabulary goes from 0 to 198"),
        ({"tokens": "text"}, "The prompt is text, and the model has no tokenizer. Pass token ids."),
        ({"targets": []}, "targets is empty"),
        ({"targets": [VOCAB]}, "The target token 199 is not in the vocabulary of 199 tokens"),
        ({"targets": [-1]}, "The target token -1 is not in the vocabulary"),
        ({"targets": [" word"]}, "The target ' word' is text, and the model has no tokenizer"),
        ({"targets": [4, 4]}, "The target '4' at position 6 is asked for twice"),
        ({"targets": [Target("v", 7, vector=torch.ones(D))]}, "'v' is at position 7; the prompt has 7 tokens"),
        ({"targets": [Target("v", -8, vector=torch.ones(D))]}, "at position -8"),
        ({"targets": [Target("v", 0)]}, "'v' needs a vector or a latent, one of them; found both or none"),
        ({"targets": [Target("v", 0, torch.ones(D), ("x", 0))]}, "one of them; found both or none"),
        ({"targets": [Target("v", 0, vector=torch.ones(5))]}, r"vector of shape \(48,\).*found shape \(5,\)"),
        ({"targets": [Target("v", 0, vector=torch.full((D,), torch.nan))]}, "found numbers that are not finite, shape"),
        (
            {"targets": [Target("v", 2, latent=("blocks.0.attn.hook_z", 0))]},
            r"'blocks.0.attn.hook_z', where no dictionary of this graph writes; they write \['blocks.0.hook_mlp_out'",
        ),
        (
            {"targets": [Target("v", 2, latent=("blocks.0.hook_mlp_out", 24))]},
            "asks for latent 24 of 'blocks.0.hook_mlp_out', which has latents 0 to 23",
        ),
        (
            {"targets": [Target("v", 0, latent=("blocks.0.hook_mlp_out", 3))]},
            "position 0, a special token that the dictionary of 'blocks.0.hook_mlp_out' was not trained on",
        ),
        ({"logit_mass": 0.0}, "logit_mass is a share of probability, above 0 and at most 1; found 0.0"),
        ({"max_logits": 0}, "max_logits must be at least 1; found 0"),
        ({"max_latents": -1}, "max_latents must be at least 0, or None for all; found -1"),
        ({"dtype": torch.bfloat16}, "dtype must be torch.float32 or torch.float64; found torch.bfloat16"),
    ],
)
def test_what_has_no_meaning_is_refused(model, transcoders, settings, message):
    with pytest.raises(ValueError, match=message):
        run(model, transcoders, **settings)


def test_lists_of_ids_and_iterators_of_dictionaries_are_taken_whole(model, transcoders):
    # Called without the tests' checks of types.
    assert torch.equal(token_ids.__wrapped__(model.model, PROMPT.tolist()), PROMPT[None])
    graph = attribute.__wrapped__(model, PROMPT, saes=iter(transcoders), progress=False)
    assert len(graph.sites) == 3


def test_one_target_alone_is_refused(model, transcoders):
    with pytest.raises(TypeError, match=r"targets takes a list; found ' word' alone. Pass \[' word'\]"):
        run(model, transcoders, targets=" word")


def test_dictionaries_that_do_not_fit_are_refused(model, transcoders):
    deeper = make_sae("blocks.25.ln2.hook_normalized", "blocks.25.hook_mlp_out", d_in=D)
    with pytest.raises(ValueError, match=r"for 'blocks.25.ln2.hook_normalized', and the model has 3 layers, 0 to 2"):
        run(model, [*transcoders, deeper])
    again = make_sae("blocks.1.ln2.hook_normalized", "blocks.1.ln2_post.hook_out", d_in=D)
    with pytest.raises(ValueError, match="Two dictionaries write 'blocks.1.ln2_post.hook_out'"):
        run(model, [*transcoders, again])
    backward = make_sae("blocks.2.ln2.hook_normalized", "blocks.0.hook_mlp_out", d_in=D)
    with pytest.raises(ValueError, match="reads 'blocks.2.ln2.hook_normalized', which fires later"):
        run(model, [backward])
    with pytest.raises(KeyError, match="no hook point 'blocks.0.hook_nowhere'"):
        run(model, [make_sae("blocks.0.hook_nowhere", d_in=D)])


@pytest.mark.parametrize(
    ("hook_in", "hook_out", "width", "message"),
    [
        ("ln2.hook_normalized", "mlp.hook_out", D, "'blocks.1.mlp.hook_out' writes inside an MLP.*hook_mlp_out"),
        ("ln2_post.hook_normalized", "ln2_post.hook_normalized", D, "writes inside an MLP, and the output"),
        ("hook_resid_mid", "hook_resid_mid", D, "'blocks.1.hook_resid_mid' cannot be spliced in: TransformerLens"),
        ("attn.hook_q", "attn.hook_q", 80, "writes queries or keys, and attention patterns are frozen"),
    ],
)
def test_a_dictionary_that_frozen_parts_overwrite_is_refused(model, transcoders, hook_in, hook_out, width, message):
    graph = run(model, transcoders)
    inside = make_sae(f"blocks.1.{hook_in}", f"blocks.1.{hook_out}", d_in=width, d_sae=24)
    with pytest.raises(ValueError, match=message):
        run(model, [inside])
    with pytest.raises(ValueError, match=message):
        verify(graph, model, saes=[inside])


def test_a_site_that_is_no_linear_function_of_the_stream_is_refused(model):
    inside = make_sae("blocks.1.mlp.hook_post", "blocks.1.hook_mlp_out", d_in=96, d_out=D)
    with pytest.raises(ValueError, match=r"do not add up.*What it reads is no linear function of what writes"):
        run(model, [inside])


def test_attention_whose_pattern_cannot_be_held_is_refused():
    config = GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=D, num_layers=2, num_heads=4, attention_types=[[["global"], 2]],
        max_position_embeddings=64,
    )  # fmt: skip
    model, saes = ScopeModel.from_hf(GPTNeoForCausalLM(config).eval()), suite("r", layers=[1])
    with pytest.raises(ValueError, match="put into GPTNeoForCausalLM change nothing .*It cannot be frozen"):
        run(model, saes)
    with pytest.raises(ValueError, match="put into GPTNeoForCausalLM change nothing .*It cannot be frozen"):
        run_with_interventions(model, PROMPT, saes=saes, interventions=[], freeze=["patterns"])


def test_a_model_that_a_hook_edits_is_refused(model, transcoders):
    model.add_hook("blocks.1.hook_resid_post", lambda tensor, hook: tensor + 1)
    try:
        with pytest.raises(ValueError, match=r"does not give the model's logits.*reset_hooks\(\) removes yours"):
            run(model, transcoders)
    finally:
        model.reset_hooks()


# ---- prompts with few latents ----


def silence(sae: HookedSAE) -> HookedSAE:
    with torch.no_grad():
        sae.threshold.fill_(1e9)
    return sae


def test_no_latent_at_all(model):
    graph = run(model, [silence(sae) for sae in suite("t")], dtype=RESULT)
    assert len(graph.find(kind=Kind.LATENT)) == 0
    assert graph.conservation().max() < 1e-12
    pruned = graph.prune()
    assert set(pruned.kind.tolist()) <= {Kind.ERROR, Kind.TOKEN, Kind.LOGIT}


@pytest.mark.parametrize("max_latents", [None, 5])
def test_no_latent_at_the_last_position(model, max_latents):
    (sae,) = suite("t", [1])
    graph = run(model, [sae])
    last = graph.index[graph.find(kind=Kind.LATENT, pos=6)]
    with torch.no_grad():
        sae.threshold[last] = 1e9
    graph = run(model, [sae], max_latents=max_latents, dtype=RESULT)
    assert len(graph.find(kind=Kind.LATENT, pos=6)) == 0
    assert len(graph.find(kind=Kind.ERROR, pos=6)) == 1
    assert graph.conservation().max() < 1e-12


def test_errors_are_everywhere_and_nothing_comes_from_untrained_ones(model, transcoders):
    graph = run(model, transcoders, torch.tensor([2, 17, 1, 9, 64]), dtype=RESULT)  # EOS in the middle
    assert len(graph.find(kind=Kind.ERROR)) == 3 * 5
    for pos in (0, 2):
        assert len(graph.find(kind=Kind.LATENT, pos=pos)) == 0
        assert not graph.dense()[:, graph.find(kind=Kind.ERROR, pos=pos)].any()
        assert graph.dense()[:, graph.find(kind=Kind.TOKEN, pos=pos)].any()


# ---- latents that are folded ----


def by_key(graph: AttributionGraph) -> dict[tuple[int, ...], int]:
    return {key: n for n, key in enumerate(zip(*(c.tolist() for c in (graph.kind, graph.stage, graph.pos, graph.index)),
                                               strict=True))}  # fmt: skip


@pytest.mark.parametrize("max_latents", [0, 1, 30])
def test_folding_keeps_every_row_whole(model, of_two_kinds, max_latents):
    saes, whole = of_two_kinds
    part = run(model, saes, max_latents=max_latents, dtype=RESULT)
    assert len(part.find(kind=Kind.LATENT)) == max_latents
    assert part.conservation().max() < 1e-12
    at, kept = by_key(whole), by_key(part)
    holds = torch.zeros(whole.n_nodes, part.n_nodes, dtype=RESULT)  # which node of the part holds which of the whole
    for (kind, stage, pos, index), number in at.items():
        key = (kind, stage, pos, index)
        holds[number, kept[key] if key in kept else kept[Kind.REST, stage, pos, -1]] = 1
    assert holds.any(0).all()
    rows = [key for key in kept if key[0] != Kind.REST]
    mine, theirs = torch.tensor([kept[key] for key in rows]), torch.tensor([at[key] for key in rows])
    torch.testing.assert_close(part.dense()[mine], (whole.dense() @ holds)[theirs], rtol=1e-9, atol=1e-12)
    assert not part.is_target[part.find(kind=Kind.REST)].any()


def test_as_many_latents_as_there_are_fold_none(model, transcoders):
    whole = run(model, transcoders)
    same = run(model, transcoders, max_latents=len(whole.find(kind=Kind.LATENT)))
    assert len(same.find(kind=Kind.REST)) == 0
    assert torch.equal(whole.dense(), same.dense())


def test_the_latents_that_stay_hold_most_of_the_influence(model, of_two_kinds):
    saes, whole = of_two_kinds
    influence, latents = whole.influence(), whole.find(kind=Kind.LATENT)
    part = run(model, saes, max_latents=len(latents) // 4)
    kept = by_key(part)
    stays = torch.tensor([key in kept for key in by_key(whole)])
    stayed = float(influence[latents][stays[latents]].sum() / influence[latents].sum())
    best = influence[latents].sort(descending=True).values
    assert stayed > 0.9 * float(best[: len(latents) // 4].sum() / best.sum())


def test_a_latent_asked_for_is_never_folded(model, transcoders):
    targets = [Target("one", 5, latent=("blocks.2.hook_mlp_out", 3)), 7]
    graph = run(model, transcoders, targets=targets, max_latents=4, dtype=RESULT)
    assert len(graph.find(kind=Kind.LATENT)) == 4
    assert len(graph.find(kind=Kind.LATENT, layer=2, pos=5, index=3)) == 1
    assert graph.conservation().max() < 1e-12


# ---- memory ----


def test_the_bound_on_edges_is_met_when_all_reach_all(model, transcoders, monkeypatch):
    bounds = []
    real = memory.edges_at_most
    monkeypatch.setattr(memory, "edges_at_most", lambda *given: bounds.append(real(*given)) or bounds[-1])
    graph = run(model, transcoders, max_logits=3)
    # Between the last layer's MLP and the final norm nothing moves from one position to another.
    behind = int(((graph.layer == 2) & (graph.pos < 6) & (graph.pos > 0) & (graph.kind <= Kind.ERROR)).sum())
    assert bounds == [len(graph.edges.weight) + 3 * behind]
    graph = run(model, suite("r"), max_logits=3)  # each hides what is before it
    assert len(graph.edges.weight) < bounds[1] < 1.1 * len(graph.edges.weight)
    across = make_sae("blocks.0.ln2.hook_out", "blocks.2.hook_attn_out", d_in=D)
    graph = run(model, [*suite("tzr"), across], max_logits=3)
    assert bounds[2] > len(graph.edges.weight)


@pytest.mark.parametrize("path", ["written out", "autograd"])
def test_small_memory_means_more_sweeps_and_the_same_graph(model, of_two_kinds, monkeypatch, path):
    saes, whole = of_two_kinds
    if path == "autograd":
        monkeypatch.setattr(attribution_module, "covers", lambda bridge, places: False)
    monkeypatch.setattr(attribution_module, "rows_that_fit", lambda *_, **__: 8)
    cut = run(model, saes, dtype=RESULT)
    assert cut.settings["path"] == path
    torch.testing.assert_close(cut.dense(), whole.dense(), rtol=1e-10, atol=1e-12)
    assert torch.equal(cut.edges.source, whole.edges.source)


def test_a_graph_that_does_not_fit_says_what_would(model, transcoders, monkeypatch):
    graph = run(model, transcoders)
    n_edges, n_latents = len(graph.edges.weight), len(graph.find(kind=Kind.LATENT))
    monkeypatch.setattr(memory, "available_memory", lambda device: int(6 * n_edges))  # half of what edges take
    monkeypatch.setattr(attribution_module, "refuse_long_prompt", lambda *_, **__: None)
    with pytest.raises(ValueError, match="of 7 tokens and .* active latents needs about .* GiB for its edges") as error:
        run(model, transcoders)
    few = int(str(error.value).split("max_latents=")[1].rstrip("."))
    assert 0 < few < n_latents
    assert len(run(model, transcoders, max_latents=few).find(kind=Kind.LATENT)) == few


def test_a_prompt_that_does_not_fit_says_how_long_a_one_would(model, transcoders):
    endless = torch.randint(3, VOCAB, (3_000_000,))
    with pytest.raises(ValueError, match=r"A prompt of 3000000 tokens needs about .* GiB .* is free. About \d+ tokens"):
        run(model, transcoders, endless)


def test_the_limit_of_a_container_counts(tmp_path):
    own = tmp_path / "self"
    own.write_text("0::/slice/task\n")
    slice_, task = tmp_path / "slice", tmp_path / "slice" / "task"
    task.mkdir(parents=True)
    for folder, limit in ((slice_, "5000"), (task, "max")):
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text("3000\n")
        (folder / "memory.stat").write_text("anon 2000\ninactive_file 700\n")
    assert memory.cgroup_rooms(tmp_path, own) == [2700]

    own.write_text("3:cpu:/x\n4:memory:/not/seen/here\n")
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9000")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("1000")
    assert memory.cgroup_rooms(tmp_path, own) == [8000]
    assert memory.cgroup_rooms(tmp_path, tmp_path / "missing") == []


# ---- what is left behind ----


def test_the_model_is_left_as_it_was_found(transcoders):
    hf = make_hf("gpt2", resid_pdrop=0.3, attn_pdrop=0.3, embd_pdrop=0.3).train()
    model = ScopeModel.from_hf(hf)
    saes = [make_sae(f"blocks.{layer}.ln2.hook_out", f"blocks.{layer}.hook_mlp_out", d_in=D) for layer in range(3)]
    attached = model.add_sae(make_sae("blocks.0.hook_resid_post", d_in=D)).sae
    parameters = dict(model.model.named_parameters())
    frozen = next(iter(parameters.values())).requires_grad_(False)
    calls = []
    model.add_hook("blocks.1.hook_resid_post", lambda tensor, hook: calls.append(tensor.shape))

    def state():
        return (
            {name: len(point.fwd_hooks) + len(point.bwd_hooks) for name, point in model.hook_dict.items()},
            [module.training for module in model.model.modules()],
            [parameter.requires_grad for parameter in parameters.values()],
            [parameter.grad for parameter in parameters.values()],
            dict(model.attached),
            {name: value.clone() for name, value in parameters.items()},
        )

    before = state()
    graph = run(model, saes, dtype=torch.float32)
    assert graph.settings["path"] == "autograd"
    with pytest.raises(ValueError, match="asked for twice"):
        run(model, saes, targets=[3, 3])
    after = state()
    assert after[:4] == before[:4]
    assert not frozen.requires_grad
    assert all(module.training for module in model.model.original_model.modules())
    assert after[4] == before[4] == {"blocks.0.hook_resid_post": attached}
    assert all(torch.equal(after[5][name], value) for name, value in before[5].items())
    assert calls  # hooks that only look are the user's, and stay


def test_what_is_attached_changes_nothing(model, transcoders):
    clean = run(model, transcoders)
    with model.saes(make_sae("blocks.0.hook_resid_post", d_in=D)):
        assert torch.equal(run(model, transcoders).dense(), clean.dense())
        assert len(model.attached) == 1


@pytest.mark.parametrize("path", ["written out", "autograd"])
def test_a_model_in_half_precision_is_swept_in_float32(monkeypatch, path):
    model = ScopeModel.from_hf(make_hf("gemma2").to(torch.bfloat16))
    if path == "autograd":
        monkeypatch.setattr(attribution_module, "covers", lambda bridge, places: False)
    graph = run(model, [sae.to(torch.bfloat16) for sae in suite("tzr")])
    assert graph.settings["path"] == path
    assert graph.edges.weight.dtype == graph.bias.dtype == torch.float32
    assert graph.conservation().max() < 1e-4
    assert graph.checks.logits < 5e-2
    assert next(iter(model.model.parameters())).dtype == torch.bfloat16


def test_both_paths_give_one_graph_of_a_model_in_half_precision(monkeypatch):
    model, saes = ScopeModel.from_hf(make_hf("gemma2").bfloat16()), suite("tzr")
    written_out = run(model, saes)
    monkeypatch.setattr(attribution_module, "covers", lambda bridge, places: False)
    through_autograd = run(model, saes)
    torch.testing.assert_close(written_out.dense(), through_autograd.dense(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "relu"])
def test_latents_are_those_of_the_splice(model, activation):
    k = None if activation == "relu" else 4
    (sae,) = suite("t", [1], activation=activation, k=k)
    graph = run(model, [sae])
    name = "blocks.1.hook_mlp_out.hook_sae_acts_post"
    _, cache = model.run_with_cache_with_saes(PROMPT[None], saes=[sae], names_filter=name)
    acts = cache[name][0] * (PROMPT != 2)[:, None]
    latents = graph.find(kind=Kind.LATENT)
    found = torch.zeros_like(acts)
    found[graph.pos[latents], graph.index[latents]] = graph.activation[latents]
    torch.testing.assert_close(found, acts, rtol=1e-4, atol=1e-5)


def test_progress_can_be_silenced(model, transcoders, capsys):
    attribute(model, PROMPT, saes=transcoders, progress=False)
    assert capsys.readouterr().err == ""
    attribute(model, PROMPT, saes=transcoders)
    assert "attribute" in capsys.readouterr().err


def test_settings_and_checks_are_in_the_graph(model, transcoders):
    graph = run(model, transcoders, logit_mass=0.5, max_latents=9)
    assert graph.settings == {
        "logit_mass": 0.5, "max_logits": 10, "max_latents": 9, "dtype": "float32", "path": "written out",
    }  # fmt: skip
    assert graph.checks.forward_only
    assert 0 < graph.checks.logits < 1e-5
    assert graph.checks.conservation == pytest.approx(float(graph.conservation().max()), rel=1e-3)


def test_importing_circuits_costs_nothing():
    code = "import sys, scope_lens.circuits as c; assert 'torch' not in sys.modules; c.nothing"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "module 'scope_lens.circuits' has no attribute 'nothing'; public names are" in found.stderr
