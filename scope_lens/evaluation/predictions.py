"""Loss and divergence of next-token predictions, a few rows of the vocabulary at a time.

The logits of 8 x 1,024 tokens over 256,000 words are 8 GB in float32. So log-probabilities are made in float32 for a
block of positions, reduced to one number a position, and dropped.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

_BLOCK = 1 << 20  # elements of a block: 4 MB in float32 stays near a CPU's cache
_BLOCK_ON_DEVICE = 1 << 26


def cross_entropy(logits: Float[Tensor, "seq pos vocab"], tokens: Int[Tensor, "seq pos"]) -> Float[Tensor, "seq pos"]:
    """`-log p(next token)` at every position, in nats; the last position has no next token and holds no meaning."""
    targets = tokens.roll(-1, dims=1).flatten()
    flat = logits.flatten(0, 1)
    losses = [
        functional.cross_entropy(_exact(flat[block]), targets[block], reduction="none") for block in _blocks(flat)
    ]
    return torch.cat(losses).view_as(tokens)


def compare(
    clean: Float[Tensor, "seq pos vocab"], other: Float[Tensor, "seq pos vocab"], tokens: Int[Tensor, "seq pos"]
) -> tuple[Float[Tensor, "seq pos"], Float[Tensor, "seq pos"], Float[Tensor, "seq pos"]]:
    """Cross-entropy of both predictions and `KL(clean || other)` at every position, in nats.

    Returns:
        The loss of `clean`, the loss of `other` and the divergence; the last position of the losses holds no meaning.
    """
    targets = tokens.roll(-1, dims=1).flatten()[:, None]
    flat_clean, flat_other = clean.flatten(0, 1), other.flatten(0, 1)
    terms: list[Tensor] = []
    for block in _blocks(flat_clean):
        log_p = functional.log_softmax(_exact(flat_clean[block]), dim=-1)
        log_q = functional.log_softmax(_exact(flat_other[block]), dim=-1)
        losses = [-log.gather(1, targets[block])[:, 0] for log in (log_p, log_q)]
        divergence = torch.sub(log_p, log_q, out=log_q).mul_(log_p.exp_()).sum(-1)
        terms.append(torch.stack([*losses, divergence]))
    ce_clean, ce_other, kl = torch.cat(terms, dim=1).unflatten(1, tokens.shape)
    return ce_clean, ce_other, kl


def _exact(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _blocks(flat: Tensor) -> Iterator[slice]:
    """Slices of positions whose logits fill one block."""
    elements = _BLOCK if flat.device.type == "cpu" else _BLOCK_ON_DEVICE
    size = max(1, elements // flat.shape[1])
    for start in range(0, flat.shape[0], size):
        yield slice(start, start + size)
