"""Bytes of all tensors alive, and their peak, in a step that runs without memory.

On torch's "meta" device a step makes every tensor that it makes on a GPU, in the same order and of the same sizes, and
lets go of each at the same time; only values are missing. Counting them gives the peak at any size on any machine. What
one operation of a library needs beside its results (a sort's scratch space) does not show.
"""

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from sm90 import hopper
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class LiveBytes(TorchDispatchMode):
    """Counts the tensors that are made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = torch.utils.weak.WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._count, out)
        return out

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known or not tensor.is_meta:
            return
        self._known[storage] = True
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.now -= size


@contextmanager
def launches_skipped() -> Iterator[None]:
    """Triton's kernels are not run: what they write to has been allocated by then."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def skip(*_args, **_kwargs) -> None:  # a mock would keep the tensors of its calls
        return None

    with (
        hopper(),
        mock.patch.object(JITFunction, "run", skip),
        mock.patch.object(InterpretedFunction, "run", skip),
    ):
        yield


def product_on_a_gpu(a, b, *, out=None, add=False) -> torch.Tensor:
    """What the product of bfloat16 operands makes there; elsewhere it makes float32 copies of them."""
    made = torch.empty(a.shape[0], b.shape[1]) if out is None or add else out
    return made if out is None else out


def weighted_rows_on_a_gpu(weights, coefficient) -> torch.Tensor:
    """Likewise."""
    return torch.empty(64, 2, weights.shape[1]).sum((0, 1))


@contextmanager
def learner_without_memory(cfg, *, d_in: int, d_out: int) -> Iterator:
    """A learner on Triton's kernels on the meta device."""
    from scope_lens.training import in_flight, learner
    from scope_lens.training.kernels.kernel_set import triton_kernels

    kernels = triton_kernels()._replace(product=product_on_a_gpu, weighted_rows=weighted_rows_on_a_gpu)
    with (
        torch.device("meta"),
        mock.patch.object(learner, "initialise"),
        mock.patch.object(in_flight.Counts, "read", return_value=[0, 0, 0]),
        mock.patch.object(
            sys.modules["torch.optim.optimizer"], "_get_fused_kernels_supported_devices", return_value=["meta"]
        ),
        launches_skipped(),
    ):
        yield learner.Learner(cfg, d_in=d_in, d_out=d_out, scale=1.0, model="", device="meta", kernels=kernels)


def peaks_of_an_update(width: int, *, d: int, batch_size: int, capacity: int, d_out: int | None = None) -> dict:
    """Bytes alive at the worst moment of a sparse and of a dense update, the raw batch not counted."""
    from scope_lens.training import TrainConfig
    from scope_lens.training.dispatch import Choice, Dispatcher

    site = "blocks.1.hook_resid_post"
    target = site if d_out is None else "blocks.1.hook_mlp_out"
    cfg = TrainConfig(
        hook_in=site, hook_out=target, width=width, sparsity=1e-3, steps=10**6, batch_size=batch_size
    )  # fmt: skip
    peaks = {}
    for kind in ("sparse", "dense"):
        choice = Choice(sparse=kind == "sparse", capacity=capacity)
        with LiveBytes() as live, mock.patch.object(Dispatcher, "choose", return_value=choice):
            with learner_without_memory(cfg, d_in=d, d_out=d_out or d) as learner:
                x = torch.empty(batch_size, d)
                y = x if d_out is None else torch.empty(batch_size, d_out)
                for _ in range(4):
                    live.peak = live.now
                    learner.update(x, y)
                raw = x.nbytes if y is x else x.nbytes + y.nbytes
                peaks[kind] = live.peak - raw
                del learner
    return peaks
