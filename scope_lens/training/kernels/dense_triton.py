# pyright: reportMissingParameterType=false
# A kernel's parameters are pointers and numbers of Triton's language, which has no Python types.
"""The dense step's kernels in Triton: two products that take decisions on their accumulators, and two small passes.

Both products are `weights @ rows^T` in tiles, latents down and the batch's rows across:

1. A tile of 128 latents by 256 rows is the largest whose accumulators two warp groups can hold, 128 registers a thread.
   It comes through tensor descriptors (the bulk copy engine), four steps of 64 ahead.
2. One program a multiprocessor takes tile after tile in one flat loop, so that the next tile's operands are on their
   way during the epilogue. Neighbours in time share a few latent tiles and all rows: both stay in the L2 cache.
3. The epilogue works on 32 rows at a time, which keeps it within the registers. With the latents down the tile a thread
   holds two latents and 64 rows: biases and thresholds take four registers, a latent's decisions of 32 rows become one
   word, and sums over the rows stay within four neighbouring threads.
4. Decisions go to memory as bits, an eighth of what f takes. What the counts and slopes add up to follows from the
   bits alone and is a pass of its own.

Sums over the rows go into a buffer with a line for each tile of rows, added up afterwards; L0 is counted by atomic adds
of integers. So the bits are the same on every run. f and d pre are stored latent by latent, for which `product` has no
need of a copy.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from scope_lens.training.kernels.bits_triton import ones
from scope_lens.training.kernels.dense import WORD, DenseActs, product, weighted_rows
from scope_lens.training.kernels.sums import LatentSums
from scope_lens.training.kernels.tiles_triton import INTERPRETED, descriptor, programs, suited

__all__ = ["dense_gradients", "dense_residual", "encode_dense", "product", "weighted_rows"]

_WORD = tl.constexpr(WORD)
_GROUP = tl.constexpr(8)  # tiles of latents that are worked on together


class _Tile(NamedTuple):
    """The shape of a program's tile and how it is run."""

    latents: int
    rows: int
    inner: int
    warps: int
    stages: int


_HOPPER = _Tile(latents=128, rows=256, inner=64, warps=8, stages=4)
_OTHER = _Tile(latents=128, rows=128, inner=32, warps=8, stages=4)
_FLOAT32 = _Tile(latents=64, rows=64, inner=32, warps=8, stages=3)
_COUNTED_LATENTS, _COUNTED_WORDS = 128, 16
_RESIDUAL_WIDTH = 1024


def encode_dense(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "block d_in"],
    b_enc: Float[Tensor, " block"],
    threshold: Float[Tensor, " block"],
    *,
    half_window: float,
) -> DenseActs:
    """`scope_lens.training.kernels.dense.encode_dense` in one kernel."""
    (n_rows, inner), n_latents = x.shape, len(W_enc)
    acts = torch.empty((n_latents, n_rows), dtype=x.dtype, device=x.device)
    active, inside = (
        torch.empty((triton.cdiv(n_rows, WORD), n_latents), dtype=torch.int32, device=x.device) for _ in range(2)
    )
    l0 = torch.zeros(n_rows, dtype=torch.int32, device=x.device)
    tile = _tile_for(x)
    _encode[_grid(x, tile, n_latents, n_rows)](
        descriptor(W_enc, (tile.latents, tile.inner)), descriptor(x, (tile.rows, tile.inner)),
        b_enc, threshold, float(half_window), acts, active, inside, l0,
        n_latents, n_rows, **_launch(tile, n_latents, n_rows, inner),
    )  # fmt: skip
    return DenseActs(acts.T, active, inside, l0)


def dense_residual(
    recons: Float[Tensor, "batch d_out"],
    b_dec: Float[Tensor, " d_out"],
    y: Float[Tensor, "batch d_out"],
    *,
    rows: int,
    operands: torch.dtype,
    skip: Float[Tensor, "batch d_out"] | None = None,
) -> tuple[Float[Tensor, "batch d_out"], Float[Tensor, " batch"]]:
    """`scope_lens.training.kernels.dense.dense_residual` in one pass."""
    n_rows, d_out = recons.shape
    d_recons = torch.empty_like(recons, dtype=operands)
    squared_error = recons.new_empty(n_rows)
    _residual[(n_rows,)](
        recons.contiguous(), b_dec, y.contiguous(), recons if skip is None else skip.contiguous(),
        d_recons, squared_error, 2 / rows, d_out, WIDTH=_RESIDUAL_WIDTH, SKIP=skip is not None,
    )  # fmt: skip
    return d_recons, squared_error


def dense_gradients(
    d_recons: Float[Tensor, "batch d_out"],
    W_dec: Float[Tensor, "block d_out"],
    acts: DenseActs,
    slope: Float[Tensor, " batch"],
) -> tuple[Float[Tensor, "batch block"], LatentSums]:
    """`scope_lens.training.kernels.dense.dense_gradients` in one kernel and a sum over its tiles of rows."""
    (n_rows, inner), n_latents = d_recons.shape, len(W_dec)
    d_pre = torch.empty((n_latents, n_rows), dtype=d_recons.dtype, device=d_recons.device)
    tile = _tile_for(d_recons)
    parts = d_pre.new_empty((triton.cdiv(n_rows, tile.rows), 2, n_latents), dtype=torch.float32)
    _gradients[_grid(d_recons, tile, n_latents, n_rows)](
        descriptor(W_dec, (tile.latents, tile.inner)), descriptor(d_recons, (tile.rows, tile.inner)),
        acts.active, acts.inside, d_pre, parts,
        n_latents, n_rows, **_launch(tile, n_latents, n_rows, inner),
    )  # fmt: skip
    near, total = parts.sum(0)
    return d_pre.T, LatentSums(*_counts(acts, slope), d_act_inside=near, d_pre=total)


def _counts(acts: DenseActs, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`fired`, `inside` and `slope` of the sums, which the bits alone decide."""
    (words, n_latents), n_rows = acts.active.shape, len(slope)
    grid = triton.cdiv(n_latents, _COUNTED_LATENTS), triton.cdiv(words, _COUNTED_WORDS)
    parts = slope.new_empty((grid[1], 3, n_latents))
    _count[grid](
        acts.active, acts.inside, slope, parts, n_latents, n_rows, LATENTS=_COUNTED_LATENTS, WORDS=_COUNTED_WORDS
    )
    fired, inside, slopes = parts.sum(0)
    return fired, inside, slopes


@no_type_check
@triton.jit
def _encode(
    weights, rows, bias, threshold, half_window, acts, active_bits, inside_bits, l0, n_latents, n_rows,
    D: tl.constexpr, LATENTS: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr, RAGGED: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """acts: (n_latents, n_rows). The bits: (words of rows, n_latents). l0: (n_rows,), zero before."""
    tiles = tl.cdiv(n_latents, LATENTS) * tl.cdiv(n_rows, ROWS)
    lane = tl.arange(0, _WORD)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        first_latent, first_row = _corner(tile, n_latents, n_rows, LATENTS, ROWS)
        pre = _tile_product(weights, rows, first_latent, first_row, D, LATENTS, ROWS, INNER, UPCAST)
        latent = first_latent + tl.arange(0, LATENTS)
        known = latent < n_latents
        shift = tl.load(bias + latent, mask=known, other=0.0)[:, None]
        cut = tl.load(threshold + latent, mask=known, other=0.0)[:, None]
        corner = acts + (first_latent.to(tl.int64) * n_rows + first_row)
        at = tl.arange(0, LATENTS)[:, None] * n_rows
        for part in tl.static_range(ROWS // _WORD):
            row = part * _WORD + lane
            there, begun, row_there = None, None, None
            if RAGGED:
                row_there = row < n_rows - first_row
                there = known[:, None] & row_there[None, :]
                begun = latent < tl.where(n_rows - first_row > part * _WORD, n_latents, 0)
            value = _columns(pre, part, ROWS // _WORD) + shift
            active = (value <= cut) == 0  # so that NaN passes
            inside = tl.abs(value - cut) < half_window
            act = tl.where(active, value, 0.0).to(acts.dtype.element_ty)
            word = (first_row // _WORD + part).to(tl.int64) * n_latents
            if RAGGED:
                active, inside = active & there, inside & there
            tl.store(corner + (at + row[None, :]), act, mask=there)
            tl.store(active_bits + word + latent, _word(active, lane), mask=begun)
            tl.store(inside_bits + word + latent, _word(inside, lane), mask=begun)
            tl.atomic_add(l0 + first_row + row, tl.sum(active.to(tl.int32), 0), mask=row_there, sem="relaxed")


@no_type_check
@triton.jit
def _residual(
    recons, bias, target, skip, d_recons, squared_error, scale, width,
    WIDTH: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """One row of each (batch, width) array."""
    row = tl.program_id(0)
    start = row.to(tl.int64) * width
    squares = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, width, WIDTH):
        column = first + tl.arange(0, WIDTH)
        there = column < width
        at = start + column
        value = tl.load(recons + at, mask=there, other=0.0)
        if SKIP:
            value += tl.load(skip + at, mask=there, other=0.0)
        error = value + tl.load(bias + column, mask=there, other=0.0) - tl.load(target + at, mask=there, other=0.0)
        squares += error * error
        tl.store(d_recons + at, (error * scale).to(d_recons.dtype.element_ty), mask=there)
    tl.store(squared_error + row, tl.sum(squares, 0))


@no_type_check
@triton.jit
def _gradients(
    weights, rows, active_bits, inside_bits, d_pre, parts, n_latents, n_rows,
    D: tl.constexpr, LATENTS: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr, RAGGED: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """d_pre: (n_latents, n_rows). The bits: (words of rows, n_latents). parts: (tiles of rows, 2, n_latents)."""
    tiles = tl.cdiv(n_latents, LATENTS) * tl.cdiv(n_rows, ROWS)
    lane = tl.arange(0, _WORD)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        first_latent, first_row = _corner(tile, n_latents, n_rows, LATENTS, ROWS)
        d_act = _tile_product(weights, rows, first_latent, first_row, D, LATENTS, ROWS, INNER, UPCAST)
        latent = first_latent + tl.arange(0, LATENTS)
        known = latent < n_latents
        corner = d_pre + (first_latent.to(tl.int64) * n_rows + first_row)
        at = tl.arange(0, LATENTS)[:, None] * n_rows
        both = tl.zeros((LATENTS, 2), tl.float32)
        for part in tl.static_range(ROWS // _WORD):
            row = part * _WORD + lane
            word = (first_row // _WORD + part).to(tl.int64) * n_latents
            there, begun = None, None
            if RAGGED:
                there = known[:, None] & (row < n_rows - first_row)[None, :]
                begun = latent < tl.where(n_rows - first_row > part * _WORD, n_latents, 0)
            active = _bits(tl.load(active_bits + word + latent, mask=begun), lane)
            inside = _bits(tl.load(inside_bits + word + latent, mask=begun), lane)
            if RAGGED:
                active, inside = active & there, inside & there
            value = _columns(d_act, part, ROWS // _WORD)
            d_active = tl.where(active, value, 0.0)
            # One sum of pairs: of two sums, the compiler puts off the additions until it runs out of registers.
            both += tl.sum(tl.join(tl.where(inside, value, 0.0), d_active), 1)
            tl.store(corner + (at + row[None, :]), d_active.to(d_pre.dtype.element_ty), mask=there)
        line = parts + (first_row // ROWS).to(tl.int64) * 2 * n_latents + latent
        near, total = tl.split(both)
        tl.store(line, near, mask=known)
        tl.store(line + n_latents, total, mask=known)


@no_type_check
@triton.jit
def _count(
    active_bits, inside_bits, slope, parts, n_latents, n_rows,
    LATENTS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """parts: (stretches of WORDS words, 3, n_latents)."""
    latent = tl.program_id(0) * LATENTS + tl.arange(0, LATENTS)
    known = latent < n_latents
    lane = tl.arange(0, _WORD)
    fired, within = tl.zeros((LATENTS,), tl.int32), tl.zeros((LATENTS,), tl.int32)
    slopes = tl.zeros((LATENTS, _WORD), tl.float32)
    for step in range(WORDS):
        word = tl.program_id(1) * WORDS + step
        row = word * _WORD + lane
        begun = latent < tl.where(n_rows > word * _WORD, n_latents, 0)
        at = word.to(tl.int64) * n_latents + latent
        inside = tl.load(inside_bits + at, mask=begun, other=0)
        fired += ones(tl.load(active_bits + at, mask=begun, other=0))
        within += ones(inside)
        slopes += tl.where(_bits(inside, lane), tl.load(slope + row, mask=row < n_rows, other=0.0)[None, :], 0.0)
    line = parts + tl.program_id(1).to(tl.int64) * 3 * n_latents + latent
    tl.store(line, fired.to(tl.float32), mask=known)
    tl.store(line + n_latents, within.to(tl.float32), mask=known)
    tl.store(line + 2 * n_latents, tl.sum(slopes, 1), mask=known)


@no_type_check
@triton.jit
def _word(mask, lane):
    """One word for each latent from (latents, rows): the sum of its bits."""
    return tl.sum(tl.where(mask, (1 << lane)[None, :], 0), 1)


@no_type_check
@triton.jit
def _bits(word, lane):
    """(latents, rows) of a word's bits as a mask."""
    return (word[:, None] << (31 - lane)[None, :]) < 0


@no_type_check
@triton.jit
def _columns(tile, part: tl.constexpr, PARTS: tl.constexpr):
    """Part number `part` of PARTS equal parts of a tile's columns, a power of two, within the registers."""
    if PARTS > 1:
        left, right = tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))
        tile = _columns(left, part, PARTS // 2) if part < PARTS // 2 else _columns(right, part - PARTS // 2, PARTS // 2)
    return tile


@no_type_check
@triton.jit
def _corner(program, n_latents, n_rows, LATENTS: tl.constexpr, ROWS: tl.constexpr):
    """First latent and first row of this program's tile."""
    latent_tiles, row_tiles = tl.cdiv(n_latents, LATENTS), tl.cdiv(n_rows, ROWS)
    group = program // (_GROUP * row_tiles)
    size = tl.minimum(latent_tiles - group * _GROUP, _GROUP)
    within = program - group * _GROUP * row_tiles
    return (group * _GROUP + within % size) * LATENTS, (within // size) * ROWS


@no_type_check
@triton.jit
def _tile_product(
    weights, rows, first_latent, first_row, D: tl.constexpr,
    LATENTS: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(LATENTS, ROWS) of `weights @ rows^T`, zero beyond the edges."""
    total = tl.zeros((LATENTS, ROWS), tl.float32)
    for start in range(0, D, INNER):
        a, b = weights.load([first_latent, start]), rows.load([first_row, start])
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b.T, total, input_precision="ieee")
    return total


# The interpreter multiplies the bits of bfloat16 as integers; in float32 it is right.
def _tile_for(operand: Tensor) -> _Tile:
    return suited(operand, float32=_FLOAT32, hopper=_HOPPER, other=_OTHER)


def _grid(operand: Tensor, tile: _Tile, n_latents: int, n_rows: int) -> tuple[int]:
    return programs(operand, triton.cdiv(n_latents, tile.latents) * triton.cdiv(n_rows, tile.rows))


def _launch(tile: _Tile, n_latents: int, n_rows: int, inner: int) -> dict[str, int | bool]:
    """The settings that both kernels are compiled with."""
    return {
        "LATENTS": tile.latents,
        "ROWS": tile.rows,
        "INNER": tile.inner,
        "D": inner,
        "RAGGED": n_latents % tile.latents != 0 or n_rows % tile.rows != 0,
        "UPCAST": INTERPRETED,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
