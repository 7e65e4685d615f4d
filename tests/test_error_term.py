"""The error term: nothing edited changes nothing, bit for bit; edits move the output by what they write."""

import copy

import pytest
import torch
from hf_reference import CASES, LAYER, SITES, width

from scope_lens.model import ScopeModel
from scope_lens.splice import splice

SITE = f"blocks.{LAYER}.hook_resid_post"
POST, ERROR, RECONS = (f"{SITE}.hook_sae_{name}" for name in ("acts_post", "error", "recons"))


def all_sites(reference, random_sae, dtype):
    """Dictionaries at every layer's attention, MLP (a skip transcoder) and residual site."""
    saes = []
    for layer in range(3):
        block = f"blocks.{layer}"
        saes += [
            random_sae(f"{block}.attn.hook_z", d_in=width(reference, "att")),
            random_sae(f"{block}.ln2.hook_normalized", f"{block}.hook_mlp_out", d_in=48, skip=True),
            random_sae(f"{block}.hook_resid_post", d_in=48, activation="topk", k=5),
        ]
    return [sae.to(dtype) for sae in saes]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sae_dtype", [torch.float32, torch.bfloat16])
def test_unedited_is_bitwise_clean_at_all_sites_at_once(hf_model, random_sae, tokens, model_dtype, sae_dtype, grad):
    reference = hf_model("gemma2").to(model_dtype)
    model = ScopeModel.from_hf(copy.deepcopy(reference))
    saes = all_sites(reference, random_sae, sae_dtype)
    with torch.set_grad_enabled(grad):
        clean = model(tokens)
        assert torch.equal(model.run_with_saes(tokens, saes=saes, use_error_term=True), clean)
        cached, cache = model.run_with_cache_with_saes(
            tokens, saes=saes, use_error_term=True, positions="all", names_filter=lambda name: "hook_sae" in name
        )
        assert torch.equal(cached, clean)
        assert cache[f"{SITE}.hook_sae_acts_post"].count_nonzero() > 0
        assert not torch.equal(model.run_with_saes(tokens, saes=saes), clean)


@pytest.mark.parametrize(("architecture", "site"), CASES)
def test_unedited_is_bitwise_clean_at_each_site(hf_model, random_sae, tokens, architecture, site):
    reference = hf_model(architecture)
    model, where = ScopeModel.from_hf(reference), SITES[architecture][site]
    sae = random_sae(where.hook_in, where.hook_out, d_in=width(reference, site))
    clean = model(tokens)
    assert torch.equal(model.run_with_saes(tokens, saes=sae, use_error_term=True), clean)


def out_and_clean(model, sae, tokens, fwd_hooks, positions="all"):
    """The tensor that flows on at the site, edited and clean."""
    flows = {}

    def keep(name):
        return lambda tensor, hook: flows.__setitem__(name, tensor.detach().clone())

    model.run_with_hooks(tokens, fwd_hooks=[(SITE, keep("clean"))])
    model.run_with_hooks_with_saes(
        tokens, saes=sae, use_error_term=True, positions=positions, fwd_hooks=[*fwd_hooks, (SITE, keep("edited"))]
    )
    return flows["edited"], flows["clean"]


def in_place(tensor, hook):
    tensor[..., 3] += 2.0


def returned(tensor, hook):
    tensor = tensor.clone()
    tensor[..., 3] += 2.0
    return tensor


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("edit", [in_place, returned])
def test_an_edit_of_the_latents_moves_the_output_by_what_it_writes(gemma2, random_sae, tokens, edit, grad):
    model, _ = gemma2
    sae = random_sae(SITE, d_in=48)
    with torch.set_grad_enabled(grad):
        out, clean = out_and_clean(model, sae, tokens, [(POST, edit)])
    torch.testing.assert_close(out - clean, (2.0 * sae.W_dec[3]).detach().expand_as(clean), atol=2e-6, rtol=1e-5)


def test_edits_at_untrained_positions_have_no_effect(gemma2, random_sae, tokens):
    model, _ = gemma2
    sae = random_sae(SITE, d_in=48)
    with torch.no_grad():
        out, clean = out_and_clean(model, sae, tokens, [(POST, returned)], positions="trained")
    assert torch.equal(out[:, 0], clean[:, 0])
    assert not torch.equal(out[:, 1:], clean[:, 1:])


def test_an_edit_of_pre_activations_or_input_acts_through_the_latents(gemma2, random_sae, tokens):
    model, _ = gemma2
    sae = random_sae(SITE, d_in=48)
    with torch.no_grad():
        _, clean = out_and_clean(model, sae, tokens, [])
        f = sae.encode(clean)
        out, _ = out_and_clean(model, sae, tokens, [(f"{SITE}.hook_sae_acts_pre", lambda t, hook: t + 0.3)])
        moved = sae.activate(sae.pre_activation(clean) + 0.3)
        torch.testing.assert_close(out - clean, (moved - f) @ sae.W_dec, atol=1e-5, rtol=1e-4)
        out, _ = out_and_clean(model, sae, tokens, [(f"{SITE}.hook_sae_input", lambda t, hook: 1.5 * t)])
        torch.testing.assert_close(out - clean, (sae.encode(1.5 * clean) - f) @ sae.W_dec, atol=2e-5, rtol=1e-4)


def test_editing_the_input_of_a_skip_transcoder_moves_the_skip_term_too(gemma2, random_sae, tokens):
    model, _ = gemma2
    read, write = f"blocks.{LAYER}.ln2.hook_normalized", f"blocks.{LAYER}.hook_mlp_out"
    sae = random_sae(read, write, d_in=48, skip=True)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        x, y = cache[read], cache[write]
        with model.saes(sae, use_error_term=True, positions="all"):
            hook = (f"{write}.hook_sae_input", lambda t, hook: 2 * t)
            with model.hooks([hook]):
                _, edited = model.run_with_cache(tokens, names_filter=write)
    torch.testing.assert_close(edited[write] - y, sae(2 * x) - sae(x), atol=2e-5, rtol=1e-4)


def test_zeroing_the_error_gives_the_plain_splice(gemma2, random_sae, tokens):
    model, _ = gemma2
    sae = random_sae(SITE, d_in=48)
    with torch.no_grad():
        zeroed = model.run_with_hooks_with_saes(
            tokens, saes=sae, use_error_term=True, fwd_hooks=[(ERROR, lambda t, hook: torch.zeros_like(t))]
        )
        torch.testing.assert_close(zeroed, model.run_with_saes(tokens, saes=sae), atol=1e-5, rtol=1e-5)


def test_an_edit_of_the_reconstruction_moves_the_output_by_its_change(gemma2, random_sae, tokens):
    model, _ = gemma2
    sae = random_sae(SITE, d_in=48)
    shift = torch.randn(48)
    with torch.no_grad():
        out, clean = out_and_clean(model, sae, tokens, [(RECONS, lambda t, hook: t + shift)])
        torch.testing.assert_close(out - clean, shift.expand_as(clean), atol=2e-6, rtol=1e-5)
        both, _ = out_and_clean(model, sae, tokens, [(POST, returned), (RECONS, lambda t, hook: t + shift)])
        torch.testing.assert_close(both - clean, (shift + 2 * sae.W_dec[3]).expand_as(clean), atol=4e-6, rtol=1e-5)


def test_in_bfloat16_an_edit_is_summed_in_float32_and_rounded_once(hf_model, random_sae, tokens):
    model = ScopeModel.from_hf(hf_model("gemma2").to(torch.bfloat16))
    sae = random_sae(SITE, d_in=48).to(torch.bfloat16)
    with torch.no_grad():
        out, clean = out_and_clean(model, sae, tokens, [(POST, returned)])
        f = sae.encode(clean)
        edited = f.clone()
        edited[..., 3] += 2.0
        want = clean.double() + (edited.double() - f.double()) @ sae.W_dec.double()
    assert torch.equal(out, want.float().to(torch.bfloat16))


@pytest.mark.parametrize("edit_input", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_the_encoder_runs_once_and_twice_only_for_an_edited_input(
    gemma2, random_sae, tokens, monkeypatch, edit_input, grad
):
    model, _ = gemma2
    sae = random_sae(SITE, d_in=48)
    calls = []
    original = sae.pre_activation
    monkeypatch.setattr(sae, "pre_activation", lambda x: calls.append(1) or original(x))
    hooks = [(POST, returned), (ERROR, lambda t, hook: 2 * t), (RECONS, lambda t, hook: None)]
    if edit_input:
        hooks.append((f"{SITE}.hook_sae_input", lambda t, hook: 2 * t))
    else:
        hooks.append((f"{SITE}.hook_sae_input", lambda t, hook: None))
    with torch.set_grad_enabled(grad):
        model.run_with_hooks_with_saes(tokens, saes=sae, use_error_term=True, fwd_hooks=hooks)
    assert len(calls) == (2 if edit_input else 1)


@pytest.mark.parametrize("positions", ["trained", "all"])
def test_gradients_are_the_clean_models(hf_model, random_sae, tokens, positions):
    reference = hf_model("gemma2")
    model, clean_model = ScopeModel.from_hf(copy.deepcopy(reference)), ScopeModel.from_hf(reference)
    saes = all_sites(reference, random_sae, torch.float32)
    residual = saes[3 * LAYER + 2]
    direction = torch.randn(2, 14, 199)
    grads = {}

    def note(name):
        def hook(grad, hook):
            grads[name] = grad.detach().clone()

        return hook

    with model.saes(saes, use_error_term=True, positions=positions):
        with model.hooks(bwd_hooks=[(POST, note("latents")), (ERROR, note("error"))]):
            (model(tokens) * direction).sum().backward()
    with clean_model.hooks(bwd_hooks=[(SITE, note("site"))]):
        (clean_model(tokens) * direction).sum().backward()

    g = grads["site"].clone()
    if positions == "trained":
        g[:, 0] = 0
    torch.testing.assert_close(grads["error"], g, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(grads["latents"], g @ residual.W_dec.detach().T, atol=1e-6, rtol=1e-4)
    mine = dict(model.model.original_model.named_parameters())
    for name, parameter in clean_model.model.original_model.named_parameters():
        if parameter.grad is not None:
            scale = float(parameter.grad.abs().max())
            torch.testing.assert_close(mine[name].grad, parameter.grad, atol=1e-5 * scale, rtol=1e-4, msg=name)


def test_gradients_reach_an_edit(random_sae):
    """Hooks that depend on alpha get d loss / d alpha, checked by finite differences in float64."""
    sae = random_sae("read", "write", d_in=48, skip=True).double()
    x, y, direction = torch.randn(3, 9, 48).double()

    def loss(alpha):
        def add(t, hook):
            t = t.clone()
            t[..., 3] = t[..., 3] * 1.1 + alpha
            return t

        hooks = [
            ("hook_sae_acts_post", add),
            ("hook_sae_error", lambda t, hook: t * (1 + alpha)),
            ("hook_sae_recons", lambda t, hook: t + alpha),
        ]
        with sae.hooks(fwd_hooks=hooks):
            return (splice(sae, x, y, use_error_term=True, untrained=None) * direction).sum()

    alpha = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    loss(alpha).backward()
    with torch.no_grad():
        step = 1e-5
        numeric = (loss(alpha + step) - loss(alpha - step)) / (2 * step)
    torch.testing.assert_close(alpha.grad, numeric, atol=1e-8, rtol=1e-8)


def test_the_error_fires_only_with_the_error_term_and_is_what_is_missed(gemma2, random_sae, tokens):
    model, _ = gemma2
    sae = random_sae(SITE, d_in=48)
    with torch.no_grad():
        _, plain = model.run_with_cache_with_saes(tokens, saes=sae)
        assert ERROR not in plain
        _, cache = model.run_with_cache_with_saes(tokens, saes=sae, use_error_term=True)
    want = cache[SITE] - sae(cache[SITE]).detach()
    want[:, 0] = 0
    torch.testing.assert_close(cache[ERROR], want, atol=1e-6, rtol=1e-5)
    assert torch.equal(cache[f"{SITE}.hook_sae_output"], cache[SITE])
