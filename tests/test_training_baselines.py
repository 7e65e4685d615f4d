"""TopK, BatchTopK, ReLU and Gated: losses and gradients by hand in NumPy, and their inference forms."""

import dataclasses

import numpy as np
import pytest
import torch
from test_training_losses import dictionary

from scope_lens.training import TrainConfig
from scope_lens.training.baselines import AuxK, gated_loss, relu_loss, topk_loss
from scope_lens.training.learner import Learner

SITE = "blocks.1.hook_resid_post"
KINDS = ["autoencoder", "transcoder", "skip"]


def parts_of(sae, x):
    """Parameters, encoder input and pre-activation in NumPy."""
    p = {name: value.detach().numpy() for name, value in sae.named_parameters()}
    seen = x.numpy() - p["b_dec"] if sae.cfg.pre_encoder_bias else x.numpy()
    return p, seen, seen @ p["W_enc"] + p["b_enc"]


def backward(sae, p, x, y, f, seen):
    """Squared error and its gradients, with d loss / d f, which the caller takes back through the activation."""
    y_hat = f @ p["W_dec"] + p["b_dec"] + (x.numpy() @ p["W_skip"] if sae.cfg.skip else 0)
    error = y_hat - y.numpy()
    d_out = 2 * error / len(x)
    grads = {"W_dec": f.T @ d_out, "b_dec": d_out.sum(0)}
    if sae.cfg.skip:
        grads["W_skip"] = x.numpy().T @ d_out
    return (error**2).sum() / len(x), d_out @ p["W_dec"].T, grads, error


def through_encoder(sae, p, seen, d_pre, grads):
    grads |= {"W_enc": seen.T @ d_pre, "b_enc": d_pre.sum(0)}
    if sae.cfg.pre_encoder_bias:
        grads["b_dec"] = grads["b_dec"] - (d_pre @ p["W_enc"].T).sum(0)
    return grads


def assert_gradients(sae, grads, **more):
    assert {name for name, _ in sae.named_parameters()} <= grads.keys()
    for name, expected in grads.items():
        found = more[name] if name in more else sae.get_parameter(name)
        np.testing.assert_allclose(found.grad.numpy(), expected, rtol=1e-9, atol=1e-13, err_msg=name)


def keep_largest(scores, count):
    """1 at the `count` largest entries of a flat array, 0 elsewhere; by sorting."""
    chosen = np.zeros(scores.size)
    chosen[np.argsort(-scores, kind="stable")[:count]] = 1
    return chosen


@pytest.mark.parametrize("dead", ["none", "three", "one"])
@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
@pytest.mark.parametrize("kind", KINDS)
def test_topk_and_its_auxiliary_loss_follow_the_equations(kind, activation, dead):
    sae, x, y = dictionary(kind, activation, k=4)
    dead_latents = {"none": [], "three": [1, 5, 8], "one": [5]}[dead]
    mask = torch.zeros(11, dtype=torch.bool)
    mask[dead_latents] = True
    aux = AuxK(mask, k=2, coefficient=0.3)
    parts, smallest = topk_loss(sae, (x, y), aux=aux)
    parts.loss.backward()

    p, seen, pre = parts_of(sae, x)
    if activation == "topk":
        kept = np.stack([keep_largest(row, 4) for row in pre])
    else:
        kept = keep_largest(pre.ravel(), 4 * len(x)).reshape(pre.shape)
    on = kept * (pre > 0)
    f = pre * on
    loss, d_f, grads, error = backward(sae, p, x, y, f, seen)
    squared_error, d_pre = loss, d_f * on
    if dead_latents:
        lively = np.where(mask.numpy(), pre, -np.inf)
        chosen = np.stack([keep_largest(row, min(2, len(dead_latents))) for row in lively]) * (pre > 0)
        rest = chosen * pre @ p["W_dec"] + error  # e_hat - e, as e is y - y_hat
        loss += 0.3 * (rest**2).sum() / len(x)
        d_rest = 0.3 * 2 * rest / len(x)
        d_pre = d_pre + chosen * (d_rest @ p["W_dec"].T)
        grads["W_dec"] = grads["W_dec"] + (chosen * pre).T @ d_rest
    assert parts.loss.item() == pytest.approx(loss, rel=1e-12)
    assert parts.squared_error.item() == pytest.approx(squared_error, rel=1e-12)
    assert parts.l0.item() == pytest.approx(on.sum() / len(x), rel=1e-12)
    assert smallest.item() == pytest.approx(f[f > 0].min(), rel=1e-12)
    assert parts.fired.tolist() == (on.sum(0) > 0).tolist()
    assert_gradients(sae, through_encoder(sae, p, seen, d_pre, grads))


@pytest.mark.parametrize("kind", KINDS)
def test_relu_with_l1_follows_the_equations(kind):
    sae, x, y = dictionary(kind, "relu")
    parts = relu_loss(sae, (x, y), sparsity=0.07)
    parts.loss.backward()
    p, seen, pre = parts_of(sae, x)
    f = np.maximum(pre, 0)
    loss, d_f, grads, _ = backward(sae, p, x, y, f, seen)
    assert parts.loss.item() == pytest.approx(loss + 0.07 * f.sum() / len(x), rel=1e-12)
    assert parts.squared_error.item() == pytest.approx(loss, rel=1e-12)
    assert parts.l0.item() == pytest.approx((f > 0).sum() / len(x), rel=1e-12)
    assert_gradients(sae, through_encoder(sae, p, seen, (d_f + 0.07 / len(x)) * (pre > 0), grads))


@pytest.mark.parametrize("kind", KINDS)
def test_gated_follows_the_equations(kind):
    sae, x, y = dictionary(kind, "relu")
    generator = torch.Generator().manual_seed(5)
    r_mag, b_mag = (torch.randn(11, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    parts = gated_loss(sae, (x, y), r_mag=r_mag, b_mag=b_mag, sparsity=0.07)
    parts.loss.backward()

    p, seen, gate = parts_of(sae, x)
    ratio = np.exp(r_mag.detach().numpy())
    magnitude = (seen @ p["W_enc"]) * ratio + b_mag.detach().numpy()
    on = (gate > 0) * (magnitude > 0)
    loss, d_f, grads, _ = backward(sae, p, x, y, magnitude * on, seen)
    d_mag = d_f * on
    opened = np.maximum(gate, 0)
    frozen_error = opened @ p["W_dec"] + p["b_dec"] + (x.numpy() @ p["W_skip"] if sae.cfg.skip else 0) - y.numpy()
    # The decoder of the auxiliary term is a constant: its error reaches the gate alone.
    d_gate = (2 * frozen_error @ p["W_dec"].T + 0.07) / len(x) * (gate > 0)
    total = loss + (frozen_error**2).sum() / len(x) + 0.07 * opened.sum() / len(x)
    assert parts.loss.item() == pytest.approx(total, rel=1e-12)
    assert parts.squared_error.item() == pytest.approx(loss, rel=1e-12)
    assert parts.l0.item() == pytest.approx(on.sum() / len(x), rel=1e-12)
    d_directions = d_gate + d_mag * ratio
    grads |= {"W_enc": seen.T @ d_directions, "b_enc": d_gate.sum(0), "b_mag": d_mag.sum(0)}
    grads["r_mag"] = (d_mag * (seen @ p["W_enc"]) * ratio).sum(0)
    if sae.cfg.pre_encoder_bias:
        grads["b_dec"] = grads["b_dec"] - (d_directions @ p["W_enc"].T).sum(0)
    assert_gradients(sae, grads, r_mag=r_mag, b_mag=b_mag)


# ---- training and inference forms ----


def planted_rows(count, *, seed=0, width=16, latents=48, active=4):
    """Rows that are sums of a few of `latents` fixed directions."""
    directions = torch.nn.functional.normalize(
        torch.randn(latents, width, generator=torch.Generator().manual_seed(99)), dim=1
    )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(count, latents, generator=generator).argsort(1)[:, :active]
    weights = 1 + torch.rand(count, active, generator=generator)
    return torch.einsum("b a, b a d -> b d", weights, directions[chosen])


def trained(activation, *, steps=300, **changes):
    k = 4 if activation.endswith("topk") else None
    cfg = TrainConfig.short_run(site="res", layer=1, width=64, activation=activation, k=k, steps=steps)
    cfg = dataclasses.replace(cfg, batch_size=256, **changes)
    rows = planted_rows(steps * 256)
    learner = Learner(cfg, d_in=16, d_out=16, scale=float(rows.pow(2).sum(1).mean().sqrt()), model="m")
    for x in rows.split(256):
        learner.update(x, x)
    return learner


def fvu(y_hat, y):
    return float((y - y_hat).pow(2).sum().detach() / (y - y.mean(0)).pow(2).sum())


def test_a_batchtopk_dictionary_is_exported_as_a_jumprelu_of_the_same_l0_and_error():
    learner = trained("batchtopk")
    sae = learner.result()
    assert sae.cfg.activation == "jumprelu"
    assert sae.cfg.k is None
    assert sae.threshold.unique().numel() == 1
    rows = planted_rows(4096, seed=7)
    acts = sae.encode(rows)
    assert (acts > 0).sum(1).float().mean().item() == pytest.approx(4, rel=0.05)
    in_training = learner.scale * learner.sae(rows / learner.scale)
    assert fvu(sae(rows), rows) == pytest.approx(fvu(in_training, rows), rel=0.05)
    # One row at a time gives what the batch gave: the export does not look at its neighbours.
    torch.testing.assert_close(sae.encode(rows[:1]), acts[:1])


def test_the_threshold_of_batchtopk_is_the_running_mean_of_the_smallest_active_latents():
    learner = trained("batchtopk", steps=1)
    expected, weight = 0.0, 0.0
    for seed in range(5):
        x = planted_rows(256, seed=seed)
        with torch.no_grad():
            acts = learner.sae.encode(x / learner.scale)
        if seed == 0:  # the first update has seen one batch already
            mean, weight = learner.objective.buffers["cutoff"].tolist()
            expected = mean
        learner.update(x, x)
        expected, weight = 0.99 * expected + 0.01 * acts[acts > 0].min().item(), 0.99 * weight + 0.01
    assert learner.result().threshold[0].item() == pytest.approx(learner.scale * expected / weight, rel=1e-5)


@pytest.mark.parametrize("activation", ["relu", "gated"])
def test_relu_and_gated_are_exported_as_exactly_the_same_jumprelu(activation):
    learner = trained(activation, steps=60)
    generator = torch.Generator().manual_seed(1)
    learner.sae.double()
    for parameter in learner.parameters.values():  # away from where training starts
        parameter.data = parameter.data.double() + 0.2 * torch.randn(parameter.shape, generator=generator).double()
    sae = learner.result()
    assert sae.cfg.activation == "jumprelu"
    assert not sae.cfg.pre_encoder_bias
    rows = planted_rows(2000, seed=3).double()
    with torch.no_grad():
        gate = (rows / learner.scale - learner.sae.b_dec) @ learner.sae.W_enc + learner.sae.b_enc
        if activation == "gated":
            r_mag, b_mag = learner.parameters["r_mag"], learner.parameters["b_mag"]
            centred = (rows / learner.scale - learner.sae.b_dec) @ learner.sae.W_enc
            f = (gate > 0) * (r_mag.exp() * centred + b_mag).clamp(min=0)
            assert ((gate > 0) & (f == 0)).any()  # the gate is open and the magnitude negative
            assert ((gate <= 0) & (r_mag.exp() * centred + b_mag > 0)).any()
        else:
            f = gate.clamp(min=0)
        recons = f @ learner.sae.W_dec + learner.sae.b_dec
    assert torch.equal(sae.encode(rows) > 0, f > 0)
    torch.testing.assert_close(sae.encode(rows), learner.scale * f)
    torch.testing.assert_close(sae(rows), learner.scale * recons)


def test_topk_stays_topk():
    learner = trained("topk", steps=3)
    sae = learner.result()
    assert (sae.cfg.activation, sae.cfg.k) == ("topk", 4)
    rows = planted_rows(100, seed=3)
    torch.testing.assert_close(sae(rows), learner.scale * learner.sae(rows / learner.scale))


def test_dead_latents_come_back_by_the_auxiliary_loss():
    """Latents that start far from firing stay dead without it."""
    alive = {}
    for aux_k in (0, 16):
        cfg = TrainConfig.short_run(site="res", layer=1, width=64, activation="topk", k=4, steps=300)
        cfg = dataclasses.replace(cfg, batch_size=256, aux_k=aux_k, dead_after=2_000)
        rows = planted_rows(300 * 256)
        learner = Learner(cfg, d_in=16, d_out=16, scale=float(rows.pow(2).sum(1).mean().sqrt()), model="m")
        with torch.no_grad():
            learner.sae.W_enc[:, 20:] *= 0.01
        for x in rows.split(256):
            learner.update(x, x)
        alive[aux_k] = 1 - learner.dead()
    assert alive[16] > alive[0] + 0.2, alive
