"""Decode, residual and gradients at the entries: twin and kernels against dense formulas in float64."""

import pytest
import torch
from torch import Tensor

from scope_lens.training.kernels import decode, decode_triton
from scope_lens.training.kernels.entries import Entries

KERNELS = pytest.mark.parametrize("kernels", [decode, decode_triton], ids=["eager", "triton"])
OPERANDS = pytest.mark.parametrize("operands", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
# batch, d_sae, d_out, capacity: one row, odd widths, more than one chunk of columns, more than one step of entries
SHAPES = [(1, 50, 17, 8), (33, 256, 48, 24), (4, 256, 301, 70), (3, 64, 256, 130)]
HALF_WINDOW = 0.1


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


class Case:
    """A batch with its entries, and the same entries as dense matrices in float64."""

    def __init__(self, batch: int, d_sae: int, d_out: int, capacity: int, operands: torch.dtype, device: str):
        pre, threshold = torch.randn(batch, d_sae), 0.3 + 1.5 * torch.rand(d_sae)
        pre[batch // 2] = -9  # a row without an entry
        active = pre > threshold
        matters = active | ((pre - threshold).abs() < HALF_WINDOW)
        self.count = matters.sum(1).int()
        latent = torch.full((batch, capacity), d_sae, dtype=torch.int32)
        # What stands in the padding must not be used.
        kept, act = (torch.full((batch, capacity), torch.nan) for _ in range(2))
        self.dense_act, self.stored = torch.zeros(batch, d_sae, dtype=torch.float64), torch.zeros(batch, d_sae) > 0
        for row in range(batch):
            found = matters[row].nonzero().flatten()[:capacity]
            n = len(found)
            latent[row, :n] = found.int()
            kept[row, :n] = pre[row, found]
            act[row, :n] = torch.where(active, pre, 0)[row, found]
            self.dense_act[row, found] = act[row, :n].double()
            self.stored[row, found] = True
        self.entries = Entries(*(column.to(device) for column in (latent, kept, act, self.count, active.sum(1).int())))
        self.W_dec = torch.randn(d_sae, d_out).to(operands).to(device)
        self.b_dec = torch.randn(d_out, device=device)
        self.y, self.skip = torch.randn(2, batch, d_out, device=device).unbind()

    def d_act_of(self, d_recons: Tensor) -> Tensor:
        """Dense gradient with respect to the activations, at the stored entries, in the order of the entries."""
        dense = d_recons.double().cpu() @ self.W_dec.double().cpu().T
        d_act = torch.zeros(self.entries.act.shape, dtype=torch.float64)
        for row, stored in enumerate(self.stored):
            d_act[row, : int(stored.sum())] = dense[row, stored]
        return d_act


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    """To a part of the largest number that is expected."""
    assert found.dtype == torch.float32
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(found.double().cpu(), expected, rtol=0, atol=tolerance * max(scale, 1.0))


@KERNELS
@OPERANDS
@pytest.mark.parametrize("shape", SHAPES)
def test_decode(kernels, operands, shape, device):
    case = Case(*shape, operands, device)
    expected = case.dense_act @ case.W_dec.double().cpu()
    assert_close(kernels.decode(case.entries, case.W_dec, None), expected)
    assert_close(kernels.decode(case.entries, case.W_dec, case.b_dec), expected + case.b_dec.double().cpu())


@KERNELS
@OPERANDS
@pytest.mark.parametrize("shape", SHAPES)
def test_residual(kernels, operands, shape, device):
    case = Case(*shape, operands, device)
    with_skip = operands is torch.float32
    rows = 3 * shape[0]  # the batch is a third of the whole one
    found = kernels.residual(
        case.entries, case.W_dec, case.b_dec, case.y, rows=rows, skip=case.skip if with_skip else None
    )
    recons = case.dense_act @ case.W_dec.double().cpu() + case.b_dec.double().cpu()
    gap = recons + with_skip * case.skip.double().cpu() - case.y.double().cpu()
    d_recons = 2 * gap / rows
    assert_close(found.squared_error, gap.square().sum(1))
    # From the gradient that is not rounded, whatever the operands are.
    assert_close(found.d_act, case.d_act_of(d_recons))
    assert found.d_recons.dtype == operands
    # A bfloat16 has 8 bits; Triton's interpreter cuts the others off where a GPU rounds.
    relative = 1e-6 if operands is torch.float32 else 2**-7
    torch.testing.assert_close(found.d_recons.double().cpu(), d_recons, rtol=relative, atol=1e-6)


def test_residual_is_the_gradient_of_the_loss(device):
    """Of the mean squared error, by autograd through the dense products."""
    case = Case(5, 40, 33, 40, torch.float32, device)
    act = case.dense_act.clone().requires_grad_()
    recons = act @ case.W_dec.double().cpu() + case.b_dec.double().cpu()
    recons.retain_grad()
    loss = (recons - case.y.double().cpu()).square().sum(1).mean()
    loss.backward()
    assert recons.grad is not None
    assert act.grad is not None
    for kernels in (decode, decode_triton):
        found = kernels.residual(case.entries, case.W_dec, case.b_dec, case.y, rows=5)
        assert_close(found.d_recons, recons.grad)
        for row, stored in enumerate(case.stored):
            assert_close(found.d_act[row, : int(stored.sum())], act.grad[row, stored])
        torch.testing.assert_close(found.squared_error.double().mean().cpu(), loss.detach())


@KERNELS
@OPERANDS
@pytest.mark.parametrize("shape", SHAPES)
def test_latent_gradients(kernels, operands, shape, device):
    case = Case(*shape, operands, device)
    d_recons = case.y.to(operands)
    found = kernels.latent_gradients(case.entries, case.W_dec, d_recons)
    assert_close(found, case.d_act_of(d_recons))


@KERNELS
def test_the_cases_hold_what_they_are_meant_to(kernels, device):
    """A row without entries, one that overflows, some inside the window and silent; 0 in the padding."""
    case = Case(33, 256, 48, 24, torch.float32, device)
    assert case.count.min() == 0
    assert case.count.max() > 24
    assert case.stored.sum(1).max() == 24
    assert (case.stored & (case.dense_act == 0)).any()
    padding = torch.arange(24) >= case.count[:, None]
    found = kernels.residual(case.entries, case.W_dec, case.b_dec, case.y, rows=33)
    for d_act in (found.d_act, kernels.latent_gradients(case.entries, case.W_dec, case.y)):
        assert (d_act.cpu()[padding] == 0).all()
        assert (d_act.cpu()[~padding] != 0).all()


@KERNELS
def test_nan_stays_in_its_row(kernels, device):
    case = Case(6, 64, 40, 30, torch.float32, device)
    clean = kernels.residual(case.entries, case.W_dec, case.b_dec, case.y, rows=6)
    case.entries.act[1, 0] = torch.nan
    case.y[4, 3] = torch.nan
    found = kernels.residual(case.entries, case.W_dec, case.b_dec, case.y, rows=6)
    recons = kernels.decode(case.entries, case.W_dec, case.b_dec)
    assert recons[1].isnan().all()
    assert recons[torch.arange(6, device=device) != 1].isfinite().all()
    assert found.d_recons[1].isnan().all()
    assert found.d_recons[4].isnan().nonzero().flatten().tolist() == [3]
    for row in (1, 4):
        n = int(case.stored[row].sum())
        assert found.squared_error[row].isnan()
        assert found.d_act[row, :n].isnan().all()
        assert (found.d_act[row, n:] == 0).all()
    others = [0, 2, 3, 5]
    assert all(torch.equal(a[others], b[others]) for a, b in zip(clean, found, strict=True))


@KERNELS
def test_nan_in_a_weight_reaches_only_rows_that_use_it(kernels, device):
    case = Case(12, 64, 40, 30, torch.float32, device)
    latent = 0  # what stands in for padding where a latent has to be named
    case.W_dec[latent, 7] = torch.nan
    uses = case.stored[:, latent]
    assert uses.any()
    assert not uses.all()
    found = kernels.decode(case.entries, case.W_dec, case.b_dec)
    assert torch.equal(found[:, 7].isnan().cpu(), uses)
    assert found[:, :7].isfinite().all()


@KERNELS
def test_the_same_bits_on_every_run(kernels, device, one_thread):
    case = Case(8, 128, 300, 60, torch.bfloat16, device)
    first, second = (
        kernels.residual(case.entries, case.W_dec, case.b_dec, case.y, rows=8, skip=case.skip) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_blocks_of_the_twin(monkeypatch, device):
    """The twin in blocks of entries is the twin at once, and the last block may be short."""
    case = Case(7, 50, 20, 16, torch.float32, device)
    whole = decode.latent_gradients(case.entries, case.W_dec, case.y)
    monkeypatch.setattr(decode, "_GATHERED", 3 * 20)
    assert case.stored.sum() % 3
    assert torch.equal(whole, decode.latent_gradients(case.entries, case.W_dec, case.y))


@pytest.mark.gpu
def test_rows_behind_two_to_the_31_numbers():
    """The last rows of a dictionary of a million latents at d 2304."""
    d_sae, d_out = 2**20, 2304
    W_dec = torch.zeros(d_sae, d_out, dtype=torch.bfloat16, device="cuda")
    W_dec[-2:] = torch.randn(2, d_out).bfloat16()
    latent = torch.tensor([[d_sae - 2, d_sae - 1]], dtype=torch.int32, device="cuda")
    act = torch.tensor([[2.0, 3.0]], device="cuda")
    count = torch.tensor([2], dtype=torch.int32, device="cuda")
    entries = Entries(latent, act, act, count, count)
    expected = 2 * W_dec[-2].double() + 3 * W_dec[-1].double()
    assert_close(decode_triton.decode(entries, W_dec, None), expected[None].cpu())
    d_act = decode_triton.latent_gradients(entries, W_dec, expected[None].float())
    assert_close(d_act, (W_dec[-2:].double() @ expected)[None].cpu())
