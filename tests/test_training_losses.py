"""The JumpReLU loss and its pseudo-derivatives against the equations written out by hand in NumPy, float64."""

import math

import numpy as np
import pytest
import torch

from scope_lens.sae import HookedSAE, SAEConfig
from scope_lens.training.losses import jumprelu_firing, jumprelu_loss
from scope_lens.training.sparsity import SparsityTerm

LAMBDA, BANDWIDTH = 0.037, 0.4
LINEAR = SparsityTerm(LAMBDA)
TERMS = {
    "linear": LINEAR,
    "target": SparsityTerm(LAMBDA, target_l0=3.5, quadratic_factor=2 / 3.5),
    "frequency": SparsityTerm(LAMBDA, frequency=0.21, limit=0.3),
    "all": SparsityTerm(LAMBDA, target_l0=6.0, quadratic_factor=0.11, frequency=0.02, limit=0.1),
}


def dictionary(kind, activation="jumprelu", **fields):
    autoencoder = kind == "autoencoder"
    sae = HookedSAE(
        SAEConfig(
            d_in=5,
            d_out=5 if autoencoder else 7,
            d_sae=11,
            hook_in="a",
            hook_out="a" if autoencoder else "b",
            activation=activation,
            pre_encoder_bias=autoencoder,
            skip=kind == "skip",
            **fields,
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


def by_hand(sae, x, y, term=LINEAR, prefixes=()):
    """Loss and gradients from the published equations; no autograd, no code of the package."""
    p = {name: value.detach().numpy() for name, value in sae.named_parameters()}
    x, y = x.numpy(), y.numpy()
    n, width = len(x), len(p["b_enc"])
    seen = x - p["b_dec"] if sae.cfg.pre_encoder_bias else x
    pre = seen @ p["W_enc"] + p["b_enc"]
    theta = p["threshold"]
    on = (pre > theta).astype(float)
    f = pre * on
    l0, frequency = on.sum(1), on.mean(0)

    loss, d_f, d_dec, d_out_sum = 0.0, np.zeros_like(f), np.zeros_like(p["W_dec"]), np.zeros_like(y)
    for m in (*prefixes, width):
        y_hat = f[:, :m] @ p["W_dec"][:m] + p["b_dec"] + (x @ p["W_skip"] if sae.cfg.skip else 0)
        squared_error = ((y - y_hat) ** 2).sum() / n
        loss += squared_error
        d_out = 2 * (y_hat - y) / n
        d_f[:, :m] += d_out @ p["W_dec"][:m].T
        d_dec[:m] += f[:, :m].T @ d_out
        d_out_sum += d_out

    if term.target_l0 is None:
        loss += term.coefficient * l0.mean()
        d_l0 = np.full(n, term.coefficient / n)
    else:
        loss += term.coefficient * term.quadratic_factor * ((l0 - term.target_l0) ** 2).mean()
        d_l0 = term.coefficient * term.quadratic_factor * 2 * (l0 - term.target_l0) / n
    loss += term.frequency * (frequency**2).sum() / term.limit
    d_step = d_l0[:, None] + term.frequency * 2 * frequency / term.limit / n

    kernel = (np.abs((pre - theta) / BANDWIDTH) < 0.5).astype(float)
    d_theta = (-(theta / BANDWIDTH) * kernel * d_f - (1 / BANDWIDTH) * kernel * d_step).sum(0)
    d_pre = d_f * on
    grads = {
        "W_enc": seen.T @ d_pre,
        "b_enc": d_pre.sum(0),
        "W_dec": d_dec,
        "b_dec": d_out_sum.sum(0),
        "threshold": d_theta,
    }
    if sae.cfg.pre_encoder_bias:
        grads["b_dec"] = grads["b_dec"] - (d_pre @ p["W_enc"].T).sum(0)
    if sae.cfg.skip:
        grads["W_skip"] = x.T @ d_out_sum
    return {"loss": loss, "squared_error": squared_error, "l0": l0.mean(), "hits": kernel.sum(), "grads": grads}


@pytest.mark.parametrize("prefixes", [(), (2, 7)])
@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("kind", ["autoencoder", "transcoder", "skip"])
def test_the_loss_and_every_gradient_follow_the_equations(kind, term, prefixes):
    sae, x, y = dictionary(kind)
    parts = jumprelu_loss(
        sae, (x, y), threshold=sae.threshold, sparsity=TERMS[term], bandwidth=BANDWIDTH, prefixes=prefixes
    )
    parts.loss.backward()
    expected = by_hand(sae, x, y, TERMS[term], prefixes)
    assert expected["hits"] > 50  # the estimator is at work
    for name in ("loss", "squared_error", "l0"):
        assert getattr(parts, name).item() == pytest.approx(expected[name], rel=1e-12)
    assert {name for name, _ in sae.named_parameters()} == expected["grads"].keys()
    for name, grad in expected["grads"].items():
        np.testing.assert_allclose(sae.get_parameter(name).grad.numpy(), grad, rtol=1e-10, atol=1e-13, err_msg=name)


def test_a_log_threshold_gets_the_chain_factor_theta():
    sae, x, y = dictionary("autoencoder")
    log_theta = sae.threshold.detach().log().requires_grad_()
    jumprelu_loss(sae, (x, y), threshold=log_theta.exp(), sparsity=LINEAR, bandwidth=BANDWIDTH).loss.backward()
    expected = by_hand(sae, x, y)["grads"]["threshold"] * sae.threshold.detach().numpy()
    np.testing.assert_allclose(log_theta.grad.numpy(), expected, rtol=1e-10)


def test_the_threshold_gradient_estimates_the_derivative_of_the_expected_loss():
    """Against the derivative itself: Gaussian rows have a known density of each pre-activation.

    d E[loss] / d theta_i = p_i(theta_i) * E[loss without latent i - loss with it | pre_i = theta_i], where the rows
    with pre_i = theta_i can be drawn exactly. No window is in it, so it has none of the estimator's bias.
    """
    sae, _, _ = dictionary("autoencoder")
    weight = {name: value.detach().numpy() for name, value in sae.named_parameters()}
    theta, bandwidth, draws, block = weight["threshold"], 0.06, 60, 8_192
    rng = np.random.default_rng(11)
    estimates = np.empty((draws, 11))
    for draw in range(draws):
        x = torch.from_numpy(rng.normal(size=(block, 5)))
        leaf = sae.threshold.detach().clone().requires_grad_()
        jumprelu_loss(sae, (x, x), threshold=leaf, sparsity=SparsityTerm(0.3), bandwidth=bandwidth).loss.backward()
        estimates[draw] = leaf.grad.numpy()
    mean, error = estimates.mean(0), estimates.std(0, ddof=1) / math.sqrt(draws)

    shift = weight["b_enc"] - weight["b_dec"] @ weight["W_enc"]
    exact, exact_error = np.empty(11), np.empty(11)
    for i in range(11):
        w = weight["W_enc"][:, i]
        spread = np.linalg.norm(w)
        density = math.exp(-(((theta[i] - shift[i]) / spread) ** 2) / 2) / (spread * math.sqrt(2 * math.pi))
        x = rng.normal(size=(200_000, 5))
        x += np.outer((theta[i] - shift[i] - x @ w) / spread**2, w)
        pre = x @ weight["W_enc"] + shift
        f = pre * (pre > theta)
        f[:, i] = 0.0
        without = x - f @ weight["W_dec"] - weight["b_dec"]
        with_it = without - theta[i] * weight["W_dec"][i]
        jump = (without**2).sum(1) - (with_it**2).sum(1) - 0.3
        exact[i], exact_error[i] = density * jump.mean(), density * jump.std() / math.sqrt(len(jump))
    assert (error < 0.06 * np.abs(exact) + 0.01).all()  # the comparison can tell a wrong factor
    assert (np.abs(mean - exact) < 4 * np.hypot(error, exact_error) + 0.01 * np.abs(exact)).all()
    assert (np.abs(exact) > 10 * error).sum() >= 9


def test_the_step_passes_no_gradient_to_the_pre_activation_and_sees_both_halves_of_the_window():
    pre = torch.tensor([[0.96, 1.04, 1.06, 0.94, 3.0]], dtype=torch.float64, requires_grad=True)
    theta = torch.ones(5, dtype=torch.float64, requires_grad=True)
    jumprelu_firing(pre, theta, 0.1).l0.sum().backward()
    assert pre.grad is None
    np.testing.assert_allclose(theta.grad.numpy(), [-10, -10, 0, 0, 0])


def test_a_pre_activation_equal_to_its_threshold_is_silent():
    acts, l0, frequency = jumprelu_firing(torch.tensor([[0.5, 0.5000001]]), torch.tensor([0.5, 0.5]), 0.1)
    assert acts[0, 0] == 0
    assert acts[0, 1] > 0
    assert l0.tolist() == [1.0]
    assert frequency.tolist() == [0.0, 1.0]


def test_the_quadratic_factor_of_the_paper_and_of_its_text():
    """2 / L0* is printed; the text's property, the linear gradient at twice the target, belongs to 1 / (2 L0*)."""
    l0 = torch.full((4,), 40.0, requires_grad=True)
    for factor, times in ((2 / 20, 4.0), (1 / 40, 1.0)):
        term = SparsityTerm(0.5, target_l0=20.0, quadratic_factor=factor)
        (slope,) = torch.autograd.grad(term.value(l0, torch.zeros(3)), l0)
        np.testing.assert_allclose(slope.numpy(), times * 0.5 / 4)


def test_the_frequency_penalty_and_l0_are_the_published_sum():
    """sum_i p_i (1 + p_i / p0), whose first term is L0."""
    on = torch.rand(50, 8) < torch.linspace(0.05, 0.9, 8)
    frequency = on.double().mean(0)
    ours = SparsityTerm(0.3, frequency=0.3, limit=0.2).value(on.double().sum(1), frequency)
    assert ours.item() == pytest.approx(0.3 * sum(p * (1 + p / 0.2) for p in frequency.tolist()), rel=1e-12)
