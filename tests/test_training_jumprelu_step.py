"""The hand-written step against the equations written out in NumPy, float64: no autograd, no code of the package.

All numbers that decide whether a latent fires lie on a grid that float32 adds without rounding, so both sides take the
same decisions, and thousands of entries fall exactly on a threshold or on an edge of the window.
"""

import numpy as np
import pytest
import torch

from scope_lens.sae import HookedSAE, SAEConfig
from scope_lens.training.jumprelu_step import _SPARSE_DENSITY, StepWorkspace, jumprelu_step
from scope_lens.training.losses import jumprelu_loss
from scope_lens.training.sparsity import SparsityTerm

BANDWIDTH = 0.5
ROWS, D_IN, D_SAE, CHUNK = 150, 12, 70, 32  # the last chunk is not full
PENALTIES = {
    "linear": SparsityTerm(0.3),
    "quadratic": SparsityTerm(0.02, target_l0=6.0, quadratic_factor=0.4),
    "frequency": SparsityTerm(0.3, frequency=0.7, limit=0.1),
}
# Thresholds at which few latents fire, many do, and few in one half of the rows only.
THRESHOLDS = {"sparse": 4.25, "dense": 0.25, "mixed": 2.0}


def grid(generator, *shape, steps, unit):
    return torch.randint(-steps, steps + 1, shape, generator=generator).double() * unit


def case(kind, density, dtype=torch.float64):
    """A dictionary, its thresholds and a batch."""
    autoencoder = kind == "autoencoder"
    d_out = D_IN if autoencoder else 9
    sae = HookedSAE(
        SAEConfig(
            d_in=D_IN,
            d_out=d_out,
            d_sae=D_SAE,
            hook_in="a",
            hook_out="a" if autoencoder else "b",
            pre_encoder_bias=autoencoder,
            skip=kind == "skip",
        )
    )
    generator = torch.Generator().manual_seed(7)
    values = {
        "W_enc": grid(generator, D_IN, D_SAE, steps=4, unit=1 / 4),
        "b_enc": grid(generator, D_SAE, steps=4, unit=1 / 16),
        "W_dec": torch.randn(D_SAE, d_out, generator=generator),
        "b_dec": grid(generator, d_out, steps=1, unit=1 / 4),
        "threshold": THRESHOLDS[density] + grid(generator, D_SAE, steps=4, unit=1 / 16).abs(),
    }
    if kind == "skip":
        values["W_skip"] = torch.randn(D_IN, d_out, generator=generator)
    x = grid(generator, ROWS, D_IN, steps=8, unit=1 / 4)
    if density == "mixed":
        x[: ROWS // 2] /= 4
    y = x if autoencoder else torch.randn(ROWS, d_out, generator=generator)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(values[name])
    sae, x, y = sae.to(dtype), x.to(dtype), y.to(dtype)
    return sae, x, x if autoencoder else y


def by_hand(sae, x, y, penalty):
    """Loss parts and gradients from the published equations, for the whole batch, in float64."""
    p = {name: value.detach().double().numpy() for name, value in sae.named_parameters()}
    x, y = x.double().numpy(), y.double().numpy()
    n, theta = len(x), p["threshold"]
    seen = x - p["b_dec"] if sae.cfg.pre_encoder_bias else x
    pre = seen @ p["W_enc"] + p["b_enc"]
    on = (pre > theta).astype(float)
    f = pre * on
    y_hat = f @ p["W_dec"] + p["b_dec"] + (x @ p["W_skip"] if sae.cfg.skip else 0)
    squared_error = ((y - y_hat) ** 2).sum() / n
    l0, often = on.sum(1), on.mean(0)
    if penalty.target_l0 is None:
        price = penalty.coefficient * l0.mean()
        by_row = np.full((n, 1), penalty.coefficient / n)
    else:
        factor = penalty.coefficient * penalty.quadratic_factor
        price = factor * ((l0 - penalty.target_l0) ** 2).mean()
        by_row = factor * 2 * (l0 - penalty.target_l0)[:, None] / n
    price += penalty.frequency * (often**2).sum() / penalty.limit
    by_latent = penalty.frequency * 2 * often / penalty.limit / n

    d_out = 2 * (y_hat - y) / n
    d_f = d_out @ p["W_dec"].T
    kernel = (np.abs((pre - theta) / BANDWIDTH) < 0.5).astype(float)
    d_pre = d_f * on
    grads = {
        "W_enc": seen.T @ d_pre,
        "b_enc": d_pre.sum(0),
        "W_dec": f.T @ d_out,
        "b_dec": d_out.sum(0),
        "threshold": (-(theta / BANDWIDTH) * kernel * d_f - (by_row + by_latent) * kernel / BANDWIDTH).sum(0),
    }
    if sae.cfg.pre_encoder_bias:
        grads["b_dec"] = grads["b_dec"] - (d_pre @ p["W_enc"].T).sum(0)
    if sae.cfg.skip:
        grads["W_skip"] = x.T @ d_out
    parts = {"loss": squared_error + price, "squared_error": squared_error, "l0": l0.mean(), "fired": on.any(0)}
    return parts, grads, (pre, theta)


def step(sae, x, y, penalty=PENALTIES["linear"], workspace=None):
    """Parts and gradients of the step; gradients that stood before are spoilt first."""
    for parameter in sae.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    theta = sae.threshold.detach()
    parts = jumprelu_step(
        sae,
        (x, y),
        threshold=theta,
        threshold_grad=sae.threshold.grad,
        sparsity=penalty,
        bandwidth=BANDWIDTH,
        workspace=workspace or StepWorkspace(sae, chunk_rows=CHUNK),
    )
    return parts, {name: parameter.grad.clone() for name, parameter in sae.named_parameters()}


def assert_close(found, expected, tolerance):
    for name, value in expected.items():
        scale = np.abs(value).max()
        error = np.abs(found[name].detach().double().numpy() - value).max()
        assert error <= tolerance * scale, f"{name}: off by {error / scale:.1e} of its largest entry"


def chunk_densities(pre, theta):
    matters = (pre > theta) | (np.abs(pre - theta) < BANDWIDTH / 2)
    return np.array([matters[start : start + CHUNK].mean() for start in range(0, ROWS, CHUNK)])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("density", THRESHOLDS)
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("kind", ["autoencoder", "transcoder", "skip"])
def test_values_and_all_gradients_follow_the_equations(kind, penalty, density, dtype, tolerance):
    sae, x, y = case(kind, density, dtype)
    parts, grads = step(sae, x, y, PENALTIES[penalty])
    expected, expected_grads, (pre, theta) = by_hand(sae, x, y, PENALTIES[penalty])
    # The case is what it says, with entries exactly on the threshold and on both edges of the window.
    few = chunk_densities(pre, theta) <= _SPARSE_DENSITY
    assert {"sparse": few.all(), "dense": not few.any(), "mixed": few.any() and not few.all()}[density]
    gap = pre - theta
    assert (gap == 0).sum() > 5
    assert (gap == BANDWIDTH / 2).sum() > 5
    assert (gap == -BANDWIDTH / 2).sum() > 5
    assert (np.abs(gap) < BANDWIDTH / 2).sum() > 100
    for name in ("loss", "squared_error", "l0"):
        assert getattr(parts, name).item() == pytest.approx(expected[name], rel=tolerance), name
    np.testing.assert_array_equal(parts.fired.numpy(), expected["fired"])
    assert grads.keys() == expected_grads.keys()
    assert_close(grads, expected_grads, tolerance)


@pytest.mark.parametrize("density", THRESHOLDS)
@pytest.mark.parametrize("kind", ["autoencoder", "skip"])
def test_it_agrees_with_its_autograd_twin(kind, density):
    sae, x, y = case(kind, density, torch.float32)
    for penalty in PENALTIES.values():
        parts, grads = step(sae, x, y, penalty)
        sae.zero_grad()
        twin = jumprelu_loss(sae, (x, y), threshold=sae.threshold, sparsity=penalty, bandwidth=BANDWIDTH)
        twin.loss.backward()
        assert_close(grads, {name: p.grad.numpy() for name, p in sae.named_parameters()}, 1e-5)
        assert parts.loss.item() == pytest.approx(twin.loss.item(), rel=1e-5)
        assert torch.equal(parts.fired, twin.fired)


@pytest.mark.parametrize("density", THRESHOLDS)
def test_the_size_of_a_chunk_does_not_matter(density):
    sae, x, y = case("autoencoder", density, torch.float32)
    _, whole = step(sae, x, y, workspace=StepWorkspace(sae, chunk_rows=1000))
    for rows in (1, 7, 75, ROWS, None):
        _, grads = step(sae, x, y, workspace=StepWorkspace(sae, chunk_rows=rows))
        assert_close(grads, {name: grad.numpy() for name, grad in whole.items()}, 1e-6)


@pytest.mark.parametrize("density", THRESHOLDS)
def test_it_repeats_bit_for_bit_whatever_the_workspace_saw_before(density):
    sae, x, y = case("autoencoder", density, torch.float32)
    used = StepWorkspace(sae, chunk_rows=CHUNK)
    step(sae, x * 3, y, workspace=used)
    step(sae, x[:5] / 7, y[:5], workspace=used)
    _, first = step(sae, x, y, workspace=used)
    _, again = step(sae, x, y, workspace=used)
    _, fresh = step(sae, x, y)
    for name, grad in first.items():
        assert torch.equal(grad, again[name])
        assert torch.equal(grad, fresh[name])


def test_a_dictionary_without_an_active_latent_still_learns_its_output_bias():
    sae, x, y = case("autoencoder", "sparse", torch.float32)
    with torch.no_grad():
        sae.threshold.fill_(1000)
    parts, grads = step(sae, x, y)
    assert parts.l0.item() == 0
    assert not parts.fired.any()
    torch.testing.assert_close(grads["b_dec"], 2 * (sae.b_dec.detach() - y.mean(0)))
    torch.testing.assert_close(parts.squared_error, (y - sae.b_dec.detach()).square().sum(1).mean())
    assert all(not grads[name].any() for name in ("W_enc", "b_enc", "W_dec", "threshold"))


@pytest.mark.parametrize("others", ["few", "many"])
def test_the_comparison_and_the_window_are_strict(others):
    # One input that is always 1, so a latent's pre-activation is its bias; 60 more latents make the row sparse or not.
    sae = HookedSAE(SAEConfig(d_in=1, d_out=1, d_sae=65, hook_in="a", hook_out="b"))
    with torch.no_grad():
        sae.b_enc.fill_(-9.0 if others == "few" else 9.0)
        sae.threshold.fill_(1.0)
        sae.b_enc[:5] = torch.tensor([1.0, 0.75, 1.25, 0.75 + 2**-24, 1.25 - 2**-23])
    x = torch.ones(1, 1)
    parts, grads = step(sae, x, torch.zeros(1, 1), SparsityTerm(1.0))
    assert parts.fired[:5].tolist() == [False, False, True, False, True]
    assert (grads["threshold"][:5] * -BANDWIDTH).tolist() == [1.0, 0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("every", [1, 10])
def test_rounding_loses_no_entry_at_an_edge_of_the_window(every):
    # Thresholds and a bandwidth that float32 rounds; pre-activations a few units in the last place around both edges.
    latents, bandwidth = 40_000, 0.013
    sae = HookedSAE(SAEConfig(d_in=1, d_out=1, d_sae=latents, hook_in="a", hook_out="b"))
    theta = torch.rand(latents) * 10 ** torch.linspace(-3, 1, latents)
    edge = theta + torch.where(torch.rand(latents) < 0.5, -1, 1) * bandwidth / 2
    pre = torch.full((latents,), -9.0)
    pre[::every] = (edge * (1 + torch.randint(-4, 5, (latents,)) * 2**-24))[::every]
    with torch.no_grad():
        sae.b_enc.copy_(pre)
    grad = torch.empty(latents)
    jumprelu_step(
        sae,
        (torch.ones(1, 1), torch.zeros(1, 1)),
        threshold=theta,
        threshold_grad=grad,
        sparsity=SparsityTerm(1.0),
        bandwidth=bandwidth,
        workspace=StepWorkspace(sae),
    )
    inside = (pre - theta).abs() < bandwidth / 2
    assert 0.2 < inside.double().mean() * every < 0.8
    assert torch.equal(grad != 0, inside)


@pytest.mark.parametrize("density", ["sparse", "dense"])
def test_a_row_that_is_not_finite_reaches_the_loss(density):
    for value in (float("nan"), float("inf")):
        sae, x, y = case("transcoder", density, torch.float32)
        x[40, 3] = value
        assert not step(sae, x, y)[0].loss.isfinite()


def test_gradients_are_written_where_they_were():
    sae, x, y = case("skip", "mixed", torch.float32)
    step(sae, x, y)
    before = {name: parameter.grad.data_ptr() for name, parameter in sae.named_parameters()}
    jumprelu_step(
        sae,
        (x, y),
        threshold=sae.threshold.detach(),
        threshold_grad=sae.threshold.grad,
        sparsity=PENALTIES["linear"],
        bandwidth=BANDWIDTH,
        workspace=StepWorkspace(sae),
    )
    assert {name: parameter.grad.data_ptr() for name, parameter in sae.named_parameters()} == before
