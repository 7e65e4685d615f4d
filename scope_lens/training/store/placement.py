"""Which row of a store each kept position becomes: shuffled in buckets.

Rows are shuffled in buckets of 2^20 before they are written (Gemma Scope, arXiv 2408.05147, section 3.1: "buckets of
about 10^6 activations"), so that a reader can take long runs of rows at a time. Every row has its number before the
first forward: a harvest that is taken up again puts each row where an unbroken one would have put it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from scope_lens.training.store.seeds import generator

BUCKET_ROWS = 1 << 20


class Piece(NamedTuple):
    """Consecutive rows of a harvest that go into one bucket.

    Attributes:
        bucket: Which one.
        rows: Where they stand among the rows given.
        slots: Their numbers in the bucket.
        ends: Whether the bucket is full with them.
    """

    bucket: int
    rows: slice
    slots: Int[Tensor, " row"]
    ends: bool


class Placement:
    """Row numbers of a store.

    Args:
        rows: Rows of the store.
        seed: Of the order.
    """

    def __init__(self, rows: int, *, seed: int) -> None:
        self._rows, self._seed = rows, seed
        self._latest: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.long))

    def span(self, bucket: int) -> tuple[int, int]:
        """Give the first row of a bucket, and the first behind it."""
        return bucket * BUCKET_ROWS, min((bucket + 1) * BUCKET_ROWS, self._rows)

    def pieces(self, first: int, n: int) -> Iterator[Piece]:
        """Place the rows number `first` to `first + n` of the harvest."""
        at = first
        while at < first + n:
            bucket = at // BUCKET_ROWS
            begin, end = self.span(bucket)
            stop = min(first + n, end)
            slots = self._order(bucket)[at - begin : stop - begin]
            yield Piece(bucket=bucket, rows=slice(at - first, stop - first), slots=slots, ends=stop == end)
            at = stop

    def _order(self, bucket: int) -> Int[Tensor, " slot"]:
        if self._latest[0] != bucket:
            begin, end = self.span(bucket)
            self._latest = (bucket, torch.randperm(end - begin, generator=generator(self._seed, bucket)))
        return self._latest[1]
