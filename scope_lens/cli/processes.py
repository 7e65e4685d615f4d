"""The processes that torchrun started for one command, and how they share its work."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def is_first() -> bool:
    """Say whether this process says and writes what is said and written once."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def sharing(*, data_parallel: int, latent_parallel: int, device: str | None) -> "Generator[DeviceMesh | None]":
    """Give the mesh over all processes until the block ends; None for a single one.

    Args:
        data_parallel: Processes that share the rows of a batch.
        latent_parallel: Processes that share the latents.
        device: "cpu", "cuda", or None for a GPU a process where there are any.

    Raises:
        ValueError: Another number of processes was started, there are fewer GPUs than processes on this machine, or
            one device is named for several processes.
    """
    started, asked = int(os.environ.get("WORLD_SIZE", "1")), data_parallel * latent_parallel
    if min(data_parallel, latent_parallel) < 1 or asked != started:
        raise ValueError(
            f"--data-parallel {data_parallel} and --latent-parallel {latent_parallel} are the work of {asked} "
            f"process{'es' if asked != 1 else ''}, and {started} {'were' if started != 1 else 'was'} started. Start "
            f"them with: torchrun --nproc-per-node {max(asked, 1)} -m scope_lens.cli train ..."
        )
    if asked == 1:
        yield None
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"--device {device} is one device, and each process takes its own; leave it out.")
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda":
        local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= there:
            raise ValueError(
                f"This machine has {there} GPU{'s' if there != 1 else ''}, and torchrun started more processes on it; "
                f"start {there} with --nproc-per-node, or pass --device cpu."
            )
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    yield init_device_mesh(kind, (data_parallel, latent_parallel), mesh_dim_names=("data", "latent"))
    # After an error the others may not come here; then the end of the process is what they notice.
    dist.destroy_process_group()
