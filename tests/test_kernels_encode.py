"""The fused encoder and its twin against float64, written from the definition; ragged, empty, overflowing and NaN."""

from unittest import mock

import pytest
import torch

from scope_lens import activations
from scope_lens.training.kernels import encode as twin
from scope_lens.training.kernels import encode_triton as fused
from scope_lens.training.kernels.entries import Entries, columns_of

HALF_WINDOW = 0.05
SHAPES = [(1, 17, 50), (33, 48, 50), (9, 17, 256)]


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def inputs(batch, d_in, d_sae, dtype, device):
    x = torch.randn(batch, d_in)
    W_enc = torch.randn(d_sae, d_in) / d_in**0.5
    b_enc = 0.3 * torch.randn(d_sae)
    threshold = 0.5 + torch.rand(d_sae)
    return x.to(device, dtype), W_enc.to(device, dtype), b_enc.to(device), threshold.to(device)


@pytest.fixture(params=["twin", "float32 tile", "H200 tile"])
def kernel(request, device):
    """The twin, and the kernel with the settings of its two tiles; tiles are small in the interpreter."""
    if request.param == "twin":
        yield twin
        return
    if device == "cuda":
        yield fused
        return
    tile = fused._HOPPER if request.param == "H200 tile" else fused._FLOAT32
    with mock.patch.object(fused, "tile_for", return_value=tile._replace(rows=16, latents=64, group=2)):
        yield fused


def pre_activations(x, W_enc, b_enc):
    return x.double() @ W_enc.double().T + b_enc.double()


def dense(values, entries: Entries, d_sae: int):
    """The entries' values at their places in a (batch, d_sae) tensor, which has a column more for the padding."""
    out = torch.zeros(len(values), d_sae + 1, dtype=values.dtype, device=values.device)
    return out.scatter(1, entries.latent.long(), values)[:, :d_sae]


def check_form(entries: Entries, capacity: int, d_sae: int) -> None:
    slot = torch.arange(capacity, device=entries.count.device)
    empty = slot >= entries.count[:, None]
    assert entries.latent.dtype == entries.count.dtype == entries.l0.dtype == torch.int32
    assert entries.pre.dtype == entries.act.dtype == torch.float32
    assert entries.latent.shape == entries.pre.shape == entries.act.shape == (len(entries.count), capacity)
    assert (entries.latent[empty] == d_sae).all()
    assert (entries.pre[empty] == 0).all()
    assert (entries.act[empty] == 0).all()
    ascending = entries.latent[:, 1:] > entries.latent[:, :-1]
    assert (ascending | empty[:, 1:]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "d_in", "d_sae"), SHAPES)
def test_entries_are_those_of_float64(kernel, device, batch, d_in, d_sae, dtype):
    x, W_enc, b_enc, threshold = inputs(batch, d_in, d_sae, dtype, device)
    pre = pre_activations(x, W_enc, b_enc)
    gap = pre - threshold.double()
    # No entry is so near an edge that float32, or a tensor core, decides otherwise.
    assert gap.abs().min() > 1e-4
    assert (gap.abs() - HALF_WINDOW).abs().min() > 1e-4
    active, inside = gap > 0, gap.abs() < HALF_WINDOW
    assert (inside & active).any() or batch == 1
    assert (inside & ~active).any() or batch == 1
    entries = kernel.encode(x, W_enc, b_enc, threshold, half_window=HALF_WINDOW, capacity=d_sae + 3)
    check_form(entries, d_sae + 3, d_sae)
    torch.testing.assert_close(entries.count, (active | inside).sum(1).int())
    torch.testing.assert_close(entries.l0, active.sum(1).int())
    matters = dense(torch.ones_like(entries.pre), entries, d_sae) > 0
    assert (matters == (active | inside)).all()
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(dense(entries.pre, entries, d_sae), (pre * matters).float(), **close)
    torch.testing.assert_close(dense(entries.act, entries, d_sae), (pre * active).float(), **close)


def test_a_window_of_zero_keeps_active_latents_alone(kernel, device):
    x, W_enc, b_enc, threshold = inputs(9, 48, 50, torch.bfloat16, device)
    entries = kernel.encode(x, W_enc, b_enc, threshold, half_window=0, capacity=50)
    pre = pre_activations(x, W_enc, b_enc)
    expected = activations.jumprelu(pre, threshold.double()).float()
    torch.testing.assert_close(dense(entries.act, entries, 50), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entries.count, entries.l0)
    torch.testing.assert_close(entries.act, entries.pre)


def test_edges_are_strict(kernel, device):
    # Exact numbers: pre is the bias. Threshold 1, half a window of 0.25.
    b_enc = torch.tensor([1.0, 1.25, 0.75, 1.1875, 0.8125, 1.0 + 2.0**-23, -5.0, 0.0], device=device)
    nothing = [torch.zeros(n, 8, dtype=torch.bfloat16, device=device) for n in (2, 8)]
    entries = kernel.encode(*nothing, b_enc, torch.ones(8, device=device), half_window=0.25, capacity=8)
    assert entries.latent.tolist() == [[0, 1, 3, 4, 5, 8, 8, 8]] * 2
    assert entries.act[0].tolist() == [0.0, 1.25, 1.1875, 0.0, 1.0 + 2.0**-23, 0.0, 0.0, 0.0]
    assert entries.pre[0].tolist() == [1.0, 1.25, 1.1875, 0.8125, 1.0 + 2.0**-23, 0.0, 0.0, 0.0]
    assert entries.count.tolist() == [5, 5]
    assert entries.l0.tolist() == [3, 3]
    # A threshold of zero with no window: exactly zero is silent.
    zero = torch.zeros(8, device=device)
    entries = kernel.encode(*nothing, b_enc, zero, half_window=0.0, capacity=8)
    assert entries.latent[0].tolist() == [0, 1, 2, 3, 4, 5, 8, 8]


def test_every_place_of_a_tile_decides_at_the_last_bit(device):
    """Pre-activations a few roundings away from both edges, at all 256 latents of the tile on an H200."""
    d_sae = 256
    rows = torch.arange(d_sae) % 9
    size = 10.0 ** torch.randint(-3, 3, (d_sae,))
    x, W_enc = torch.eye(9, 16).bfloat16(), (torch.randn(d_sae, 16) * size[:, None]).bfloat16()
    threshold = torch.rand(d_sae) * size
    edge = torch.where(torch.rand(d_sae) < 0.5, threshold, threshold - HALF_WINDOW)
    b_enc = edge - W_enc[torch.arange(d_sae), rows].float()
    b_enc += torch.randint(-2, 3, (d_sae,)) * 2**-24 * b_enc.abs()
    given = tuple(tensor.to(device) for tensor in (x, W_enc, b_enc, threshold))
    expected = twin.encode(*given, half_window=HALF_WINDOW, capacity=d_sae)
    near = (expected.pre - threshold.to(device)[expected.latent.clamp(max=255)]).abs() < 1e-4 * size.max()
    assert near.sum() > 64
    if device == "cuda":
        entries = fused.encode(*given, half_window=HALF_WINDOW, capacity=d_sae)
    else:
        with mock.patch.object(fused, "tile_for", return_value=fused._HOPPER):
            entries = fused.encode(*given, half_window=HALF_WINDOW, capacity=d_sae)
    for found, wanted in zip(entries, expected, strict=True):
        assert torch.equal(found, wanted)


def test_rows_without_entries_and_rows_with_too_many(kernel, device):
    x, W_enc, b_enc, threshold = inputs(9, 48, 256, torch.bfloat16, device)
    x *= 0.7
    x[4] = 0
    b_enc[:] = 0
    x[7] *= 100  # half of the latents
    pre = pre_activations(x, W_enc, b_enc)
    active = pre > threshold
    count = (active | ((pre - threshold).abs() < HALF_WINDOW)).sum(1).int()
    assert count[4] == 0
    assert count[7] > 60
    capacity = 48
    assert (count > capacity).nonzero().flatten().tolist() == [7]
    entries = kernel.encode(x, W_enc, b_enc, threshold, half_window=HALF_WINDOW, capacity=capacity)
    torch.testing.assert_close(entries.count, count)
    torch.testing.assert_close(entries.l0, active.sum(1).int())
    check_form(entries, capacity, 256)
    # Some of its entries, each with its own number; the other rows are as ever.
    rows = torch.arange(9, device=device)[:, None]
    there = torch.arange(capacity, device=device) < count[:, None]
    expected = pre[rows, entries.latent.long().clamp(max=255)].float()
    torch.testing.assert_close(entries.pre[there], expected[there], rtol=1e-5, atol=1e-4)


def test_nan_comes_through(kernel, device):
    x, W_enc, b_enc, threshold = inputs(9, 48, 50, torch.bfloat16, device)
    clean = kernel.encode(x, W_enc, b_enc, threshold, half_window=HALF_WINDOW, capacity=50)
    bad = x.clone()
    bad[5, 3] = torch.nan
    entries = kernel.encode(bad, W_enc, b_enc, threshold, half_window=HALF_WINDOW, capacity=50)
    assert entries.count[5] == entries.l0[5] == 50
    assert entries.act[5].isnan().all()
    others = torch.arange(9, device=device) != 5
    for now, before in zip(entries, clean, strict=True):
        torch.testing.assert_close(now[others], before[others])
    b_enc[11] = torch.nan
    entries = kernel.encode(x, W_enc, b_enc, threshold, half_window=HALF_WINDOW, capacity=50)
    assert (entries.latent[entries.act.isnan()] == 11).all()
    assert entries.act.isnan().sum() == 9


def test_no_rows(kernel, device):
    x, W_enc, b_enc, threshold = inputs(0, 48, 50, torch.bfloat16, device)
    entries = kernel.encode(x, W_enc, b_enc, threshold, half_window=HALF_WINDOW, capacity=16)
    assert entries.latent.shape == entries.pre.shape == entries.act.shape == (0, 16)
    assert entries.count.shape == entries.l0.shape == (0,)
    columns = columns_of(entries, 50)
    assert columns.slot.shape == (0,)
    assert columns.offsets.tolist() == [0] * 51


def test_views_with_gaps_between_their_rows(kernel, device):
    x, W_enc, b_enc, threshold = inputs(9, 48, 50, torch.bfloat16, device)
    expected = kernel.encode(x, W_enc, b_enc, threshold, half_window=HALF_WINDOW, capacity=50)
    apart = torch.randn(9, 96, device=device).bfloat16()
    apart[:, 5:53] = x
    found = kernel.encode(
        apart[:, 5:53], W_enc.T.contiguous().T, b_enc, threshold, half_window=HALF_WINDOW, capacity=50
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_topk_keeps_the_largest(kernel, device, dtype):
    k, d_sae = 5, 256
    x, W_enc, b_enc, _ = inputs(9, 48, d_sae, dtype, device)
    b_enc -= 2.3
    pre = pre_activations(x, W_enc, b_enc)
    expected = activations.topk(pre, k)
    assert ((expected > 0).sum(1) < k).any(), "some row keeps fewer than k after ReLU"
    floor = torch.tensor([-1.5], device=device)
    entries = kernel.topk_encode(x, W_enc, b_enc, k=k, floor=floor, capacity=128)
    candidates = (pre > -1.5).sum(1).int()
    assert ((candidates >= k) & (candidates <= 128)).all()
    torch.testing.assert_close(entries.count, candidates)
    torch.testing.assert_close(entries.l0, (expected > 0).sum(1).int())
    assert entries.latent.shape == (9, k)
    assert (entries.latent[:, 1:] > entries.latent[:, :-1]).all()
    torch.testing.assert_close(dense(entries.act, entries, d_sae), expected.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entries.act, entries.pre.relu())


def test_topk_shows_rows_with_too_few_candidates(kernel, device):
    x, W_enc, b_enc, _ = inputs(9, 48, 50, torch.bfloat16, device)
    floor = torch.tensor([1.5], device=device)
    entries = kernel.topk_encode(x, W_enc, b_enc, k=8, floor=floor, capacity=32)
    above = pre_activations(x, W_enc, b_enc) > 1.5
    torch.testing.assert_close(entries.count, above.sum(1).int())
    few = entries.count < 8
    assert few.any()
    empty = torch.arange(8, device=device) >= entries.count[:, None]
    assert (entries.latent[empty] == 50).all()
    assert (entries.act[empty] == 0).all()
    with pytest.raises(ValueError, match="k=8 latents out of at most capacity=7 candidates"):
        kernel.topk_encode(x, W_enc, b_enc, k=8, floor=floor, capacity=7)


def test_twice_the_same_bits(kernel, device):
    x, W_enc, b_enc, threshold = inputs(9, 48, 256, torch.bfloat16, device)
    first, second = (kernel.encode(x, W_enc, b_enc, threshold, half_window=HALF_WINDOW, capacity=128) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_columns_are_the_entries_by_latent(device):
    x, W_enc, b_enc, threshold = inputs(9, 48, 50, torch.bfloat16, device)
    entries = twin.encode(x, W_enc, b_enc, threshold, half_window=HALF_WINDOW, capacity=40)
    columns = columns_of(entries, 50)
    expected = sorted(
        (latent, row, slot)
        for row, latents in enumerate(entries.latent.tolist())
        for slot, latent in enumerate(latents)
        if latent < 50
    )
    assert columns.slot.dtype == columns.offsets.dtype == torch.int32
    assert len(columns.slot) == 9 * 40
    used = columns.slot[: len(expected)].tolist()
    assert used == [row * 40 + slot for _, row, slot in expected]
    assert sorted(columns.slot.tolist()) == list(range(9 * 40))
    begins = [sum(latent < bound for latent, _, _ in expected) for bound in range(51)]
    assert columns.offsets.tolist() == begins
