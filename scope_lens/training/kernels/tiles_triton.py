"""What kernels that multiply tiles share: the tile for a device, the number of programs, how operands are read."""

from typing import TypeVar

import torch
import triton
from jaxtyping import Float
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from scope_lens.training.kernels.bits_triton import ones

Tile = TypeVar("Tile")

INTERPRETED = type(ones) is not triton.JITFunction


def suited(operand: Float[Tensor, "rows inner"], *, float32: Tile, hopper: Tile, other: Tile) -> Tile:
    """Give the tile for operands of this dtype on their device.

    Float32 operands are multiplied as they are (IEEE), which tensor cores cannot do: theirs is the path for checking.

    Args:
        operand: One of the two.
        float32: For float32 operands, anywhere.
        hopper: For an H100 or H200.
        other: For all other devices, and the interpreter.
    """
    if operand.dtype == torch.float32:
        return float32
    if INTERPRETED or torch.version.hip is not None:
        return other
    return hopper if torch.cuda.get_device_properties(operand.device).major == 9 else other


def programs(operand: Float[Tensor, "rows inner"], tiles: int, *, at_once: int = 1) -> tuple[int]:
    """Give the grid of persistent programs, as many as run at a time if there are tiles for them; two when interpreted.

    Args:
        operand: On the device.
        tiles: To be worked on.
        at_once: Programs that run on a multiprocessor.
    """
    if INTERPRETED:
        return (min(tiles, 2),)
    return (min(tiles, at_once * torch.cuda.get_device_properties(operand.device).multi_processor_count),)


def descriptor(matrix: Float[Tensor, "rows inner"], block: tuple[int, int]) -> TensorDescriptor:
    """Give what the copy engine reads tiles by; it needs rows that begin at multiples of 16 bytes.

    Args:
        matrix: An operand; one whose rows do not begin there is copied.
        block: Rows and columns of a tile.
    """
    missing = -matrix.shape[1] % (16 // matrix.itemsize)
    if missing:  # padding by nothing would copy all the same
        matrix = torch.nn.functional.pad(matrix, (0, missing))
    matrix = matrix.contiguous()
    if matrix.data_ptr() % 16:
        matrix = matrix.clone()
    return TensorDescriptor.from_tensor(matrix, list(block))
