# pyright: reportMissingParameterType=false
# A kernel's parameters are pointers and numbers of Triton's language, which has no Python types.
"""The update of latent-major weights as one kernel: `scope_lens.training.kernels.update` has the steps and the names.

A program takes one latent: its whole row of w, v (and m) stays in registers from the first read to the last write, so
an update moves 18 bytes a parameter of a touched row: w and v read and written in float32, the bf16 shadow written. A
dense gradient is 4 more, a first moment 8. A row of d numbers is held as two tiles whose sizes are powers of two
(2304 = 2048 + 256), because one tile of 4096 would leave 44 % of the lanes idle. What is read once is marked to leave
the L2 cache first, so that the rows that many latents sum stay there.

**Load balance.** Most latents have a handful of entries, some have one in every row of the batch, and a program that
sums thousands of rows alone would outlast all others. The order of the latents is cut into chunks of `CHUNK` entries.
A first launch sums each chunk that lies within one latent's stretch, some columns a program; the latent's own program
then adds these sums, and the entries before and behind them, fewer than two chunks. The cut depends on the entries
alone and every sum has a fixed order, so the results are the same bits on every run. The chunks' sums take
`4 d / CHUNK` bytes for each slot of the batch: 38 MB with 4096 rows of 256 slots and d 2304.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from scope_lens.training.kernels.update import FromEntries, RowAdam, checked_rows, log2_decay

CHUNK = 256  # entries; no program sums two chunks or more of single entries, and a chunk's sum costs next to nothing
_CHUNK_ROWS, _CHUNK_COLUMNS = 16, 256  # of the tile in which a program sums a chunk
_ROWS = 4  # entries of a latent whose rows are on their way to its program at the same time


def tiles(d: int) -> tuple[int, int, int]:
    """Give the sizes of the two tiles that hold a row, and a program's warps: 16 to 32 numbers of a row to a thread."""
    head = max(triton.next_power_of_2(d) // 2, 1)
    rest = triton.next_power_of_2(max(d - head, 1))
    return head, rest, min(max(triton.next_power_of_2((head + rest) // 512 + 1) // 2, 1), 8)


@torch.no_grad()
def update_rows(
    weight: Float[Tensor, "d_sae d"],
    state: RowAdam,
    gradient: FromEntries | Float[Tensor, "block d"],
    *,
    shadow: Float[Tensor, "d_sae d"] | None,
    unit_rows: bool,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    halted: Int[Tensor, "1"],
    latents: slice | None = None,
) -> None:
    """Make update `step` of a weight, in place, as the twin does, without waiting for the device."""
    weight, state, shadow = checked_rows(weight, state, gradient, shadow=shadow, betas=betas, latents=latents)
    entries = isinstance(gradient, FromEntries)
    _update[(len(weight),)](
        weight,
        state.second,
        state.first,
        state.last,
        shadow,
        *(_summands(gradient) if entries else (None, None, None, gradient, None)),
        halted,
        step,
        lr / (1 - betas[0] ** step),
        (1 - betas[1] ** step) ** -0.5,
        1 - betas[0],
        1 - betas[1],
        log2_decay(betas[1]),
        eps,
        UNIT_ROWS=unit_rows,
        CAPACITY=gradient.coefficient.shape[1] if entries else 1,
        **_sizes(weight.shape[1]),
    )


@torch.no_grad()
def weight_gradients(source: FromEntries, d_sae: int) -> Float[Tensor, "d_sae d"]:
    """Give the gradient alone, as the twin does."""
    capacity, d = source.coefficient.shape[1], source.rows.shape[1]
    gradient = source.rows.new_empty(d_sae, d, dtype=torch.float32)
    _weight_gradients[(d_sae,)](gradient, *_summands(source), CAPACITY=capacity, **_sizes(d))
    return gradient


def _summands(source: FromEntries) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What a latent's program adds up: slots, offsets, coefficients, rows, and the sums of chunks."""
    slot, offsets = source.columns
    capacity, d, d_sae = source.coefficient.shape[1], source.rows.shape[1], len(offsets) - 1
    chunks = len(slot) // CHUNK
    partial = source.rows.new_empty(max(chunks, 1), d, dtype=torch.float32)
    summands = (slot, offsets, source.coefficient, source.rows, partial)
    if chunks:
        _sum_chunks[(chunks, triton.cdiv(d, _CHUNK_COLUMNS))](
            *summands, d_sae, d_sae.bit_length(),
            CAPACITY=capacity, D=d, PER_CHUNK=CHUNK, AT_ONCE=_CHUNK_ROWS, WIDTH=_CHUNK_COLUMNS,
        )  # fmt: skip
    return summands


def _sizes(d: int) -> dict[str, int]:
    head, rest, warps = tiles(d)
    return {"D": d, "HEAD": head, "REST": rest, "PER_CHUNK": CHUNK, "AT_ONCE": _ROWS, "num_warps": warps}


@no_type_check
@triton.jit(do_not_specialize=["step"])
def _update(
    weight, second, first, last, shadow,
    slot, offsets, coefficient, rows, partial,
    halted, step, size, correction, new_first, new_second, log2_decay, eps,
    UNIT_ROWS: tl.constexpr, CAPACITY: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, REST: tl.constexpr,
    PER_CHUNK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Update one latent's row; without `slot` the gradient is dense and stands in `rows`."""
    latent = tl.program_id(0)
    if tl.load(halted) != 0:
        return
    if slot is not None:
        begin = tl.load(offsets + latent)
        end = tl.load(offsets + latent + 1)
        if (begin == end) & (first is None):
            return
    head = tl.arange(0, HEAD)
    rest = HEAD + tl.arange(0, REST)
    inside = rest < D
    at = latent.to(tl.int64) * D  # d_sae * d may pass 2^31
    # w and v are asked for before the entries are summed, and arrive meanwhile.
    w_head = tl.load(weight + at + head, eviction_policy="evict_first")
    w_rest = tl.load(weight + at + rest, mask=inside, other=0.0, eviction_policy="evict_first")
    v_head = tl.load(second + at + head, eviction_policy="evict_first")
    v_rest = tl.load(second + at + rest, mask=inside, other=0.0, eviction_policy="evict_first")
    missed = step - tl.load(last + latent)
    # The fast power is off by a few roundings, which would add up in a latent that is touched every time.
    decay = tl.where(missed == 1, 1.0 - new_second, tl.exp2(missed.to(tl.float32) * log2_decay))
    if slot is not None:
        g_head, g_rest = _sum(slot, coefficient, rows, partial, begin, end, head, rest, CAPACITY, D, PER_CHUNK, AT_ONCE)
    else:
        g_head = tl.load(rows + at + head, eviction_policy="evict_first")
        g_rest = tl.load(rows + at + rest, mask=inside, other=0.0, eviction_policy="evict_first")
    if UNIT_ROWS:
        along = tl.sum(g_head * w_head) + tl.sum(g_rest * w_rest)
        g_head -= along * w_head
        g_rest -= along * w_rest
    v_head = v_head * decay + new_second * g_head * g_head
    v_rest = v_rest * decay + new_second * g_rest * g_rest
    tl.store(second + at + head, v_head, eviction_policy="evict_first")
    tl.store(second + at + rest, v_rest, mask=inside, eviction_policy="evict_first")
    if first is not None:
        g_head = _moved(first + at + head, g_head, new_first, None)
        g_rest = _moved(first + at + rest, g_rest, new_first, inside)
    w_head -= size * g_head / (tl.sqrt(v_head) * correction + eps)
    w_rest -= size * g_rest / (tl.sqrt(v_rest) * correction + eps)
    if UNIT_ROWS:
        w_rest = tl.where(inside, w_rest, 0.0)
        shrink = 1 / tl.sqrt(tl.sum(w_head * w_head) + tl.sum(w_rest * w_rest))
        w_head *= shrink
        w_rest *= shrink
    tl.store(weight + at + head, w_head, eviction_policy="evict_first")
    tl.store(weight + at + rest, w_rest, mask=inside, eviction_policy="evict_first")
    if shadow is not None:
        tl.store(shadow + at + head, w_head.to(shadow.dtype.element_ty))
        tl.store(shadow + at + rest, w_rest.to(shadow.dtype.element_ty), mask=inside)
    tl.debug_barrier()  # every warp has read `last` by now, before one of them writes it
    tl.store(last + latent, step)


@no_type_check
@triton.jit
def _moved(first, g, new_first, inside):
    """Move the first moment towards the gradient, in memory too."""
    m = tl.load(first, mask=inside, eviction_policy="evict_first")
    m += new_first * (g - m)
    tl.store(first, m, mask=inside, eviction_policy="evict_first")
    return m


@no_type_check
@triton.jit
def _weight_gradients(
    gradient, slot, offsets, coefficient, rows, partial,
    CAPACITY: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, REST: tl.constexpr, PER_CHUNK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Write one latent's gradient."""
    latent = tl.program_id(0)
    begin = tl.load(offsets + latent)
    end = tl.load(offsets + latent + 1)
    head = tl.arange(0, HEAD)
    rest = HEAD + tl.arange(0, REST)
    g_head, g_rest = _sum(slot, coefficient, rows, partial, begin, end, head, rest, CAPACITY, D, PER_CHUNK, AT_ONCE)
    at = latent.to(tl.int64) * D
    tl.store(gradient + at + head, g_head)
    tl.store(gradient + at + rest, g_rest, mask=rest < D)


@no_type_check
@triton.jit
def _sum_chunks(
    slot, offsets, coefficient, rows, partial, d_sae, levels,
    CAPACITY: tl.constexpr, D: tl.constexpr, PER_CHUNK: tl.constexpr, AT_ONCE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sum some columns of one chunk, if all of it is one latent's."""
    chunk = tl.program_id(0)
    begin = chunk * PER_CHUNK
    end = begin + PER_CHUNK
    if end > tl.load(offsets + d_sae):
        return
    # The last latent whose stretch begins at or before the chunk, by bisection: its first entry belongs to it.
    low, high = chunk * 0, chunk * 0 + d_sae - 1
    for _ in range(levels):
        middle = (low + high + 1) // 2
        before = tl.load(offsets + middle) <= begin
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle - 1)
    if tl.load(offsets + low + 1) < end:
        return
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((AT_ONCE, WIDTH), tl.float32)
    for start in range(begin, end, AT_ONCE):
        where = tl.load(slot + start + tl.arange(0, AT_ONCE))
        factor = tl.load(coefficient + where)
        row = rows + (where // CAPACITY).to(tl.int64) * D
        values = tl.load(row[:, None] + column[None, :], mask=column[None, :] < D, other=0.0)
        total += factor[:, None] * values.to(tl.float32)
    tl.store(partial + chunk.to(tl.int64) * D + column, tl.sum(total, axis=0), mask=column < D)


@no_type_check
@triton.jit
def _sum(
    slot, coefficient, rows, partial, begin, end, head, rest,
    CAPACITY: tl.constexpr, D: tl.constexpr, PER_CHUNK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Sum a latent's entries [begin, end): those before and behind its whole chunks, then the chunks' sums."""
    first = (begin + PER_CHUNK - 1) // PER_CHUNK
    beyond = tl.maximum(end // PER_CHUNK, first)
    summed = (beyond - first) * PER_CHUNK
    count = end - begin - summed
    g_head = tl.zeros(head.shape, tl.float32)
    g_rest = tl.zeros(rest.shape, tl.float32)
    for start in range(0, count, AT_ONCE):
        # Written out: the rows' reads are on their way together before the first is added.
        for ahead in tl.static_range(AT_ONCE):
            live = start + ahead < count
            entry = begin + start + ahead
            entry = tl.where(entry >= first * PER_CHUNK, entry + summed, entry)
            where = tl.load(slot + entry, mask=live, other=0)
            factor = tl.load(coefficient + where, mask=live, other=0.0)
            row = rows + (where // CAPACITY).to(tl.int64) * D
            width = tl.where(live, D, 0)
            g_head += factor * tl.load(row + head, mask=head < width, other=0.0).to(tl.float32)
            g_rest += factor * tl.load(row + rest, mask=rest < width, other=0.0).to(tl.float32)
    partial += first.to(tl.int64) * D
    for _ in range(first, beyond):
        g_head += tl.load(partial + head)
        g_rest += tl.load(partial + rest, mask=rest < D, other=0.0)
        partial += D
    return g_head, g_rest
