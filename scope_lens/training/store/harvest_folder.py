"""A harvest into a folder, which a kill at any moment cannot spoil.

    <name>.part/             until the store is complete, then <name>/
      progress.json          what is done: sequences, whole buckets, sums of squares
      scratch/               the bucket under construction, memory maps
      documents.txt          hashes of the documents
      zarr.json, acts/, ...  whole buckets (see zarr_rows)
      manifest.json          at the end

1. Rows are put into the scratch maps, each at its number in the bucket.
2. Now and then the maps are flushed, and then a note says how many sequences they hold.
3. A full bucket goes to Zarr; only then a note says so, and the maps serve the next one.
4. A harvest that is taken up runs the forwards behind its last note again and leaves out rows of buckets that are
   written, so it equals an unbroken one.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scope_lens.training.store.harvest import Harvest, Harvested, square_sum
from scope_lens.training.store.manifest import StoreManifest, differences, write_json
from scope_lens.training.store.placement import BUCKET_ROWS, Piece
from scope_lens.training.store.transfer import put_rows
from scope_lens.training.store.zarr_rows import (
    CHUNK_ROWS,
    SHARD_ROWS,
    ZarrRows,
    arrays_of,
    disk_errors,
    full_disk,
    reserve,
)

_DOCUMENTS = "documents.txt"
_PROGRESS = "progress.json"
_SECONDS_BETWEEN_NOTES = 5.0
_GO_ON = "What was noted stays: make room and run the same harvest again."
_PLACES = "places"


def harvest_folder(harvest: Harvest, path: Path, *, resume: bool, batch_size: int, progress: bool) -> None:
    """Fill the folder `path`, or open what an equal harvest left there.

    Args:
        harvest: What to do.
        path: The store's folder.
        resume: Whether an earlier harvest in `path` is taken up; otherwise one that is under way is begun anew.
        batch_size: Sequences of a forward.
        progress: Whether a progress bar is shown.

    Raises:
        FileExistsError: `path` holds a finished store and `resume` is off.
        ValueError: `path` holds the store of another harvest.
        OSError: The disk is full; what was noted stays.
    """
    if path.exists():
        if not resume:
            raise FileExistsError(f"{path} exists and resume is off; remove it or choose another path.")
        manifest = StoreManifest.read(path)
        if manifest.source != harvest.source:
            raise ValueError(
                f"{path} holds the store of another harvest ({differences(manifest.identity, harvest.identity)}); "
                "choose another path."
            )
        (path / _PROGRESS).unlink(missing_ok=True)
        return
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(part.parent, advice=_GO_ON):
        _Folder(harvest, part, resume=resume).fill(path, batch_size=batch_size, progress=progress)


def read_documents(path: Path) -> frozenset[str]:
    """Give the hashes of the documents that a store was harvested from.

    Raises:
        ValueError: The file is missing.
    """
    file = path / _DOCUMENTS
    if not file.is_file():
        raise ValueError(f"{file} is missing; the store is damaged, harvest again.")
    return frozenset(file.read_text().split())


class _Folder:
    """A folder under construction.

    Args:
        harvest: What to do.
        part: The folder.
        resume: Whether what lies there is taken up.
    """

    def __init__(self, harvest: Harvest, part: Path, *, resume: bool) -> None:
        self._harvest, self._part = harvest, part
        self._sequences, self._bucket = 0, 0
        self._sums = dict.fromkeys(harvest.site_rows.sites, 0.0)
        found = _found(part, harvest) if resume else None
        if found is not None:
            self._sequences, self._bucket, self._sums = found["sequences"], found["bucket"], found["square_sums"]
        elif part.exists():
            shutil.rmtree(part)
        part.mkdir(exist_ok=True)
        self._note()
        self._check_room()
        self._arrays = self._zarr(create=found is None)
        self._scratch, self._maps = self._reserved()
        (part / _DOCUMENTS).write_text("".join(f"{name}\n" for name in sorted(harvest.documents())))

    def fill(self, path: Path, *, batch_size: int, progress: bool) -> None:
        """Run the forwards that are left, and give the folder its name."""
        noted = time.monotonic()
        forwards = self._harvest.forwards(batch_size=batch_size, first=self._sequences, progress=progress)
        try:
            for part in forwards:
                self._put(part)
                self._sequences = part.batch.sequences
                if time.monotonic() - noted >= _SECONDS_BETWEEN_NOTES:
                    self._note()
                    noted = time.monotonic()
        except BaseException:
            self._note()
            raise
        self._note()
        self._harvest.describe(self._sums).write(self._part)
        del self._scratch, self._maps
        shutil.rmtree(self._part / "scratch")
        self._part.rename(path)
        (path / _PROGRESS).unlink()

    def _put(self, part: Harvested) -> None:
        for piece in self._harvest.placement.pieces(part.first_row, len(part.batch.kept)):
            if piece.bucket < self._bucket:  # written before the harvest was broken off
                continue
            self._scratch[_PLACES][piece.slots] = part.batch.places[piece.rows]
            for site, rows in part.rows.items():
                put_rows(self._scratch[site], piece.slots, rows[piece.rows])
            if piece.ends:
                self._write(piece)

    def _write(self, piece: Piece) -> None:
        """Move the full bucket to Zarr, and note it."""
        begin, end = self._harvest.placement.span(piece.bucket)
        sums = dict(self._sums)
        for first in range(begin, end, SHARD_ROWS):
            rows = slice(first - begin, min(first + SHARD_ROWS, end) - begin)
            origin = self._harvest.corpus.origin(self._scratch[_PLACES][rows])
            for name, numbers in origin._asdict().items():
                self._arrays[name].write(first, numbers.int())
            for site in self._sums:
                self._arrays[site].write(first, self._scratch[site][rows])
                sums[site] += square_sum(self._scratch[site][rows])
        self._sums, self._bucket = sums, piece.bucket + 1
        self._note()

    def _note(self) -> None:
        """Note what is done, once its rows are on disk."""
        for scratch in getattr(self, "_maps", ()):
            scratch.flush()
        note = {"sequences": self._sequences, "bucket": self._bucket, "square_sums": self._sums}
        write_json(self._part / _PROGRESS, note | {"identity": dict(self._harvest.identity)})

    def _check_room(self) -> None:
        rows = self._harvest.corpus.rows - self._bucket * BUCKET_ROWS
        whole_chunks = -(-rows // CHUNK_ROWS) * CHUNK_ROWS
        scratch = 0 if (self._part / "scratch").exists() else min(self._harvest.corpus.rows, BUCKET_ROWS)
        widths = sum(self._harvest.site_rows.widths.values())
        needed = (whole_chunks + scratch) * (widths * self._harvest.dtype.itemsize + 12)
        if needed > shutil.disk_usage(self._part).free:
            raise full_disk(self._part, f"The harvest needs {needed / 1e9:.1f} GB more. {_GO_ON}")

    def _zarr(self, *, create: bool) -> dict[str, ZarrRows]:
        harvest = self._harvest
        create = create or not (self._part / "zarr.json").exists()
        return arrays_of(
            self._part,
            harvest.site_rows.widths,
            rows=harvest.corpus.rows,
            dtype=harvest.dtype,
            create=create or self._bucket == 0,
        )

    def _reserved(self) -> tuple[dict[str, Tensor], list["np.memmap[Any, Any]"]]:
        """Map one bucket of each site, and of the places in the corpus."""
        rows = min(self._harvest.corpus.rows, BUCKET_ROWS)
        widths, dtype = self._harvest.site_rows.widths, self._harvest.dtype
        shapes = {_PLACES: ((rows,), torch.long)} | {site: ((rows, width), dtype) for site, width in widths.items()}
        folder = self._part / "scratch"
        folder.mkdir(exist_ok=True)
        tensors: dict[str, Tensor] = {}
        maps: list[np.memmap[Any, Any]] = []
        for name, (shape, kind) in shapes.items():
            size = torch.Size(shape).numel() * kind.itemsize
            reserve(folder / name, size)
            maps.append(np.memmap(folder / name, dtype=np.uint8, mode="r+", shape=(size,)))
            tensors[name] = torch.from_numpy(maps[-1]).view(kind).view(shape)
        return tensors, maps


def _found(part: Path, harvest: Harvest) -> dict[str, Any] | None:
    """Read the note that an equal harvest left; None where there is none."""
    if (part / "site_0.npy").exists():
        raise ValueError(
            f"{part} holds an unfinished store of the old layout (site_0.npy), which this version does not take up. "
            "Remove it, or pass resume=False."
        )
    file = part / _PROGRESS
    if not file.is_file():
        if part.exists() and {entry.name for entry in part.iterdir()} - {f"{_PROGRESS}.part"}:
            raise ValueError(
                f"{part} is no unfinished harvest ({_PROGRESS} is missing). Remove it, or choose another path."
            )
        return None
    try:
        note: dict[str, Any] = json.loads(file.read_text())
        identity: dict[str, Any] = note["identity"]
        note["square_sums"] = {site: float(note["square_sums"][site]) for site in note["square_sums"]}
        note["sequences"], note["bucket"] = int(note["sequences"]), int(note["bucket"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is damaged ({type(error).__name__}: {error}). Remove {part}, or pass resume=False."
        ) from None
    if identity == harvest.identity and set(note["square_sums"]) != set(harvest.site_rows.sites):
        raise ValueError(
            f"{part} was begun with the sites {sorted(note['square_sums'])}; name them so to go on, or pass "
            "resume=False."
        )
    if identity != harvest.identity:
        raise ValueError(
            f"{part} is an unfinished harvest of other data or settings ({differences(identity, harvest.identity)}); "
            "remove it, pass resume=False, or choose another path."
        )
    return note
