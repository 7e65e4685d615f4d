"""The fused encoder in Triton: the product, and the decision on its accumulators.

At 65,536 latents this product is more than a third of what a sparse update has to do, and its share grows with the
width.

1. Tiles of 128 rows by 256 latents, the largest whose accumulators two warp groups can hold (128 registers a thread).
   The operands come through tensor descriptors (the bulk copy engine), four steps of 64 ahead. A step reads 48 KB for
   1,024 cycles of tensor core work; half of the tile would ask more of the L2 cache than it gives.
2. One program a multiprocessor takes tile after tile. Neighbours in time share 16 row tiles (9 MB at d 2304) and a few
   latent tiles: x stays in the L2 cache, and the weights are read once for every 2,048 rows.
3. The epilogue writes the accumulators to a scratch tile that stays in the L2 cache, and packs the decisions on them
   into words of 32 latents. Few bits are set, and from there on only they matter: one atomic add on a row's count
   reserves slots for those of a word, and each is stored as 64 bits, the latent above its `pre`, which is read back.
   A prefix sum over the tile, or storing from it directly, would move every accumulator through shared memory several
   times, and spill. No tensor of (batch, d_sae) exists.
4. A second kernel brings what each row has stored into the order of the latents, by counting for each how many are
   smaller: the same bits on every run, in whatever order the tiles reserved their slots.

A count goes on beyond the capacity while nothing is stored there, so a batch with half of its latents active ends too,
though slowly: every active latent is counted.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from scope_lens.training.kernels.bits_triton import ones
from scope_lens.training.kernels.encode import check_room, largest
from scope_lens.training.kernels.entries import Entries
from scope_lens.training.kernels.tiles_triton import INTERPRETED, descriptor, programs, suited


class Tile(NamedTuple):
    """How the product is cut up, and how a tile is worked on.

    Attributes:
        rows: Rows of the batch in a tile.
        latents: Latents in a tile.
        depth: Inner dimension of a step.
        group: Row tiles that are worked on together.
        warps: Warps of a program.
        stages: Steps whose operands are in shared memory at a time.
        programs: Programs on a multiprocessor.
    """

    rows: int
    latents: int
    depth: int
    group: int
    warps: int
    stages: int
    programs: int


_HOPPER = Tile(rows=128, latents=256, depth=64, group=16, warps=8, stages=4, programs=1)
_OTHER = Tile(rows=64, latents=64, depth=64, group=16, warps=4, stages=3, programs=2)
_FLOAT32 = Tile(rows=64, latents=64, depth=16, group=16, warps=4, stages=3, programs=2)

_SLOTS, _OTHERS = 64, 16  # slots that a program of the second kernel places, and those it compares them with at once

_WORD = tl.constexpr(32)  # latents whose decisions share a word


def encode(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    threshold: Float[Tensor, " d_sae"],
    *,
    half_window: float,
    capacity: int,
) -> Entries:
    """`f = pre * (pre > threshold)` with `pre = x @ W_enc^T + b_enc`, as entries: see `encode.encode`."""
    (batch, d_in), d_sae, device = x.shape, len(W_enc), x.device
    counters = torch.zeros(2, batch, dtype=torch.int32, device=device)
    entries = Entries(
        latent=torch.empty(batch, capacity, dtype=torch.int32, device=device),
        pre=torch.empty(batch, capacity, dtype=torch.float32, device=device),
        act=torch.empty(batch, capacity, dtype=torch.float32, device=device),
        count=counters[0],
        l0=counters[1],
    )
    if batch == 0:
        return entries
    tile = tile_for(x)
    found = torch.empty(batch, capacity, dtype=torch.int64, device=device)
    tiles = triton.cdiv(batch, tile.rows) * triton.cdiv(d_sae, tile.latents)
    grid = programs(x, tiles, at_once=tile.programs)
    scratch = torch.empty(*grid, tile.rows, tile.latents, device=device)
    _encode[grid](
        descriptor(x, (tile.rows, tile.depth)), descriptor(W_enc, (tile.latents, tile.depth)), b_enc, threshold,
        entries.count, entries.l0, found, scratch, batch, d_sae, capacity, float(half_window),
        **_settings(tile, d_in, d_sae),
    )  # fmt: skip
    _order[(batch, triton.cdiv(capacity, _SLOTS))](
        found, threshold, entries.latent, entries.pre, entries.act, entries.count, capacity, d_sae, _SLOTS, _OTHERS
    )
    return entries


def topk_encode(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    *,
    k: int,
    floor: Float[Tensor, "1"],
    capacity: int,
) -> Entries:
    """Keep the k largest pre-activations of each row, then ReLU, as entries: see `encode.topk_encode`."""
    check_room(k, capacity)
    threshold = floor.expand(len(W_enc)).contiguous()
    candidates = encode(x, W_enc, b_enc, threshold, half_window=0.0, capacity=capacity)
    return largest(candidates, k=k, d_sae=len(W_enc))


def tile_for(x: Float[Tensor, "batch d_in"]) -> Tile:
    """Give the tile for operands of this dtype on their device."""
    return suited(x, float32=_FLOAT32, hopper=_HOPPER, other=_OTHER)


def _settings(tile: Tile, d_in: int, d_sae: int) -> dict[str, int | bool]:
    """What the product is compiled with."""
    return {
        "D": d_in,
        "ROWS": tile.rows,
        "LATENTS": tile.latents,
        "DEPTH": tile.depth,
        "GROUP": tile.group,
        "RAGGED": d_sae % tile.latents != 0,
        "INTERPRETED": INTERPRETED,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


# Triton's interpreter wants functions defined above those that call them.


@no_type_check
@triton.jit
def _decisions(acc, first_row, first_latent, b_enc, threshold, batch, d_sae, half_window):
    """Words of a row and 32 latents: bit i is set where the i-th of them matters."""
    rows: tl.constexpr = acc.shape[0]
    latents: tl.constexpr = acc.shape[1]
    place = tl.arange(0, latents)
    known = first_latent + place < d_sae
    pre = acc + tl.load(b_enc + first_latent + place, mask=known, other=0.0)[None, :]
    theta = tl.load(threshold + first_latent + place, mask=known, other=float("inf"))[None, :]
    # The difference is negative where pre > threshold: one comparison decides both, and lets NaN through.
    bits = tl.where(~(theta - pre >= half_window), (1 << (place % _WORD))[None, :], 0)
    words = tl.sum(tl.reshape(bits, (rows, latents // _WORD, _WORD)), 2)
    return tl.where((first_row + tl.arange(0, rows) < batch)[:, None], words, 0)


@no_type_check
@triton.jit
def _append(
    acc, scratch, first_row, first_latent, b_enc, threshold, count, l0, found, batch, d_sae, capacity, half_window
):
    """Append what matters in a tile to its rows."""
    rows: tl.constexpr = acc.shape[0]
    latents: tl.constexpr = acc.shape[1]
    row = tl.arange(0, rows)[:, None]
    tl.store(scratch + row * latents + tl.arange(0, latents)[None, :], acc)
    words = _decisions(acc, first_row, first_latent, b_enc, threshold, batch, d_sae, half_window)
    in_word = ones(words)
    row = row + tl.zeros_like(words)
    slot = tl.atomic_add(count + first_row + row, in_word, mask=words != 0, sem="relaxed")
    place = tl.arange(0, latents // _WORD)[None, :] * _WORD
    tl.debug_barrier()  # the scratch tile is read by other threads than wrote it
    for _ in tl.range(0, tl.max(in_word), num_stages=1):
        there = words != 0
        column = place + ones((words & -words) - 1)  # of the lowest bit
        latent = first_latent + column
        pre = tl.load(scratch + row * latents + column, mask=there, other=0.0)
        pre += tl.load(b_enc + latent, mask=there, other=0.0)
        active = there & ~(pre <= tl.load(threshold + latent, mask=there, other=0.0))
        word = (latent.to(tl.int64) << 32) | pre.to(tl.uint32, bitcast=True).to(tl.int64)
        to = found + (first_row + row).to(tl.int64) * capacity + slot
        tl.store(to, word, mask=there & (slot < capacity))
        tl.atomic_add(l0 + first_row + row, 1, mask=active, sem="relaxed")
        slot += 1
        words &= words - 1
    tl.debug_barrier()  # and not overwritten before all of them have read


@no_type_check
@triton.jit
def _encode(
    x, W_enc, b_enc, threshold, count, l0, found, scratch, batch, d_sae, capacity, half_window,
    D: tl.constexpr, ROWS: tl.constexpr, LATENTS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    RAGGED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(batch, ROWS)
    latent_tiles = tl.cdiv(d_sae, LATENTS)
    for tile in range(tl.program_id(0), row_tiles * latent_tiles, tl.num_programs(0)):
        group = tile // (GROUP * latent_tiles)
        in_group = tl.minimum(row_tiles - group * GROUP, GROUP)
        place = tile - group * GROUP * latent_tiles
        first_row = (group * GROUP + place % in_group) * ROWS
        first_latent = place // in_group * LATENTS
        acc = tl.zeros((ROWS, LATENTS), tl.float32)
        for inner in range(0, D, DEPTH):
            a = x.load([first_row, inner])
            b = W_enc.load([first_latent, inner])
            if INTERPRETED:  # whose products of bfloat16 are not to be trusted
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            acc = tl.dot(a, b.T, acc, input_precision="ieee")
        if RAGGED:
            # Silent even where the row holds NaN.
            acc = tl.where((first_latent + tl.arange(0, LATENTS) < d_sae)[None, :], acc, float("-inf"))
        _append(
            acc, scratch + tl.program_id(0) * ROWS * LATENTS, first_row, first_latent, b_enc, threshold, count, l0,
            found, batch, d_sae, capacity, half_window,
        )  # fmt: skip


@no_type_check
@triton.jit
def _order(found, threshold, latent, pre, act, count, capacity, d_sae, SLOTS: tl.constexpr, OTHERS: tl.constexpr):
    """Put each of a row's entries at the place that the number of smaller latents in the row gives it."""
    row = tl.program_id(0).to(tl.int64) * capacity
    first = tl.program_id(1) * SLOTS
    slot = first + tl.arange(0, SLOTS)
    n = tl.minimum(tl.load(count + tl.program_id(0)), capacity)
    there = slot < n
    words = tl.load(found + row + slot, mask=there, other=0)
    which = (words >> 32).to(tl.int32)
    smaller = tl.zeros((SLOTS, OTHERS), tl.int32)
    for begin in range(0, tl.where(first < n, n, 0), OTHERS):
        other = begin + tl.arange(0, OTHERS)
        others = (tl.load(found + row + other, mask=other < n, other=0) >> 32).to(tl.int32)
        smaller += ((others[None, :] < which[:, None]) & (other < n)[None, :]).to(tl.int32)
    place = row + tl.where(there, tl.sum(smaller, 1), slot)
    value = words.to(tl.uint32).to(tl.float32, bitcast=True)
    theta = tl.load(threshold + which, mask=there, other=0.0)
    active = there & ~(value <= theta)
    tl.store(latent + place, tl.where(there, which, d_sae), mask=slot < capacity)
    tl.store(pre + place, tl.where(there, value, 0.0), mask=slot < capacity)
    tl.store(act + place, tl.where(active, value, 0.0), mask=slot < capacity)
