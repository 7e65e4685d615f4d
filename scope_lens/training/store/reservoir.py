"""A preallocated buffer of rows that is shuffled while it is filled and consumed.

All rows lie in slots of tensors that are allocated once. The slot numbers stand in a ring:

    [ to be served ... | refilled since the shuffle ... | free ... ]

1. `draw` takes the next slots of the ring; they are free from then on.
2. `put` writes new rows into free slots, in place; they wait for the next shuffle.
3. When half of the rows of a round are served, `shuffle` puts the slots that hold rows in a random order again. A row
   so stays for two rounds on average, and one permutation is drawn for many batches.

Nothing is moved, joined or reallocated, so memory is that of the tensors and of one number a slot.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scope_lens.training.store.transfer import put_rows, take_rows


class Reservoir:
    """Slots for rows of several sites and for their places in the text.

    Args:
        widths: Width of each site.
        rows: Number of slots.
        dtype: Of the rows.
        device: Where they lie.
    """

    def __init__(self, widths: Mapping[str, int], *, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows = rows
        self.arrays = {site: torch.empty(rows, width, dtype=dtype, device=device) for site, width in widths.items()}
        self._places = torch.empty(rows, dtype=torch.long)
        self._ring = torch.arange(rows, dtype=torch.int32)
        self._served, self._of_round, self._held_until = 0, 0, 0
        self._generator = torch.Generator()

    @property
    def held(self) -> int:
        """Rows in the reservoir."""
        return self._held_until - self._served

    @property
    def room(self) -> int:
        """Free slots."""
        return self.rows - self.held

    def seed(self, generator: torch.Generator) -> None:
        """Shuffle by this generator from now on."""
        self._generator = generator

    def put(self, rows: Mapping[str, Float[Tensor, "row _"]], places: Int[Tensor, " row"]) -> None:
        """Write rows into free slots; there must be room for them."""
        n = len(places)
        assert n <= self.room
        slots = self._slots(self._held_until, n)
        self._places[slots] = places
        for site, array in self.arrays.items():
            put_rows(array, slots, rows[site])
        self._held_until += n

    def spent(self, size: int) -> bool:
        """Whether a shuffle is due before the next batch."""
        return self._served + size > max(self._of_round // 2, min(size, self._of_round))

    def shuffle(self) -> None:
        """Begin a round: put the slots that hold rows in a random order."""
        held = self.held
        ring = self._ring.roll(-self._served)
        ring[:held] = ring[torch.randperm(held, generator=self._generator)]
        self._ring, self._served, self._of_round, self._held_until = ring, 0, held, held

    def draw(self, out: Mapping[str, Float[Tensor, "size _"]], size: int) -> Int[Tensor, " size"]:
        """Take the next rows of the round: write those of each site, and give their places; no shuffle may be due."""
        assert self._served + size <= self._of_round
        slots = self._slots(self._served, size)
        self._served += size
        for site, rows in out.items():
            take_rows(self.arrays[site], slots, out=rows)
        return self._places[slots]

    def state(self) -> dict[str, Tensor]:
        """Give everything, rows included; the large tensors are the live ones."""
        counters = torch.tensor([self._served, self._of_round, self._held_until])
        rows = {f"rows.{site}": array for site, array in self.arrays.items()}
        return rows | {
            "places": self._places,
            "ring": self._ring,
            "counters": counters,
            "generator": self._generator.get_state(),
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave, in place.

        Raises:
            ValueError: It is of a reservoir of other sites or of another size.
        """
        for site, array in self.arrays.items():
            saved = state.get(f"rows.{site}")
            if saved is None or saved.shape != array.shape or saved.dtype != array.dtype:
                found = "none" if saved is None else f"{tuple(saved.shape)} in {saved.dtype}"
                raise ValueError(
                    f"The saved state holds {found} for {site!r}, this stream {tuple(array.shape)} in {array.dtype}. "
                    "Make the stream with the sites, rows and dtype that the state was saved with."
                )
            array.copy_(saved)
        self._places.copy_(state["places"])
        self._ring = state["ring"].clone()
        self._served, self._of_round, self._held_until = state["counters"].tolist()
        self._generator.set_state(state["generator"])

    def _slots(self, first: int, n: int) -> Int[Tensor, " n"]:
        """Slot numbers from ring position `first` on, around its end."""
        first %= self.rows
        end = first + n
        if end <= self.rows:
            return self._ring[first:end].long()
        return torch.cat([self._ring[first:], self._ring[: end - self.rows]]).long()
