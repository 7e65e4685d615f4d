"""What the terms of Gemma Scope 2 do to a dictionary: target, frequency penalty, prefixes, skip term."""

import dataclasses

import pytest
import torch

from scope_lens.training import TrainConfig
from scope_lens.training.learner import Learner

BASE = dataclasses.replace(
    TrainConfig.short_run(site="res", layer=1, width=48, sparsity=1e-2, steps=300), batch_size=128, seed=1
)


def rows(count, *, seed=0):
    """Sums of 24 directions in 12 dimensions, of which the first few are in most rows."""
    directions = torch.randn(24, 12, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(seed)
    present = torch.rand(count, 24, generator=generator) < torch.linspace(0.7, 0.02, 24)
    return (present * (0.5 + torch.rand(count, 24, generator=generator))) @ directions


def trained(cfg, *, targets=None):
    x = rows(cfg.steps * cfg.batch_size)
    y = x if targets is None else targets(x)
    learner = Learner(cfg, d_in=12, d_out=y.shape[1], scale=float(x.pow(2).sum(1).mean().sqrt()), model="m")
    for a, b in zip(x.split(cfg.batch_size), y.split(cfg.batch_size), strict=True):
        parts = learner.update(a, a if targets is None else b)
    return learner, parts


@torch.no_grad()
def held_out(sae):
    x = rows(4096, seed=9)
    acts = sae.encode(x)
    return x, acts


def fvu(y, y_hat):
    return float((y - y_hat).pow(2).sum().detach() / (y - y.mean(0)).pow(2).sum())


def test_the_target_is_met_from_above_and_below():
    for target in (3.0, 8.0):
        learner, _ = trained(dataclasses.replace(BASE, sparsity=0.2, target_l0=target))
        l0 = (held_out(learner.result())[1] > 0).sum(1).double().mean().item()
        assert l0 == pytest.approx(target, rel=0.15)


def test_the_frequency_penalty_takes_frequent_latents_away():
    frequency = {}
    for penalty in (0.0, 0.1):
        learner, _ = trained(dataclasses.replace(BASE, frequency_penalty=penalty, frequency_limit=0.1))
        frequency[penalty] = (held_out(learner.result())[1] > 0).double().mean(0)
    assert frequency[0.0].max() > 0.4
    assert frequency[0.1].max() < 0.6 * frequency[0.0].max()
    assert (frequency[0.1] > 0.25).sum() < (frequency[0.0] > 0.25).sum()


def test_a_prefix_of_a_matryoshka_dictionary_reconstructs_alone():
    alone = {}
    for prefixes in ((), (8, 16)):
        learner, parts = trained(dataclasses.replace(BASE, matryoshka=prefixes))
        sae = learner.result()
        x, acts = held_out(sae)
        alone[prefixes] = [fvu(x, acts[:, :m] @ sae.W_dec[:m] + sae.b_dec) for m in (8, 16, 48)]
        # The error that is reported is the whole dictionary's; the loss has those of the prefixes too.
        of_prefixes = parts.loss - parts.squared_error - BASE.sparsity * parts.l0
        assert (of_prefixes > parts.squared_error) == bool(prefixes)
    plain, nested = alone[()], alone[(8, 16)]
    assert nested[0] < 0.8 * plain[0]
    assert nested[1] < 0.8 * plain[1]
    assert nested[0] > nested[1] > nested[2]


def test_the_skip_term_learns_the_affine_part():
    mixing = torch.randn(12, 7, generator=torch.Generator().manual_seed(2)) / 3

    def targets(x):
        return x @ mixing + 0.5 * torch.relu(x[:, :7])

    cfg = dataclasses.replace(BASE, hook_in="blocks.1.ln2.hook_out", hook_out="blocks.1.hook_mlp_out")
    errors = {}
    for skip in (False, True):
        learner, _ = trained(dataclasses.replace(cfg, skip=skip, sparsity=0.05), targets=targets)
        sae = learner.result()
        assert (sae.W_skip is not None) == skip
        x, _ = held_out(sae)
        with torch.no_grad():
            errors[skip] = fvu(targets(x), sae(x))
    assert errors[True] < 0.5 * errors[False]


@pytest.mark.parametrize("activation", ["jumprelu", "topk", "batchtopk", "relu", "gated"])
def test_a_learner_goes_on_from_its_state_bit_for_bit(activation):
    k = 4 if activation.endswith("topk") else None
    cfg = TrainConfig.short_run(site="res", layer=1, width=48, activation=activation, k=k, steps=60)
    cfg = dataclasses.replace(cfg, batch_size=128, dead_after=1_000)
    x = rows(40 * 128)
    unbroken, first, second = (Learner(cfg, d_in=12, d_out=12, scale=2.0, model="m") for _ in range(3))
    for batch in x.split(128):
        unbroken.update(batch, batch)
    for batch in x[: 25 * 128].split(128):
        first.update(batch, batch)
    second.load_state({name: tensor.clone() for name, tensor in first.state().items()})
    for batch in x[25 * 128 :].split(128):
        second.update(batch, batch)
    expected, found = unbroken.state(), second.state()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    with pytest.raises(ValueError, match="W_enc has shape"):
        Learner(cfg, d_in=10, d_out=10, scale=2.0, model="m").load_state(expected)


def test_a_loss_that_is_not_finite_is_seen():
    learner = Learner(BASE, d_in=12, d_out=12, scale=2.0, model="m")
    assert learner.whole
    learner.update(rows(128), rows(128))
    assert learner.whole
    bad = rows(128)
    bad[3, 2] = float("nan")
    assert not learner.update(bad, bad).loss.isfinite()
    assert not learner.whole
