"""The recipe: initialisation, warm-ups, one update against a second implementation, and the inference form."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from scope_lens.sae import HookedSAE, SAEConfig
from scope_lens.training import TrainConfig, gemma_scope_path, save_gemma_scope
from scope_lens.training.initialisation import normalise_rows, project_out_rows
from scope_lens.training.learner import Learner

SITE = "blocks.1.hook_resid_post"
SMALL = TrainConfig(
    hook_in=SITE, hook_out=SITE, width=24, sparsity=0.01, steps=40, batch_size=32, learning_rate=3e-3, lr_warmup=4,
    lr_decay=10, sparsity_warmup=8, bandwidth=0.2, threshold_init=0.05,
)  # fmt: skip


def learner(cfg=SMALL, **widths):
    return Learner(cfg, **({"d_in": 6, "d_out": 6, "scale": 2.5, "model": "m"} | widths))


def transcoder_config(**changes):
    return dataclasses.replace(
        SMALL, hook_in="blocks.1.ln2.hook_normalized", hook_out="blocks.1.hook_mlp_out", **changes
    )


def test_warm_ups_follow_their_formulas():
    cfg = TrainConfig.gemma_scope(site="res", layer=0, width=2**14, sparsity=2e-3)
    assert cfg.learning_rate_at(0) == pytest.approx(7e-6)
    assert cfg.learning_rate_at(500) == pytest.approx(7e-5 * 0.55)
    assert cfg.learning_rate_at(250) == pytest.approx(7e-5 * (0.1 + 0.9 * (1 - math.cos(math.pi / 4)) / 2))
    assert cfg.learning_rate_at(999) < 7e-5
    assert cfg.learning_rate_at(1000) == cfg.learning_rate_at(cfg.steps - 1) == 7e-5
    assert [cfg.sparsity_at(s) for s in (0, 2500, 9_999, 10_000, 400_000)] == pytest.approx(
        [0, 5e-4, 2e-3 * 0.9999, 2e-3, 2e-3]
    )
    short = dataclasses.replace(cfg, steps=3000, lr_decay=1000)
    assert [short.learning_rate_at(s) for s in (1999, 2000, 2500, 2999)] == pytest.approx([7e-5, 7e-5, 3.5e-5, 7e-8])
    assert short.learning_rate_at(3000) == short.learning_rate_at(5000) == 0.0  # after the end


def test_a_run_without_warm_ups_or_decay_is_constant():
    cfg = dataclasses.replace(SMALL, lr_warmup=0, sparsity_warmup=0, lr_decay=0, steps=1)
    assert [cfg.learning_rate_at(s) for s in (0, 1, 7)] == [3e-3] * 3
    assert [cfg.sparsity_at(s) for s in (0, 1, 7)] == [0.01] * 3


def test_both_penalties_warm_up_together_and_the_factor_has_its_published_default():
    cfg = dataclasses.replace(SMALL, target_l0=5.0, frequency_penalty=0.2, frequency_limit=0.3)
    term = cfg.sparsity_term_at(2)  # of 8
    assert term == (0.0025, 5.0, 2 / 5, 0.05, 0.3)
    assert dataclasses.replace(cfg, quadratic_factor=0.1).sparsity_term_at(8) == (0.01, 5.0, 0.1, 0.2, 0.3)
    assert SMALL.sparsity_term_at(0)[:2] == (0.0, None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 0}, "width is 0"),
        ({"sparsity": -1.0}, "sparsity is -1.0"),
        ({"lr_decay": 99}, "more than the run's 40"),
        ({"adam_eps": 0.0}, "adam_eps is 0.0; it must be positive and finite"),
        ({"betas": (2.0, 1.0)}, r"betas is \(2.0, 1.0\); expected two numbers, each at least 0 and below 1"),
        ({"betas": (0.0, float("nan"))}, "betas is"),
    ],
)
def test_a_setting_outside_its_range_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(SMALL, **changes)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("threshold", "foo", "threshold is 'foo'; expected 'direct' or 'log'"),
        ("activation", "swish", "activation is 'swish'; expected 'jumprelu' or 'topk' or 'batchtopk' or 'relu' or"),
        ("untrained", ("bos", "noon"), r"untrained holds \['noon'\]; known are bos, eos, pad, chat_prefix"),
    ],
)
def test_an_unknown_name_is_refused(field, value, words):
    cfg = dataclasses.replace(SMALL)
    object.__setattr__(cfg, field, value)  # the tests' type checker would refuse it before the config does
    with pytest.raises(ValueError, match=words):
        cfg.__post_init__()


TOPK = {"activation": "topk", "k": 4, "sparsity": 0.0}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activation": "topk", "sparsity": 0.0}, r"topk keeps k latents, 1 <= k <= width=24; found k=None. Pass k=."),
        (TOPK | {"k": 25}, "1 <= k <= width=24; found k=25"),
        (TOPK | {"sparsity": 0.01}, "k=4 sets the sparsity of a topk dictionary; found sparsity=0.01. Pass sparsity=0"),
        (TOPK | {"aux_k": 30}, "aux_k is 30, more than the width 24"),
        ({"k": 4}, "k=4 and aux_k=0 belong to topk and batchtopk; leave them out for activation='jumprelu'"),
        ({"activation": "relu", "aux_k": 4}, "aux_k=4 belong to topk and batchtopk"),
        ({"activation": "gated", "target_l0": 5.0}, "only a jumprelu dictionary has; found target_l0=5.0"),
        ({"activation": "relu", "frequency_penalty": 0.1}, "frequency_penalty=0.1 with activation='relu'"),
        ({"target_l0": 0.0}, "target_l0 is 0.0; expected a number of latents above 0 and up to the width 24"),
        ({"target_l0": 25.0}, "target_l0 is 25.0"),
        ({"quadratic_factor": 0.1}, "quadratic_factor=0.1 is a positive factor .* found target_l0=None. Set both"),
        ({"target_l0": 5.0, "quadratic_factor": -1.0}, "quadratic_factor=-1.0 is a positive factor"),
        ({"skip": True}, "skip=True for an autoencoder of 'blocks.1.hook_resid_post' would learn the identity"),
        ({"matryoshka": (8, 4)}, r"matryoshka is \(8, 4\); expected ascending widths between 1 and 23"),
        ({"matryoshka": (8, 24)}, "The whole width is always the last prefix and is not listed"),
        ({"matryoshka": (0, 8)}, "expected ascending widths"),
        ({"matryoshka": (8,), "activation": "gated"}, "A gated dictionary has no Matryoshka training"),
        ({"learning_rate": math.inf}, "learning_rate is inf; it must be positive and finite"),
        ({"frequency_limit": 0.0}, "frequency_limit is 0.0; it must be positive and finite"),
        ({"aux_coefficient": -1.0}, "aux_coefficient is -1.0; it must be positive and finite"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(SMALL, **changes)


def test_an_autoencoder_starts_tied_with_unit_rows_and_zero_biases():
    sae = learner(dataclasses.replace(SMALL, width=4096), d_in=64, d_out=64).sae
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(4096))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()
    assert (sae.threshold == 0.05).all()
    assert sae.cfg.pre_encoder_bias
    # Uniform entries, rescaled: the fourth moment of a uniform variable over the square of its second is 9/5.
    kurtosis = (sae.W_dec**4).mean() / (sae.W_dec**2).mean() ** 2
    assert kurtosis.item() == pytest.approx(9 / 5, abs=0.06)


def test_a_transcoder_starts_untied_without_a_pre_encoder_bias():
    sae = learner(transcoder_config(width=512), d_in=64, d_out=64).sae
    assert not sae.cfg.pre_encoder_bias
    torch.testing.assert_close(sae.W_enc.norm(dim=0), torch.ones(512))
    cosine = (sae.W_enc.T * sae.W_dec).sum(1)
    assert cosine.abs().mean() < 0.2


def test_projection_and_rescaling_keep_rows_on_the_sphere():
    weight = torch.nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    normalise_rows(weight)
    weight.grad = torch.randn(5, 3, dtype=torch.float64)
    before = weight.grad.clone()
    project_out_rows(weight)
    for w, g, projected in zip(weight.detach(), before, weight.grad, strict=True):
        np.testing.assert_allclose(projected.numpy(), (g - (g * w).sum() * w).numpy(), atol=1e-15)
        assert abs(torch.dot(projected, w)) < 1e-15
    with pytest.raises(ValueError, match="call backward first"):
        project_out_rows(torch.nn.Parameter(torch.eye(2)))


@pytest.mark.parametrize("parametrisation", ["direct", "log"])
@pytest.mark.parametrize("kind", ["autoencoder", "transcoder"])
def test_updates_follow_a_second_implementation(kind, parametrisation):
    """Six updates in float64 NumPy, gradients and Adam written out, against the learner's."""
    autoencoder = kind == "autoencoder"
    cfg = (dataclasses.replace if autoencoder else lambda _, **c: transcoder_config(**c))(
        SMALL, threshold=parametrisation
    )
    d_out = 6 if autoencoder else 4
    ours = learner(cfg, d_out=d_out)
    ours.sae.double()
    ours.objective.theta.data = ours.objective.theta.data.double()
    p = {name: value.detach().numpy().copy() for name, value in ours.sae.named_parameters()}
    p["theta"] = ours.objective.theta.detach().numpy().copy()
    del p["threshold"]
    second = {name: np.zeros_like(value) for name, value in p.items()}
    rng = np.random.default_rng(0)
    for step in range(6):
        raw_x = rng.normal(size=(32, 6))
        raw_y = raw_x if autoencoder else rng.normal(size=(32, d_out))
        ours.update(torch.from_numpy(raw_x), torch.from_numpy(raw_y))

        x, y, n = raw_x / 2.5, raw_y / 2.5, 32
        theta = np.exp(p["theta"]) if parametrisation == "log" else p["theta"]
        seen = x - p["b_dec"] if autoencoder else x
        pre = seen @ p["W_enc"] + p["b_enc"]
        on = pre > theta
        f = pre * on
        d_out_grad = 2 * (f @ p["W_dec"] + p["b_dec"] - y) / n
        d_f = d_out_grad @ p["W_dec"].T
        kernel = np.abs(pre - theta) < cfg.bandwidth / 2
        sparsity = 0.01 * min(1, step / 8)
        d_theta = -(kernel * (theta * d_f + sparsity / n)).sum(0) / cfg.bandwidth
        d_pre = d_f * on
        d_dec = f.T @ d_out_grad
        grads = {
            "W_enc": seen.T @ d_pre,
            "b_enc": d_pre.sum(0),
            "W_dec": d_dec - (d_dec * p["W_dec"]).sum(1, keepdims=True) * p["W_dec"],
            "b_dec": d_out_grad.sum(0) - ((d_pre @ p["W_enc"].T).sum(0) if autoencoder else 0),
            "theta": d_theta * (theta if parametrisation == "log" else 1),
        }
        rate = 3e-3 * (0.1 + 0.9 * (1 - math.cos(math.pi * min(step, 4) / 4)) / 2)
        for name, grad in grads.items():
            second[name] = 0.999 * second[name] + 0.001 * grad**2
            p[name] = p[name] - rate * grad / (np.sqrt(second[name] / (1 - 0.999 ** (step + 1))) + 1e-8)
        p["W_dec"] /= np.linalg.norm(p["W_dec"], axis=1, keepdims=True)
        if parametrisation == "direct":
            p["theta"] = np.maximum(p["theta"], 0)
    for name, expected in p.items():
        np.testing.assert_allclose(ours.parameters[name].detach().numpy(), expected, rtol=1e-7, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("kind", ["autoencoder", "transcoder"])
def test_the_inference_form_reads_raw_activations(kind):
    cfg = SMALL if kind == "autoencoder" else transcoder_config()
    ours = learner(cfg)
    for _ in range(20):
        x = 2.5 * torch.randn(32, 6)
        ours.update(x, x)
    folded = ours.result()
    assert not folded.cfg.pre_encoder_bias
    x = (2.5 * torch.randn(100, 6)).double()
    sae, folded = ours.objective.inference().double(), folded.double()
    torch.testing.assert_close(folded(x), 2.5 * sae(x / 2.5))
    torch.testing.assert_close(folded.encode(x), 2.5 * sae.encode(x / 2.5))
    torch.testing.assert_close(folded.threshold.float(), 2.5 * ours.objective.threshold().detach().float())


def test_dead_counts_rows_since_the_last_firing():
    ours = learner(dataclasses.replace(SMALL, dead_after=64, threshold_init=1e9))
    x = torch.randn(32, 6)
    ours.update(x, x)
    assert ours.dead() == 0.0
    ours.update(x, x)
    assert ours.dead() == 1.0
    ours.last_fired[:6] = 64
    ours.update(x, x)
    assert ours.dead() == 0.75


def test_gemma_scope_files_hold_the_five_arrays_in_their_layout(tmp_path):
    sae = learner().result()
    path = gemma_scope_path(layer=3, width=2**14, l0=70.6)
    assert path == "layer_3/width_16k/average_l0_71"
    assert gemma_scope_path(layer=0, width=1024, l0=22.4) == "layer_0/width_1k/average_l0_22"
    file = save_gemma_scope(sae, tmp_path / path)
    assert file == tmp_path / path / "params.npz"
    with np.load(file, allow_pickle=False) as arrays:
        assert sorted(arrays) == ["W_dec", "W_enc", "b_dec", "b_enc", "threshold"]
        for name in arrays:
            assert arrays[name].dtype == np.float32
            np.testing.assert_array_equal(arrays[name], sae.get_parameter(name).detach().numpy())
    assert [entry.name for entry in file.parent.iterdir()] == ["params.npz"]


def test_what_the_format_has_no_place_for_is_refused(tmp_path):
    with pytest.raises(ValueError, match="to_inference"):
        save_gemma_scope(learner().sae, tmp_path)
    skip = HookedSAE(SAEConfig(d_in=4, d_out=4, d_sae=8, hook_in="a", hook_out="b", skip=True))
    with pytest.raises(ValueError, match="skip=True"):
        save_gemma_scope(skip, tmp_path)
    assert not list(tmp_path.iterdir())
