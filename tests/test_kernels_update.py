"""The update of latent-major weights: the twin against torch.optim.Adam in float64, the kernel against the twin."""

import re

import pytest
import torch
from torch import Tensor

from scope_lens.training.initialisation import normalise_rows, project_out_rows
from scope_lens.training.kernels import update, update_triton
from scope_lens.training.kernels.entries import Columns, Entries, columns_of
from scope_lens.training.kernels.update import FromEntries, RowAdam, catch_up

GEMMA_SCOPE = (0.0, 0.999)
MOMENTUM = (0.9, 0.99)
EPS = 1e-8


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def entries_of(matters: Tensor) -> Columns:
    """The columns of the entries where `matters` (batch, d_sae) is true; one slot a row more than are needed."""
    d_sae = matters.shape[1]
    capacity = int(matters.sum(1).max()) + 1
    latent = torch.where(matters, torch.arange(d_sae, device=matters.device), d_sae).sort(1).values
    latent = torch.nn.functional.pad(latent, (0, capacity), value=d_sae)[:, :capacity].int()
    zeros = torch.zeros(latent.shape, device=matters.device)
    count = matters.sum(1).int()
    return columns_of(Entries(latent, zeros, zeros, count, count), d_sae)


def source_of(dense: Tensor, rows: Tensor, *, matters: Tensor | None = None) -> FromEntries:
    """Entries whose gradient is `dense.T @ rows`: `dense` (batch, d_sae) holds the coefficients."""
    columns = entries_of(dense != 0 if matters is None else matters)
    capacity = len(columns.slot) // len(dense)
    # What stands in the padding must not be read.
    coefficient = torch.full((len(dense), capacity), torch.nan, dtype=dense.dtype, device=dense.device)
    for row in range(len(dense)):
        found = dense[row][dense[row] != 0 if matters is None else matters[row]]
        coefficient[row, : len(found)] = found
    return FromEntries(columns, coefficient, rows)


def random_dense(batch: int, d_sae: int, density: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, d_sae, dtype=dtype) * (torch.rand(batch, d_sae) < density)


class Case:
    """A weight with its state, and the settings of its updates."""

    def __init__(self, d_sae: int, d: int, *, unit_rows: bool, betas=GEMMA_SCOPE, dtype=torch.float32, device="cpu"):
        self.weight = torch.randn(d_sae, d, dtype=dtype)
        self.weight /= self.weight.norm(dim=1, keepdim=True)
        self.weight = self.weight.to(device)
        first = torch.zeros_like(self.weight) if betas[0] else None
        last = torch.zeros(d_sae, dtype=torch.int32, device=device)
        self.state = RowAdam(torch.zeros_like(self.weight), first, last)
        self.shadow = self.weight.bfloat16()
        self.settings = {"unit_rows": unit_rows, "betas": betas, "lr": 1e-2, "eps": EPS}
        self.halted = torch.zeros(1, dtype=torch.int32, device=device)
        self.step = 0

    def copy(self) -> "Case":
        other = object.__new__(Case)
        other.__dict__ |= self.__dict__
        other.weight, other.shadow, other.halted = self.weight.clone(), self.shadow.clone(), self.halted.clone()
        other.state = RowAdam(*(None if tensor is None else tensor.clone() for tensor in self.state))
        return other

    def update(self, module, gradient, *, latents: slice | None = None, step: int | None = None) -> None:
        self.step = step or self.step + 1
        module.update_rows(
            self.weight, self.state, gradient, shadow=self.shadow, step=self.step, halted=self.halted, latents=latents,
            **self.settings,
        )  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        found = {"weight": self.weight, "shadow": self.shadow} | self.state._asdict()
        return {name: tensor for name, tensor in found.items() if tensor is not None}


def assert_same(left: Case, right: Case) -> None:
    for name, tensor in left.tensors().items():
        # The interpreter's conversion to bfloat16 cuts where the device rounds.
        tolerance = {"atol": 1e-3, "rtol": 2**-7} if name == "shadow" else {"atol": 2e-6, "rtol": 2e-5}
        close = torch.isclose(tensor, right.tensors()[name], equal_nan=True, **tolerance)
        assert close.all(), (name, tensor[~close], right.tensors()[name][~close])


class Reference:
    """torch.optim.Adam on every row, in float64, between the projection and the rescaling of the recipe."""

    def __init__(self, case: Case) -> None:
        self.weight = torch.nn.Parameter(case.weight.double().cpu().clone())
        self.unit_rows = case.settings["unit_rows"]
        self.adam = torch.optim.Adam([self.weight], lr=1e-2, betas=case.settings["betas"], eps=EPS)

    def update(self, gradient: Tensor) -> None:
        self.weight.grad = gradient.double().cpu().clone()
        if self.unit_rows:
            project_out_rows(self.weight)
        self.adam.step()
        if self.unit_rows:
            normalise_rows(self.weight)

    @property
    def second(self) -> Tensor:
        return self.adam.state[self.weight]["exp_avg_sq"]


# ---- the twin against Adam ----


@pytest.mark.parametrize("unit_rows", [True, False])
@pytest.mark.parametrize("betas", [GEMMA_SCOPE, MOMENTUM])
def test_five_hundred_lazy_updates_are_those_of_adam_on_every_row(unit_rows, betas):
    # A latent has entries in about every tenth update.
    case = Case(40, 24, unit_rows=unit_rows, betas=betas, dtype=torch.float64)
    reference = Reference(case)
    rested = 0
    for _ in range(500):
        dense = random_dense(8, 40, 0.3, torch.float64) * (torch.rand(40) < 0.1)
        rows = torch.randn(8, 24, dtype=torch.float64)
        case.update(update, source_of(dense, rows))
        reference.update(dense.T @ rows)
        rested += int((case.state.last < case.step).sum())
    assert rested == 0 if betas[0] else rested > 0.8 * 500 * 40
    catch_up(case.state, case.step, betas[1])
    assert (case.weight - reference.weight).abs().max() < 1e-12
    torch.testing.assert_close(case.state.second, reference.second, rtol=1e-10, atol=0)
    assert case.state.last.unique().tolist() == [500]


# ---- both against Adam ----


@pytest.mark.parametrize(("module", "d_sae", "steps"), [(update, 40, 500), (update_triton, 10, 100)])
def test_float32_follows_float64(module, d_sae, steps, device):
    case = Case(d_sae, 24, unit_rows=True, device=device)
    reference = Reference(case)
    for _ in range(steps):
        dense = random_dense(8, d_sae, 0.3) * (torch.rand(d_sae) < 0.1)
        rows = torch.randn(8, 24)
        case.update(module, source_of(dense.to(device), rows.to(device)))
        reference.update(dense.double().T @ rows.double())
    catch_up(case.state, case.step, 0.999)
    assert (case.weight.cpu() - reference.weight).abs().max() < 2e-5
    torch.testing.assert_close(case.state.second.cpu(), reference.second.float(), rtol=1e-4, atol=1e-8)
    assert (case.weight.norm(dim=1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("module", [update, update_triton])
@pytest.mark.parametrize("unit_rows", [True, False])
@pytest.mark.parametrize("betas", [GEMMA_SCOPE, MOMENTUM])
def test_sparse_and_dense_updates_may_alternate(module, unit_rows, betas, device):
    case = Case(9, 17, unit_rows=unit_rows, betas=betas, device=device)
    reference = Reference(case)
    for index in range(6):
        dense, rows = random_dense(6, 9, 0.15), torch.randn(6, 17)
        gradient = dense.T @ rows
        if index % 3 == 1:
            # By blocks of latents, all at the same update.
            case.update(module, gradient[:6].to(device), latents=slice(0, 6))
            case.update(module, gradient[6:].to(device), latents=slice(6, 9), step=case.step)
        else:
            case.update(module, source_of(dense.to(device), rows.to(device)))
        reference.update(gradient)
    catch_up(case.state, case.step, betas[1])
    torch.testing.assert_close(case.weight.cpu(), reference.weight.detach().float(), rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(case.state.second.cpu(), reference.second.float(), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("module", [update, update_triton])
def test_the_gradient_alone_is_the_product(module, device):
    dense, rows = random_dense(33, 50, 0.1), torch.randn(33, 48)
    dense[:, 7] = 0
    gradient = module.weight_gradients(source_of(dense.to(device), rows.bfloat16().to(device)), 50).cpu()
    expected = dense.double().T @ rows.bfloat16().double()
    assert gradient.dtype == torch.float32
    assert (gradient - expected).abs().max() < 1e-5
    assert not gradient[7].any()


# ---- the kernel against the twin ----


@pytest.mark.parametrize(
    ("batch", "d_sae", "d"), [(1, 50, 17), (33, 50, 48), (64, 16, 256), (5, 9, 1), (5, 9, 2)], ids=str
)
@pytest.mark.parametrize(("operands", "unit_rows"), [(torch.bfloat16, True), (torch.float32, False)])
def test_ragged_sizes(batch, d_sae, d, operands, unit_rows, device):
    eager = Case(d_sae, d, unit_rows=unit_rows, device=device)
    fused = eager.copy()
    for step in (1, 30):
        rows = torch.randn(batch, d).to(operands).to(device)
        source = source_of(random_dense(batch, d_sae, 0.08).to(device), rows)
        eager.update(update, source, step=step)
        fused.update(update_triton, source, step=step)
        assert_same(fused, eager)


def test_a_latent_with_an_entry_in_every_row_is_summed_in_chunks(device, monkeypatch):
    monkeypatch.setattr(update_triton, "CHUNK", 16)
    dense = random_dense(37, 20, 0.1)
    dense[:, 3], dense[:30, 4], dense[:5, 5], dense[:16, 19] = (torch.randn(n) for n in (37, 30, 5, 16))
    dense[:, 11:17] = 0
    source = source_of(dense.to(device), torch.randn(37, 19).to(device))
    counts = source.columns.offsets.diff()
    assert counts.max() == 37
    assert counts.min() == 0
    expected = dense.double().T @ source.rows.double().cpu()
    assert (update_triton.weight_gradients(source, 20).cpu() - expected).abs().max() < 1e-5
    eager = Case(20, 19, unit_rows=True, device=device)
    fused, again = eager.copy(), eager.copy()
    eager.update(update, source)
    fused.update(update_triton, source)
    again.update(update_triton, source)
    assert_same(fused, eager)
    for name, tensor in fused.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name


@pytest.mark.parametrize("module", [update, update_triton])
def test_rows_without_entries_are_left_bit_for_bit(module, device):
    case = Case(30, 17, unit_rows=True, device=device)
    before = case.copy()
    dense = random_dense(9, 30, 0.05)
    case.update(module, source_of(dense.to(device), torch.randn(9, 17).to(device)))
    rested = ~dense.any(0)
    assert 0 < rested.sum() < 30
    for name, tensor in case.tensors().items():
        same = (tensor == before.tensors()[name]).reshape(30, -1).all(1).cpu()
        assert torch.equal(same, rested), name


@pytest.mark.parametrize("module", [update, update_triton])
def test_a_batch_without_entries_changes_nothing(module, device):
    case = Case(10, 17, unit_rows=True, device=device)
    before = case.copy()
    case.update(module, source_of(torch.zeros(5, 10).to(device), torch.randn(5, 17).to(device)))
    for name, tensor in case.tensors().items():
        assert torch.equal(tensor, before.tensors()[name]), name


@pytest.mark.parametrize("module", [update, update_triton])
@pytest.mark.parametrize("betas", [GEMMA_SCOPE, MOMENTUM])
def test_a_halted_update_writes_nothing(module, betas, device):
    case = Case(10, 17, unit_rows=True, betas=betas, device=device)
    before = case.copy()
    case.halted.fill_(3)
    dense = random_dense(5, 10, 0.5)
    rows = torch.randn(5, 17)
    case.update(module, source_of(dense.to(device), rows.to(device)))
    case.update(module, (dense.T @ rows).to(device))
    for name, tensor in case.tensors().items():
        assert torch.equal(tensor, before.tensors()[name]), name


@pytest.mark.parametrize("module", [update, update_triton])
@pytest.mark.parametrize("where", ["coefficient", "rows", "dense"])
def test_nan_reaches_the_weights_and_only_those_it_belongs_to(module, where, device):
    case = Case(10, 17, unit_rows=True, device=device)
    dense, rows = torch.zeros(5, 10), torch.randn(5, 17)
    dense[1, 2], dense[1, 3], dense[0, 3], dense[4, 8] = 1.0, 2.0, 3.0, 4.0
    if where == "coefficient":
        dense[0, 3] = torch.nan
    elif where == "rows":
        rows[0] = torch.nan  # what a kernel that reads too far would read
    source = source_of(dense.to(device), rows.to(device))
    if where == "dense":
        gradient = dense.T @ rows
        gradient[3, 5] = torch.nan
        case.update(module, gradient.to(device))
    else:
        case.update(module, source)
    for tensor in (case.weight, case.shadow, case.state.second):
        assert tensor.isnan().any(1).nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("module", [update, update_triton])
def test_entries_in_the_window_have_coefficient_zero_and_only_age_a_row(module, device):
    case = Case(6, 17, unit_rows=False, device=device)
    case.state.second.fill_(0.5)
    before = case.copy()
    matters = torch.zeros(3, 6, dtype=torch.bool)
    matters[1, 4] = True
    case.update(
        module,
        source_of(torch.zeros(3, 6).to(device), torch.randn(3, 17).to(device), matters=matters.to(device)),
        step=10,
    )
    assert torch.equal(case.weight, before.weight)
    assert case.state.last.tolist() == [0, 0, 0, 0, 10, 0]
    torch.testing.assert_close(case.state.second[4], torch.full((17,), 0.5 * 0.999**10, device=device))


@pytest.mark.parametrize("module", [update, update_triton])
def test_a_weight_kept_latent_major_under_a_transposed_parameter(module, device):
    case = Case(10, 17, unit_rows=False, device=device)
    parameter = torch.nn.Parameter(case.weight.T)  # (d_in, d_sae), its storage latent-major
    other = case.copy()
    source = source_of(random_dense(5, 10, 0.3).to(device), torch.randn(5, 17).to(device))
    other.update(module, source)
    case.weight = parameter.T
    case.update(module, source)
    assert torch.equal(parameter, other.weight.T)


def test_no_shadow_and_a_float32_shadow(device):
    source = source_of(random_dense(5, 10, 0.3).to(device), torch.randn(5, 17).to(device))
    for module in (update, update_triton):
        case = Case(10, 17, unit_rows=True, device=device)
        bare = case.copy()
        bare.shadow = None
        case.shadow = case.weight.clone()
        case.update(module, source)
        bare.update(module, source)
        assert torch.equal(case.shadow, case.weight)
        assert torch.equal(bare.weight, case.weight)


def test_catching_up_at_any_time_changes_rounding_alone():
    case = Case(10, 17, unit_rows=True)
    other = case.copy()
    for step in range(1, 40):
        source = source_of(random_dense(5, 10, 0.05), torch.randn(5, 17))
        case.update(update, source)
        other.update(update, source)
        if step % 7 == 0:
            catch_up(other.state, step, 0.999)
            assert other.state.last.unique().tolist() == [step]
    torch.testing.assert_close(case.weight, other.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_numbers_beyond_two_to_the_31():
    d_sae, d = 2**20, 2304
    small = Case(3, d, unit_rows=True, device="cuda")
    dense = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, -1.0]], device="cuda")
    source = source_of(dense, torch.randn(2, d, device="cuda"))
    large = small.copy()
    large.weight, large.shadow = (
        torch.ones(d_sae, d, dtype=t.dtype, device="cuda") for t in (small.weight, small.shadow)
    )
    large.state = RowAdam(torch.zeros_like(large.weight), None, torch.zeros(d_sae, dtype=torch.int32, device="cuda"))
    large.weight[-3:], large.shadow[-3:] = small.weight, small.shadow
    empty = torch.zeros(d_sae - 3, dtype=torch.int32, device="cuda")
    columns = Columns(source.columns.slot, torch.cat([empty, source.columns.offsets]))
    small.update(update, source)
    large.update(update_triton, source._replace(columns=columns))
    assert (large.weight[:-3] == 1).all()
    large.weight, large.shadow, large.state = (
        large.weight[-3:],
        large.shadow[-3:],
        RowAdam(large.state.second[-3:], None, large.state.last[-3:]),
    )
    assert_same(large, small)


# ---- what is refused ----


@pytest.mark.parametrize("module", [update, update_triton])
def test_what_does_not_fit_is_refused(module):
    case = Case(10, 17, unit_rows=True)
    source = source_of(random_dense(5, 10, 0.3), torch.randn(5, 17))

    def refused(message: str, gradient, **changes) -> None:
        broken = case.copy()
        for name, value in changes.items():
            setattr(broken, name, value)
        with pytest.raises(ValueError, match=re.escape(message)):
            broken.update(module, gradient)

    with pytest.raises(ValueError, match=re.escape("the gradient has 4 rows for the 5 latents of slice(0, 5, None).")):
        case.update(module, torch.zeros(4, 17), latents=slice(0, 5))
    with pytest.raises(ValueError, match="latents belongs to a dense gradient"):
        case.update(module, source, latents=slice(0, 5))
    fewer = {"weight": case.weight[:9], "shadow": None}
    refused("the entries are of 10 latents, the weight has 9 rows.", source, **fewer)
    refused("betas[0] is 0.9, but the state has no first moment", source, settings=case.settings | {"betas": MOMENTUM})
    refused("weight has shape (10, 17) and strides (1, 10)", source, weight=case.weight.T.contiguous().T)
    narrow = FromEntries(source.columns, source.coefficient, source.rows[:, :16])
    refused("gradient has shape (5, 16) and strides (17, 1); expected contiguous rows of 17 numbers.", narrow)
