"""The entries of a batch that matter, active or inside the estimator's window, and their order by latents.

A trained dictionary has some hundred of them in a row of tens of thousands of latents, and every gradient of the step
is a sum over them alone (`scope_lens.training.jumprelu_step` has the formulas). They are kept in two orders:

1. `Entries`: row by row, latents ascending, padded to a capacity, so that the shapes do not depend on the data. Sums
   over a row's entries (reconstruction, L0) read one line.
2. `Columns`: a permutation of the same slots, latent by latent, rows ascending. Sums over a latent's entries (its
   weights' gradients, its threshold's) read one stretch. No sum needs atomics, so the bits are the same on every run.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Entries(NamedTuple):
    """Entries (row, latent) that matter, row by row, padded to a capacity.

    Attributes:
        latent: int32, ascending within a row; d_sae in the padding.
        pre: float32 pre-activation; 0 in the padding.
        act: float32; `pre` where the latent is active, 0 elsewhere and in the padding.
        count: int32, entries of the row that matter, also where there are more than the capacity. The row has then
            overflowed: its slots hold some of them, and nobody knows which.
        l0: int32, active latents of the row, right also where it has overflowed.
    """

    latent: Int[Tensor, "batch capacity"]
    pre: Float[Tensor, "batch capacity"]
    act: Float[Tensor, "batch capacity"]
    count: Int[Tensor, " batch"]  # pyright: ignore[reportIncompatibleMethodOverride]
    l0: Int[Tensor, " batch"]


class Columns(NamedTuple):
    """The same entries in the order of the latents, each one's rows ascending.

    Attributes:
        slot: int32, flat index into the (batch, capacity) arrays of `Entries`, so row = slot // capacity. It is
            batch * capacity long; the slots of the padding stand behind `offsets[-1]`.
        offsets: int32, where each latent's stretch of `slot` begins, and at the end where the last one ends.
    """

    slot: Int[Tensor, " entry"]
    offsets: Int[Tensor, " d_sae_plus_1"]


def columns_of(entries: Entries, d_sae: int) -> Columns:
    """Bring the entries into the order of the latents, by a stable sort: no shape depends on the data.

    Args:
        entries: The entries of a batch.
        d_sae: Number of latents; the latent that marks the padding.
    """
    latent, slot = torch.sort(entries.latent.flatten(), stable=True)
    bounds = torch.arange(d_sae + 1, dtype=latent.dtype, device=latent.device)
    return Columns(slot.int(), torch.searchsorted(latent, bounds, out_int32=True))
