"""What each latent's entries add up to: twin and kernel against sums over dense matrices in float64."""

import pytest
import torch
from torch import Tensor

from scope_lens.training.kernels import sums, sums_triton
from scope_lens.training.kernels.entries import Entries, columns_of

KERNELS = pytest.mark.parametrize("kernels", [sums, sums_triton], ids=["eager", "triton"])
HALF_WINDOW = 0.25


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


class Case:
    """Entries of a batch with gradients, and the same as dense matrices in float64."""

    def __init__(self, pre: Tensor, threshold: Tensor, capacity: int, device: str):
        batch, d_sae = pre.shape
        active, inside = ~(pre <= threshold), (pre - threshold).abs() < HALF_WINDOW
        matters = active | inside
        stored = matters & (matters.cumsum(1) <= capacity)
        self.active, self.inside = active & stored, inside & stored
        latent = torch.full((batch, capacity), d_sae, dtype=torch.int32)
        kept, act, d_act = (torch.zeros(batch, capacity) for _ in range(3))
        self.d_act = torch.randn(batch, d_sae)
        for row in range(batch):
            found = stored[row].nonzero().flatten()
            n = len(found)
            latent[row, :n] = found.int()
            kept[row, :n], d_act[row, :n] = pre[row, found], self.d_act[row, found]
            act[row, :n] = torch.where(self.active, pre, 0)[row, found]
        count = matters.sum(1).int()
        entries = Entries(latent, kept, act, count, active.sum(1).int())
        self.entries = Entries(*(column.to(device) for column in entries))
        self.columns = columns_of(self.entries, d_sae)
        self.entry_d_act, self.threshold = d_act.to(device), threshold.to(device)
        self.slope = torch.randn(batch, device=device)

    def run(self, kernels, *, threshold: bool = True) -> sums.LatentSums:
        given = self.threshold if threshold else None
        return kernels.latent_sums(
            self.entries, self.entry_d_act, self.columns, given, self.slope, half_window=HALF_WINDOW
        )

    def expected(self) -> tuple[Tensor, ...]:
        active, inside, d_act = self.active.double(), self.inside.double(), self.d_act.double()
        slope = self.slope.double().cpu()
        return active.sum(0), inside.sum(0), slope @ inside, (inside * d_act).sum(0), (active * d_act).sum(0)


def random_case(batch: int, d_sae: int, capacity: int, device: str) -> Case:
    pre, threshold = torch.randn(batch, d_sae), 0.5 + torch.rand(d_sae)
    pre[batch // 2] = -9  # a row without an entry
    pre[:, d_sae // 3] = -9  # a latent without an entry
    pre[:, d_sae // 2] = 3  # a latent with an entry in every row
    pre[batch // 2, d_sae // 2] = -9
    return Case(pre, threshold, capacity, device)


def assert_sums(found: sums.LatentSums, expected: tuple[Tensor, ...]) -> None:
    for name, a, b in zip(found._fields, found, expected, strict=True):
        assert a.dtype == torch.float32, name
        if name in ("fired", "inside"):
            assert torch.equal(a.double().cpu(), b), name
        else:
            torch.testing.assert_close(
                a.double().cpu(), b, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )


@KERNELS
@pytest.mark.parametrize(("batch", "d_sae", "capacity"), [(1, 50, 50), (33, 50, 40), (64, 256, 90)])
def test_against_dense_sums(kernels, batch, d_sae, capacity, device):
    case = random_case(batch, d_sae, capacity, device)
    assert (case.entries.count <= capacity).all()
    assert_sums(case.run(kernels), case.expected())


@KERNELS
def test_rows_that_overflow(kernels, device):
    case = random_case(20, 64, 8, device)
    assert (case.entries.count > 8).any()
    assert_sums(case.run(kernels), case.expected())


@KERNELS
def test_heavy_latents_beside_empty_ones(kernels, device):
    """Two latents active in each of 1,100 rows, which is more than the kernel's narrow and first wide tile hold."""
    pre = torch.full((1100, 20), -9.0)
    pre[:, 3], pre[::2, 4], pre[:, 19] = 2 + torch.rand(1100), 1.2, 3 + torch.rand(1100)
    case = Case(pre, torch.ones(20), 4, device)
    found = case.run(kernels)
    assert found.fired.tolist() == [0, 0, 0, 1100, 550, *[0] * 14, 1100]
    assert found.inside.tolist() == [0, 0, 0, 0, 550, *[0] * 15]
    assert_sums(found, case.expected())


@KERNELS
def test_no_entry_at_all(kernels, device):
    case = Case(torch.full((5, 18), -9.0), torch.ones(18), 6, device)
    assert all((column == 0).all() for column in case.run(kernels))


@KERNELS
def test_without_thresholds(kernels, device):
    """TopK: nothing is inside a window, everything that is not 0 is active."""
    case = random_case(33, 50, 40, device)
    expected = case.expected()
    nothing = torch.zeros(50, dtype=torch.float64)
    assert_sums(case.run(kernels, threshold=False), (expected[0], nothing, nothing, nothing, expected[4]))


@KERNELS
def test_the_edges_of_the_window_are_outside(kernels, device):
    pre = torch.tensor([[0.75, 1.25, 0.7500001, 1.2499999, 1.0]])
    found = Case(pre, torch.ones(5), 5, device).run(kernels)
    assert found.inside.tolist() == [0, 0, 1, 1, 1]
    # Only latent 1 and 3 lie above the threshold; at the threshold itself a latent is silent.
    assert found.fired.tolist() == [0, 1, 0, 1, 0]


@KERNELS
def test_nan_stays_with_its_latent(kernels, device):
    """A pre-activation that is not a number counts as active, and as outside the window."""
    case = random_case(33, 50, 40, device)
    clean = case.run(kernels)
    latent = 50 // 2
    where = (case.entries.latent == latent).nonzero()[0]
    case.entries.act[*where] = case.entries.pre[*where] = case.entry_d_act[*where] = torch.nan
    found = case.run(kernels)
    assert found.fired[latent] == clean.fired[latent]
    assert found.inside[latent] == clean.inside[latent] == 0
    assert found.d_pre[latent].isnan()
    assert found.d_act_inside[latent] == 0
    others = torch.arange(50, device=device) != latent
    assert all(torch.equal(a[others], b[others]) for a, b in zip(clean, found, strict=True))


@KERNELS
def test_the_same_bits_on_every_run(kernels, device, one_thread):
    case = random_case(64, 100, 60, device)
    assert all(torch.equal(a, b) for a, b in zip(case.run(kernels), case.run(kernels), strict=True))
