"""A checkpoint that several ranks write together, each its own part, and that any number of them can read.

    checkpoint_000001000/__0_0.distcp, __1_0.distcp, ...    tensors, one file a rank
    checkpoint_000001000/.metadata                          which part of which tensor lies where
    checkpoint_000001000/run.json                           what describes the run, and a checksum of every other file

The files are torch.distributed.checkpoint's. A tensor that is cut by latents is written as a DTensor over the mesh, and
what several ranks have is written by one of them. So every rank of another mesh reads the parts it needs, and a single
process reads whole tensors, without torchrun too. `run.json` is written last.

`.metadata` is a pickle, as that library writes it: resume only from folders that you trust.
"""

import json
import os
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scope_lens.training.ranks import Ranks, latent_axis

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# torch.distributed.checkpoint takes half a second to import, so it is imported where several ranks need it.

ONE_FOLDER = "The folder of a run has to be one that every rank sees."
_HEADER = "run.json"
_BLOCK = 1 << 24


def write_shards(folder: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor], *, ranks: Ranks) -> None:
    """Write this rank's part of a state; all ranks do it together.

    Args:
        folder: Empty; every rank sees it.
        header: What describes the run; JSON holds it. The first rank's is written.
        tensors: This rank's part of the state, by name.
        ranks: Whose latents these are.

    Raises:
        OSError: A rank could not write its tensors; all ranks raise it.
        ValueError: Another rank could not read its files again, or write the header.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    state = {name: _as_dtensor(name, tensor.detach(), ranks) for name, tensor in tensors.items()}
    agreement = ranks.agreement
    try:
        # The state's tensors are typed storages inside that library, which it warns about itself.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save(state, checkpoint_id=folder, process_group=agreement.group)
    except CheckpointException as error:
        raise OSError(_failures(error.failures)) from None
    with agreement.together():
        own = {path.name: _check_of(path) for path in folder.glob(f"__{agreement.rank}_*")}
        if ranks.first:
            own[".metadata"] = _check_of(folder / ".metadata")
    files = {name: check for one in agreement.gather(own) for name, check in one.items()}
    with agreement.together():
        if ranks.first:
            if missing := sorted(name for name in files if not (folder / name).is_file()):
                raise FileNotFoundError(f"{missing} were written by other ranks and are not here. {ONE_FOLDER}")
            with (folder / _HEADER).open("w", encoding="utf-8") as file:
                json.dump({**header, "files": files}, file)
                file.flush()
                os.fsync(file.fileno())


def read_shards(folder: Path, *, ranks: Ranks) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the header and this rank's part of the state; all ranks do it together.

    Args:
        folder: What `write_shards` filled, on a mesh of any size.
        ranks: Which latents are read; a single process reads all of them.

    Raises:
        ValueError: A file is missing or was changed, on any rank.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    agreement = ranks.agreement
    with agreement.together():
        header: dict[str, Any] = json.loads((folder / _HEADER).read_text(encoding="utf-8"))
        _check_files(folder, header["files"], ranks)
    reader = FileSystemReader(folder)
    room: dict[str, Any] = {}
    for name, described in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(described, TensorStorageMetadata)
        shard = ranks.shard(name, torch.empty(described.size, dtype=described.properties.dtype, device="meta"))
        room[name] = _as_dtensor(name, torch.empty(shard.shape, dtype=shard.dtype), ranks)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this is a single process, which it may be
            load(room, storage_reader=reader, process_group=agreement.group, no_dist=ranks.alone)
    except CheckpointException as error:
        raise ValueError(_failures(error.failures)) from None
    return header, {
        name: tensor.to_local() if _is_cut(name, tensor, ranks) else tensor for name, tensor in room.items()
    }


def _failures(failures: Mapping[int, Any]) -> str:
    """What went wrong on which rank, without the places in the code that the library adds."""
    return "; ".join(f"rank {rank}: {type(error).__name__}: {error}" for rank, (error, _) in sorted(failures.items()))


def _is_cut(name: str, tensor: Tensor, ranks: Ranks) -> bool:
    return not ranks.alone and latent_axis(name, tensor.ndim) is not None


def _as_dtensor(name: str, tensor: Tensor, ranks: Ranks) -> "Tensor | DTensor":
    """This rank's part as a part of the whole, such that the library knows which part it is."""
    axis = latent_axis(name, tensor.ndim)
    if ranks.alone or axis is None:
        return tensor
    from torch.distributed.tensor import DTensor, Replicate, Shard

    assert ranks.mesh is not None
    cut = [Shard(axis) if dimension == "latent" else Replicate() for dimension in ranks.mesh.mesh_dim_names or ()]
    return DTensor.from_local(tensor.contiguous(), ranks.mesh, cut, run_check=False)


def _check_files(folder: Path, files: Mapping[str, Any], ranks: Ranks) -> None:
    """Check that all files are there, and the checksums of this rank's share of them."""
    for index, (name, (size, checksum)) in enumerate(sorted(files.items())):
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise ValueError(f"{name} has {found} bytes, not {size}" if found is not None else f"{name} is missing")
        if index % (ranks.n_data * ranks.n_latent) == ranks.agreement.rank and _check_of(path)[1] != checksum:
            raise ValueError(f"the checksum of {name} is not the one it was written with")


def _check_of(path: Path) -> tuple[int, int]:
    """Size and checksum of a file."""
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return size, checksum
