"""Attaching, names, caches, positions, delegation and state of a ScopeModel."""

import copy
import gc
import shutil
import weakref

import pytest
import torch
from hf_reference import width
from transformer_lens import TransformerBridge

from scope_lens.model import ScopeModel

MLP, MLP_CANONICAL = "blocks.1.hook_mlp_out", "blocks.1.ln2_post.hook_out"
RES, RES_CANONICAL = "blocks.0.hook_resid_post", "blocks.0.hook_out"
Z, Z_CANONICAL = "blocks.1.attn.hook_z", "blocks.1.attn.o.hook_in"
READ = "blocks.1.ln2.hook_normalized"


def hooks_on(model: ScopeModel) -> dict[str, int]:
    """Hooks at the bridge's hook points and around the Hugging Face model, whose submodules have hooks of their own."""
    found = {n: len(p.fwd_hooks) + len(p.bwd_hooks) for n, p in model.model.hook_dict.items() if p.has_hooks()}
    whole = model.model.original_model
    around = len(whole._forward_hooks) + len(whole._forward_pre_hooks)
    return found | ({"model": around} if around else {})


@pytest.fixture
def model(gemma2):
    torch.set_grad_enabled(False)
    yield gemma2[0]
    torch.set_grad_enabled(True)


@pytest.fixture
def saes(random_sae, gemma2):
    return [
        random_sae(RES, d_in=48),
        random_sae(Z, d_in=width(gemma2[1], "att")),
        random_sae(READ, MLP, d_in=48, skip=True),
    ]


# ---- attach, detach, state ----


def test_attach_and_detach_leave_the_model_as_it_was(model, saes, tokens):
    clean, before = model(tokens), hooks_on(model)
    handles = [model.add_sae(sae) for sae in saes]
    assert list(model.attached) == [RES, Z, MLP]
    assert model.attached[RES_CANONICAL] is saes[0] is model.attached[RES]
    assert not torch.equal(model(tokens), clean)
    handles[0].remove()
    handles[0].remove()
    assert list(model.attached) == [Z, MLP]
    model.reset_saes(MLP_CANONICAL)
    assert list(model.attached) == [Z]
    model.reset_saes()
    assert dict(model.attached) == {}
    assert hooks_on(model) == before == {}
    assert torch.equal(model(tokens), clean)


def test_a_handle_that_was_replaced_removes_nothing(model, saes):
    old = model.add_sae(saes[0])
    model.reset_saes()
    model.add_sae(saes[0])
    old.remove()
    assert list(model.attached) == [RES]


def test_context_restores_the_earlier_state_also_on_exceptions(model, saes, tokens):
    model.add_sae(saes[0], use_error_term=True)
    before = model(tokens)
    with pytest.raises(RuntimeError, match="inside"), model.saes(saes[1:]):
        assert len(model.attached) == 3
        model.reset_saes()
        model.add_sae(saes[2], positions="all")
        raise RuntimeError("inside")
    assert list(model.attached) == [RES]
    assert torch.equal(model(tokens), before)
    with pytest.raises(ValueError, match="two cannot write one site"), model.saes([saes[1], saes[0]]):
        pass
    assert list(model.attached) == [RES]


def test_handles_work_on_after_a_block_that_detached(model, saes, tokens):
    clean = model(tokens)
    handle = model.add_sae(saes[2])
    spliced = model(tokens)
    with model.saes():
        handle.remove()
        assert torch.equal(model(tokens), clean)
    assert torch.equal(model(tokens), spliced)
    handle.remove()
    assert torch.equal(model(tokens), clean)
    assert hooks_on(model) == {}


def test_state_after_a_hook_raises_in_the_forward_pass(model, saes, tokens):
    clean = model(tokens)

    def fail(tensor, hook):
        raise RuntimeError("boom")

    for run in (
        lambda: model.run_with_hooks_with_saes(tokens, saes=saes, fwd_hooks=[(f"{MLP}.hook_sae_acts_post", fail)]),
        lambda: model.run_with_hooks_with_saes(tokens, saes=saes, fwd_hooks=[("blocks.2.hook_out", fail)]),
    ):
        with pytest.raises(RuntimeError, match="boom"):
            run()
        assert hooks_on(model) == {}
        assert not any(point.has_hooks() for sae in saes for point in sae.hook_dict.values())
        assert torch.equal(model(tokens), clean)


def test_captures_are_cleared_after_every_forward(model, saes, tokens):
    from scope_lens.attachments import attachments_of

    model.add_sae(saes[2])
    state = attachments_of(model.model)

    def empty():
        noted = state._forward
        return noted.tokens is None and not noted.read and not noted.untrained

    def fail(tensor, hook):
        assert not empty()
        raise RuntimeError("boom")

    model(tokens)
    assert empty()
    with pytest.raises(RuntimeError, match="boom"):
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.2.hook_out", fail)])
    assert empty()
    model(tokens, stop_at_layer=2)
    assert empty()


def test_user_hooks_at_a_spliced_site_live_on_in_their_order(model, saes, tokens):
    seen = []
    point = model.model.hook_dict[MLP]
    model.model.add_hook(MLP, lambda t, hook: seen.append(("before", t.clone())), is_permanent=True)
    handle = model.add_sae(saes[2])
    assert model.model.hook_dict[MLP] is point
    model.add_hook(MLP, lambda t, hook: seen.append(("after", t.clone())))
    model(tokens)
    assert [name for name, _ in seen] == ["before", "after"]
    assert not torch.equal(seen[0][1], seen[1][1])
    handle.remove()
    seen.clear()
    model(tokens)
    assert [name for name, _ in seen] == ["before", "after"]
    assert torch.equal(seen[0][1], seen[1][1])


def test_attached_tells_the_truth_after_reset_hooks(model, saes, tokens):
    clean = model(tokens)
    model.add_sae(saes[0])
    spliced = model(tokens)
    model.model.reset_hooks()
    assert list(model.attached) == [RES]
    assert torch.equal(model(tokens), spliced)
    model.model.reset_hooks(including_permanent=True)
    assert list(model.attached) == []
    assert torch.equal(model(tokens), clean)
    model.add_sae(saes[0])
    assert torch.equal(model(tokens), spliced)


def test_the_bridge_itself_is_spliced_and_shared(model, saes, tokens):
    second = ScopeModel(model.model)
    handle = second.add_sae(saes[0])
    assert list(model.attached) == [RES]
    assert torch.equal(model.model(tokens), second(tokens))
    assert torch.equal(model.model.run_with_hooks(tokens), second(tokens))
    with pytest.raises(ValueError, match="two cannot write one site"):
        model.add_sae(saes[0])
    handle.remove()
    assert list(model.attached) == []


def test_deepcopy_gives_an_independent_model(model, saes, tokens):
    clean = model(tokens)
    handles = [model.add_sae(sae, use_error_term=sae is saes[1]) for sae in saes]
    spliced = model(tokens)
    twin = copy.deepcopy(model)
    assert list(twin.attached) == list(model.attached)
    assert twin.attached[RES] is not saes[0]
    assert torch.equal(twin(tokens), spliced)
    for handle in handles:
        handle.remove()
    assert torch.equal(model(tokens), clean)
    assert torch.equal(twin(tokens), spliced)
    twin.attached[RES].b_dec.add_(1)
    model.add_sae(saes[0])
    twin.reset_saes()
    assert torch.equal(twin(tokens), clean)
    assert hooks_on(twin) == {}


def test_a_bridge_with_dictionaries_is_not_copied_by_itself(model, saes, tokens):
    handle = model.add_sae(saes[2])
    with pytest.raises(ValueError, match="cannot be deep-copied.*Copy the ScopeModel"):
        copy.deepcopy(model.model)
    handle.remove()
    twin = copy.deepcopy(model.model)
    assert torch.equal(twin(tokens), model(tokens))


def test_nothing_keeps_a_model_alive(hf_model, saes, tokens):
    model = ScopeModel.from_hf(hf_model("gemma2"))
    model.add_sae(saes[2])
    with torch.no_grad():
        model(tokens)
    alive = weakref.ref(model.model)
    del model
    gc.collect()
    assert alive() is None


# ---- names ----


@pytest.mark.parametrize("name", [MLP, MLP_CANONICAL])
def test_every_spelling_of_a_site_names_its_hook_points(model, saes, tokens, name):
    sae = saes[2]
    model.add_sae(sae, positions="all")
    _, cache = model.run_with_cache(tokens)
    x = cache[READ]
    torch.testing.assert_close(cache[f"{name}.hook_sae_input"], x)
    torch.testing.assert_close(cache[f"{name}.hook_sae_acts_post"], sae.encode(x))
    torch.testing.assert_close(cache[f"{name}.hook_sae_recons"], sae(x))
    assert torch.equal(cache[f"{name}.hook_sae_output"], cache[MLP])
    assert torch.equal(cache[MLP], cache[MLP_CANONICAL])

    _, only = model.run_with_cache(tokens, names_filter=f"{name}.hook_sae_acts_post")
    assert list(only) == [f"{name}.hook_sae_acts_post"]
    _, mixed = model.run_with_cache(tokens, names_filter=[f"{name}.hook_sae_acts_pre", RES])
    assert set(mixed) == {f"{name}.hook_sae_acts_pre", RES, RES_CANONICAL}
    _, chosen = model.run_with_cache(tokens, names_filter=lambda n: n == f"{name}.hook_sae_acts_post")
    assert list(chosen) == [f"{name}.hook_sae_acts_post"]

    seen = []
    spliced = model(tokens)
    edited = model.run_with_hooks(
        tokens, fwd_hooks=[(f"{name}.hook_sae_acts_post", lambda t, hook: seen.append(hook.name) or 0 * t)]
    )
    assert seen == [f"{name}.hook_sae_acts_post"]
    assert not torch.equal(edited, spliced)
    assert torch.equal(model(tokens), spliced)
    seen.clear()
    with model.hooks([(lambda n: "hook_sae_acts" in n, lambda t, hook: seen.append(hook.name))]):
        model(tokens)
    assert seen == [f"{MLP}.hook_sae_acts_pre", f"{MLP}.hook_sae_acts_post"], (
        "once a point, under the config's spelling"
    )
    assert model.hook_dict[f"{name}.hook_sae_error"] is sae.hook_sae_error


def test_the_cache_has_every_name_the_bridge_has(model, saes, tokens):
    _, plain = model.model.run_with_cache(tokens)
    model.add_sae(saes[1], use_error_term=True)
    _, cache = model.run_with_cache(tokens)
    assert set(plain) < set(cache)
    assert len(set(cache) - set(plain)) == 2 * 6
    for name in set(cache) - set(plain):
        want = 96 if "acts" in name else 80
        assert cache[name].shape == (2, 14, want), "flat at hook_z"
    assert cache[Z].shape == (2, 14, 4, 20)


def test_cache_options_reach_the_dictionaries(model, saes, tokens):
    model.add_sae(saes[0])
    name = f"{RES}.hook_sae_acts_post"
    _, full = model.run_with_cache(tokens, names_filter=[name, RES])
    _, sliced = model.run_with_cache(tokens, names_filter=[name, RES], pos_slice=slice(2, 5))
    assert torch.equal(sliced[name], full[name][:, 2:5])
    assert sliced[RES].shape[1] == 3
    _, single = model.run_with_cache(tokens[:1], names_filter=name, remove_batch_dim=True)
    torch.testing.assert_close(single[name], full[name][0])
    _, plain = model.run_with_cache(tokens, names_filter=name, return_cache_object=False)
    assert type(plain) is dict
    assert list(plain) == [name]
    _, stopped = model.run_with_cache(tokens, names_filter=[name, RES], stop_at_layer=1)
    assert torch.equal(stopped[name], full[name])
    squeezed = []
    model.run_with_hooks(
        tokens[:1], fwd_hooks=[(name, lambda t, hook: squeezed.append(t.shape))], remove_batch_dim=True
    )
    assert squeezed == [(14, 96)]


def test_caching_hooks_and_permanent_hooks_know_the_dictionaries(model, saes, tokens):
    model.add_sae(saes[0])
    name = f"{RES}.hook_sae_acts_post"
    cache, fwd, bwd = model.get_caching_hooks([name, RES])
    with model.hooks(fwd, bwd):
        model(tokens)
    _, want = model.run_with_cache(tokens, names_filter=[name, RES])
    assert set(cache) == set(want.cache_dict)
    assert torch.equal(cache[name], want[name])
    model.add_perma_hook(name, lambda t, hook: 0 * t)
    model.reset_hooks()
    _, silent = model.run_with_cache(tokens, names_filter=f"{RES}.hook_sae_recons")
    assert torch.equal(silent[f"{RES}.hook_sae_recons"], saes[0].b_dec.expand(2, 14, 48))


def test_gradients_are_cached_for_dictionaries(gemma2, random_sae, tokens):
    model, _ = gemma2
    sae = random_sae(RES, d_in=48)
    name = f"{RES}.hook_sae_acts_post"
    _, cache = model.run_with_cache_with_saes(
        tokens, saes=sae, names_filter=[name, f"{RES}.hook_sae_output"], incl_bwd=True, return_type="loss"
    )
    want = cache[f"{RES}.hook_sae_output_grad"].clone()
    want[:, 0] = 0
    torch.testing.assert_close(cache[f"{name}_grad"], want @ sae.W_dec.detach().T, atol=1e-7, rtol=1e-4)


def test_unknown_names_are_refused(model, saes, tokens):
    model.add_sae(saes[0])
    for call in (
        lambda: model.run_with_cache(tokens, names_filter=f"{MLP}.hook_sae_acts_post"),
        lambda: model.run_with_cache(tokens, names_filter=[RES, f"{RES}.hook_sae_act"]),
        lambda: model.run_with_hooks(tokens, fwd_hooks=[(f"{MLP}.hook_sae_acts_post", print)]),
        lambda: model.add_hook(f"{MLP}.hook_sae_acts_post", print),
    ):
        with pytest.raises(KeyError, match="No attached dictionary has the hook point"):
            call()
    for names in (["blocks.0.hook_typo"], ["blocks.0.hook_typo", RES], "blocks.0.hook_typo"):
        with pytest.raises(KeyError, match="matched no hook points"):
            model.run_with_cache(tokens, names_filter=names)
    with pytest.raises(KeyError, match="does not exist"):
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_typo", print)])


def test_hooks_added_to_dictionaries_go_with_reset_hooks(model, saes, tokens):
    model.add_sae(saes[0])
    spliced = model(tokens)
    model.add_hook(f"{RES_CANONICAL}.hook_sae_acts_post", lambda t, hook: 0 * t)
    assert not torch.equal(model(tokens), spliced)
    model.reset_hooks()
    assert torch.equal(model(tokens), spliced)
    assert list(model.attached) == [RES]
    model.add_hook(f"{RES}.hook_sae_acts_post", lambda t, hook: 0 * t)
    model.reset_saes()
    model.reset_hooks()
    assert torch.equal(model.run_with_saes(tokens, saes=saes[0]), spliced), "a detached dictionary's hooks go as well"


def test_an_edit_where_a_transcoder_reads_reaches_it(model, saes, tokens):
    """A hook given to run_with_hooks comes after the reading hook was added, and is seen all the same."""
    sae = saes[2]
    model.add_sae(sae, positions="all")
    inputs = []
    hooks = [(READ, lambda t, hook: 3 * t), (f"{MLP}.hook_sae_input", lambda t, hook: inputs.append(t.clone()))]
    _, cache = model.run_with_cache(tokens, names_filter=READ)
    with pytest.warns(UserWarning, match="hook_normalized"):
        model.run_with_hooks(tokens, fwd_hooks=hooks)
    torch.testing.assert_close(inputs[0], 3 * cache[READ])


def test_any_number_of_dictionaries_may_read_one_hook(model, random_sae, tokens):
    first = random_sae("blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out", d_in=48)
    second = random_sae("blocks.0.ln2.hook_normalized", "blocks.2.hook_mlp_out", d_in=48)
    third = random_sae("blocks.0.ln2.hook_normalized", d_in=48)
    with model.saes([first, second, third], use_error_term=True):
        assert torch.equal(model.run_with_cache(tokens)[0], model(tokens))
    one, two = model.add_sae(first), model.add_sae(second)
    both = model(tokens)
    one.remove()
    assert not torch.equal(model(tokens), both)
    model.add_sae(first)
    torch.testing.assert_close(model(tokens), both)
    two.remove()
    model.reset_saes()
    assert hooks_on(model) == {}


# ---- positions ----


def spliced_positions(model, sae, run) -> torch.Tensor:
    """Where a splice changed the site in one run."""
    flows = []
    with model.hooks([(sae.cfg.hook_out, lambda t, hook: flows.append(t.clone()))]):
        run()
    with model.saes(sae), model.hooks([(sae.cfg.hook_out, lambda t, hook: flows.append(t.clone()))]):
        run()
    clean, spliced = flows
    return (clean != spliced).any(-1)


def test_special_positions_pass_through(model, saes, tokens):
    tokens = tokens.clone()
    tokens[0, 5], tokens[1, 7:] = 1, 0
    changed = spliced_positions(model, saes[0], lambda: model(tokens))
    assert torch.equal(changed, (tokens != 0) & (tokens != 1) & (tokens != 2))
    direct = spliced_positions(model, saes[0], lambda: model.model(tokens))
    assert torch.equal(direct, changed)
    with model.saes(saes[0], positions="all"):
        _, cache = model.run_with_cache(tokens, names_filter=RES)
    torch.testing.assert_close(cache[RES], saes[0](model.run_with_cache(tokens, names_filter=RES)[1][RES]))


def test_masked_out_positions_are_padding(model, saes, tokens):
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    changed = spliced_positions(model, saes[0], lambda: model(tokens, attention_mask=mask))
    assert torch.equal(changed, (mask == 1) & (tokens != 2))


def test_a_dictionary_without_untrained_positions_is_spliced_everywhere(model, random_sae, tokens):
    sae = random_sae(RES, d_in=48, untrained=())
    assert spliced_positions(model, sae, lambda: model(tokens)).all()
    embeddings = torch.randn(1, 6, 48)
    with model.saes(sae):
        model(embeddings)


def test_a_forward_without_ids_raises_unless_everything_is_spliced(model, saes, tokens):
    _, cache = model.run_with_cache(tokens, names_filter="blocks.0.hook_in")
    residual = cache["blocks.0.hook_in"]
    with model.saes(saes[0]):
        for run in (lambda: model(residual), lambda: model(residual, start_at_layer=0)):
            with pytest.raises(ValueError, match="shows no token ids"):
                run()
    with model.saes(saes[0], positions="all"):
        model(residual, start_at_layer=0)


@pytest.mark.parametrize("use_error_term", [False, True])
def test_generate_agrees_with_and_without_the_kv_cache(model, saes, tokens, use_error_term):
    prompt = torch.cat([tokens[:1, :6], torch.tensor([[1, 2]]), tokens[:1, 6:]], dim=1)

    def generate(kv):
        return model.generate(
            prompt, max_new_tokens=10, do_sample=False, verbose=False, use_past_kv_cache=kv, stop_at_eos=False
        )

    clean = generate(True)
    with model.saes(saes, use_error_term=use_error_term):
        assert torch.equal(generate(True), generate(False))
        assert torch.equal(generate(True), clean) == use_error_term


def test_chunks_with_a_kv_cache_equal_the_whole(model, saes, tokens):
    with model.saes(saes):
        whole = model(tokens)
        first, past = model(tokens[:, :5], return_type="logits_and_cache", use_cache=True)
        rest = model(tokens[:, 5:], past_key_values=past)
    torch.testing.assert_close(torch.cat([first, rest], 1), whole, atol=1e-5, rtol=1e-5)


# ---- delegation ----


def test_delegation_and_attributes(model, saes):
    assert isinstance(model.model, TransformerBridge)
    assert model.cfg is model.model.cfg
    assert model.eval() is model
    assert model.to(torch.float32) is model
    assert model.cpu() is model
    assert model.requires_grad_(requires_grad=True) is model
    with pytest.raises(AttributeError, match="would have no effect"):
        model.use_error_term = True
    with pytest.raises(AttributeError, match="cannot be set"):
        model.attached = {}
    for name in ("model", "run_with_cache", "_bridge"):
        with pytest.raises(AttributeError, match="cannot be set"):
            setattr(model, name, None)
    with pytest.raises(AttributeError):
        _ = model.no_such_thing
    model.tokenizer = None
    assert "run_with_saes" in dir(model)
    assert "generate" in dir(model)
    model.add_sae(saes[0])
    assert repr(model).endswith("attached=['blocks.0.hook_resid_post'])")
    with pytest.raises(TypeError, match="ScopeModel wraps a TransformerBridge; found Linear"):
        ScopeModel.__init__.__wrapped__(object.__new__(ScopeModel), torch.nn.Linear(2, 2))


def test_to_moves_dictionaries_and_keeps_their_dtype(model, saes, tokens):
    model.add_sae(saes[0])
    model.to(torch.bfloat16)
    assert saes[0].dtype == torch.float32
    assert model(tokens).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="Gemma2ForCausalLM in float16"):
        model.to(torch.float16)
    assert model(tokens).dtype == torch.bfloat16


def test_the_stream_keeps_its_dtype(hf_model, saes, tokens):
    model = ScopeModel.from_hf(hf_model("gemma2").to(torch.bfloat16))
    with torch.no_grad():
        _, cache = model.run_with_cache_with_saes(tokens, saes=saes)
    assert {cache[n].dtype for n in (RES, Z, MLP)} == {torch.bfloat16}
    assert cache[f"{MLP}.hook_sae_acts_post"].dtype == torch.float32


@pytest.mark.parametrize("use_error_term", [False, True])
def test_a_hook_may_return_another_dtype(hf_model, saes, tokens, use_error_term):
    model = ScopeModel.from_hf(hf_model("gemma2").to(torch.bfloat16))
    saes = [sae.to(torch.bfloat16) for sae in saes]
    hooks = [(lambda name: "hook_sae_" in name, lambda t, hook: t.float() * 1.5)]
    with torch.no_grad(), model.saes(saes, use_error_term=use_error_term):
        plain, edited = model(tokens), model.run_with_hooks(tokens, fwd_hooks=hooks)
    assert edited.dtype == torch.bfloat16
    assert not torch.equal(plain, edited)


# ---- what is refused ----


def test_what_cannot_attach_is_refused_with_the_reason(model, random_sae, gemma2):
    cases = [
        (
            KeyError,
            "no hook point 'blocks.0.hook_resid_psot'.*blocks.0.hook_resid_post",
            "blocks.0.hook_resid_psot",
            48,
        ),
        (KeyError, "no hook point", "blocks.9.hook_resid_post", 48),
        (ValueError, "'blocks.0.hook_mlp_in' is refused.*ln2.hook_normalized", "blocks.0.hook_mlp_in", 48),
        (ValueError, "does not fire on this model.*use_attn_result", "blocks.0.attn.hook_result", 48),
        (ValueError, "is 48 wide on this model, the dictionary has d_in=64", "blocks.0.hook_resid_post", 64),
        (ValueError, "is 96 wide on this model, the dictionary has d_in=48", "blocks.0.mlp.hook_post", 48),
        (ValueError, "is 80 wide on this model, the dictionary has d_in=48", "blocks.0.attn.hook_z", 48),
    ]
    for error, text, hook, d in cases:
        with pytest.raises(error, match=text):
            model.add_sae(random_sae(hook, d_in=d))
    with pytest.raises(ValueError, match="d_out=64"):
        model.add_sae(random_sae(READ, MLP, d_in=48, d_out=64))
    with pytest.raises(ValueError, match=r"on meta, the model on cpu"):
        model.add_sae(random_sae(RES, d_in=48).to("meta"))
    with pytest.raises(KeyError, match="No dictionary is attached at"):
        model.reset_saes(RES)
    for name in (RES, "blocks.0.hook_mlp_in", "no.such.hook"):
        assert name not in model.attached
        with pytest.raises(KeyError, match="No dictionary is attached at"):
            model.attached[name]
    assert hooks_on(model) == {}


def test_a_wrong_width_that_the_config_cannot_tell_is_refused_in_the_forward(model, random_sae, tokens):
    with model.saes(random_sae("blocks.0.attn.hook_k", d_in=48)):
        with pytest.raises(ValueError, match=r"'blocks.0.attn.hook_k' has shape \(2, 14, 2, 20\).*width 48"):
            model(tokens)


def test_an_input_after_its_output_is_refused(model, random_sae, tokens):
    late = random_sae("blocks.2.hook_resid_post", "blocks.0.hook_mlp_out", d_in=48)
    with model.saes(late), pytest.raises(ValueError, match="Its input must come before its output"):
        model(tokens)


def test_gemma_in_float16_is_refused(hf_model, random_sae):
    model = ScopeModel.from_hf(hf_model("gemma2").to(torch.float16))
    with pytest.raises(ValueError, match="Gemma2ForCausalLM in float16"):
        model.add_sae(random_sae(RES, d_in=48))
    with pytest.raises(ValueError, match="google/gemma-2-2b in float16"):
        ScopeModel.from_pretrained("google/gemma-2-2b", dtype=torch.float16)


def test_a_cast_to_float16_after_attaching_is_refused_in_the_forward(model, saes, tokens):
    model.add_sae(saes[0])
    model.model.original_model.half()
    with pytest.raises(ValueError, match="Gemma2ForCausalLM in float16"):
        model(tokens)


def test_what_add_sae_takes(model, saes):
    with pytest.raises(TypeError, match="takes one HookedSAE, found list"):
        ScopeModel.add_sae.__wrapped__(model, saes)


def test_only_gemma_is_refused_in_float16(hf_model, shared_data, tmp_path):
    for name, architecture in (("gemma-work", "llama"), ("other", "gemma2")):
        hf_model(architecture).save_pretrained(tmp_path / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(shared_data / "tiny-gemma2-stories" / file, tmp_path / name / file)
    assert ScopeModel.from_pretrained(tmp_path / "gemma-work", dtype=torch.float16).cfg.dtype == torch.float16
    with pytest.raises(ValueError, match="in float16"):
        ScopeModel.from_pretrained(tmp_path / "other", dtype=torch.float16)


def test_truncated_weights_are_refused(shared_data, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(shared_data / "tiny-gemma2-stories", folder)
    (folder / "model.safetensors").chmod(0o644)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match="are damaged or truncated"):
        ScopeModel.from_pretrained(folder, device="cpu")


def test_loading_a_model_that_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        ScopeModel.from_pretrained(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"holds no config.json"):
        ScopeModel.from_pretrained(str(tmp_path))


def test_from_pretrained_reads_a_local_folder(shared_data, tokens):
    model = ScopeModel.from_pretrained(shared_data / "tiny-gemma2-stories", device="cpu")
    assert model.to_tokens("Once upon a time").shape[0] == 1
    loss = model("Once upon a time, there was a little girl named Lily.", return_type="loss")
    assert 0 < loss.item() < 3
