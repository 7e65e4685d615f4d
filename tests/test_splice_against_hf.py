"""Splicing through the bridge equals replacing the Hugging Face tensor by a plain torch hook, values and gradients."""

import copy

import pytest
import torch
from hf_reference import CASES, LAYER, SITES, encode_decode, replaced, width

from scope_lens.model import ScopeModel, fold_mlp_norm


def build(hf_model, random_sae, architecture, site, **fields):
    reference = hf_model(architecture)
    model = ScopeModel.from_hf(copy.deepcopy(reference))
    where = SITES[architecture][site]
    sae = random_sae(where.hook_in, where.hook_out, d_in=width(reference, site), **fields)
    return reference, model, where, sae


def expected_logits(reference, where, sae, tokens):
    def change(x, y):
        _, recons = encode_decode(sae, x)
        return torch.where((tokens == 2).unsqueeze(-1), y, recons)

    with replaced(reference, where, change):
        return reference(tokens).logits


def fold_by_transformer_lens(model):
    model.model.enable_compatibility_mode(
        fold_ln=True, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )


FOLDED = [
    ("gemma2", site, fold) for site in SITES["gemma2"] if site != "gained transcoder" for fold in ("ours", "theirs")
]


@pytest.mark.parametrize(("architecture", "site", "fold"), [(*case, "raw") for case in CASES] + FOLDED)
def test_splice_equals_hf_replacement_in_value_and_gradient(hf_model, random_sae, tokens, architecture, site, fold):
    reference, model, where, sae = build(hf_model, random_sae, architecture, site)
    if fold == "ours":
        fold_mlp_norm(model)
    if fold == "theirs":
        fold_by_transformer_lens(model)
    twin = copy.deepcopy(sae)
    got = model.run_with_saes(tokens, saes=sae)
    want = expected_logits(reference, where, twin, tokens)
    clean = reference(tokens).logits
    assert (want - clean).abs().max() > 1e-3, "the splice must matter, or the test is empty"
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)

    direction = torch.randn_like(want)
    (got * direction).sum().backward()
    (want * direction).sum().backward()
    for name, parameter in twin.named_parameters():
        if name != "threshold":
            scale = parameter.grad.abs().max()
            torch.testing.assert_close(getattr(sae, name).grad, parameter.grad, atol=float(1e-5 * scale), rtol=1e-4)
    if fold == "raw":
        embedding = model.model.original_model.get_input_embeddings()
        weight = next(p for n, p in embedding.named_parameters() if n.endswith("weight"))
        want_grad = reference.get_input_embeddings().weight.grad
        torch.testing.assert_close(weight.grad, want_grad, atol=float(1e-5 * want_grad.abs().max()), rtol=1e-4)


def test_skip_term_reaches_the_splice(hf_model, random_sae, tokens):
    reference, model, where, sae = build(hf_model, random_sae, "gemma2", "transcoder", skip=True)
    with torch.no_grad():
        got = model.run_with_saes(tokens, saes=sae)
        torch.testing.assert_close(got, expected_logits(reference, where, sae, tokens), atol=1e-5, rtol=1e-5)
        sae.W_skip.zero_()
        assert not torch.allclose(got, model.run_with_saes(tokens, saes=sae), atol=1e-3)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "llama"])
def test_fold_mlp_norm_keeps_logits_and_empties_the_gain(hf_model, tokens, architecture):
    model = ScopeModel.from_hf(hf_model(architecture))
    with torch.no_grad():
        before, cache = model.run_with_cache(tokens)
        fold_mlp_norm(model)
        after, folded = model.run_with_cache(tokens)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    for layer in range(3):
        normalised = folded[f"blocks.{layer}.ln2.hook_normalized"]
        torch.testing.assert_close(folded[f"blocks.{layer}.ln2.hook_out"], normalised, atol=2e-6, rtol=1e-5)
        assert not torch.allclose(cache[f"blocks.{layer}.ln2.hook_out"], normalised, atol=1e-2)
        for name in ("ln1", "ln2_post"):
            if f"blocks.{layer}.{name}.hook_out" in cache:
                torch.testing.assert_close(
                    folded[f"blocks.{layer}.{name}.hook_out"],
                    cache[f"blocks.{layer}.{name}.hook_out"],
                    atol=1e-4,
                    rtol=1e-4,
                )


def test_folding_twice_is_refused_and_changes_nothing(gemma2, tokens):
    model, _ = gemma2
    with torch.no_grad():
        before = model(tokens)
        fold_mlp_norm(model, layers=[1])
        with pytest.raises(ValueError, match="layer 1 is folded already"):
            fold_mlp_norm(model)
        torch.testing.assert_close(model(tokens), before, atol=1e-5, rtol=1e-5)
        fold_mlp_norm(model, layers=[0, 2])
    with pytest.raises(IndexError, match="layers 0 to 2; found 7"):
        fold_mlp_norm(model, layers=[7])


def test_folding_refuses_a_layer_norm(hf_model):
    with pytest.raises(ValueError, match="GPT2LMHeadModel has a 'LN' norm"):
        fold_mlp_norm(ScopeModel.from_hf(hf_model("gpt2")))


GAINED = ["blocks.1.ln2.hook_out", "blocks.1.mlp.hook_in", "blocks.1.mlp.gate.hook_in", "blocks.1.mlp.in.hook_in"]


def test_folding_by_transformer_lens_after_attaching_is_refused_in_the_forward(hf_model, random_sae, tokens):
    model = ScopeModel.from_hf(hf_model("llama"))
    with model.saes(random_sae(GAINED[0], f"blocks.{LAYER}.hook_mlp_out", d_in=48)):
        model(tokens)
        fold_by_transformer_lens(model)
        with pytest.raises(ValueError, match="folded into the MLP's weights"):
            model(tokens)
    model(tokens)


@pytest.mark.parametrize("hook_in", GAINED)
def test_a_dictionary_that_needs_the_gain_is_refused_on_a_folded_model(hf_model, random_sae, hook_in):
    sae = random_sae(hook_in, f"blocks.{LAYER}.hook_mlp_out", d_in=48)
    model = ScopeModel.from_hf(hf_model("gemma2"))
    fold_mlp_norm(model, layers=[0, 2])
    model.add_sae(sae).remove()
    with model.saes(sae), pytest.raises(ValueError, match="loses its gain by folding"):
        fold_mlp_norm(model, layers=[1])
    fold_mlp_norm(model, layers=[1])
    with pytest.raises(ValueError, match="folded into the MLP's weights"):
        model.add_sae(sae)
    compat = ScopeModel.from_hf(hf_model("gemma2"))
    fold_by_transformer_lens(compat)
    with pytest.raises(ValueError, match="folded into the MLP's weights"):
        compat.add_sae(sae)
