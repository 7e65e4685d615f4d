"""The dense kernels put together give the loss of the training and its gradients, taken by autograd in float64.

All numbers that decide whether a latent fires lie on a grid that bfloat16 holds and float32 adds without rounding, so
both sides take the same decisions, many of them exactly on a threshold or on an edge of the window.
"""

import pytest
import torch
from torch import Tensor

from scope_lens.sae import HookedSAE, SAEConfig
from scope_lens.training.kernels import dense, dense_triton
from scope_lens.training.losses import jumprelu_loss
from scope_lens.training.sparsity import SparsityTerm

BANDWIDTH = 0.5
TERMS = {
    "linear": SparsityTerm(0.3),
    "quadratic": SparsityTerm(0.02, target_l0=6.0, quadratic_factor=0.4, frequency=0.7, limit=0.1),
}
# rows, d_in, d_out of a transcoder, latents, latents of a block
ORDINARY = (200, 40, 33, 300, 128)
TINY = (40, 12, 9, 70, 32)


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def on_grid(*shape: int, steps: int, unit: float) -> Tensor:
    return torch.randint(-steps, steps + 1, shape).double() * unit


def case(kind: str, size: tuple[int, ...]) -> tuple[HookedSAE, Tensor, Tensor]:
    """A dictionary and a batch in float64."""
    rows, d_in, d_out, d_sae, _ = size
    autoencoder = kind == "autoencoder"
    d_out = d_in if autoencoder else d_out
    sae = HookedSAE(
        SAEConfig(
            d_in=d_in,
            d_out=d_out,
            d_sae=d_sae,
            hook_in="a",
            hook_out="a" if autoencoder else "b",
            pre_encoder_bias=autoencoder,
            skip=kind == "skip",
        )
    ).double()
    values = {
        "W_enc": on_grid(d_in, d_sae, steps=4, unit=1 / 4),
        "b_enc": on_grid(d_sae, steps=4, unit=1 / 16),
        "W_dec": torch.randn(d_sae, d_out).bfloat16(),
        "b_dec": on_grid(d_out, steps=1, unit=1 / 4),
        "threshold": 2 + on_grid(d_sae, steps=4, unit=1 / 16).abs(),
        "W_skip": torch.randn(d_in, d_out),
    }
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(values[name])
    x = on_grid(rows, d_in, steps=8, unit=1 / 4)
    return sae, x, x if autoencoder else torch.randn(rows, d_out).double()


def expected(sae: HookedSAE, batch: tuple[Tensor, Tensor], term: SparsityTerm) -> dict[str, Tensor]:
    """Loss, its parts and all gradients, by autograd."""
    parts = jumprelu_loss(sae, batch, threshold=sae.threshold, sparsity=term, bandwidth=BANDWIDTH)
    parts.loss.backward()
    gradients = {name: parameter.grad for name, parameter in sae.named_parameters()}
    return {**gradients, **parts.detached()._asdict()}


def step(
    module, sae: HookedSAE, batch: tuple[Tensor, Tensor], term: SparsityTerm, *, operands: torch.dtype, block: int
) -> dict[str, Tensor]:
    """The same from the kernels: what is written here is how a dense step goes."""
    x, y = (each.float() for each in batch)
    p = {name: value.detach().float() for name, value in sae.named_parameters()}
    seen = (x - p["b_dec"] if sae.cfg.pre_encoder_bias else x).to(operands)
    W_enc, W_dec = p["W_enc"].T.contiguous().to(operands), p["W_dec"].to(operands)
    rows, blocks = len(x), [slice(start, start + block) for start in range(0, len(W_dec), block)]

    recons = torch.empty_like(y)
    encoded = []
    for latents in blocks:
        acts = module.encode_dense(
            seen, W_enc[latents], p["b_enc"][latents], p["threshold"][latents], half_window=BANDWIDTH / 2
        )
        module.product(acts.acts, W_dec[latents], out=recons, add=bool(encoded))
        encoded.append(acts)
    l0 = torch.stack([acts.l0 for acts in encoded]).sum(0).float()
    skip = x @ p["W_skip"] if "W_skip" in p else None
    d_recons, error = module.dense_residual(recons, p["b_dec"], y, rows=rows, operands=operands, skip=skip)
    if term.target_l0 is None:
        slope = torch.full_like(l0, term.coefficient / rows)
    else:
        slope = 2 * term.coefficient * term.quadratic_factor * (l0 - term.target_l0) / rows

    d_W_dec, d_W_enc, sums = torch.empty_like(p["W_dec"]), torch.empty_like(p["W_enc"].T.contiguous()), []
    for latents, acts in zip(blocks, encoded, strict=True):
        d_pre, added = module.dense_gradients(d_recons, W_dec[latents], acts, slope)
        module.product(acts.acts.T, d_recons, out=d_W_dec[latents])
        module.product(d_pre.T, seen, out=d_W_enc[latents])
        sums.append(added)
    fired, inside, slopes, d_act_inside, d_b_enc = (torch.cat(parts) for parts in zip(*sums, strict=True))
    frequency = fired / rows
    price = 2 * term.frequency / term.limit * frequency / rows
    d_b_dec = d_recons.float().sum(0)
    if sae.cfg.pre_encoder_bias:
        d_b_dec = d_b_dec - p["W_enc"] @ d_b_enc
    found = {
        "W_enc": d_W_enc.T,
        "b_enc": d_b_enc,
        "W_dec": d_W_dec,
        "b_dec": d_b_dec,
        "threshold": -(p["threshold"] * d_act_inside + slopes + price * inside) / BANDWIDTH,
        "loss": error.mean() + term.value(l0, frequency),
        "squared_error": error.mean(),
        "l0": l0.mean(),
        "fired": fired > 0,
    }
    return found | ({} if skip is None else {"W_skip": module.product(x.T, d_recons)})


def compare(module, kind: str, penalty: str, size: tuple[int, ...], *, operands: torch.dtype, device: str) -> None:
    sae, *batch = (each.to(device) for each in case(kind, size))
    exact = expected(sae, tuple(batch), TERMS[penalty])
    found = step(module, sae, tuple(batch), TERMS[penalty], operands=operands, block=size[-1])
    assert found.keys() == exact.keys()
    assert torch.equal(found.pop("fired"), exact["fired"])
    assert found.pop("l0").item() == pytest.approx(exact["l0"].item(), rel=1e-6)
    assert 1 < exact["l0"] < size[3] / 2
    # Of the whole tensor's norm: rounding f, d y_hat and d pre to bfloat16 is up to 2^-9 of each number; the
    # interpreter cuts off where a GPU rounds, which is twice as much.
    allowed = 1e-6 if operands == torch.float32 else 4e-3 if module is dense else 8e-3
    for name, value in found.items():
        assert value.dtype == torch.float32, name
        assert (value - exact[name]).norm() <= allowed * exact[name].norm(), name


OPERANDS = pytest.mark.parametrize("operands", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
PENALTIES = pytest.mark.parametrize("penalty", TERMS)
KINDS = pytest.mark.parametrize("kind", ["autoencoder", "transcoder", "skip"])


@OPERANDS
@PENALTIES
@KINDS
def test_the_twins_give_loss_and_gradients(kind, penalty, operands, device):
    compare(dense, kind, penalty, ORDINARY, operands=operands, device=device)


@OPERANDS
@pytest.mark.parametrize(("kind", "penalty"), [("autoencoder", "quadratic"), ("transcoder", "linear")])
def test_the_kernels_give_loss_and_gradients(kind, penalty, operands, device):
    compare(dense_triton, kind, penalty, TINY, operands=operands, device=device)


@pytest.mark.parametrize("block", [70, 32, 16])
def test_blocks_of_latents_change_nothing(block, device):
    sae, *batch = (each.to(device) for each in case("autoencoder", TINY))
    whole, blocked = (
        step(dense, sae, tuple(batch), TERMS["quadratic"], operands=torch.float32, block=size) for size in (70, block)
    )
    for name, value in whole.items():
        torch.testing.assert_close(blocked[name], value, rtol=1e-5, atol=1e-6)
