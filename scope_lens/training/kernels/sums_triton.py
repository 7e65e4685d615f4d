# pyright: reportMissingParameterType=false
# A kernel's parameters are pointers and numbers of Triton's language, which has no Python types.
"""The kernel of `sums.py` in Triton.

1. A program takes some neighbouring latents and the first 32 entries of each at once: at 65k latents and L0 80 a
   latent has five on average in a batch of 4,096.
2. A latent that has more is finished alone, 1,024 entries at a time: one that is active in every row takes four turns,
   so it is no long tail.

Sums run over lanes and turns in a fixed order, without atomics: the same bits on every run.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from scope_lens.training.kernels.entries import Columns, Entries
from scope_lens.training.kernels.sums import LatentSums

_SIZES = {
    "LATENTS": 16,  # of a program
    "NARROW": 32,  # entries of each of them at once
    "WIDE": 1024,  # further entries of one latent at once
}


def latent_sums(
    entries: Entries,
    d_act: Float[Tensor, "batch capacity"],
    columns: Columns,
    threshold: Float[Tensor, " d_sae"] | None,
    slope: Float[Tensor, " batch"],
    *,
    half_window: float,
) -> LatentSums:
    """Sum over each latent's entries: see `sums.latent_sums`."""
    assert all(values.is_contiguous() for values in (entries.pre, entries.act, d_act))
    d_sae = len(columns.offsets) - 1
    sums = torch.empty(5, d_sae, dtype=torch.float32, device=d_act.device)
    _latent_sums[(triton.cdiv(d_sae, _SIZES["LATENTS"]),)](
        columns.slot, columns.offsets, entries.pre, entries.act, d_act, threshold, slope, sums,
        half_window, d_sae, entries.latent.shape[1], **_SIZES,
    )  # fmt: skip
    return LatentSums(*sums)


@no_type_check
@triton.jit
def _summands(slot, at, end, pre, act, d_act, theta, slope, half_window, capacity):
    """What the entries at the positions `at` add to the five sums: 0 from `end` on."""
    there = at < end
    where = tl.load(slot + at, mask=there, other=0)
    gradient = tl.load(d_act + where, mask=there, other=0.0)
    active = there & (tl.load(act + where, mask=there, other=0.0) != 0)
    if theta is None:
        inside = there & (where < 0)
    else:
        inside = there & (tl.abs(tl.load(pre + where, mask=there, other=0.0) - theta) < half_window)
    price = tl.load(slope + where // capacity, mask=inside, other=0.0)
    return (
        active.to(tl.float32),
        inside.to(tl.float32),
        price,
        tl.where(inside, gradient, 0.0),
        tl.where(active, gradient, 0.0),
    )


@no_type_check
@triton.jit
def _latent_sums(
    slot, offsets, pre, act, d_act, threshold, slope, sums, half_window, d_sae, capacity,
    LATENTS: tl.constexpr, NARROW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * LATENTS
    lane = tl.arange(0, LATENTS * NARROW)
    latent = first + lane // NARROW
    begin = tl.load(offsets + latent, mask=latent < d_sae, other=0)
    end = tl.load(offsets + latent + 1, mask=latent < d_sae, other=0)
    theta = None
    if threshold is not None:
        theta = tl.load(threshold + latent, mask=latent < d_sae, other=0.0)
    fired, inside, price, d_inside, d_pre = _summands(
        slot, begin + lane % NARROW, end, pre, act, d_act, theta, slope, half_window, capacity
    )
    fired = tl.sum(tl.reshape(fired, (LATENTS, NARROW)), axis=1)
    inside = tl.sum(tl.reshape(inside, (LATENTS, NARROW)), axis=1)
    price = tl.sum(tl.reshape(price, (LATENTS, NARROW)), axis=1)
    d_inside = tl.sum(tl.reshape(d_inside, (LATENTS, NARROW)), axis=1)
    d_pre = tl.sum(tl.reshape(d_pre, (LATENTS, NARROW)), axis=1)

    if tl.max(end - begin, axis=0) > NARROW:
        for which in range(tl.minimum(LATENTS, d_sae - first)):
            mine = tl.arange(0, LATENTS) == which
            start = tl.load(offsets + first + which) + NARROW
            stop = tl.load(offsets + first + which + 1)
            own_theta = None
            if threshold is not None:
                own_theta = tl.load(threshold + first + which)
            for position in range(start, stop, WIDE):
                at = position + tl.arange(0, WIDE)
                more = _summands(slot, at, stop, pre, act, d_act, own_theta, slope, half_window, capacity)
                fired += tl.where(mine, tl.sum(more[0], axis=0), 0.0)
                inside += tl.where(mine, tl.sum(more[1], axis=0), 0.0)
                price += tl.where(mine, tl.sum(more[2], axis=0), 0.0)
                d_inside += tl.where(mine, tl.sum(more[3], axis=0), 0.0)
                d_pre += tl.where(mine, tl.sum(more[4], axis=0), 0.0)

    own = first + tl.arange(0, LATENTS)
    tl.store(sums + own, fired, mask=own < d_sae)
    tl.store(sums + d_sae + own, inside, mask=own < d_sae)
    tl.store(sums + 2 * d_sae + own, price, mask=own < d_sae)
    tl.store(sums + 3 * d_sae + own, d_inside, mask=own < d_sae)
    tl.store(sums + 4 * d_sae + own, d_pre, mask=own < d_sae)
