# pyright: reportMissingParameterType=false
# A kernel's parameters are pointers and numbers of Triton's language, which has no Python types.
"""The kernels of `decode.py` in Triton: gathers of weight rows, bound by memory.

A row of a batch of 4,096 with 80 entries needs 80 rows of `W_dec`, 4.6 KB each in bfloat16 at d 2304: 1.5 GB a batch.
The work is cut so that little of this comes from the device's memory, and so that many loads are under way at a time:

1. A program takes one row of the batch and 256 of its columns (9 programs a row at d 2304, no idle lane). All rows'
   first columns come first, then all rows' next ones: 256 columns of 65,536 latents are 34 MB and fit the second-level
   cache (50 MB on an H200), so that a latent which five rows share need not be read from memory five times.
2. A warp loads one entry's 256 columns at once, 16 bytes a lane; 8 of these are in flight in each of 4 warps, and the
   next entries' latents are read while the present weights arrive.
3. `d_act` is a sum over columns, and a program's part of it needs only its own columns of `d_recons`. So a program
   goes over its entries twice: first for the reconstruction, then, backwards, for its part of `d_act`. The five
   programs that a multiprocessor runs at once read 41 KB each for 80 entries, which its first-level cache (256 KB with
   the shared memory) can hold until the second time.
4. A small kernel adds up the parts, in the order of the columns. No atomics: the same bits on every run.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from scope_lens.training.kernels.decode import Residual
from scope_lens.training.kernels.entries import Entries

_COLUMNS = 256  # of a program: 512 bytes of a bfloat16 row, which a warp loads at once
_WARPS = tl.constexpr(4)
_IN_FLIGHT = 64  # bytes that a column has in flight in a program: 32 entries in bfloat16, 8 in each warp
_REGISTERS = 96  # of a thread. Without a limit the assembler aims lower still, and waits for each two loads in turn
_SLOTS = 128  # slots of a program that adds up parts


def decode(
    entries: Entries, W_dec: Float[Tensor, "d_sae d_out"], b_dec: Float[Tensor, " d_out"] | None
) -> Float[Tensor, "batch d_out"]:
    """Give `x_hat = sum of act * W_dec[latent] (+ b_dec)` for each row, in float32: see `decode.decode`."""
    assert _rows_follow(entries.latent, entries.act, W_dec)
    (batch, capacity), d_out = entries.latent.shape, W_dec.shape[1]
    recons = torch.empty(batch, d_out, dtype=torch.float32, device=W_dec.device)
    _decode[(batch, _parts(W_dec))](
        entries.latent, entries.act, entries.count, W_dec, b_dec, recons, capacity, **_sizes(W_dec)
    )
    return recons


def residual(
    entries: Entries,
    W_dec: Float[Tensor, "d_sae d_out"],
    b_dec: Float[Tensor, " d_out"] | None,
    y: Float[Tensor, "batch d_out"],
    *,
    rows: int,
    skip: Float[Tensor, "batch d_out"] | None = None,
) -> Residual:
    """Reconstruct, compare with the target, and give the gradient at each entry: see `decode.residual`."""
    assert _rows_follow(entries.latent, entries.act, W_dec, y, skip)
    (batch, capacity), d_out = entries.latent.shape, W_dec.shape[1]
    d_recons = torch.empty(batch, d_out, dtype=W_dec.dtype, device=W_dec.device)
    d_act_parts = torch.empty(batch, _parts(W_dec), capacity, dtype=torch.float32, device=W_dec.device)
    error_parts = d_act_parts.new_empty(batch, _parts(W_dec))
    _residual[(batch, _parts(W_dec))](
        entries.latent, entries.act, entries.count, W_dec, b_dec, y, skip,
        d_recons, d_act_parts, error_parts, 2 / rows, capacity, **_sizes(W_dec),
    )  # fmt: skip
    return Residual(d_recons, _sum_of_parts(entries, d_act_parts), error_parts.sum(1))


def latent_gradients(
    entries: Entries, W_dec: Float[Tensor, "d_sae d_out"], d_recons: Float[Tensor, "batch d_out"]
) -> Float[Tensor, "batch capacity"]:
    """Give `d_act = d_recons . W_dec[latent]` at each entry, in float32: see `decode.latent_gradients`."""
    assert _rows_follow(entries.latent, W_dec, d_recons)
    batch, capacity = entries.latent.shape
    d_act_parts = torch.empty(batch, _parts(W_dec), capacity, dtype=torch.float32, device=W_dec.device)
    _latent_gradients[(batch, _parts(W_dec))](
        entries.latent, entries.count, W_dec, d_recons, d_act_parts, capacity, **_sizes(W_dec)
    )
    return _sum_of_parts(entries, d_act_parts)


def _parts(W_dec: Tensor) -> int:
    """Programs that share a row."""
    return triton.cdiv(W_dec.shape[1], _COLUMNS)


def _sum_of_parts(entries: Entries, d_act_parts: Tensor) -> Tensor:
    batch, parts, capacity = d_act_parts.shape
    d_act = d_act_parts.new_empty(batch, capacity)
    sizes = {"PARTS": parts, "PADDED": triton.next_power_of_2(parts), "SLOTS": _SLOTS}
    _add_parts[(batch, triton.cdiv(capacity, _SLOTS))](entries.count, d_act_parts, d_act, capacity, **sizes)
    return d_act


def _sizes(W_dec: Tensor) -> dict[str, int]:
    """Give what is known when a kernel is compiled: columns of a row, of a program, entries in flight, warps."""
    entries = _IN_FLIGHT // W_dec.itemsize
    sizes = {"D": W_dec.shape[1], "COLUMNS": _COLUMNS, "ENTRIES": entries}
    return sizes | {"num_warps": _WARPS.value, "maxnreg": _REGISTERS}


def _rows_follow(*tensors: Tensor | None) -> bool:
    """Whether the rows of each stand one behind the other, as the kernels expect."""
    return all(tensor is None or tensor.is_contiguous() for tensor in tensors)


@no_type_check
@triton.jit
def _weighted_sum(latent, act, n, capacity, W, cols, in_row, D: tl.constexpr, ENTRIES: tl.constexpr):
    """`sum of act * W[latent, cols]` over n entries, each warp over entries of its own until the end."""
    slot = tl.arange(0, ENTRIES)
    total = tl.zeros((_WARPS, cols.shape[0]), tl.float32)
    # The first latents do not wait for n; what is padding among them is left out below.
    which = tl.load(latent + slot, mask=slot < capacity, other=0).to(tl.int64)
    weight = tl.load(act + slot, mask=slot < capacity, other=0.0)
    for first in range(0, n, ENTRIES):
        there = first + slot < n
        picked = tl.load(W + which[:, None] * D + cols[None, :], mask=there[:, None] & in_row[None, :], other=0.0)
        # The next latents are on their way while these weights arrive.
        ahead = first + ENTRIES + slot
        next_which = tl.load(latent + ahead, mask=ahead < n, other=0).to(tl.int64)
        next_weight = tl.load(act + ahead, mask=ahead < n, other=0.0)
        # Entry e is loaded by warp e % 4: this sum stays inside each thread.
        weighted = tl.where(there, weight, 0.0)[:, None] * picked.to(tl.float32)
        total += tl.sum(tl.reshape(weighted, (ENTRIES // _WARPS, _WARPS, cols.shape[0])), axis=0)
        which = next_which
        weight = next_weight
    return tl.sum(total, axis=0)


@no_type_check
@triton.jit
def _store_gradients(latent, n, W, cols, in_row, d, d_act_part, D: tl.constexpr, ENTRIES: tl.constexpr):
    """`d . W[latent, cols]` for each of n entries."""
    # Backwards: what was read last is the most likely to be in the cache still.
    for back in range(0, n, ENTRIES):
        slot = (n - 1) // ENTRIES * ENTRIES - back + tl.arange(0, ENTRIES)
        there = slot < n
        which = tl.load(latent + slot, mask=there, other=0).to(tl.int64)
        picked = tl.load(W + which[:, None] * D + cols[None, :], mask=there[:, None] & in_row[None, :], other=0.0)
        tl.store(d_act_part + slot, tl.sum(picked.to(tl.float32) * d[None, :], axis=1), mask=there)


@no_type_check
@triton.jit
def _decode(
    latent, act, count, W, bias, recons, capacity,
    D: tl.constexpr, COLUMNS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_row = cols < D
    n = tl.minimum(tl.load(count + row), capacity)
    slots = row * capacity
    total = _weighted_sum(latent + slots, act + slots, n, capacity, W, cols, in_row, D, ENTRIES)
    if bias is not None:
        total += tl.load(bias + cols, mask=in_row, other=0.0)
    tl.store(recons + row * D + cols, total, mask=in_row)


@no_type_check
@triton.jit
def _residual(
    latent, act, count, W, bias, y, skip, d_recons, d_act_parts, error_parts, scale, capacity,
    D: tl.constexpr, COLUMNS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_row = cols < D
    n = tl.minimum(tl.load(count + row), capacity)
    # What the sum is compared with is asked for first and arrives meanwhile.
    target = tl.load(y + row * D + cols, mask=in_row, other=0.0)
    slots = row * capacity
    total = _weighted_sum(latent + slots, act + slots, n, capacity, W, cols, in_row, D, ENTRIES)
    if bias is not None:
        total += tl.load(bias + cols, mask=in_row, other=0.0)
    if skip is not None:
        total += tl.load(skip + row * D + cols, mask=in_row, other=0.0)
    gap = total - target
    d = gap * scale
    tl.store(d_recons + row * D + cols, d.to(d_recons.dtype.element_ty), mask=in_row)
    part = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(error_parts + part, tl.sum(gap * gap, axis=0))
    _store_gradients(latent + slots, n, W, cols, in_row, d, d_act_parts + part * capacity, D, ENTRIES)


@no_type_check
@triton.jit
def _latent_gradients(
    latent, count, W, d_recons, d_act_parts, capacity,
    D: tl.constexpr, COLUMNS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_row = cols < D
    n = tl.minimum(tl.load(count + row), capacity)
    d = tl.load(d_recons + row * D + cols, mask=in_row, other=0.0).to(tl.float32)
    part = row * tl.num_programs(1) + tl.program_id(1)
    _store_gradients(latent + row * capacity, n, W, cols, in_row, d, d_act_parts + part * capacity, D, ENTRIES)


@no_type_check
@triton.jit
def _add_parts(count, d_act_parts, d_act, capacity, PARTS: tl.constexpr, PADDED: tl.constexpr, SLOTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    part = tl.arange(0, PADDED)
    n = tl.minimum(tl.load(count + row), capacity)
    parts = tl.load(
        d_act_parts + (row * PARTS + part[:, None]) * capacity + slot[None, :],
        mask=(part[:, None] < PARTS) & (slot[None, :] < n),
        other=0.0,
    )
    tl.store(d_act + row * capacity + slot, tl.sum(parts, axis=0), mask=slot < capacity)
