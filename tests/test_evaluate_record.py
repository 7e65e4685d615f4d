"""The record of an evaluation, its standard error, and the model left as it was found."""

import dataclasses
import hashlib
import json
import math
import statistics
import struct

import pytest
import torch

from scope_lens.evaluation import EvalResult, EvaluationInterrupted, evaluate
from scope_lens.evaluation.fidelity import _clustered_error

SITE = "blocks.1.hook_resid_post"


@pytest.fixture
def res(random_sae):
    return random_sae(SITE, d_in=48, model="google/gemma-2-2b", release="some/repo", path="layer_1")


@pytest.fixture
def result(gemma2, res, tokens):
    return evaluate(gemma2[0], tokens, saes=res, progress=False)


# ---- the record ----


def test_json_round_trip(result):
    assert EvalResult.from_json(result.to_json()) == result


def test_json_of_numbers_that_json_does_not_have(result):
    odd = dataclasses.replace(
        result, delta_loss_se=math.nan, loss_recovered=-math.inf, fvu={SITE: math.inf}, l0={SITE: math.nan}
    )

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    assert json.loads(odd.to_json(), parse_constant=refuse)["loss_recovered"] == "-Infinity"
    back = EvalResult.from_json(odd.to_json())
    assert math.isnan(back.delta_loss_se)
    assert math.isnan(back.l0[SITE])
    assert back.loss_recovered == -math.inf
    assert back.fvu == {SITE: math.inf}


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"ce_clean": "much"}'])
def test_other_text_is_refused(text):
    with pytest.raises(ValueError, match="no EvalResult .* Expected what EvalResult.to_json writes"):
        EvalResult.from_json(text)


def test_settings_say_how_to_repeat_it(gemma2, res, tokens):
    got = evaluate(gemma2[0], tokens, saes=res, batch_size=3, positions="all", ablation="zero", progress=False).settings
    expected = {
        "model": "Gemma2ForCausalLM", "dtype": "float32", "device": "cpu", "batch_size": 3, "context": 128,
        "positions": "all", "ablation": "zero", "n_sequences": 2, "n_sequences_given": 2, "longest_sequence": 14,
        "complete": True,
    }  # fmt: skip
    assert expected.items() <= got.items()
    (sae,) = got["saes"]
    assert (sae["release"], sae["path"], sae["hook_out"]) == ("some/repo", "layer_1", SITE)
    assert set(got["versions"]) == {"scope-lens", "torch", "transformer-lens", "transformers"}


def test_hash_is_of_the_exact_ids(result, tokens):
    digest = hashlib.sha256()
    for row in tokens.tolist():
        digest.update(struct.pack("<Q", len(row)) + struct.pack(f"<{len(row)}q", *row))
    assert result.tokens_hash == f"sha256:{digest.hexdigest()}"


# ---- the standard error ----


def test_error_of_sequences_of_equal_length_is_that_of_their_means():
    differences, length = torch.randn(9, dtype=torch.float64), 7
    want = statistics.stdev((differences / length).tolist()) / math.sqrt(9)
    assert _clustered_error(differences, torch.full((9,), length)) == pytest.approx(want, rel=1e-12)


def test_sequences_without_terms_do_not_count():
    sums, terms = torch.tensor([1.0, 0, 3, 2]).double(), torch.tensor([4, 0, 5, 4])
    kept = torch.tensor([0, 2, 3])
    assert _clustered_error(sums, terms) == _clustered_error(sums[kept], terms[kept])


def test_one_sequence_has_no_error(gemma2, res, tokens):
    assert math.isnan(evaluate(gemma2[0], tokens[:1], saes=res, progress=False).delta_loss_se)


# ---- the model is left as it was found ----


def fingerprint(model, tokens):
    hooks = {name: [id(handle) for handle in point.fwd_hooks] for name, point in model.model.hook_dict.items()}
    with torch.no_grad():
        return hooks, model(tokens)


def test_what_was_attached_is_set_aside_and_put_back(gemma2, random_sae, res, tokens):
    model, _ = gemma2
    want = evaluate(model, tokens, saes=res, progress=False)
    other = random_sae(SITE, d_in=48)
    transcoder = random_sae("blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out", d_in=48)
    handle = model.add_sae(other, use_error_term=False)
    model.add_sae(transcoder, positions="all")
    model.add_hook(SITE, lambda tensor, hook: tensor + 0)
    hooks, logits = fingerprint(model, tokens)

    got = evaluate(model, tokens, saes=res, progress=False)
    assert got == want
    assert model.attached[SITE] is other
    assert model.attached["blocks.0.hook_mlp_out"] is transcoder
    after, logits_after = fingerprint(model, tokens)
    assert torch.equal(logits_after, logits)
    # The hooks that note token ids are renewed; those at the sites keep their order.
    for name in ("blocks.1.hook_resid_post", "blocks.0.hook_mlp_out", "blocks.0.ln2.hook_normalized"):
        assert after[name] == hooks[name], name

    # The very dictionary that is attached can be evaluated, and the handle still works.
    assert evaluate(model, tokens, saes=[other, transcoder], progress=False).ce_clean == want.ce_clean
    handle.remove()
    assert list(model.attached) == ["blocks.0.hook_mlp_out"]


def test_a_failed_evaluation_leaves_no_trace(gemma2, random_sae, res, tokens):
    model, _ = gemma2
    other = random_sae(SITE, d_in=48)
    model.add_sae(other)
    _, logits = fingerprint(model, tokens)
    hooks = {name: len(point.fwd_hooks) for name, point in model.model.hook_dict.items()}
    calls = []

    def fail(tensor, hook):
        calls.append(hook.name)
        if len(calls) == failing:
            raise RuntimeError("broken on purpose")

    for failing in range(1, 5):  # each of the four forwards
        calls.clear()
        with (
            pytest.raises(RuntimeError, match="on purpose"),
            model.hooks([("blocks.2.hook_resid_pre", fail)]),
        ):
            evaluate(model, tokens, saes=res, progress=False)
        assert len(calls) == failing
        assert {name: len(point.fwd_hooks) for name, point in model.model.hook_dict.items()} == hooks
        assert torch.equal(fingerprint(model, tokens)[1], logits)


def test_dropout_is_off_meanwhile(hf_model, random_sae, tokens):
    from scope_lens.model import ScopeModel

    model = ScopeModel.from_hf(hf_model("gpt2"))
    res = random_sae(SITE, d_in=48)
    want = evaluate(model, tokens, saes=res, progress=False)
    model.model.train()
    model.model.blocks[0].eval()
    modules = [*model.model.modules(), *model.model.original_model.modules()]
    modes = [module.training for module in modules]
    assert any(modes)
    assert not all(modes)
    assert evaluate(model, tokens, saes=res, progress=False) == want
    assert [module.training for module in modules] == modes


# ---- Ctrl-C ----


def interrupt_at(model, forward):
    calls = []

    def stop(tensor, hook):
        calls.append(1)
        if len(calls) == forward:
            raise KeyboardInterrupt

    return model.hooks([("blocks.2.hook_resid_pre", stop)])


@pytest.mark.parametrize(("forward", "batches"), [(4, 1), (6, 1), (7, 2), (9, 2), (10, 3), (12, 3)])
def test_an_interrupt_keeps_the_finished_batches(gemma2, res, forward, batches):
    model, _ = gemma2
    tokens = torch.randint(3, 199, (6, 9))
    tokens[:, 0] = 2
    with pytest.raises(EvaluationInterrupted) as stopped, interrupt_at(model, forward):
        evaluate(model, tokens, saes=res, batch_size=2, progress=False)
    assert isinstance(stopped.value, KeyboardInterrupt)
    assert (
        str(stopped.value) == f"The evaluation was interrupted after {2 * batches} of 6 sequences; .result holds them."
    )
    got = stopped.value.result
    want = evaluate(model, tokens[: 2 * batches], saes=res, batch_size=2, progress=False)
    for name in ("ce_clean", "ce_spliced", "ce_spliced_out", "delta_loss", "kl", "fvu", "l0", "dead", "n_tokens"):
        assert getattr(got, name) == getattr(want, name), name
    assert got.tokens_hash == want.tokens_hash
    assert math.isnan(got.ce_ablated)
    assert math.isnan(got.loss_recovered)
    assert got.settings["complete"] is False
    assert not model.attached
    assert not EvalResult.from_json(got.to_json()).settings["complete"]


@pytest.mark.parametrize("forward", [1, 2, 3])
def test_an_interrupt_before_the_first_batch_is_done_has_nothing_to_keep(gemma2, res, tokens, forward):
    model, _ = gemma2
    with pytest.raises(KeyboardInterrupt) as stopped, interrupt_at(model, forward):
        evaluate(model, tokens, saes=res, progress=False)
    assert not isinstance(stopped.value, EvaluationInterrupted)
    assert not model.attached


@pytest.mark.parametrize(("progress", "shown"), [(True, True), (False, False)])
def test_progress_bar(gemma2, res, tokens, capsys, progress, shown):
    evaluate(gemma2[0], tokens, saes=res, progress=progress)
    assert ("evaluate" in capsys.readouterr().err) == shown
