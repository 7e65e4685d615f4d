"""Which kernels a run takes: Triton's on a CUDA GPU, torch's own operations elsewhere."""

from importlib.util import find_spec
from typing import Literal, get_args

import torch

KernelChoice = Literal["auto", "eager", "triton"]


def resolve(choice: str, device: torch.device) -> Literal["eager", "triton"]:
    """Say which kernels a run on `device` takes.

    Args:
        choice: "auto" takes Triton's kernels on CUDA and torch's own operations elsewhere.
        device: Where the dictionaries are.

    Raises:
        ValueError: Triton's kernels are asked for and cannot run there, or the name is unknown.
    """
    if choice not in get_args(KernelChoice):
        raise ValueError(f"kernels={choice!r} is unknown; expected {', '.join(map(repr, get_args(KernelChoice)))}.")
    found = obstacle(device)
    if choice == "triton" and found:
        raise ValueError(f"kernels='triton' cannot run here: {found[0]}. {found[1]}, or pass kernels='auto'.")
    return "eager" if choice == "eager" or found else "triton"


def obstacle(device: torch.device) -> tuple[str, str] | None:
    """Say what stands in the way of Triton's kernels, and the remedy; None where nothing does."""
    if device.type != "cuda":
        found = "there is a CUDA device" if torch.cuda.is_available() else "torch finds no CUDA device"
        return (
            f"the dictionaries are on {device.type!r} and the kernels need CUDA ({found})",
            "Pass device='cuda' on a machine with an NVIDIA GPU and PyTorch built for it",
        )
    if find_spec("triton") is None or find_spec("triton.tools.tensor_descriptor") is None:
        return (
            "Triton 3.4 or newer is not installed",
            "Install a PyTorch for CUDA from 2.8 on, which brings it",
        )
    return None
