"""Rows on disk: Zarr v3 arrays, uncompressed, read and written through TensorStore.

    zarr.json                      group
    acts/zarr.json                 group
    acts/<site>/zarr.json, c/...   (rows, width), bfloat16, float16 or float32
    token_id/, doc/, pos/          (rows,), int32: where each row came from

A chunk is 4,096 rows, the smallest run that is worth a read of its own; 16 chunks lie in a file (a shard), because a
large store would have a hundred thousand files otherwise. Files are mapped into memory and copied from there into the
caller's tensor, which was measured at two to four times the speed of `read` calls (docs/benchmarks/store.md). Nothing
is cached: the operating system does that.
"""

import errno
import json
import os
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tensorstore as ts
import torch
from jaxtyping import Shaped
from torch import Tensor

from scope_lens.training.store.manifest import write_json
from scope_lens.training.store.transfer import empty_rows

CHUNK_ROWS = 4_096
SHARD_ROWS = 65_536
ORIGIN = ("token_id", "doc", "pos")
_INDEX_BYTES = 16  # of a chunk in its shard's index: offset and length
_CHECKSUM_BYTES = 4
_LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
# Torch and NumPy share the bits; bfloat16 goes through int16, because NumPy has no such dtype of its own.
_BITS = {torch.bfloat16: torch.int16}


class ZarrRows:
    """One array of rows in a folder.

    Args:
        path: The array's folder.
        shape: (rows, width), or (rows,).
        dtype: Of the rows.
        create: Whether the array is made anew; it is opened otherwise.

    Raises:
        ValueError: The array is damaged, or another one than asked for.
    """

    def __init__(self, path: Path, *, shape: tuple[int, ...], dtype: torch.dtype, create: bool = False) -> None:
        self.path, self._dtype = path, dtype
        self._store: Any = _create(path, shape, dtype) if create else _open(path, shape, dtype)

    def __len__(self) -> int:
        return int(self._store.shape[0])

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return int(self._store.shape[1])

    def write(self, first: int, rows: Shaped[Tensor, "row *width"]) -> None:
        """Write rows from number `first` on; whole shards, but for the last rows of the array."""
        self._store[first : first + len(rows)].write(_numpy(rows)).result()

    def read(self, spans: Sequence[tuple[int, int]], *, into: Shaped[Tensor, "more *width"] | None = None) -> "Reading":
        """Begin to read these spans of rows (first, end), one behind the other.

        Args:
            spans: Runs of rows.
            into: Memory to read into; ignored where it is too small. None takes new memory.
        """
        total = sum(end - first for first, end in spans)
        if into is None or len(into) < total:
            into = empty_rows((total, *self._store.shape[1:]), dtype=self._dtype, device=torch.device("cpu"))
        rows = into[:total]
        target, pending, at = ts.array(_numpy(rows)), list[Any](), 0
        for first, end in spans:
            corner = (at,) + (0,) * (rows.ndim - 1)
            source = self._store[first:end].translate_to[corner]
            pending.append(target[at : at + end - first].write(source))
            at += end - first
        return Reading(rows, pending, self.path, into)

    def gather(self, numbers: Shaped[Tensor, " row"]) -> Shaped[Tensor, "row *width"]:
        """Read single rows by their numbers, far slower than spans."""
        found = self._store[numbers.tolist()].read().result()
        return torch.from_numpy(found)


class Reading:
    """Rows on their way from disk.

    Args:
        rows: Where they will lie.
        pending: What is to be waited for.
        path: Of the array, for errors.
        memory: Of which the rows are the first.
    """

    def __init__(
        self,
        rows: Shaped[Tensor, "row *width"],
        pending: Sequence[Any],
        path: Path,
        memory: Shaped[Tensor, "more *width"],
    ) -> None:
        self._rows, self._pending, self._path, self._memory = rows, pending, path, memory

    def result(self) -> Shaped[Tensor, "row *width"]:
        """Wait for the rows.

        Raises:
            ValueError: A file is damaged.
        """
        try:
            for future in self._pending:
                future.result()
        except ValueError as error:
            raise ValueError(f"{self._path} is damaged ({_first_line(error)}); harvest again.") from None
        self._pending = ()
        return self._rows

    def memory(self) -> Shaped[Tensor, "more *width"]:
        """Wait until nothing is written any more, and give the memory back."""
        for future in self._pending:
            future.exception()
        return self._memory


def make_group(folder: Path) -> None:
    """Make a folder a Zarr group."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "zarr.json", {"zarr_format": 3, "node_type": "group", "attributes": {}})


def arrays_of(
    folder: Path, widths: Mapping[str, int], *, rows: int, dtype: torch.dtype, create: bool
) -> dict[str, ZarrRows]:
    """Open or make the arrays of a store: one for each site, and `ORIGIN`."""
    if create:
        make_group(folder)
        make_group(folder / "acts")
    arrays = {
        site: ZarrRows(folder / "acts" / site, shape=(rows, width), dtype=dtype, create=create)
        for site, width in widths.items()
    }
    return arrays | {name: ZarrRows(folder / name, shape=(rows,), dtype=torch.int32, create=create) for name in ORIGIN}


class FullDiskError(OSError):
    """A disk is full; the message says what to do."""


@contextmanager
def disk_errors(folder: Path, *, advice: str) -> Generator[None]:
    """Turn a full disk, however it is reported, into an OSError that says what to do."""
    try:
        yield
    except FullDiskError:
        raise
    except (OSError, ValueError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or any(f"os_error_code='{code}'" in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):
            raise full_disk(folder, advice) from error
        raise


def full_disk(folder: Path, advice: str) -> FullDiskError:
    """Make the error of a full disk."""
    free = shutil.disk_usage(folder).free
    return FullDiskError(errno.ENOSPC, f"The disk of {folder} is full ({free / 1e9:.1f} GB are free). {advice}")


def reserve(path: Path, size: int) -> None:
    """Make a file of `size` bytes whose space is set aside, so that a mapping of it cannot run out of disk."""
    with path.open("r+b" if path.exists() else "w+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)


def _create(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    width = list(shape[1:])
    inner = {
        "chunk_shape": [CHUNK_ROWS, *width],
        "codecs": [_LITTLE],
        "index_codecs": [_LITTLE, {"name": "crc32c"}],
    }
    metadata = {
        "shape": list(shape),
        "data_type": _name(dtype),
        "dimension_names": ["row", "d"][: len(shape)],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [SHARD_ROWS, *width]}},
        "codecs": [{"name": "sharding_indexed", "configuration": inner}],
    }
    # Rows of zeros are written as well, so that the size of a file tells whether it is whole.
    spec = _spec(path) | {"metadata": metadata, "store_data_equal_to_fill_value": True}
    return ts.open(spec, create=True, delete_existing=True, context=_context()).result()


def _open(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    try:
        store = ts.open(_spec(path), open=True, read=True, write=True, context=_context()).result()
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({_first_line(error)}); harvest again.") from None
    if store.shape != shape or store.dtype.name != _name(dtype):
        raise ValueError(
            f"{path} holds {store.dtype.name} of shape {tuple(store.shape)}; the manifest says {_name(dtype)} of "
            f"{shape}."
        )
    return store


def check_whole(path: Path) -> None:
    """Refuse an array of which a file is missing or cut short; missing chunks would read as zeros.

    Raises:
        ValueError: It says which file.
    """
    metadata = json.loads((path / "zarr.json").read_text())
    shape: list[int] = metadata["shape"]
    shard: int = metadata["chunk_grid"]["configuration"]["chunk_shape"][0]
    chunk: int = metadata["codecs"][0]["configuration"]["chunk_shape"][0]
    item = {"float32": 4, "int32": 4}.get(metadata["data_type"], 2)
    bytes_of_chunk = chunk * item * (shape[1] if len(shape) > 1 else 1)
    for number in range(-(-shape[0] // shard)):
        file = path.joinpath("c", str(number), *["0"] * (len(shape) - 1))
        chunks = -(-min(shard, shape[0] - number * shard) // chunk)
        expected = chunks * bytes_of_chunk + shard // chunk * _INDEX_BYTES + _CHECKSUM_BYTES
        found = file.stat().st_size if file.exists() else None
        if found != expected:
            state = "is missing" if found is None else f"has {found} bytes instead of {expected}"
            raise ValueError(f"{file} {state}; the store is damaged, harvest again.")


def _spec(path: Path) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}


def _context() -> Any:
    return ts.Context({"cache_pool": {"total_bytes_limit": 0}, "file_io_mode": {"mode": "memmap"}})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _numpy(rows: Tensor) -> Any:
    if rows.dtype in _BITS:
        return rows.view(_BITS[rows.dtype]).numpy().view(ts.bfloat16.numpy_dtype)
    return rows.numpy()


def _first_line(error: Exception) -> str:
    return str(error).split(" [", maxsplit=1)[0]
