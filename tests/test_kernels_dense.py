"""The dense step's functions: the twins against float64 written from the formulas, the kernels against the twins."""

import pytest
import torch
from torch import Tensor

from scope_lens.training.kernels import dense, dense_triton
from scope_lens.training.kernels.dense import DenseActs, pack, product, unpack
from scope_lens.training.kernels.sums import LatentSums

# Batch, d, latents of the block, operands: several tiles of rows, more tiles of latents than a group has, and more rows
# than one program counts.
CASES = [
    (1, 17, 50, torch.float32),
    (33, 48, 256, torch.float32),
    (70, 8, 540, torch.float32),
    (530, 8, 20, torch.float32),
    (1, 17, 50, torch.bfloat16),
    (33, 48, 256, torch.bfloat16),
    (270, 24, 130, torch.bfloat16),
]
HALF = 0.2


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


class Case:
    """Operands of a batch on a block of latents, and what they are in float64."""

    def __init__(self, batch: int, d: int, latents: int, *, dtype: torch.dtype, device: str):
        self.x, self.d_recons = (torch.randn(batch, d, device=device).to(dtype) for _ in range(2))
        self.W_enc, self.W_dec = ((torch.randn(latents, d, device=device) / d**0.5).to(dtype) for _ in range(2))
        self.b_enc, self.threshold = 0.1 * torch.randn(latents, device=device), torch.rand(latents, device=device)
        self.slope = torch.randn(batch, device=device)
        # Inputs on which rounding cannot decide otherwise than float64 does: none lies near a threshold or an edge.
        for _ in range(20):
            gap = self.pre() - self.threshold.double()
            near = torch.minimum(gap.abs(), (gap.abs() - HALF).abs()).amin(0) < 1e-5
            self.b_enc[near] += 3e-4 * torch.randn(latents, device=device)[near]
        assert not near.any()

    def pre(self) -> Tensor:
        return self.x.double() @ self.W_enc.double().T + self.b_enc.double()

    def encode(self, module) -> DenseActs:
        return module.encode_dense(self.x, self.W_enc, self.b_enc, self.threshold, half_window=HALF)

    def gradients(self, module, acts: DenseActs) -> tuple[Tensor, LatentSums]:
        return module.dense_gradients(self.d_recons, self.W_dec, acts, self.slope)


def assert_rounded(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """`found` is `exact` up to a unit in the last place of its dtype, and the sums' own error."""
    assert found.dtype == dtype
    rtol = 2**-7 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.double(), exact, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize(("batch", "d", "latents", "dtype"), CASES)
@pytest.mark.parametrize("module", [dense, dense_triton], ids=["twin", "kernel"])
def test_latents_and_gradients_are_those_of_float64(module, batch, d, latents, dtype, device):
    case = Case(batch, d, latents, dtype=dtype, device=device)
    pre, threshold = case.pre(), case.threshold.double()
    active, inside = pre > threshold, (pre - threshold).abs() < HALF
    assert inside.any()
    assert active.any()

    acts = case.encode(module)
    assert_rounded(acts.acts, pre * active, dtype)
    assert torch.equal(unpack(acts.active, batch), active)
    assert torch.equal(unpack(acts.inside, batch), inside)
    assert torch.equal(acts.l0, active.sum(1).int())

    d_pre, sums = case.gradients(module, acts)
    d_act = case.d_recons.double() @ case.W_dec.double().T
    assert_rounded(d_pre, d_act * active, dtype)
    expected = LatentSums(
        fired=active.sum(0),
        inside=inside.sum(0),
        slope=(case.slope.double()[:, None] * inside).sum(0),
        d_act_inside=(d_act * inside).sum(0),
        d_pre=(d_act * active).sum(0),
    )
    for name, found, exact in zip(LatentSums._fields, sums, expected, strict=True):
        assert found.dtype == torch.float32, name
        torch.testing.assert_close(found.double(), exact.double(), rtol=1e-5, atol=1e-4, msg=name)


@pytest.mark.parametrize("module", [dense, dense_triton], ids=["twin", "kernel"])
def test_not_a_number_stays(module, device):
    case = Case(40, 17, 70, dtype=torch.float32, device=device)
    case.x[3, 5] = torch.nan
    acts = case.encode(module)
    assert acts.acts[3].isnan().all()
    assert acts.l0[3] == 70
    assert not unpack(acts.inside, 40)[3].any()
    assert not acts.acts[torch.arange(40) != 3].isnan().any()

    case.x[3, 5], case.d_recons[7, 0] = 0.0, torch.nan
    acts = case.encode(module)
    d_pre, sums = case.gradients(module, acts)
    active, inside = unpack(acts.active, 40), unpack(acts.inside, 40)
    assert torch.equal(d_pre[7].isnan(), active[7])
    assert torch.equal(sums.d_pre.isnan(), active[7])
    assert torch.equal(sums.d_act_inside.isnan(), inside[7])


@pytest.mark.parametrize("module", [dense, dense_triton], ids=["twin", "kernel"])
def test_a_pre_activation_at_its_threshold_is_silent(module, device):
    x, W_enc = torch.ones(2, 4, device=device), torch.ones(3, 4, device=device)
    b_enc, threshold = torch.tensor([-3.0, -2.0, 0.0], device=device), torch.tensor([1.0, 1.0, 3.5], device=device)
    acts = module.encode_dense(x, W_enc, b_enc, threshold, half_window=0.5)  # pre: 1, 2, 4
    assert acts.acts.tolist() == [[0.0, 2.0, 4.0]] * 2
    assert unpack(acts.inside, 2).tolist() == [[True, False, False]] * 2  # 4 - 3.5 is the window's edge
    none = module.encode_dense(x, W_enc, b_enc, threshold, half_window=0.0)
    assert not none.inside.any()


@pytest.mark.parametrize("module", [dense, dense_triton], ids=["twin", "kernel"])
def test_no_row_active_gives_zeros(module, device):
    case = Case(35, 17, 50, dtype=torch.float32, device=device)
    case.threshold += 1e3
    acts = case.encode(module)
    d_pre, sums = case.gradients(module, acts)
    assert not acts.l0.any()
    assert not acts.acts.any()
    assert not d_pre.any()
    assert not any(each.any() for each in sums)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_block_of_wider_weights_and_transposed_inputs(dtype, device):
    """What a step passes: a slice of latents, rows that are views."""
    case = Case(33, 48, 96, dtype=dtype, device=device)
    whole = case.encode(dense_triton)
    block = slice(32, 96)
    x = case.x.T.contiguous().T
    acts = dense_triton.encode_dense(x, case.W_enc[block], case.b_enc[block], case.threshold[block], half_window=HALF)
    assert torch.equal(acts.acts, whole.acts[:, block])
    assert torch.equal(acts.active, whole.active[:, block])


@pytest.mark.parametrize("module", [dense, dense_triton], ids=["twin", "kernel"])
def test_the_same_bits_on_every_run(module, device, one_thread):
    case = Case(270, 8, 130, dtype=torch.bfloat16, device=device)
    first, second = case.encode(module), case.encode(module)
    (d_pre, sums), (again, sums_again) = case.gradients(module, first), case.gradients(module, second)
    pairs = zip((*first, d_pre, *sums), (*second, again, *sums_again), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", [(1, 17), (33, 48), (5, 1030)])
@pytest.mark.parametrize("module", [dense, dense_triton], ids=["twin", "kernel"])
def test_residual(module, size, dtype, skip, device):
    recons, y, added = (torch.randn(size, device=device) for _ in range(3))
    b_dec = torch.randn(size[1], device=device)
    found, squared_error = module.dense_residual(
        recons, b_dec, y, rows=77, operands=dtype, skip=added if skip else None
    )
    error = recons.double() + b_dec.double() - y.double() + (added.double() if skip else 0)
    assert_rounded(found, error * 2 / 77, dtype)
    torch.testing.assert_close(squared_error.double(), error.square().sum(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 100])
def test_bits_are_those_of_the_rows(rows):
    mask = torch.rand(rows, 7) < 0.4
    words = pack(mask)
    assert words.shape == (-(-rows // 32), 7)
    for row in range(rows):
        assert torch.equal((words[row // 32] >> (row % 32)) & 1 != 0, mask[row])
    assert torch.equal(unpack(words, rows), mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_product(dtype, device):
    a, b = torch.randn(33, 70, device=device).to(dtype), torch.randn(33, 50, device=device).to(dtype)
    exact = a.double().T @ b.double()
    found = product(a.T, b)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    # into a block of rows of a larger tensor, in place
    whole = torch.full((90, 50), 2.0, device=device)
    given = product(a.T, b, out=whole[20:])
    assert given.data_ptr() == whole[20:].data_ptr()
    torch.testing.assert_close(whole[20:], found)
    assert bool((whole[:20] == 2).all())
    product(a.T, b, out=whole[20:], add=True)
    torch.testing.assert_close(whole[20:].double(), 2 * exact, rtol=1e-5, atol=1e-5)


def test_product_adds_to_something():
    with pytest.raises(ValueError, match="product\\(add=True\\) has nothing to add to; pass out="):
        product(torch.ones(2, 2), torch.ones(2, 2), add=True)


@pytest.mark.parametrize(("latents", "dtype", "bound"), [(192, torch.bfloat16, 2e-5), (101, torch.float32, 1e-6)])
def test_rows_are_summed_with_coefficients_that_are_not_rounded(latents, dtype, bound):
    weights, coefficient = torch.randn(latents, 24).to(dtype), torch.randn(latents)
    expected = coefficient.double() @ weights.double()
    found = dense.weighted_rows(weights, coefficient)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < bound * expected.abs().max()
