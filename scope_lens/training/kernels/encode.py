"""The encoder, straight to the entries that matter: twin of `encode_triton`.

1. Pre-activations in float32: `pre = x @ W_enc^T + b_enc`. Operands may be bfloat16; nothing is rounded afterwards.
2. The decision: an entry matters where the latent is active, `pre > threshold`, or where it is inside the window of
   the straight-through estimator, `|pre - threshold| < half_window`. NaN matters, so that it reaches the loss.
3. Those entries, row by row, up to a capacity (`scope_lens.training.kernels.entries.Entries`).

Source: JumpReLU SAEs (arXiv 2407.14435), section 3.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from scope_lens.training.kernels.entries import Entries


def encode(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    threshold: Float[Tensor, " d_sae"],
    *,
    half_window: float,
    capacity: int,
) -> Entries:
    """`f = pre * (pre > threshold)` with `pre = x @ W_enc^T + b_enc`, as entries.

    Args:
        x: Encoder inputs, bfloat16 or float32.
        W_enc: Encoder weights, latent by latent, in the dtype of `x`.
        b_enc: Biases, float32.
        threshold: Thresholds, float32.
        half_window: Half the width of the estimator's window; with 0 only active latents matter.
        capacity: Entries that a row has room for. `Entries.count` says where that was too few.
    """
    pre = x.float() @ W_enc.float().T + b_enc
    active = ~(pre <= threshold)
    inside = (pre - threshold).abs() < half_window
    return _entries(pre, active | inside, active=active, capacity=capacity)


def topk_encode(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    *,
    k: int,
    floor: Float[Tensor, "1"],
    capacity: int,
) -> Entries:
    """Keep the k largest pre-activations of each row, then ReLU, as entries with k columns.

    The fused kernel cannot see a whole row, so it takes the k largest among the candidates above `floor`, and so does
    its twin. `Entries.count` counts the candidates: a row with fewer than k of them, or more than the capacity, is
    wrong, and has to be encoded again with another floor.

    Args:
        x: Encoder inputs, bfloat16 or float32.
        W_enc: Encoder weights, latent by latent, in the dtype of `x`.
        b_enc: Biases, float32.
        k: Latents kept of each row.
        floor: What a candidate has to exceed; NaN does.
        capacity: Candidates that a row has room for, at least k.

    Raises:
        ValueError: Less room than k.
    """
    check_room(k, capacity)
    pre = x.float() @ W_enc.float().T + b_enc
    above = ~(pre <= floor)
    return largest(_entries(pre, above, active=above, capacity=capacity), k=k, d_sae=len(W_enc))


def check_room(k: int, capacity: int) -> None:
    """Refuse a capacity that cannot hold k latents.

    Raises:
        ValueError: Less room than k.
    """
    if not 1 <= k <= capacity:
        raise ValueError(
            f"topk_encode keeps k={k} latents out of at most capacity={capacity} candidates a row; pass k >= 1 and a "
            "capacity of at least k, better several times k."
        )


def largest(candidates: Entries, *, k: int, d_sae: int) -> Entries:
    """Keep each row's k largest candidates, as `torch.topk` picks them, and apply ReLU; counts stay those of all.

    Args:
        candidates: Entries of which `pre` alone is read, and `latent`.
        k: Entries kept, at most the candidates' capacity.
        d_sae: The latent that marks padding.
    """
    ranked = candidates.pre.masked_fill(candidates.latent == d_sae, -torch.inf)
    # Latents ascend with the slots, and the padding comes last.
    slot = ranked.topk(k, dim=1).indices.sort(dim=1).values
    latent, pre = candidates.latent.gather(1, slot), candidates.pre.gather(1, slot)
    act = torch.relu(pre)
    return Entries(latent, pre, act, candidates.count, (act != 0).sum(1, dtype=torch.int32))


def _entries(
    pre: Float[Tensor, "batch d_sae"],
    matters: Bool[Tensor, "batch d_sae"],
    *,
    active: Bool[Tensor, "batch d_sae"],
    capacity: int,
) -> Entries:
    (batch, d_sae), device = pre.shape, pre.device
    count = matters.sum(1)
    row, latent = matters.nonzero(as_tuple=True)
    slot = torch.arange(len(row), device=device) - (count.cumsum(0) - count)[row]
    fits = slot < capacity
    row, latent, slot = row[fits], latent[fits], slot[fits]
    found = pre[row, latent]
    where = (row, slot)
    empty = pre.new_zeros(batch, capacity)
    return Entries(
        latent=torch.full_like(empty, d_sae, dtype=torch.int32).index_put(where, latent.int()),
        pre=empty.index_put(where, found),
        act=empty.index_put(where, torch.where(active[row, latent], found, 0.0)),
        count=count.int(),
        l0=active.sum(1, dtype=torch.int32),
    )
