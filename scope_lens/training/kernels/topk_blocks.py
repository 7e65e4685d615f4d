"""The k largest latents of each row, by blocks of latents: exact whatever the batch holds.

The way that TopK takes at the start of a run, and where candidates above a floor were too few or too many
(`topk_encode`), in training and in `SparseCodec`. Only a block's pre-activations are in memory at a time. As there, NaN
counts as active.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scope_lens.training.kernels.entries import Entries


def topk_by_blocks(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    *,
    k: int,
    floor: Float[Tensor, "1"],
    block: int,
    product: Callable[..., Tensor],
) -> tuple[Entries, Int[Tensor, " batch"]]:
    """Keep the k largest pre-activations of each row, then apply ReLU; latents ascending.

    Args:
        x: Encoder inputs, in the dtype of `W_enc`.
        W_enc: Encoder weights, latent by latent.
        b_enc: Biases, float32.
        k: Latents kept.
        floor: From where on `topk_encode` would take candidates.
        block: Latents whose pre-activations are in memory at a time.
        product: `x @ W_enc^T` of operands with a float32 result.

    Returns:
        The entries, k in every row; and each row's number of candidates.
    """
    d_sae = len(W_enc)
    value = torch.empty(len(x), 0, device=x.device)
    latent = torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
    candidates = torch.zeros(len(x), dtype=torch.int32, device=x.device)
    for start in range(0, d_sae, block):
        pre = product(x, W_enc[start : start + block].T) + b_enc[start : start + block]
        candidates += (~(pre <= floor)).sum(1, dtype=torch.int32)
        largest, where = pre.topk(min(k, pre.shape[1]))
        value, latent = torch.cat([value, largest], 1), torch.cat([latent, where + start], 1)
        if value.shape[1] > k:
            value, kept = value.topk(k)
            latent = latent.gather(1, kept)
    latent, order = latent.sort(1)
    value = value.gather(1, order)
    act = value.relu()
    full = torch.full((len(x),), k, dtype=torch.int32, device=x.device)
    return Entries(latent.int(), value, act, full, (act != 0).sum(1, dtype=torch.int32)), candidates
