"""Interventions against circuit-tracer's stored ones, plain Hugging Face hooks, and loops without a KV cache."""

import copy
import json
from contextlib import ExitStack
from functools import cache

import pytest
import torch
from conftest import make_hf
from hf_reference import LAYER, SITES, encode_decode, replaced, width
from safetensors.torch import load_file

from scope_lens.circuits.frozen import PARTS
from scope_lens.circuits.interventions import Intervention, run_with_interventions
from scope_lens.model import ScopeModel
from scope_lens.releases import read_npz

B = f"blocks.{LAYER}"
STORED = [
    "ablate_one", "ablate_one_free_attention", "ablate_one_direct", "double_one", "double_one_direct_preacts",
    "turn_on_inactive", "several", "half_range", "open_ended_slice",
]  # fmt: skip


# ---- the stored interventions ----


@pytest.fixture(scope="module")
def nano(request):
    folder = request.getfixturevalue("shared_data") / "graph-crosscheck" / "nano"
    saes = [
        read_npz(
            folder / f"transcoders/layer_{layer}",
            hook_in=f"blocks.{layer}.ln2.hook_normalized",
            hook_out=f"blocks.{layer}.hook_mlp_out",
        )
        for layer in range(2)
    ]
    tokens = torch.tensor(json.loads((folder / "prompts.json").read_text())["len9"])
    made = json.loads((folder / "expected/len9/interventions.json").read_text())
    assert set(STORED) == {name for name in made if name != "_check"}
    values = load_file(folder / "expected/len9/interventions.safetensors")
    return ScopeModel.from_pretrained(folder / "hf_model"), saes, tokens, made, values


@pytest.mark.parametrize("name", STORED)
def test_stored_interventions_of_circuit_tracer(nano, name):
    model, saes, tokens, made, values = nano
    keywords = made[name]["kwargs"]
    freeze = [] if keywords.get("freeze_attention") is False else ["patterns"]
    if "constrained_layers" in keywords:
        freeze = ["patterns", "norms", "mlps"]
    interventions = [
        Intervention(f"blocks.{layer}.hook_mlp_out", latent, slice(1, None) if pos == "1:" else pos, value)
        for layer, pos, latent, value in made[name]["interventions"]
    ]
    reads = {}
    hooks = [(sae.cfg.hook_in, lambda x, hook, sae=sae: reads.update({sae: x[0].clone()})) for sae in saes]
    with model.hooks(fwd_hooks=hooks):
        logits = run_with_interventions(model, tokens, saes=saes, interventions=interventions, freeze=freeze)
        found = []
        for sae in saes:
            pre = sae.pre_activation(reads[sae])
            found.append(pre if keywords.get("apply_activation_function") is False else sae.activate(pre))
            found[-1][0] = 0  # the peer has no latents at BOS
    assert logits.shape == (1, 9, 64)
    torch.testing.assert_close(logits[0], values[f"{name}.logits"], atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.stack(found).detach(), values[f"{name}.acts"], atol=1e-5, rtol=1e-5)
    assert (logits[0] - values["base.logits"]).abs().max() > 0.1


# ---- plain Hugging Face hooks ----


def edited(sae, tokens, edits, untrained=(2,)):
    """A plain hook that edits with nothing frozen; edits are (positions, latent, kind, value)."""

    def change(x, y):
        old, _ = encode_decode(sae, x)
        new = old.clone()
        for positions, latent, kind, value in edits:
            here = torch.zeros(tokens.shape[1], dtype=torch.bool)
            here[positions] = True
            for special in untrained:
                here &= tokens[0] != special
            before = new[0, here, latent]
            new[0, here, latent] = {"set": torch.full_like(before, value), "add": before + value}.get(
                kind, before * value
            )
        return y + torch.einsum("bps,so->bpo", new - old, sae.W_dec).reshape(y.shape)

    return change


def active_latent(model, sae, tokens, pos):
    """An active latent of a dictionary at one position."""
    name = f"{sae.cfg.hook_out}.hook_sae_acts_post"
    _, cache = model.run_with_cache_with_saes(tokens, saes=sae, use_error_term=True, names_filter=name)
    return int(cache[name][0, pos].argmax())


@pytest.fixture(scope="module")
def bridged():
    """One model of each architecture and its bridge, for tests that change neither."""

    @cache
    def made(architecture):
        reference = make_hf(architecture)
        return reference, ScopeModel.from_hf(copy.deepcopy(reference))

    return made


def build(models, random_sae, architecture, sites):
    """A model, its bridge and a dictionary at each site; `models` is the fixture `bridged`, or None for one's own."""
    if models is None:
        reference = make_hf(architecture)
        model = ScopeModel.from_hf(copy.deepcopy(reference))
    else:
        reference, model = models(architecture)
    saes = {}
    for site in sites:
        where = SITES[architecture][site]
        saes[site] = random_sae(where.hook_in, where.hook_out, d_in=width(reference, site))
    return reference, model, saes


PROMPT = torch.tensor([2, 31, 100, 36, 21, 37, 155, 40, 27, 91])
WHERE = {
    "gemma2": ["res canonical", "mlp", "att", "attn_out", "transcoder", "gained transcoder", "embedding"],
    "gemma3": ["att", "transcoder"], "llama": ["att", "normalised transcoder"], "gpt2": ["att", "transcoder", "res"],
}  # fmt: skip


@pytest.mark.parametrize(("architecture", "site"), [(a, s) for a, sites in WHERE.items() for s in sites])
def test_edits_equal_plain_hooks_under_every_name_of_the_site(bridged, random_sae, architecture, site):
    reference, model, saes = build(bridged, random_sae, architecture, [site])
    sae, where = saes[site], SITES[architecture][site]
    latent = active_latent(model, sae, PROMPT[None], 4)
    edits = [([4], latent, "set", 0.0), ([7], 5, "set", 2.5), ([-1], latent, "add", -1.5), ([3, 5], latent, "scale", 3)]
    change = edited(sae, PROMPT[None], edits)
    with torch.no_grad(), replaced(reference, where, change):
        want = reference(PROMPT[None]).logits
    points = model.model.hook_dict
    names = [name for name, point in points.items() if point is points[where.hook_out]]
    for name in names:
        interventions = [
            Intervention(name, latent, 4, 0.0),
            Intervention(name, 5, -3, 2.5),
            Intervention(name, latent, 9, -1.5, "add"),
            Intervention(name, latent, slice(3, 6, 2), 3.0, "scale"),
        ]
        got = run_with_interventions(model, PROMPT, saes=[sae], interventions=interventions)
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    assert (want - reference(PROMPT[None]).logits).abs().max() > 0.02


def test_several_dictionaries_are_edited_at_once_and_edits_of_one_latent_follow_each_other(bridged, random_sae):
    sites = ["att", "transcoder", "res"]
    reference, model, saes = build(bridged, random_sae, "gemma2", sites)
    tokens = PROMPT[None]
    twice = [([3], 4, "set", 1.0), ([3], 4, "add", 0.5), (list(range(2, 10)), 4, "scale", 2.0)]
    with torch.no_grad(), ExitStack() as stack:
        for site in sites:
            stack.enter_context(replaced(reference, SITES["gemma2"][site], edited(saes[site], tokens, twice)))
        want = reference(tokens).logits
    interventions = [
        Intervention(SITES["gemma2"][site].hook_out, 4, pos, value, kind)
        for pos, kind, value in ((3, "set", 1.0), (3, "add", 0.5), (slice(2, None), "scale", 2.0))
        for site in reversed(sites)
    ]
    got = run_with_interventions(model, tokens, saes=list(saes.values()), interventions=interventions)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)


# ---- what is frozen ----


def everything(random_sae, reference, architecture):
    """A dictionary at each attention, MLP (a transcoder with a skip term) and residual site."""
    read = "ln2.hook_out" if architecture == "gpt2" else "ln2.hook_normalized"
    return [
        sae
        for layer in range(3)
        for sae in (
            random_sae(f"blocks.{layer}.attn.hook_z", d_in=width(reference, "att")),
            random_sae(f"blocks.{layer}.{read}", f"blocks.{layer}.hook_mlp_out", d_in=48, skip=True),
            random_sae(f"blocks.{layer}.hook_resid_post", d_in=48),
        )
    ]


def flows(model, names, run):
    """What flows at some hooks of the bridge while `run()` runs."""
    seen = {}
    hooks = [(name, lambda tensor, hook, name=name: seen.update({name: tensor.clone()})) for name in names]
    with model.hooks(fwd_hooks=hooks):
        out = run()
    return out, seen


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "llama", "gpt2"])
@pytest.mark.parametrize("freeze", [*([part] for part in PARTS), [*PARTS]])
def test_frozen_parts_hold_in_the_edited_run_and_the_others_respond(bridged, random_sae, architecture, freeze):
    """Seen downstream, by what the frozen values make of the tensors that did change."""
    reference, model = bridged(architecture)
    saes = everything(random_sae, reference, architecture)
    first, block = "blocks.0.hook_mlp_out", "blocks.2"
    names = [
        "attn.hook_pattern", "attn.hook_v", "attn.hook_z", "ln2.hook_in", "ln2.hook_scale", "ln2.hook_normalized",
        "hook_mlp_out", "hook_resid_post",
    ]  # fmt: skip
    names = [f"{block}.{name}" for name in names] + [
        "ln_final.hook_in",
        "ln_final.hook_scale",
        "ln_final.hook_normalized",
    ]
    _, clean = flows(model, names, lambda: model(PROMPT[None]))
    edits = [Intervention(first, 7, 4, 6.0), Intervention(first, 9, 6, -4.0)]
    _, seen = flows(
        model, names, lambda: run_with_interventions(model, PROMPT, saes=saes, interventions=edits, freeze=freeze)
    )

    def attended(pattern):
        values = seen[f"{block}.attn.hook_v"].unflatten(-1, (-1, seen[f"{block}.attn.hook_z"].shape[-1]))
        values = values.flatten(2, 3) if values.ndim == 5 else values
        values = values.repeat_interleave(pattern.shape[1] // values.shape[2], dim=2)
        return torch.einsum("bhqk,bkhd->bqhd", pattern, values)

    def normalised(norm, scale):
        x = seen[f"{norm}.hook_in"]
        return (x - x.mean(-1, keepdim=True) if architecture == "gpt2" else x) / scale

    def close(a, b):
        return bool(torch.isclose(a, b, atol=1e-5, rtol=1e-4).all())

    z = seen[f"{block}.attn.hook_z"]
    assert close(z, attended(clean[f"{block}.attn.hook_pattern"])) == ("patterns" in freeze)
    for norm in (f"{block}.ln2", "ln_final"):
        assert close(seen[f"{norm}.hook_normalized"], normalised(norm, clean[f"{norm}.hook_scale"])) == (
            "norms" in freeze
        )
    transcoder = next(sae for sae in saes if sae.cfg.hook_out == f"{block}.hook_mlp_out")
    read = transcoder.cfg.hook_in
    _, before = flows(model, [read], lambda: model(PROMPT[None]))
    _, after = flows(
        model, [read], lambda: run_with_interventions(model, PROMPT, saes=saes, interventions=edits, freeze=freeze)
    )
    skip = torch.einsum("bpi,io->bpo", after[read] - before[read], transcoder.W_skip)
    skip[:, 0] = 0  # BOS: nothing of the dictionary there
    added = seen[f"{block}.hook_resid_post"] - seen[f"{block}.ln2.hook_in"]
    assert close(added, clean[f"{block}.hook_mlp_out"] + skip) == ("mlps" in freeze)
    assert not close(seen[f"{block}.ln2.hook_in"], clean[f"{block}.ln2.hook_in"])


def test_with_all_frozen_the_changes_of_edits_add_up_and_are_based_on_the_clean_run(bridged, random_sae):
    reference, model = bridged("gemma2")
    saes = everything(random_sae, reference, "gemma2")
    final = "ln_final.hook_out"
    edits = []
    for sae in saes:
        latent = active_latent(model, sae, PROMPT[None], 5)
        edits += [Intervention(sae.cfg.hook_out, latent, 5, 0.3), Intervention(sae.cfg.hook_out, 3, 6, 1.5)]

    def at_end(interventions):
        return flows(
            model,
            [final],
            lambda: run_with_interventions(model, PROMPT, saes=saes, interventions=interventions, freeze=PARTS),
        )[1][final]

    nothing = at_end([])
    _, clean = flows(model, [final], lambda: model(PROMPT[None]))
    torch.testing.assert_close(nothing, clean[final], atol=1e-5, rtol=1e-5)
    together = at_end(edits) - nothing
    in_turn = sum(at_end(edits[start::3]) - nothing for start in range(3))
    torch.testing.assert_close(together, in_turn, atol=1e-5, rtol=1e-4)
    tripled = at_end([edit._replace(kind="scale", value=3.0) for edit in edits[::2]]) - nothing
    removed = at_end([edit._replace(kind="scale", value=0.0) for edit in edits[::2]]) - nothing
    torch.testing.assert_close(tripled, -2 * removed, atol=1e-5, rtol=1e-4)


# ---- generation ----


def greedy(reference, prompt, n, hooked):
    """Generate by a full forward pass of the Hugging Face model for every token."""
    tokens = prompt[None]
    with torch.no_grad():
        for _ in range(n):
            with hooked(tokens):
                logits = reference(tokens, use_cache=False).logits
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    return tokens


@pytest.mark.parametrize(
    ("architecture", "site", "pos"),
    [
        ("gemma2", "transcoder", slice(1, None)),
        ("gemma2", "res", slice(5, 13)),
        ("gemma3", "att", slice(-2, None, 2)),
        ("gemma3", "transcoder", 12),
        ("llama", "att", slice(11, None)),
        ("gpt2", "transcoder", -1),
        ("gpt2", "res", slice(1, None)),
    ],
)
def test_generation_equals_a_loop_without_a_cache(bridged, random_sae, architecture, site, pos):
    reference, model, saes = build(bridged, random_sae, architecture, [site])
    sae, where = saes[site], SITES[architecture][site]
    sae.W_dec.data *= 3
    n_prompt, n = len(PROMPT), 8

    def reached(length):
        everywhere = list(range(n_prompt + n))
        if isinstance(pos, int):
            wanted = [pos % n_prompt if pos < 0 else pos]
        else:
            start = pos.start + n_prompt if pos.start < 0 else pos.start
            wanted = everywhere[start : pos.stop : pos.step]
        return [position for position in wanted if position < length]

    def hooked(tokens):
        edits = [(reached(tokens.shape[1]), 11, "set", 9.0)]
        return replaced(reference, where, edited(sae, tokens, edits, untrained=(0, 1, 2)))

    want = greedy(reference, PROMPT, n, hooked)
    interventions = [Intervention(where.hook_out, 11, pos, 9.0)]
    got = run_with_interventions(model, PROMPT, saes=[sae], interventions=interventions, generate=n)
    assert torch.equal(got, want)


def test_without_edits_generation_is_the_bridges(gemma2):
    model, _ = gemma2
    want = model.generate(PROMPT[None], max_new_tokens=5, do_sample=False, stop_at_eos=False, verbose=False)
    assert torch.equal(run_with_interventions(model, PROMPT[None], saes=[], interventions=[], generate=5), want)


def test_generation_goes_on_behind_an_end_of_sequence_token_and_edits_nothing_there(random_sae):
    reference, model, saes = build(None, random_sae, "gemma2", ["res"])
    sae, where = saes["res"], SITES["gemma2"]["res"]
    sae.W_dec.data *= 3
    free = greedy(reference, PROMPT, 3, lambda tokens: replaced(reference, where, lambda x, y: y))
    model.model.original_model.config.eos_token_id = int(free[0, -3])  # the first token that is generated
    special = (2, int(free[0, -3]), 0)

    def hooked(tokens):
        steered = [(list(range(10, tokens.shape[1])), 11, "add", 12.0)]
        return replaced(reference, where, edited(sae, tokens, steered, untrained=special))

    want = greedy(reference, PROMPT, 8, hooked)
    interventions = [Intervention(where.hook_out, 11, slice(10, None), 12.0, "add")]
    got = run_with_interventions(model, PROMPT, saes=[sae], interventions=interventions, generate=8)
    assert torch.equal(got, want)
    assert int(got[0, 10]) == special[1]
    everywhere = [(list(range(10, 18)), 11, "add", 12.0)]
    assert not torch.equal(
        greedy(
            reference, PROMPT, 8,
            lambda t: replaced(reference, where, edited(sae, t, [([p for p in everywhere[0][0] if p < t.shape[1]],
                                                                 *everywhere[0][1:])])),
        ),
        want,
    )  # fmt: skip


@pytest.mark.parametrize("freeze", [["patterns"], [*PARTS]])
def test_freezing_holds_for_the_prompt_alone(hf_model, random_sae, freeze):
    """The same loop without a cache holds what belongs to the prompt's queries in every pass."""
    reference = hf_model("gemma2")
    for layer in reference.model.layers:
        layer.self_attn.q_proj.weight.data *= 5  # attention of a fresh model is near to even, and moves little
    model = ScopeModel.from_hf(copy.deepcopy(reference))
    sae, n_prompt = random_sae("blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out", d_in=48), len(PROMPT)
    sae.W_dec.data *= 3
    site = sae.cfg.hook_out
    ends = tuple({"patterns": "hook_pattern", "norms": "hook_scale", "mlps": "hook_mlp_out"}[part] for part in freeze)
    names = [name for name in model.model.hook_dict if name.endswith(ends)]
    _, clean = flows(model, [*names, sae.cfg.hook_in], lambda: model(PROMPT[None]))
    clean_acts, _ = encode_decode(sae, clean[sae.cfg.hook_in])

    def hold(name):
        def hook(tensor, hook):
            tensor = tensor.clone()
            if name.endswith("hook_pattern"):
                tensor[:, :, :n_prompt, :n_prompt] = clean[name]
            else:
                tensor[:, :n_prompt] = clean[name]
            return tensor

        return name, hook

    def pass_without_cache(tokens):
        reads = {}

        def edit(y, hook):
            acts, _ = encode_decode(sae, reads["x"])
            base = acts.clone()
            if "mlps" in freeze:
                base[:, :n_prompt] = clean_acts
            change = torch.zeros_like(acts)
            change[0, 3:, 20] = 9.0 - base[0, 3:, 20]
            return y + torch.einsum("bps,so->bpo", change, sae.W_dec)

        hooks = [
            (sae.cfg.hook_in, lambda x, hook: reads.update(x=x)),
            *(hold(name) for name in names),
            (site, edit),
        ]
        return model.run_with_hooks(tokens, fwd_hooks=hooks, use_cache=False)

    want, wanted = PROMPT[None], []
    with torch.no_grad():
        for _ in range(6):
            wanted.append(pass_without_cache(want)[:, -1])
            want = torch.cat([want, wanted[-1].argmax(-1)[None]], 1)

    def generated(freeze):
        found = []
        last = ("unembed.hook_out", lambda logits, hook: found.append(logits[:, -1]))
        interventions = [Intervention(site, 20, slice(3, None), 9.0)]
        with model.hooks(fwd_hooks=[last]):
            tokens = run_with_interventions(
                model, PROMPT, saes=[sae], interventions=interventions, freeze=freeze, generate=6
            )
        return tokens, torch.cat(found[-6:])  # the clean pass comes before them

    got, logits = generated(freeze)
    cap = reference.config.final_logit_softcapping
    torch.testing.assert_close(cap * torch.tanh(logits / cap), torch.cat(wanted), atol=2e-5, rtol=1e-5)
    assert torch.equal(got, want)
    away = (logits - generated([])[1]).abs().amax(1)
    assert away[0] > 1e-3
    assert away[1:].max() > 1e-4, "what is frozen in the prompt's pass stays in the cache"


# ---- half precision ----


@pytest.mark.parametrize(
    ("freeze", "sae_dtype"),
    [
        ([], torch.bfloat16),
        (["patterns", "mlps"], torch.float32),
        ([*PARTS], torch.float32),
        ([*PARTS], torch.bfloat16),
    ],
)
def test_half_precision(hf_model, random_sae, freeze, sae_dtype):
    """A bfloat16 model moves as the float32 model with the same weights, up to bfloat16's rounding."""
    reference = hf_model("gemma2").to(torch.bfloat16)
    model = ScopeModel.from_hf(copy.deepcopy(reference))
    exact = ScopeModel.from_hf(copy.deepcopy(reference).float())
    saes = [
        sae.to(sae_dtype)
        for sae in everything(random_sae, reference, "gemma2")
        if not sae.cfg.hook_out.endswith("resid_post")
    ]
    edits = [Intervention("blocks.0.hook_mlp_out", 7, 4, 6.0), Intervention("blocks.1.attn.hook_z", 9, 6, -4.0, "add")]
    got = run_with_interventions(model, PROMPT, saes=saes, interventions=edits, freeze=freeze)
    clean = run_with_interventions(model, PROMPT, saes=saes, interventions=[], freeze=freeze)
    if "norms" not in freeze:
        assert torch.equal(clean, model(PROMPT[None]))
    wide = [copy.deepcopy(sae).float() for sae in saes]
    want = run_with_interventions(exact, PROMPT, saes=wide, interventions=edits, freeze=freeze)
    moved = (want - run_with_interventions(exact, PROMPT, saes=wide, interventions=[], freeze=freeze)).abs().max()
    assert got.dtype == torch.bfloat16
    assert moved > 0.15
    assert ((got - clean).float() - (want - exact(PROMPT[None]))).abs().max() < 0.1 * moved


# ---- the model is left as it was found ----


def state(model):
    points = model.model.hook_dict
    hooks = {name: (len(point.fwd_hooks), len(point.bwd_hooks)) for name, point in points.items()}
    return hooks, list(model.attached)


def test_attached_dictionaries_are_set_aside_and_come_back(random_sae):
    _, model, saes = build(None, random_sae, "gemma2", ["transcoder", "res"])
    edits = [Intervention(saes["transcoder"].cfg.hook_out, 7, 4, 6.0)]
    arguments = {"saes": [saes["transcoder"]], "interventions": edits, "freeze": PARTS}
    want = run_with_interventions(model, PROMPT, **arguments)
    handle = model.add_sae(saes["res"])
    model.add_sae(saes["transcoder"])
    spliced, before = model(PROMPT[None]), state(model)
    assert torch.equal(run_with_interventions(model, PROMPT, **arguments), want)
    assert state(model) == before
    assert torch.equal(model(PROMPT[None]), spliced)
    handle.remove()
    assert list(model.attached) == [saes["transcoder"].cfg.hook_out]


def test_an_exception_on_the_way_leaves_the_model_as_it_was(random_sae):
    _, model, saes = build(None, random_sae, "gemma2", ["transcoder", "res"])
    model.add_sae(saes["res"])
    clean, before, calls = model(PROMPT[None]), state(model), []

    def breaks(tensor, hook):
        calls.append(1)
        if len(calls) == 2:  # the first pass is the clean one
            raise RuntimeError("on the way")

    edits = [Intervention(saes["transcoder"].cfg.hook_out, 7, 4, 6.0)]
    with pytest.raises(RuntimeError, match="on the way"), model.hooks(fwd_hooks=[("blocks.2.hook_resid_pre", breaks)]):
        run_with_interventions(model, PROMPT, saes=[saes["transcoder"]], interventions=edits, freeze=PARTS)
    assert len(calls) == 2
    assert state(model) == before
    assert torch.equal(model(PROMPT[None]), clean)


# ---- input that is refused ----

SITE = f"{B}.hook_mlp_out"
BAD = [
    ([Intervention("blocks.1.hook_mlpout", 0, 1, 0.0)], {}, KeyError, "none of the dictionaries given writes; they"),
    ([Intervention("blocks.0.hook_mlp_out", 0, 1, 0.0)], {}, KeyError, "Intervention 0 is at 'blocks.0.hook_mlp_out'"),
    ([Intervention(SITE, 96, 1, 0.0)], {}, ValueError, "latent 96 of .* has the latents 0 to 95"),
    ([Intervention(SITE, -1, 1, 0.0)], {}, ValueError, "latent -1 of"),
    ([Intervention(SITE, 0, 10, 0.0)], {}, ValueError, "at position 10; the prompt has 10 tokens"),
    ([Intervention(SITE, 0, -11, 0.0)], {}, ValueError, "at position -11; the prompt has 10 tokens"),
    ([Intervention(SITE, 0, 12, 0.0)], {"generate": 3}, ValueError, "at position 12; .* 12 positions pass"),
    ([Intervention(SITE, 0, slice(5, 5), 0.0)], {}, ValueError, "selects no position"),
    ([Intervention(SITE, 0, slice(10, None), 0.0)], {}, ValueError, "selects no position"),
    ([Intervention(SITE, 0, 0, 0.0)], {}, ValueError, r"never trained there.*Leave out the positions \[0\]"),
    ([Intervention(SITE, 0, -10, 0.0)], {}, ValueError, "never trained there"),
    ([Intervention(SITE, 0, slice(None), 0.0)], {}, ValueError, "Intervention 0 edits .* at position 0, whose token"),
    ([Intervention(SITE, 0, 1, float("nan"))], {}, ValueError, "the value nan; it must be finite"),
    ([Intervention(SITE, 0, 1, 1.0), Intervention(SITE, 0, 1, 1.0, "mul")], {}, ValueError, "Intervention 1 has kind"),
    ([], {"freeze": ["pattern"]}, ValueError, r"give a sequence of any of \['patterns', 'norms', 'mlps'\]"),
    ([], {"freeze": "mlps"}, ValueError, "give a sequence"),
    ([], {"generate": -1}, ValueError, "generate is -1"),
]


def test_bad_edits_are_refused_with_what_to_do(bridged, random_sae):
    _, model, saes = build(bridged, random_sae, "gemma2", ["transcoder"])
    before = state(model)
    for interventions, keywords, error, text in BAD:
        with pytest.raises(error, match=text):
            run_with_interventions.__wrapped__.__wrapped__(
                model, PROMPT, saes=[saes["transcoder"]], interventions=interventions, **keywords
            )
    assert state(model) == before


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (torch.tensor([], dtype=torch.long), "The prompt is empty"),
        (torch.tensor([2]), "special tokens alone"),
        (torch.ones(2, 3, dtype=torch.long), r"shape \(2, 3\); give one prompt"),
    ],
)
def test_prompts_that_are_empty_or_special_or_several(gemma2, tokens, text):
    with pytest.raises(ValueError, match=text):
        run_with_interventions.__wrapped__.__wrapped__(gemma2[0], tokens, saes=[], interventions=[])


def test_two_dictionaries_for_one_site_and_one_inside_a_frozen_mlp(bridged, random_sae):
    _, model, saes = build(bridged, random_sae, "gemma2", ["transcoder", "mlp"])
    with pytest.raises(ValueError, match=r"Two of the dictionaries write 'blocks\.1\.hook_mlp_out'"):
        run_with_interventions(model, PROMPT, saes=list(saes.values()), interventions=[])
    inside = random_sae(f"{B}.mlp.hook_out", d_in=48)
    edit = [Intervention(f"{B}.mlp.hook_out", 3, 4, 1.0)]
    with pytest.raises(ValueError, match=r"writes inside an MLP.*out of freeze=\['mlps'\]"):
        run_with_interventions(model, PROMPT, saes=[inside], interventions=edit, freeze=["mlps"])
    run_with_interventions(model, PROMPT, saes=[inside], interventions=edit, freeze=["patterns", "norms"])
    keys = random_sae(f"{B}.attn.hook_k", d_in=40)
    edit = [Intervention(f"{B}.attn.hook_k", 3, 4, 1.0)]
    with pytest.raises(ValueError, match=r"writes queries or keys.*out of freeze=\['patterns'\]"):
        run_with_interventions(model, PROMPT, saes=[keys], interventions=edit, freeze=["patterns"])
    run_with_interventions(model, PROMPT, saes=[keys], interventions=edit, freeze=["norms", "mlps"])


def test_parts_that_a_model_does_not_show_are_refused(bridged, random_sae, monkeypatch):
    _, model, _ = build(bridged, random_sae, "gemma2", [])
    shown = {name: [] for name in PARTS} | {"norms": ["blocks.0.hook_mlp_in"]}  # a hook that is off
    for module in ("interventions", "frozen"):
        monkeypatch.setattr(
            f"scope_lens.circuits.{module}.frozen_points",
            lambda bridge, parts=PARTS: [name for part in parts for name in shown[part]],
        )
    with pytest.raises(ValueError, match="has no hook points for 'patterns', so they cannot be held"):
        run_with_interventions(model, PROMPT, saes=[], interventions=[], freeze=["patterns"])
    monkeypatch.setattr("scope_lens.circuits.places.record", lambda *_, **__: (None, {}))
    with pytest.raises(ValueError, match=r"\['blocks.0.hook_mlp_in'\] did not fire in a forward pass"):
        run_with_interventions(model, PROMPT, saes=[], interventions=[], freeze=["norms"])
