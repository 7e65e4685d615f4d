"""The kernels of a training step as one set: eager twins, or Triton.

Both sets have the same functions with the same signatures, so that a step is written once and the tests run it on
either.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from scope_lens.training.kernels import decode, dense, encode, sums, update
from scope_lens.training.kernels.decode import Residual
from scope_lens.training.kernels.dense import DenseActs
from scope_lens.training.kernels.entries import Entries
from scope_lens.training.kernels.sums import LatentSums


class Kernels(NamedTuple):
    """The functions that a step calls; the eager twin of each has its documentation.

    Attributes:
        name: "eager" or "triton".
    """

    name: str
    encode: Callable[..., Entries]
    topk_encode: Callable[..., Entries]
    decode: Callable[..., Tensor]
    residual: Callable[..., Residual]
    latent_gradients: Callable[..., Tensor]
    latent_sums: Callable[..., LatentSums]
    update_rows: Callable[..., None]
    weight_gradients: Callable[..., Tensor]
    encode_dense: Callable[..., DenseActs]
    dense_residual: Callable[..., tuple[Tensor, Tensor]]
    dense_gradients: Callable[..., tuple[Tensor, LatentSums]]
    product: Callable[..., Tensor]
    weighted_rows: Callable[..., Tensor]


def eager_kernels() -> Kernels:
    """Give the twins: torch alone, on any device."""
    return _kernels("eager", encode, decode, sums, update, dense)


def triton_kernels() -> Kernels:
    """Give the Triton kernels.

    Raises:
        ImportError: Triton is not installed.
    """
    from scope_lens.training.kernels import decode_triton, dense_triton, encode_triton, sums_triton, update_triton

    return _kernels("triton", encode_triton, decode_triton, sums_triton, update_triton, dense_triton)


def _kernels(name: str, *modules: Any) -> Kernels:
    found = {field: getattr(module, field) for module in modules for field in Kernels._fields if hasattr(module, field)}
    return Kernels(name=name, **found)
