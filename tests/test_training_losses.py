"""The loss and its pseudo-derivatives against the equations written out by hand in NumPy, float64."""

import numpy as np
import pytest
import torch

from scope_lens.sae import HookedSAE, SAEConfig
from scope_lens.training.losses import jumprelu_firing, jumprelu_loss
from scope_lens.training.sparsity import SparsityTerm

SPARSITY, BANDWIDTH = 0.037, 0.4


def dictionary(kind):
    autoencoder = kind == "autoencoder"
    sae = HookedSAE(
        SAEConfig(
            d_in=5,
            d_out=5 if autoencoder else 7,
            d_sae=11,
            hook_in="a",
            hook_out="a" if autoencoder else "b",
            pre_encoder_bias=autoencoder,
            skip=kind == "skip",
        )
    ).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
            if name == "threshold":
                parameter.copy_(parameter.abs() + 0.05)
    x = torch.randn(64, 5, generator=generator, dtype=torch.float64)
    y = x if autoencoder else torch.randn(64, 7, generator=generator, dtype=torch.float64)
    return sae, x, y


def by_hand(sae, x, y):
    """Loss and gradients from the published equations; no autograd, no code of the package."""
    p = {name: value.detach().numpy() for name, value in sae.named_parameters()}
    x, y = x.numpy(), y.numpy()
    n = len(x)
    seen = x - p["b_dec"] if sae.cfg.pre_encoder_bias else x
    pre = seen @ p["W_enc"] + p["b_enc"]
    theta = p["threshold"]
    on = (pre > theta).astype(float)
    f = pre * on
    y_hat = f @ p["W_dec"] + p["b_dec"] + (x @ p["W_skip"] if sae.cfg.skip else 0)
    loss = ((y - y_hat) ** 2).sum() / n + SPARSITY * on.sum() / n

    d_out = 2 * (y_hat - y) / n
    d_f = d_out @ p["W_dec"].T
    kernel = (np.abs((pre - theta) / BANDWIDTH) < 0.5).astype(float)
    d_theta = (-(theta / BANDWIDTH) * kernel * d_f - (1 / BANDWIDTH) * kernel * SPARSITY / n).sum(0)
    d_pre = d_f * on
    grads = {
        "W_enc": seen.T @ d_pre,
        "b_enc": d_pre.sum(0),
        "W_dec": f.T @ d_out,
        "b_dec": d_out.sum(0),
        "threshold": d_theta,
    }
    if sae.cfg.pre_encoder_bias:
        grads["b_dec"] = grads["b_dec"] - (d_pre @ p["W_enc"].T).sum(0)
    if sae.cfg.skip:
        grads["W_skip"] = x.T @ d_out
    return loss, on.sum() / n, kernel.sum(), grads


@pytest.mark.parametrize("kind", ["autoencoder", "transcoder", "skip"])
def test_the_loss_and_every_gradient_follow_the_equations(kind):
    sae, x, y = dictionary(kind)
    parts = jumprelu_loss(sae, (x, y), threshold=sae.threshold, sparsity=SparsityTerm(SPARSITY), bandwidth=BANDWIDTH)
    parts.loss.backward()
    loss, l0, in_window, grads = by_hand(sae, x, y)
    assert in_window > 50  # the estimator is at work
    assert parts.loss.item() == pytest.approx(loss, rel=1e-12)
    assert parts.l0.item() == pytest.approx(l0, rel=1e-12)
    assert parts.squared_error.item() == pytest.approx(loss - SPARSITY * l0, rel=1e-12)
    assert {name for name, _ in sae.named_parameters()} == grads.keys()
    for name, expected in grads.items():
        np.testing.assert_allclose(sae.get_parameter(name).grad.numpy(), expected, rtol=1e-10, atol=1e-13, err_msg=name)


def test_a_log_threshold_gets_the_chain_factor_theta():
    sae, x, y = dictionary("autoencoder")
    log_theta = sae.threshold.detach().log().requires_grad_()
    jumprelu_loss(
        sae, (x, y), threshold=log_theta.exp(), sparsity=SparsityTerm(SPARSITY), bandwidth=BANDWIDTH
    ).loss.backward()
    expected = by_hand(sae, x, y)[3]["threshold"] * sae.threshold.detach().numpy()
    np.testing.assert_allclose(log_theta.grad.numpy(), expected, rtol=1e-10)


def test_the_step_passes_no_gradient_to_the_pre_activation_and_sees_both_halves_of_the_window():
    pre = torch.tensor([[0.96, 1.04, 1.06, 0.94, 3.0]], dtype=torch.float64, requires_grad=True)
    theta = torch.ones(5, dtype=torch.float64, requires_grad=True)
    jumprelu_firing(pre, theta, 0.1).l0.sum().backward()
    assert pre.grad is None
    np.testing.assert_allclose(theta.grad.numpy(), [-10, -10, 0, 0, 0])


def test_a_pre_activation_equal_to_its_threshold_is_silent():
    acts, l0, _ = jumprelu_firing(torch.tensor([[0.5, 0.5000001]]), torch.tensor([0.5, 0.5]), 0.1)
    assert acts[0, 0] == 0
    assert acts[0, 1] > 0
    assert l0.tolist() == [1.0]
