"""The state of a run on disk, such that a kill at any moment leaves a folder that resumes.

    folder/checkpoint_000001000.safetensors     tensors of every learner and reader; the header describes the run
    folder/checkpoint_000001000/                the same of a run on several ranks (`sharded_checkpoint`)
    folder/log.jsonl                            one line a result (`scope_lens.training.log`)

1. A checkpoint is written into `folder/checkpoint.part/`, forced to the disk, and moved to its name when it is whole.
   Several ranks write theirs together, and the first one moves it when all are done.
2. Only then are those removed that are older than the last `keep`. The next writer removes what a killed one left.
3. The header holds checksums, so a file that was cut or changed later is known as damaged. Nothing falls back to an
   older checkpoint by itself: the error names those that are whole.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from scope_lens.training.config import TrainConfig
from scope_lens.training.ranks import ALONE, Ranks
from scope_lens.training.sharded_checkpoint import ONE_FOLDER, read_shards, write_shards

_NAME = re.compile(r"checkpoint_(\d{9,})(\.safetensors)?")
_UNFINISHED = "checkpoint.part"
_STALE = "checkpoint.stale"
_HEADER = "scope_lens_run"


class Checkpoint(NamedTuple):
    """A run at one moment.

    Attributes:
        path: The file, or the folder that several ranks wrote.
        header: What describes the run, as JSON holds it.
        tensors: Its state by name; on several ranks, this rank's part.
    """

    path: Path
    header: dict[str, Any]
    tensors: dict[str, Tensor]

    def below(self, prefix: str) -> dict[str, Tensor]:
        """Give the tensors whose names begin with `prefix`, without it."""
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}


def checkpoints(folder: str | Path) -> dict[int, Path]:
    """List the checkpoints in a folder by the number of updates, ascending; empty where there is no run."""
    found = ((_NAME.fullmatch(path.name), path) for path in Path(folder).glob("checkpoint_*"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def write_checkpoint(
    folder: Path,
    header: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    step: int,
    keep: int,
    ranks: Ranks = ALONE,
) -> Path:
    """Write one checkpoint, whole or not at all, and then remove all but the last `keep`.

    Args:
        folder: Created if missing; several ranks write into one folder that all of them see.
        header: What describes the run; JSON holds it.
        tensors: Its state; on several ranks, this rank's part.
        step: Updates made.
        keep: Checkpoints that stay, this one included.
        ranks: Who writes it.

    Raises:
        OSError: The disk is full or cannot be written; earlier checkpoints are untouched.
        ValueError: Another rank could not write.
    """
    path = folder / f"checkpoint_{step:09d}{'.safetensors' if ranks.alone else ''}"
    # A folder, because safetensors writes through a temporary file of a random name, which a kill would leave behind.
    unfinished = folder / _UNFINISHED
    described = {**header, "step": step}
    try:
        with ranks.agreement.together():
            if ranks.first:
                for left in (unfinished, folder / _STALE):
                    shutil.rmtree(left, ignore_errors=True)
                unfinished.mkdir(parents=True)
        part = unfinished / path.name
        if ranks.alone:
            _write_file(part, described, tensors)
        else:
            write_shards(part, described, tensors, ranks=ranks)
        with ranks.agreement.together():
            if ranks.first:
                part.replace(path)
    except (OSError, SafetensorError) as error:
        kept = ", ".join(older.name for older in checkpoints(folder).values()) or "none"
        raise OSError(
            f"{path} could not be written ({error}). Earlier checkpoints are whole: {kept}. Make room, then go on with "
            f"Trainer.resume({str(folder)!r})."
        ) from error
    finally:
        if ranks.first:
            shutil.rmtree(unfinished, ignore_errors=True)
    if ranks.first:
        older = [there for number, there in checkpoints(folder).items() if number <= step]
        for stale in older[:-keep]:
            _remove(stale)
    return path


def read_checkpoint(folder: str | Path, *, step: int | None = None, ranks: Ranks = ALONE) -> Checkpoint:
    """Read the newest checkpoint of a run, or the one after `step` updates, whoever wrote it.

    Args:
        folder: Of the run.
        step: Updates that it was written after; None takes the newest.
        ranks: Which part of the state is read.

    Raises:
        FileNotFoundError: The folder holds no run, or no checkpoint of this step.
        ValueError: The checkpoint is damaged, and the message says which others are whole; or the ranks see different
            folders.
    """
    there = checkpoints(folder)
    ranks.agreement.refuse_differences(checkpoints=list(there), remedy=ONE_FOLDER)
    if not there:
        raise FileNotFoundError(
            f"{folder} holds no checkpoint_<step>.safetensors and no folder checkpoint_<step>; Trainer.resume takes up "
            "a run that was begun with Trainer(configs, folder=...)."
        )
    if step is not None and step not in there:
        raise FileNotFoundError(f"{folder} holds no checkpoint of step {step}; it holds those of {list(there)}.")
    path = there[max(there) if step is None else step]
    try:
        return _read(path, ranks)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        damage = f"{path} is no whole checkpoint ({type(error).__name__}: {error})."
    whole = [number for number, other in there.items() if other != path and _is_whole(other, ranks)]
    remedy = (
        f"Those of the steps {whole} are whole: go on from one with Trainer.resume({str(folder)!r}, step={whole[-1]})."
        if whole
        else "The folder holds no other that is whole; train anew in another folder."
    )
    raise ValueError(f"{damage} {remedy}")


def remove_newer(folder: Path, *, step: int) -> None:
    """Remove the checkpoints after `step` updates: the run goes on from there and writes them anew."""
    for number, path in checkpoints(folder).items():
        if number > step:
            _remove(path)


def config_of(fields: Mapping[str, Any]) -> TrainConfig:
    """Rebuild a config from JSON, which knows lists and no tuples.

    Raises:
        TypeError: A field that a config does not have.
        ValueError: A setting outside its range.
    """
    settings: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in fields.items()}
    return TrainConfig(**settings)


def differences(kept: Sequence[TrainConfig], asked: Sequence[TrainConfig]) -> str:
    """Say in which fields two lists of configs differ; empty where they are equal.

    Args:
        kept: Of the run on disk.
        asked: Of the call.
    """
    if len(kept) != len(asked):
        return f"{len(kept)} dictionaries, now {len(asked)}"
    return "; ".join(
        f"config {index}: {name} {was!r}, now {now!r}"
        for index, (old, new) in enumerate(zip(kept, asked, strict=True))
        for (name, was), now in zip(asdict(old).items(), asdict(new).values(), strict=True)
        if was != now
    )


def _write_file(path: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(state, path, metadata={_HEADER: json.dumps({**header, "checksum": _checksum(state)})})
    with path.open("rb") as written:
        os.fsync(written.fileno())


def _remove(path: Path) -> None:
    if path.is_dir():
        # Under another name first: a kill must not leave half of a checkpoint under its own.
        stale = path.with_name(_STALE)
        shutil.rmtree(stale, ignore_errors=True)
        shutil.rmtree(path.replace(stale))
    else:
        path.unlink(missing_ok=True)


def _read(path: Path, ranks: Ranks) -> Checkpoint:
    if path.is_dir():
        return Checkpoint(path, *read_shards(path, ranks=ranks))
    with safe_open(path, framework="pt") as file:
        metadata: dict[str, str] = file.metadata() or {}
        header: dict[str, Any] = json.loads(metadata[_HEADER])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if header["checksum"] != _checksum(tensors):
        raise ValueError("the checksum of its tensors is not the one it was written with")
    return Checkpoint(path, header, {name: ranks.shard(name, tensor) for name, tensor in tensors.items()})


def _is_whole(path: Path, ranks: Ranks) -> bool:
    try:
        _read(path, ranks)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return False
    return True


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    checksum = 0
    for name, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), checksum)
        if tensor.numel():
            checksum = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, checksum)
    return checksum
