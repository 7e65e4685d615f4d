"""Random generators by number: one for each pass, bucket and window, so that no state has to be kept for them."""

import hashlib

import torch


def generator(*numbers: int) -> torch.Generator:
    """Give a generator on the CPU whose seed is a hash of these numbers, so that neighbours are unrelated."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
