"""Read Gemma Scope's `params.npz`, checked before it is used and without a second copy.

The file is an npz archive of five float arrays: `W_enc` (d_in, d_sae), `W_dec` (d_sae, d_out), `b_enc` (d_sae,),
`b_dec` (d_out,) and `threshold` (d_sae,). Widths come from the arrays, never from a name.

1. Open the archive and read the header of every array: names, dtype, shapes that fit together, and sizes that fit the
   archive's own directory. Nothing large has been read or allocated yet. Pickled objects are never loaded.
2. Allocate each tensor once, in the asked dtype and on the asked device, and fill it in pieces of a few megabytes. The
   archive's checksums are verified on the way.
3. Hand the tensors to `HookedSAE.from_tensors`, which refuses numbers that are not finite.
"""

import math
import zipfile
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from scope_lens.releases.placement import check_device, check_dtype
from scope_lens.releases.release import FILE_NAME
from scope_lens.sae import HookedSAE
from scope_lens.sae_config import UNTRAINED, SAEConfig, SpecialPosition

ARRAYS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
_LARGE = ("W_enc", "W_dec")
_DTYPES = (np.dtype("<f4"), np.dtype("<f2"), np.dtype("<f8"))
_PIECE = 1 << 19  # bytes read at a time: small enough to stay in a CPU's cache between the read and the cast
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError)
_HALF = (torch.bfloat16, torch.float16)


@runtime_checkable
class _Stream(Protocol):
    """A member of the archive, opened for reading."""

    def read(self, size: int = -1, /) -> bytes: ...


class _Header(NamedTuple):
    """What the archive says of one array before its numbers are read."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[np.floating]


class Widths(NamedTuple):
    """Sizes of a dictionary, from the headers of its file."""

    d_in: int
    d_sae: int
    d_out: int


def read_npz(
    file: str | Path,
    *,
    hook_in: str,
    hook_out: str,
    model: str = "",
    release: str = "",
    path: str = "",
    untrained: tuple[SpecialPosition, ...] = UNTRAINED,
    width: int | None = None,
    scale: float = 1.0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> HookedSAE:
    """Read one file in Gemma Scope's layout into a dictionary for the hooks named.

    Args:
        file: A `params.npz`, or the folder that holds it.
        hook_in: Hook the encoder reads; `hooks_for` names those of Gemma Scope's sites.
        hook_out: Hook the decoder writes.
        model: Hugging Face id of the language model, for the config.
        release: Repository, for the config.
        path: Path inside the repository, for the config.
        untrained: Kinds of position the dictionary never saw.
        width: Width that the activations of the site have; None takes what the arrays say.
        scale: The file's dictionary reads x_raw / scale; the one returned reads and writes x_raw (`b_enc`, `b_dec` and
            `threshold` are multiplied by `scale`; see `HookedSAE.to_inference`).
        device: Where the weights go.
        dtype: Dtype of the weights; `threshold` stays float32 for half-precision dtypes.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated, empty, pickled, no npz archive, or does not hold the five arrays in shapes
            that fit together and numbers that are finite; `dtype` is none for weights, or too narrow for these; this
            machine has no such device.
    """
    check_dtype(dtype)
    device = check_device(device)
    source = _file_of(Path(file))
    exact = torch.float32 if dtype in _HALF else dtype
    with _opened(source) as archive:
        headers = _headers(archive, source)
        sizes = _check_shapes(headers, source, width)
        if hook_in == hook_out and sizes.d_in != sizes.d_out:
            raise ValueError(
                f"{source}: reads d_in={sizes.d_in} and writes d_out={sizes.d_out}, so it is a transcoder and no "
                f"dictionary of {hook_in!r} alone; name another hook_out."
            )
        state = {
            name: _fill(archive, source, name, header, device=device, dtype=dtype if name in _LARGE else exact)
            for name, header in headers.items()
        }
    for name in ("b_enc", "b_dec", "threshold"):
        exactly = state[name] * scale
        state[name] = exactly.to(exact if name == "threshold" else dtype)
        if exactly.isfinite().all() and not state[name].isfinite().all():
            raise ValueError(_too_narrow(f"{source}: {name}", dtype))
    cfg = SAEConfig(
        d_in=sizes.d_in,
        d_out=sizes.d_out,
        d_sae=sizes.d_sae,
        hook_in=hook_in,
        hook_out=hook_out,
        model=model,
        release=release,
        path=path,
        untrained=untrained,
    )
    return HookedSAE.from_tensors(cfg, state, source=str(source))


def read_widths(file: str | Path) -> Widths:
    """Read the sizes of the dictionary in a file from its headers alone.

    Args:
        file: A `params.npz`, or the folder that holds it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no whole npz archive of the five arrays.
    """
    source = _file_of(Path(file))
    with _opened(source) as archive:
        return _check_shapes(_headers(archive, source), source, None)


# ---- 1. headers ----


def _file_of(path: Path) -> Path:
    if path.is_dir():
        inside = path / FILE_NAME
        if not inside.is_file():
            there = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
            raise FileNotFoundError(f"{path} holds no {FILE_NAME}; it holds {there}. Was the file renamed?")
        return inside
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a {FILE_NAME} or the folder that holds one.")
    return path


@contextmanager
def _opened(source: Path) -> Generator[zipfile.ZipFile, None, None]:
    """Open the archive, and say what the file looks like if it turns out to be none, or a damaged one."""
    with source.open("rb") as stream:
        try:
            with zipfile.ZipFile(stream) as archive:
                yield archive
        except _DAMAGED as error:
            raise ValueError(_damaged(source, error)) from None


def _headers(archive: zipfile.ZipFile, source: Path) -> dict[str, _Header]:
    """Read the header of every array, in the order of `ARRAYS`."""
    found = [info.filename for info in archive.infolist()]
    expected = [f"{name}.npy" for name in ARRAYS]
    if sorted(found) != sorted(expected):
        shown = ", ".join(sorted(name.removesuffix(".npy") for name in found)[:12]) or "none"
        raise ValueError(
            f"{source}: expected the arrays {', '.join(ARRAYS)}, found {shown}. Is it another kind of file?"
        )
    for info in archive.infolist():
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
            raise ValueError(
                f"{source}: {info.filename} is encrypted or compressed in a way that numpy does not write."
            )
    return {name: _header(archive, name, source) for name in ARRAYS}


def _header(archive: zipfile.ZipFile, name: str, source: Path) -> _Header:
    with archive.open(f"{name}.npy") as member:
        shape, fortran, dtype = _npy_header(member, f"{source}: {name}")
        start = member.tell()
    if dtype.hasobject:
        raise ValueError(f"{source}: {name} holds pickled objects, which are never loaded; expected float32 numbers.")
    if dtype not in _DTYPES:
        raise ValueError(f"{source}: {name} has dtype {dtype}, expected float32 (float16 and float64 are read too).")
    stored, needed = archive.getinfo(f"{name}.npy").file_size - start, math.prod(shape) * dtype.itemsize
    if stored != needed:
        raise ValueError(f"{source}: {name} of shape {shape} needs {needed} bytes, the archive holds {stored}.")
    return _Header(shape, fortran, dtype)


def _npy_header(member: _Stream, where: str) -> tuple[tuple[int, ...], bool, np.dtype[np.floating]]:
    """Read one array's header; the stream is left at the first number."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        return readers[np.lib.format.read_magic(member)](member)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{where} is no npy array ({error}); the file is damaged or of another kind.") from None


def _check_shapes(headers: dict[str, _Header], source: Path, width: int | None) -> Widths:
    """Check that the five shapes are those of one dictionary."""
    shapes = {name: header.shape for name, header in headers.items()}
    said = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    if len(shapes["W_enc"]) != 2 or len(shapes["W_dec"]) != 2:
        raise ValueError(f"{source}: W_enc and W_dec must have two axes; found {said}.")
    (d_in, d_sae), d_out = shapes["W_enc"], shapes["W_dec"][1]
    fitting = {"W_dec": (d_sae, d_out), "b_enc": (d_sae,), "b_dec": (d_out,), "threshold": (d_sae,)}
    if any(shapes[name] != shape for name, shape in fitting.items()) or 0 in (d_in, d_sae, d_out):
        raise ValueError(
            f"{source}: the shapes do not fit together; expected W_enc (d_in, d_sae), W_dec (d_sae, d_out), "
            f"b_enc and threshold (d_sae,), b_dec (d_out,); found {said}."
        )
    if width is not None and (d_in, d_out) != (width, width):
        raise ValueError(
            f"{source}: the activations of this site are {width} wide, but the file reads d_in={d_in} and writes "
            f"d_out={d_out}. Does it belong to another model or site?"
        )
    return Widths(d_in, d_sae, d_out)


# ---- 2. numbers ----


def _fill(
    archive: zipfile.ZipFile,
    source: Path,
    name: str,
    header: _Header,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Allocate one array's tensor and fill it piece by piece."""
    # An array in column order is the transpose of one in row order, so its numbers fill the transpose's rows.
    shape = header.shape[::-1] if header.fortran else header.shape
    whole = _allocate(shape, dtype, device)
    rows = whole.view(-1)
    direct = header.dtype == np.dtype("<f4") and dtype == torch.float32 and whole.device.type == "cpu"
    with archive.open(f"{name}.npy") as member:
        _npy_header(member, name)
        if direct:
            _read_into(member, rows.numpy().data.cast("B"))
        else:
            _read_cast(member, rows, header.dtype, where=f"{source}: {name}")
    return whole.t().contiguous() if header.fortran else whole


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    # numpy asks the system for huge pages and torch does not; first touching 300 MB page by page doubles the time.
    return torch.from_numpy(np.empty(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


def _read_into(member: _Stream, target: memoryview) -> None:
    """Read a member's numbers into memory that holds them as they are."""
    for start in range(0, len(target), _PIECE):
        count = min(_PIECE, len(target) - start)
        target[start : start + count] = _read(member, count)


def _read_cast(member: _Stream, target: Tensor, dtype: np.dtype[np.floating], *, where: str) -> None:
    """Read a member's numbers into a tensor of another dtype or device, through a buffer of one piece."""
    buffer = np.empty(_PIECE // dtype.itemsize, dtype=dtype)
    held, staged = buffer.data.cast("B"), torch.from_numpy(buffer)
    # bfloat16 reaches as far as float32, so that cast needs no look at every number.
    may_overflow = 2 * torch.finfo(target.dtype).max < float(np.finfo(dtype).max)
    for start in range(0, target.numel(), buffer.size):
        count = min(buffer.size, target.numel() - start)
        held[: count * dtype.itemsize] = _read(member, count * dtype.itemsize)
        piece = target[start : start + count].copy_(staged[:count])
        if may_overflow and not piece.isfinite().all() and staged[:count].isfinite().all():
            raise ValueError(_too_narrow(where, target.dtype))


def _read(member: _Stream, count: int) -> bytes:
    # The archive compares the member's checksum when the last byte has been read.
    piece = member.read(count)
    if len(piece) != count:
        raise EOFError(f"{count - len(piece)} bytes short")
    return piece


def _too_narrow(where: str, dtype: torch.dtype) -> str:
    return (
        f"{where} holds finite numbers that {dtype} cannot (its largest is {torch.finfo(dtype).max:.4g}). The file is "
        "whole; use dtype=torch.bfloat16 or torch.float32."
    )


def _damaged(source: Path, error: Exception) -> str:
    """Say what a file that is no whole npz archive looks like."""
    size = source.stat().st_size
    with source.open("rb") as stream:
        start = stream.read(64)
    if size == 0:
        seen = "it is empty"
    elif start.startswith(b"version https://git-lfs"):
        seen = "it is a Git LFS pointer, not the file itself"
    elif start.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        seen = "it is a pickle, which is never loaded"
    elif start.startswith(b"PK\x03\x04"):
        seen = f"it is truncated or damaged at {size} bytes ({error})"
    elif start.startswith(b"\x93NUMPY"):
        seen = "it is a single npy array"
    else:
        seen = f"it is no zip archive and begins with {start[:8]!r}"
    expected = f"expected an npz archive of {', '.join(ARRAYS)}"
    return f"{source}: {expected}, but {seen}. Delete it, then copy or download it again."
