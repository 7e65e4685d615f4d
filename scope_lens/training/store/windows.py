"""Where the rows of a finished store lie, and windows of some of its blocks.

In memory a window is a list of row numbers. From disk it is memory that is being filled while the window before it is
consumed, and that the next but one fills again.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scope_lens.training.store.corpus import Origin
from scope_lens.training.store.transfer import empty_rows, take_rows
from scope_lens.training.store.zarr_rows import ORIGIN, Reading, ZarrRows


@runtime_checkable
class Rows(Protocol):
    """Where the rows of a finished store lie."""

    def window(
        self, sites: Sequence[str], spans: Sequence[tuple[int, int]], *, spare: Mapping[str, Tensor] | None
    ) -> "Window":
        """Begin to fetch these spans of rows (first, end), into what an earlier window left."""
        ...

    def empty(self, site: str, size: int) -> Float[Tensor, "size _"]:
        """Make room for rows of a site in float32, on the device they come from."""
        ...

    def origin(self, numbers: Int[Tensor, " row"]) -> Origin:
        """Say where rows came from."""
        ...

    def population(self) -> Origin:
        """Say where all rows came from."""
        ...


@runtime_checkable
class Window(Protocol):
    """Some blocks of a store, whose rows are numbered through."""

    def take(self, rows: Int[Tensor, " row"], out: Mapping[str, Float[Tensor, "row _"]]) -> None:
        """Write rows of each site into `out`."""
        ...

    def close(self) -> dict[str, Tensor]:
        """Give the memory back that the next window may use."""
        ...


class MemoryRows:
    """Rows in memory.

    Args:
        arrays: One of shape (rows, width) for each site.
        origin: Where each row came from.
    """

    def __init__(self, arrays: Mapping[str, Float[Tensor, "rows _"]], origin: Origin) -> None:
        self._arrays, self._origin = dict(arrays), origin

    def window(
        self, sites: Sequence[str], spans: Sequence[tuple[int, int]], *, spare: Mapping[str, Tensor] | None
    ) -> Window:
        """Number the rows; nothing is copied."""
        del spare
        return _MemoryWindow({site: self._arrays[site] for site in sites}, spans)

    def empty(self, site: str, size: int) -> Float[Tensor, "size _"]:
        """Make room for rows of a site in float32."""
        array = self._arrays[site]
        return empty_rows((size, array.shape[1]), dtype=torch.float32, device=array.device)

    def origin(self, numbers: Int[Tensor, " row"]) -> Origin:
        """Say where rows came from."""
        return Origin(*(column[numbers] for column in self._origin))

    def population(self) -> Origin:
        """Say where all rows came from."""
        return self._origin


class DiskRows:
    """Rows in a folder.

    Args:
        arrays: As `zarr_rows.arrays_of` gives them.
    """

    def __init__(self, arrays: Mapping[str, ZarrRows]) -> None:
        self._arrays = arrays

    def window(
        self, sites: Sequence[str], spans: Sequence[tuple[int, int]], *, spare: Mapping[str, Tensor] | None
    ) -> Window:
        """Begin to read; the first take waits for the rows."""
        return _DiskWindow({
            site: self._arrays[site].read(spans, into=spare[site] if spare else None) for site in sites
        })  # fmt: skip

    def empty(self, site: str, size: int) -> Float[Tensor, "size _"]:
        """Make room for rows of a site in float32."""
        return empty_rows((size, self._arrays[site].width), dtype=torch.float32, device=torch.device("cpu"))

    def origin(self, numbers: Int[Tensor, " row"]) -> Origin:
        """Say where rows came from."""
        return Origin(*(self._arrays[name].gather(numbers).long() for name in ORIGIN))

    def population(self) -> Origin:
        """Say where all rows came from."""
        whole = [(0, len(self._arrays[ORIGIN[0]]))]
        return Origin(*(self._arrays[name].read(whole).result().long() for name in ORIGIN))


class _MemoryWindow:
    """Blocks of arrays that are all there."""

    def __init__(self, arrays: Mapping[str, Tensor], spans: Sequence[tuple[int, int]]) -> None:
        self._arrays = arrays
        self._numbers = torch.cat([torch.arange(first, end) for first, end in spans])

    def take(self, rows: Int[Tensor, " row"], out: Mapping[str, Float[Tensor, "row _"]]) -> None:
        for site, array in self._arrays.items():
            take_rows(array, self._numbers[rows], out=out[site])

    def close(self) -> dict[str, Tensor]:
        return {}


class _DiskWindow:
    """Blocks that are read from disk."""

    def __init__(self, readings: Mapping[str, Reading]) -> None:
        self._readings = readings

    def take(self, rows: Int[Tensor, " row"], out: Mapping[str, Float[Tensor, "row _"]]) -> None:
        for site, reading in self._readings.items():
            take_rows(reading.result(), rows, out=out[site])

    def close(self) -> dict[str, Tensor]:
        return {site: reading.memory() for site, reading in self._readings.items()}
