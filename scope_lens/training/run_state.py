"""What a checkpoint holds of a run: its dictionaries with their optimisers, its readers, and what describes it."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scope_lens.training.checkpoint import Checkpoint, differences
from scope_lens.training.config import TrainConfig
from scope_lens.training.kernels.kernel_set import Kernels
from scope_lens.training.learner import Learner
from scope_lens.training.ranks import Ranks
from scope_lens.training.shared_rows import Group


def run_tensors(
    learners: Sequence[Learner], groups: Sequence[Group], *, names: Sequence[str], remedy: str
) -> dict[str, Tensor]:
    """Give the state of every learner and reader by name; on several ranks, this rank's part.

    Args:
        learners: Of the run.
        groups: Of the run.
        names: Of the dictionaries, for the error.
        remedy: Last sentence of the error.

    Raises:
        ValueError: A number is not finite.
    """
    tensors: dict[str, Tensor] = {}
    for index, learner in enumerate(learners):
        own = learner.state()
        for name, tensor in own.items():
            if tensor.is_floating_point() and tensor.numel() and not _all_finite(tensor):
                raise ValueError(
                    f"{name} of {names[index]} is not finite after step {learner.step}; lower the learning rate. "
                    f"{remedy}"
                )
        tensors |= {f"learner.{index}.{name}": tensor for name, tensor in own.items()}
    for group in groups:
        tensors |= {f"reader.{group.batch_size}.{name}": t for name, t in group.reader.state().items()}
    return tensors


def learner_shapes(learners: Sequence[Learner]) -> list[dict[str, Any]]:
    """Give what `learners_of` needs to make them again, as JSON holds it."""
    return [
        {"d_in": s.cfg.d_in, "d_out": s.cfg.d_out, "scale": learner.scale, "model": s.cfg.model}
        for learner in learners
        for s in (learner.sae,)
    ]


def learners_of(
    checkpoint: Checkpoint,
    configs: Sequence[TrainConfig],
    *,
    device: torch.device,
    ranks: Ranks,
    kernels: Kernels | None = None,
) -> list[Learner]:
    """Make the learners of a checkpoint again, in the state that it holds.

    Args:
        checkpoint: This rank's part.
        configs: Of the run.
        device: Where the dictionaries go.
        ranks: Which rows and latents this process has.
        kernels: As for `Learner`; they may be others than before.

    Raises:
        KeyError: A tensor is missing.
        ValueError: A tensor has another shape.
    """
    learners: list[Learner] = []
    for index, (cfg, shape) in enumerate(zip(configs, checkpoint.header["learners"], strict=True)):
        learner = Learner(cfg, **shape, device=device, ranks=ranks, kernels=kernels)
        learner.load_state(checkpoint.below(f"learner.{index}."))
        learners.append(learner)
    return learners


@contextmanager
def state_of(path: Path) -> Generator[None]:
    """Turn what goes wrong with the state in a checkpoint into an error that says so.

    Args:
        path: The checkpoint.

    Raises:
        ValueError: The state is not one that this version knows.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is whole but is no state of a run that this version can take up ({type(error).__name__}: "
            f"{error}). Resume it with the version that wrote it, or train anew."
        ) from None


def refuse_others(folder: Path, *, kept: Sequence[TrainConfig], asked: Sequence[TrainConfig]) -> None:
    """Compare the configs of the run in a folder with those asked for.

    Args:
        folder: Of the run.
        kept: Its configs.
        asked: Of the call.

    Raises:
        ValueError: They differ; the message says in what.
    """
    if found := differences(kept, asked):
        raise ValueError(f"{folder} holds a run of other configs: {found}. Give the same, or choose another folder.")


def _all_finite(tensor: Tensor) -> bool:
    low, high = tensor.aminmax()
    return bool(torch.isfinite(low) and torch.isfinite(high))
