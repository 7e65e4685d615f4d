"""Rows of a store in shuffled batches, pass after pass.

A store's rows were shuffled in buckets when they were harvested. A reader mixes them across the whole store and reads
long runs only:

1. The store is cut into blocks of 4,096 consecutive rows; each pass takes the blocks in an order of its own.
2. Sixteen blocks (fewer where the rows are very wide) make a window, whose rows are shuffled.
3. Batches are cut from the windows one after the other. The next window is read from disk while one is consumed.

So a store of up to 65,536 rows is shuffled as a whole, and in a larger one each batch holds rows from all over the
store. The order follows from the seed, the number of the pass and the store, never from the sites that are read:
readers of one site and of many give the same rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scope_lens.training.store.corpus import Origin
from scope_lens.training.store.seeds import generator
from scope_lens.training.store.windows import Rows, Window
from scope_lens.training.store.zarr_rows import CHUNK_ROWS

_WINDOW_BLOCKS = 16
_WINDOW_BYTES = 1 << 30  # of all sites of the store, more or less


def by_site(names: Mapping[str, str], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Key a batch by the store's sites instead of the names they were asked for."""
    return {site: batch[name] for name, site in names.items()}


@runtime_checkable
class RowReader(Protocol):
    """Endless batches of rows at some sites, row i of each site from the same token."""

    def next(self, into: Mapping[str, Float[Tensor, "size _"]] | None = None) -> dict[str, Float[Tensor, "size _"]]:
        """Give the next batch in float32, by the names the sites were asked for.

        Args:
            into: A batch that is no longer needed, to be overwritten; None makes new tensors.
        """
        ...

    def origin(self) -> Origin:
        """Say where the rows of the last batch came from."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Give all that `load_state` needs to go on from here, bit for bit."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where another reader of the same store, size and seed stood."""
        ...


@runtime_checkable
class Source(Protocol):
    """What a store reads its rows from."""

    def reader(self, names: Mapping[str, str], *, size: int, seed: int) -> RowReader:
        """Read batches without end; `names` gives each site by the name it is asked for."""
        ...

    def one_pass(self, names: Mapping[str, str], *, size: int, seed: int) -> Iterator[dict[str, Float[Tensor, "_ _"]]]:
        """Read the rows of one pass, once each."""
        ...

    def population(self) -> Origin:
        """Say where the rows of one pass come from."""
        ...


class _Open(NamedTuple):
    """A window that is being consumed.

    Attributes:
        first: Number of its first row in the pass.
        order: Its rows, shuffled.
        numbers: Their numbers in the store.
        window: Its rows.
    """

    first: int
    order: Int[Tensor, " row"]
    numbers: Int[Tensor, " row"]
    window: Window


class Pass:
    """One pass over a store, to be read from front to back.

    Args:
        rows: Where the rows lie.
        total: How many there are.
        sites: What is read.
        seed: Of all passes.
        number: Which pass.
        row_bytes: Of a row of all sites of the store.
        spare: Memory of windows that were closed; taken from and added to.
    """

    def __init__(
        self,
        rows: Rows,
        total: int,
        *,
        sites: Sequence[str],
        seed: int,
        number: int,
        row_bytes: int,
        spare: list[dict[str, Tensor]],
    ) -> None:
        self.number = number
        self._rows, self._sites, self._spare = rows, sites, spare
        self._seed = (seed, number)
        blocks = [(first, min(first + CHUNK_ROWS, total)) for first in range(0, total, CHUNK_ROWS)]
        order = torch.randperm(len(blocks), generator=generator(*self._seed))
        shuffled = [blocks[i] for i in order.tolist()]
        size = max(2, min(_WINDOW_BLOCKS, _WINDOW_BYTES // (row_bytes * CHUNK_ROWS)))
        self._spans = [tuple(shuffled[i : i + size]) for i in range(0, len(shuffled), size)]
        sizes = torch.tensor([sum(end - first for first, end in spans) for spans in self._spans])
        self._ends = sizes.cumsum(0).tolist()
        self._open: dict[int, _Open] = {}

    def take(self, start: int, end: int, *, out: Mapping[str, Float[Tensor, "row _"]]) -> Int[Tensor, " row"]:
        """Write the rows number `start` to `end` of the pass into `out`, and give their numbers in the store."""
        numbers: list[Tensor] = []
        index = next(i for i, stop in enumerate(self._ends) if start < stop)
        at = start
        while at < end:
            opened = self._window(index)
            stop = min(end, self._ends[index])
            part = slice(at - opened.first, stop - opened.first)
            opened.window.take(
                opened.order[part], {site: rows[at - start : stop - start] for site, rows in out.items()}
            )
            numbers.append(opened.numbers[part])
            at, index = stop, index + 1
        return torch.cat(numbers)

    def close(self) -> None:
        """Give back the memory of the windows that are open."""
        for number in list(self._open):
            self._spare.append(self._open.pop(number).window.close())

    def _window(self, index: int) -> _Open:
        for number in [number for number in self._open if number < index]:
            self._spare.append(self._open.pop(number).window.close())
        for number in (index, index + 1):
            if number not in self._open and number < len(self._spans):
                first, spans = (self._ends[number - 1] if number else 0), self._spans[number]
                order = torch.randperm(self._ends[number] - first, generator=generator(*self._seed, number))
                self._open[number] = _Open(
                    first=first,
                    order=order,
                    numbers=torch.cat([torch.arange(begin, end) for begin, end in spans])[order],
                    window=self._rows.window(self._sites, spans, spare=self._spare.pop() if self._spare else None),
                )
        return self._open[index]


class Finished:
    """A store whose rows are all there.

    Args:
        rows: Where they lie.
        total: How many there are.
        row_bytes: Of a row of all sites.
    """

    def __init__(self, rows: Rows, *, total: int, row_bytes: int) -> None:
        self._rows, self.total, self._row_bytes = rows, total, row_bytes

    def reader(self, names: Mapping[str, str], *, size: int, seed: int) -> RowReader:
        """Read batches without end, partial ones left out."""
        return _PassReader(self, names, size=size, seed=seed)

    def one_pass(self, names: Mapping[str, str], *, size: int, seed: int) -> Iterator[dict[str, Float[Tensor, "_ _"]]]:
        """Read every row once; the last batch may have fewer."""
        rows = self.begin(names, seed=seed, number=0, spare=[])
        for start in range(0, self.total, size):
            end = min(start + size, self.total)
            batch = self.empty(names, end - start)
            rows.take(start, end, out=by_site(names, batch))
            yield batch

    def population(self) -> Origin:
        """Say where the rows come from."""
        return self._rows.population()

    def origin(self, numbers: Int[Tensor, " row"]) -> Origin:
        """Say where these rows came from."""
        return self._rows.origin(numbers)

    def empty(self, names: Mapping[str, str], size: int) -> dict[str, Float[Tensor, "size _"]]:
        """Make room for a batch."""
        rooms = {site: self._rows.empty(site, size) for site in set(names.values())}
        return {name: rooms[site] for name, site in names.items()}

    def begin(self, names: Mapping[str, str], *, seed: int, number: int, spare: list[dict[str, Tensor]]) -> Pass:
        """Begin pass `number`, with the memory that an earlier one left."""
        return Pass(
            self._rows,
            self.total,
            sites=tuple(dict.fromkeys(names.values())),
            seed=seed,
            number=number,
            row_bytes=self._row_bytes,
            spare=spare,
        )


class _PassReader:
    """Pass after pass over a finished store, partial batches left out.

    Args:
        source: The store's rows.
        names: Each site asked for, by the name it was asked for.
        size: Rows of a batch.
        seed: Of the order.
    """

    def __init__(self, source: Finished, names: Mapping[str, str], *, size: int, seed: int) -> None:
        self._source, self._names, self._size, self._seed = source, names, size, seed
        self._in_pass = source.total // size
        self._batches = 0
        self._pass: Pass | None = None
        self._spare: list[dict[str, Tensor]] = []
        self._numbers = torch.empty(0, dtype=torch.long)

    def next(self, into: Mapping[str, Float[Tensor, "size _"]] | None = None) -> dict[str, Float[Tensor, "size _"]]:
        """Give the next batch in float32, by the names the sites were asked for; see `RowReader`."""
        number, index = divmod(self._batches, self._in_pass)
        if self._pass is None or self._pass.number != number:
            self._close()
            self._pass = self._source.begin(self._names, seed=self._seed, number=number, spare=self._spare)
        batch = self._source.empty(self._names, self._size) if into is None else dict(into)
        self._numbers = self._pass.take(index * self._size, (index + 1) * self._size, out=by_site(self._names, batch))
        self._batches += 1
        return batch

    def origin(self) -> Origin:
        """Say where the rows of the last batch came from."""
        return self._source.origin(self._numbers)

    def state(self) -> dict[str, Tensor]:
        """Give the number of batches that were read."""
        return {"batches": torch.tensor(self._batches)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on behind that many batches."""
        self._close()
        self._batches = int(state["batches"])

    def _close(self) -> None:
        if self._pass is not None:
            self._pass.close()
            self._pass = None
