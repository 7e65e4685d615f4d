"""Evaluation on held-out text while a run goes on."""

import dataclasses
import json

import pytest
import torch
from conftest import make_hf

from scope_lens import ScopeModel, demo, evaluate
from scope_lens.training import ActivationStore, HeldOut, TrainConfig, Trainer, read_log

A = "blocks.0.hook_resid_post"
CFG = TrainConfig(
    hook_in=A, hook_out=A, width=96, sparsity=0.003, steps=30, batch_size=64, learning_rate=1e-2, lr_warmup=5,
    sparsity_warmup=10, bandwidth=0.1, threshold_init=0.02, threshold="direct",
)  # fmt: skip


def rows_of(n, *, seed):
    ids = torch.randint(3, 199, (n, 24), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 2
    return ids


TEXT, OTHER = rows_of(20, seed=1), rows_of(6, seed=2)


@pytest.fixture(scope="module")
def model():
    return ScopeModel.from_hf(make_hf("gemma2"))


@pytest.fixture(scope="module")
def store(model):
    return ActivationStore.harvest(model, TEXT, sites=[A], dtype=torch.float32, progress=False)


def finish(trainer, store):
    return list(trainer.run(store, progress=False))


def numbers(results):
    """All but the time it took; a NaN does not equal itself, so as text."""
    return [repr(dataclasses.replace(r, tokens_per_second=0.0)) for r in results]


def test_evaluations_are_those_of_evaluate(model, store, tmp_path):
    configs = [CFG, dataclasses.replace(CFG, steps=25, seed=1)]
    trainer = Trainer(configs, folder=tmp_path, held_out=HeldOut(model=model, text=OTHER), evaluate_every=10)
    results = finish(trainer, store)
    evaluated = [(r.index, r.step) for r in results if r.evaluation is not None]
    assert evaluated == [(0, 10), (1, 10), (0, 20), (1, 20), (1, 25), (0, 30)]
    for index, step in ((0, 30), (1, 25)):
        (found,) = (r.evaluation for r in results if (r.index, r.step) == (index, step))
        direct = evaluate(model, OTHER, saes=trainer.result()[index], progress=False)
        assert dataclasses.asdict(found) == dataclasses.asdict(direct)
        assert trainer.evaluations[index] == found
    deltas = [r.evaluation.delta_loss for r in results if r.evaluation is not None and r.index == 0]
    assert deltas[-1] < deltas[0]
    assert numbers(read_log(tmp_path / "log.jsonl")) == numbers(results)
    assert [r.evaluation for r in read_log(tmp_path / "log.jsonl")] == [r.evaluation for r in results]


def test_a_resumed_run_evaluates_as_an_unbroken_one(model, store, tmp_path):
    def held_out(text=OTHER):
        return HeldOut(model=model, text=text)

    plain = Trainer(CFG)
    finish(plain, store)
    whole = Trainer(CFG, held_out=held_out(), evaluate_every=10)
    results = finish(whole, store)
    for result in Trainer(CFG, folder=tmp_path, held_out=held_out(), evaluate_every=10).run(store, progress=False):
        if result.step == 20:
            break
    assert Trainer.resume(tmp_path).result()  # the dictionaries can be had without the text
    with pytest.raises(ValueError, match=r"began with other held-out text: \{'tokens_hash': 'sha256:.*, now None"):
        finish(Trainer.resume(tmp_path), store)
    with pytest.raises(ValueError, match="began with other held-out text"):
        finish(Trainer.resume(tmp_path, held_out=held_out(OTHER[:4])), store)
    resumed = Trainer.resume(tmp_path, held_out=held_out())
    assert resumed.evaluations[0] == results[19].evaluation
    finish(resumed, store)
    assert numbers(read_log(tmp_path / "log.jsonl")) == numbers(results)
    states = [t.result()[0].state_dict() for t in (plain, whole, resumed)]
    assert all(torch.equal(states[0][name], state[name]) for name in states[0] for state in states[1:])


def test_text_that_the_store_has_seen_is_refused(model, store):
    mixed = torch.cat([OTHER, TEXT[3:5]])
    with pytest.raises(ValueError, match=r"2 of the held-out documents \(number 6, 7\) are in the text that the store"):
        finish(Trainer(CFG, held_out=HeldOut(model=model, text=mixed)), store)


def test_stories_that_the_store_has_seen_are_refused():
    model, stories = demo.load_model(), demo.text()
    store = ActivationStore.harvest(model, stories[:4], sites=[A], rows=200, progress=False)
    cfg = dataclasses.replace(CFG, steps=1, lr_warmup=0, sparsity_warmup=0)
    with pytest.raises(ValueError, match=r"1 of the held-out documents \(number 1\) are in the text"):
        finish(Trainer(cfg, held_out=HeldOut(model=model, text=[stories[8], stories[2]])), store)
    held_out = HeldOut(model=model, text=(story for story in stories[4:6]))
    (result,) = finish(Trainer(cfg, held_out=held_out), store)
    assert json.loads(result.evaluation.to_json())["n_tokens"] > 100


def test_another_model_is_refused(store):
    other = ScopeModel.from_hf(make_hf("gemma2", num_hidden_layers=2))
    with torch.no_grad():
        next(iter(other.model.parameters())).mul_(1.1)
    with pytest.raises(ValueError, match="The store was made by another model"):
        finish(Trainer(CFG, held_out=HeldOut(model=other, text=OTHER)), store)


def test_text_without_tokens_is_refused(model):
    with pytest.raises(ValueError, match="There are no tokens to evaluate"):
        HeldOut(model=model, text=[])
