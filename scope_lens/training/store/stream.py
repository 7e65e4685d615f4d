"""Rows straight from the model: a reservoir that is refilled from the text while it is read.

1. The reservoir is filled once; the mean squared norm of each site is that of these rows.
2. After each batch, forwards are run while there is room for their rows, which take the places of those just served.
3. Each pass over the text reads the sequences in an order of its own, and every kept position once.

On CUDA the forwards of step 2 run on a stream of their own, beside the training steps on the caller's stream. Slots
that are refilled were served before (the side stream waits for the caller's), and they are served again only after the
next shuffle (the caller's stream waits for the side's), so no row is read and written at once. Whether rows are finite
is looked at before that shuffle, so that no forward waits for an answer.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from scope_lens.training.store.corpus import Origin, SequenceBatch
from scope_lens.training.store.harvest import Harvest, square_sum
from scope_lens.training.store.manifest import StoreManifest
from scope_lens.training.store.reader import RowReader, by_site
from scope_lens.training.store.reservoir import Reservoir
from scope_lens.training.store.seeds import generator
from scope_lens.training.store.transfer import empty_rows


class Stream:
    """A source of rows without end, for readers of one batch size.

    Args:
        harvest: The text and the model; every position that may be kept is.
        rows: Rows of the reservoir; fewer where the text has fewer.
        batch_size: Sequences of a forward.
        progress: Whether filling shows a progress bar.

    Raises:
        ValueError: A setting outside its range, or a site that changes its width or is not finite.
    """

    def __init__(self, harvest: Harvest, *, rows: int, batch_size: int, progress: bool) -> None:
        if rows < 1:
            raise ValueError(f"rows is {rows}; expected 1 row or more.")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected 1 sequence or more.")
        self._harvest, self._batch_size = harvest, batch_size
        self._reader: tuple[int, int] | None = None
        self._pass, self._sequence = 0, 0
        self._order = harvest.corpus.order(harvest.seed, 0)
        self._batch: SequenceBatch | None = None
        site_rows = harvest.site_rows
        self._reservoir = Reservoir(
            site_rows.widths,
            rows=min(rows, harvest.corpus.rows),
            dtype=harvest.dtype,
            device=site_rows.device,
        )
        self._side: Any = torch.cuda.Stream(site_rows.device) if site_rows.device.type == "cuda" else None
        self._unchecked: list[tuple[SequenceBatch, dict[str, Bool[Tensor, ""]]]] = []
        self._places = torch.empty(0, dtype=torch.long)
        with tqdm(total=self._reservoir.rows, desc="fill", unit="row", disable=not progress) as bar:
            for n in self._refill(self._reservoir.rows):
                bar.update(n)
        self._settle()

    def describe(self) -> StoreManifest:
        """Write down what the rows are; norms are those of the rows that the reservoir holds."""
        held = self._reservoir.held
        sums = {site: square_sum(array[:held]) for site, array in self._reservoir.arrays.items()}
        return self._harvest.describe(sums, summed=held, rows=self._reservoir.rows)

    def reader(self, names: Mapping[str, str], *, size: int, seed: int) -> RowReader:
        """Read batches without end; see `ActivationStore.reader`."""
        longest = int(self._harvest.corpus.kept_in.max())
        if self._reservoir.rows < size + longest:
            raise ValueError(
                f"The reservoir has {self._reservoir.rows} rows; batches of {size} and sequences of up to {longest} "
                f"rows need {size + longest}. Stream with more rows or more text, or set a smaller batch_size."
            )
        if self._reader is None:
            self._reservoir.seed(generator(self._harvest.seed, seed))
            self._reader = (size, seed)
        if self._reader != (size, seed):
            raise ValueError(
                f"This stream is read in batches of {self._reader[0]} (seed {self._reader[1]}) and cannot be read in "
                f"batches of {size} (seed {seed}) as well: each row is served once. Give the dictionaries one "
                "batch_size, or harvest into a folder, which any number of readers can share."
            )
        return _StreamReader(self, names, size)

    def one_pass(self, names: Mapping[str, str], *, size: int, seed: int) -> Iterator[dict[str, Float[Tensor, "_ _"]]]:
        """Read as many whole batches as one pass over the text fills."""
        reader = self.reader(names, size=size, seed=seed)
        return (reader.next() for _ in range(self._harvest.corpus.rows // size))

    def population(self) -> Origin:
        """Say where the rows of one pass come from."""
        return self._harvest.corpus.origin(self._harvest.corpus.kept.nonzero().flatten())

    def draw(
        self, names: Mapping[str, str], size: int, into: Mapping[str, Float[Tensor, "size _"]] | None
    ) -> dict[str, Float[Tensor, "size _"]]:
        """Give a batch, and begin to replace it."""
        if self._reservoir.spent(size):
            self._settle()
            self._reservoir.shuffle()
        batch = self._empty(names, size) if into is None else dict(into)
        self._places = self._reservoir.draw(by_site(names, batch), size)
        for _ in self._refill(size):
            pass
        return batch

    def origin(self) -> Origin:
        """Say where the rows of the last batch came from."""
        return self._harvest.corpus.origin(self._places)

    def state(self) -> dict[str, Tensor]:
        """Give the reservoir, its random state and the position in the text."""
        self._settle()
        return self._reservoir.state() | {"position": torch.tensor([self._pass, self._sequence])}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where another stream of the same text, model and settings stood."""
        self._settle()
        self._reservoir.load_state(state)
        self._pass, self._sequence = state["position"].tolist()
        self._order, self._batch = self._harvest.corpus.order(self._harvest.seed, self._pass), None

    def _empty(self, names: Mapping[str, str], size: int) -> dict[str, Float[Tensor, "size _"]]:
        """Make room for a batch."""
        arrays = self._reservoir.arrays
        rooms = {
            site: empty_rows((size, arrays[site].shape[1]), dtype=torch.float32, device=arrays[site].device)
            for site in set(names.values())
        }
        return {name: rooms[site] for name, site in names.items()}

    def _refill(self, size: int) -> Iterator[int]:
        """Run forwards while there is room; while fewer than `size` rows are held, shorter ones. Yield their rows."""
        while True:
            batch = self._next_batch()
            while len(batch.kept) > self._reservoir.room and len(batch.tokens) > 1 and self._reservoir.held < size:
                batch = self._harvest.corpus.batch(self._order, self._sequence, size=len(batch.tokens) // 2)
            if len(batch.kept) > self._reservoir.room:
                return
            self._run(batch)
            self._sequence, self._batch = batch.sequences, None
            yield len(batch.kept)

    def _next_batch(self) -> SequenceBatch:
        if self._batch is None:
            if self._sequence == len(self._order):
                self._pass, self._sequence = self._pass + 1, 0
                self._order = self._harvest.corpus.order(self._harvest.seed, self._pass)
            self._batch = self._harvest.corpus.batch(self._order, self._sequence, size=self._batch_size)
        return self._batch

    def _run(self, batch: SequenceBatch) -> None:
        site_rows = self._harvest.site_rows
        if self._side is None:
            self._reservoir.put(site_rows(batch), batch.places)
            return
        self._side.wait_stream(torch.cuda.current_stream(site_rows.device))
        with torch.cuda.stream(self._side):
            rows = site_rows.unchecked(batch)
            self._reservoir.put(rows, batch.places)
            self._unchecked.append((batch, {site: torch.isfinite(x).all() for site, x in rows.items()}))

    def _settle(self) -> None:
        """Let the caller's stream wait for the side's, and look at what has not been checked yet."""
        if self._side is None:
            return
        torch.cuda.current_stream(self._harvest.site_rows.device).wait_stream(self._side)
        unchecked, self._unchecked = self._unchecked, []
        for batch, finite in unchecked:
            self._harvest.site_rows.check(batch, finite, {})


class _StreamReader:
    """Batches of a stream at some sites.

    Args:
        stream: What is read.
        names: Each site asked for, by the name it was asked for.
        size: Rows of a batch.
    """

    def __init__(self, stream: Stream, names: Mapping[str, str], size: int) -> None:
        self._stream, self._names, self._size = stream, names, size

    def next(self, into: Mapping[str, Float[Tensor, "size _"]] | None = None) -> dict[str, Float[Tensor, "size _"]]:
        """Give the next batch in float32, by the names the sites were asked for; see `RowReader`."""
        return self._stream.draw(self._names, self._size, into)

    def origin(self) -> Origin:
        """Say where the rows of the last batch came from."""
        return self._stream.origin()

    def state(self) -> dict[str, Tensor]:
        """Give the reservoir, its random state and the position in the text."""
        return self._stream.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where another reader of an equal stream stood."""
        self._stream.load_state(state)
