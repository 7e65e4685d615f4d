"""Dense or sparse: how the next batch is worked through, decided from what earlier batches measured.

A dense step multiplies whole matrices; a sparse one gathers rows of weights for the entries that matter. The first is
bound by arithmetic, the second by memory, so which is faster depends on how many entries of a row matter and on how
many latents there are. Training starts with half of all latents active, where only the dense way is possible, and ends
with some hundred.

The numbers come from batches that are some updates back, because nobody waits for the device. The host may look
earlier, for a report or a checkpoint; what it learns then counts from the same update on, so that a run takes the same
decisions whenever it is looked at, broken off and taken up again. A batch that has more entries than the capacity
chosen here is done again densely, and so is a TopK batch whose candidates were too few.
"""

from collections import deque
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

# Where this share of the latents matters, a sparse step's four gathers of a row of bfloat16 weights for each entry, at
# 60 % of 4.3 TB/s, take as long as the four products that a dense step has beside the encoder's, at 90 % of
# 790 TFLOP/s: rates that H200s were seen to reach. A guess on other cards.
BREAK_EVEN = 0.0036
_BACK = 1.25  # times the break-even before a sparse run goes back, so that it does not change to and fro
_ROOM = 1.25  # capacity over the largest row seen
_LEAST, _MOST = 32, 1_024  # capacities


class Choice(NamedTuple):
    """How a batch is worked through.

    Attributes:
        sparse: Whether over the entries that matter alone.
        capacity: Room for such entries in each row.
    """

    sparse: bool
    capacity: int


class _Seen(NamedTuple):
    """What an update measured."""

    step: int
    most: int
    mean: float
    halted: bool


class Dispatcher:
    """Chooses for each update.

    Args:
        d_sae: Number of latents.
        lag: Updates after which a measurement counts.
        break_even: Share of the latents that matter in a row at which both ways take equally long.
    """

    def __init__(self, d_sae: int, *, lag: int, break_even: float = BREAK_EVEN) -> None:
        self._lag, self._d_sae = lag, d_sae
        self._limit = break_even * d_sae
        self._widest = min(_MOST, d_sae)
        self._choice = Choice(sparse=False, capacity=self._widest)
        self._dense_until = -1
        self._seen: deque[_Seen] = deque()

    def choose(self, step: int) -> Choice:
        """Say how update `step` is worked through; asked for in the order of the updates."""
        while self._seen and self._seen[0].step <= step - self._lag:
            self._learn(self._seen.popleft())
        return self._choice._replace(sparse=False) if step <= self._dense_until else self._choice

    def observe(self, step: int, *, most: int, mean: float, halted: bool) -> None:
        """Take in what update `step` measured.

        Args:
            step: The update, in ascending order.
            most: Entries that matter in the row that has most of them.
            mean: Entries that matter in a row.
            halted: Whether a row's entries were not all found. The update is made again densely, as are those that may
                have been launched since.
        """
        self._seen.append(_Seen(step, most, mean, halted))
        if halted:
            self._dense_until = step + self._lag

    def state(self) -> Float[Tensor, "entry 4"]:
        """Give what later choices depend on, as numbers."""
        own = (self._dense_until, self._choice.capacity, self._d_sae, float(self._choice.sparse))
        return torch.tensor([own, *self._seen], dtype=torch.float64)

    def load_state(self, state: Float[Tensor, "entry 4"]) -> None:
        """Take up what `state` gave; nothing of it counts where it is of another number of latents, on other ranks."""
        (until, capacity, d_sae, sparse), *seen = state.tolist()
        if d_sae != self._d_sae:
            return
        self._dense_until, self._choice = int(until), Choice(bool(sparse), int(capacity))
        self._seen = deque(_Seen(int(step), int(most), mean, bool(halted)) for step, most, mean, halted in seen)

    def _learn(self, seen: _Seen) -> None:
        needed = _LEAST
        while needed < _ROOM * seen.most:
            needed *= 2
        limit = self._limit * (_BACK if self._choice.sparse else 1)
        self._choice = Choice(
            sparse=seen.mean <= limit and seen.most <= self._widest, capacity=min(needed, self._widest)
        )
