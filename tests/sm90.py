"""Compiles the kernels for an H100 or H200 (sm_90) on a machine that needs no GPU, and says what each one occupies.

The functions that launch kernels are called as the trainer calls them, at the sizes that matter, with tensors on
torch's "meta" device: shapes and dtypes without memory. What they launch is compiled with the very arguments, tile
sizes, warps and stages of that launch, and nothing runs. A meta tensor has no values, so a function that waits for the
device (`.item()`, `nonzero`, a shape that depends on data) raises here.

    with compiled_launches() as launches:
        encode(meta(4096, 2304), ...)
    launches[0].registers, launches[0].shared, launches[0].stack, launches[0].wgmma

Only in a process that was started without TRITON_INTERPRET, because that variable decides at import what a kernel is.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch

SHARED_LIMIT = 227 * 1024  # bytes of shared memory that one block may have on sm_90
REGISTER_FILE = 65_536  # 32-bit registers of a multiprocessor: bounds the blocks that run at once
_H200 = SimpleNamespace(name="NVIDIA H200", multi_processor_count=132, major=9, minor=0, L2_cache_size=50 * 2**20)


class Launch(NamedTuple):
    """One kernel as one launch compiles it."""

    module: str  # last part of its name
    kernel: str
    grid: tuple[int, ...]
    warps: int
    stages: int
    registers: int  # of a thread
    stack: int  # bytes of a thread in local memory: what did not fit into registers was spilled there
    shared: int  # bytes of a block
    dots: int  # tile products in the source
    wgmma: int  # warp-group products (sm_90's full-rate tensor cores) in the PTX
    mma: int  # older tensor-core products, at about half that rate

    @property
    def blocks(self) -> int:
        """Blocks that run at once on a multiprocessor, as far as registers and shared memory decide."""
        by_registers = REGISTER_FILE // (self.registers * 32 * self.warps)
        by_shared = (SHARED_LIMIT + 1024) // (self.shared + 1024)
        return min(by_registers, by_shared, 64 // self.warps)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor of this shape without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


@contextmanager
def hopper() -> Iterator[None]:
    """Let code that asks for the GPU be told of an H200: nothing is launched on it."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    stand_in = mock.Mock()
    stand_in.get_current_target.return_value = GPUTarget("cuda", 90, 32)
    stand_in.get_current_device.return_value = 0
    stand_in.get_current_stream.return_value = 0
    before = driver._active
    driver.set_active(stand_in)
    try:
        with (
            mock.patch.object(torch.cuda, "get_device_properties", return_value=_H200),
            mock.patch.object(torch.cuda, "device", return_value=nullcontext()),
        ):
            yield
    finally:
        driver._active = before


@contextmanager
def compiled_launches() -> Iterator[list[Launch]]:
    """Compile every kernel that is launched inside for sm_90, instead of launching it."""
    import triton
    from triton.runtime.jit import JITFunction

    assert not triton.knobs.runtime.interpret, "start the process without TRITON_INTERPRET"
    launches: list[Launch] = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if callable(grid):
            grid = grid(dict(zip(self.arg_names, args, strict=False)) | kwargs)
        module = self.fn.__module__.rpartition(".")[2]
        launches.append(_measured(kernel, module, tuple(int(size) for size in grid)))
        return kernel

    with hopper(), mock.patch.object(JITFunction, "run", compile_only):
        yield launches


def _measured(kernel, module: str, grid: tuple[int, ...]) -> Launch:
    usage = _resource_usage(kernel.asm["cubin"])
    return Launch(
        module=module,
        kernel=kernel.metadata.name,
        grid=grid,
        warps=kernel.metadata.num_warps,
        stages=kernel.metadata.num_stages,
        registers=usage["REG"],
        stack=usage["STACK"] + usage["LOCAL"],
        shared=kernel.metadata.shared,
        dots=len(re.findall(r"= tt\.dot ", kernel.asm["ttir"])),
        wgmma=kernel.asm["ptx"].count("wgmma.mma_async"),
        mma=kernel.asm["ptx"].count("mma.sync.aligned"),
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL, as `cuobjdump`, which comes with Triton, reads them from the machine code."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def table(launches: list[Launch]) -> str:
    """The launches as a Markdown table."""
    columns = (*Launch._fields, "blocks")
    rows = [[str(getattr(launch, column)) for column in columns] for launch in launches]
    return "\n".join(
        ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        + ["| " + " | ".join(row) + " |" for row in rows]
    )
