"""Moving rows: to the device, into slots, out of slots.

On the CPU each of them is bound by memory, and the plain calls are several times slower than memory is: `index_copy_`
goes through the elements of a row one by one, and a fresh tensor of tens of megabytes costs more to map in than to fill
(docs/benchmarks/store.md).
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor


def to_device(tensor: Shaped[Tensor, "*shape"], device: torch.device) -> Shaped[Tensor, "*shape"]:
    """Copy to the device; from pinned memory on CUDA, because any other copy would wait for the work before it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def empty_rows(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Shaped[Tensor, "*shape"]:
    """Make room for rows; on the CPU through NumPy, which asks for huge pages and so is mapped in far faster."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.empty((*shape, dtype.itemsize), dtype=np.uint8)).view(dtype).squeeze(-1)


def put_rows(array: Float[Tensor, "slot d"], slots: Int[Tensor, " row"], rows: Float[Tensor, "row d"]) -> None:
    """Write rows to array[slots], for distinct slots.

    Args:
        array: Written in place.
        slots: On the CPU.
        rows: Of the array's dtype.
    """
    if array.device.type == "cpu":
        _opaque(array)[slots.numpy()] = _opaque(rows.cpu().contiguous())
    else:
        array.index_copy_(0, to_device(slots, array.device), rows.to(array.device))


def take_rows(array: Float[Tensor, "slot d"], slots: Int[Tensor, " row"], *, out: Float[Tensor, "row d"]) -> None:
    """Write array[slots] to `out`, in the dtype of `out`.

    Args:
        array: Read from.
        slots: On the CPU.
        out: Written in place, on the array's device.
    """
    numbers = to_device(slots, array.device)
    if array.dtype == out.dtype:
        torch.index_select(array, 0, numbers, out=out)
    else:
        out.copy_(array.index_select(0, numbers))


def _opaque(rows: Tensor) -> Any:
    """The same rows as a NumPy array with one item of bytes each."""
    row = np.dtype((np.void, rows.shape[1] * rows.element_size()))
    return rows.view(torch.uint8).numpy().view(row)[:, 0]
