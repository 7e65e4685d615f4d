"""Where results go besides the caller's loop: a file of JSON lines, Weights & Biases, TensorBoard.

A log is a callable that takes a `StepResult`. The file is the run's own: `Trainer` writes `folder/log.jsonl`, and a run
that is taken up again cuts it back to the checkpoint, so that it reads as if the run had never been broken off. The
other two are imported when they are made, and given to `Trainer(log=...)`:

    Trainer(configs, folder=folder, log=[TensorboardLog(folder / "tensorboard")])
"""

import errno
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scope_lens.evaluation import EvalResult
from scope_lens.training.step_result import StepResult

LOG_NAME = "log.jsonl"
_FLOATS = ("loss", "fvu", "l0", "dead", "tokens_per_second")


Log = Callable[[StepResult], None]


class JsonLog:
    """Appends one line a result to a file, unbuffered.

    Args:
        path: The file.
        size: Bytes of it that count, and what stands behind is cut off; None for a new log.

    Raises:
        FileExistsError: A new log would overwrite a file that is there.
        ValueError: The file has fewer bytes than `size`.
    """

    def __init__(self, path: Path, *, size: int | None) -> None:
        found = path.stat().st_size if path.exists() else 0
        if size is None and found:
            raise FileExistsError(f"{path} is there already and no checkpoint belongs to it; choose another folder.")
        size = size or 0
        if found < size:
            raise ValueError(
                f"{path} has {found} bytes and had {size} when the checkpoint was written: its lines up to there are "
                "gone. Put the file back, or go on from a copy of the folder that has it."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        self._file.truncate(size)
        self.size = size

    def __call__(self, result: StepResult, /) -> None:
        """Append one line.

        Raises:
            OSError: The disk is full or cannot be written.
        """
        fields = asdict(result)
        if result.evaluation is None:
            del fields["evaluation"]
        else:
            fields["evaluation"] = json.loads(result.evaluation.to_json())
        for name in _FLOATS:
            # JSON has no NaN and no infinity; spelt as EvalResult.to_json spells them, float() reads them back.
            if not math.isfinite(fields[name]):
                fields[name] = json.dumps(fields[name])
        line = json.dumps(fields, allow_nan=False).encode() + b"\n"
        try:
            written = self._file.write(line)
            if written < len(line):
                raise OSError(errno.ENOSPC, f"no space left, {written} of {len(line)} bytes fit")  # noqa: TRY301
        except OSError as error:
            raise OSError(
                f"{self._file.name} could not be written ({error}). The last checkpoint is whole: make room, then go "
                "on with Trainer.resume."
            ) from error
        self.size += len(line)

    def close(self) -> None:
        """Close the file; it is whole at any time."""
        self._file.close()


def read_log(path: str | Path) -> list[StepResult]:
    """Read the results in a run's `log.jsonl`, in the order they were made.

    A last line without its end, which a killed run leaves, is not counted.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is no result.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a Trainer with a folder writes {LOG_NAME} there.")
    results: list[StepResult] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            fields: dict[str, Any] = json.loads(line)
            fields |= {name: float(fields[name]) for name in _FLOATS}
            if "evaluation" in fields:
                fields["evaluation"] = EvalResult.from_json(json.dumps(fields["evaluation"]))
            results.append(StepResult(**fields))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{path}, line {number} is no result of a Trainer ({type(error).__name__}: {error})."
            ) from None
    return results


class WandbLog:
    """Records results in a run of Weights & Biases, one set of curves a dictionary.

    Args:
        project: Name of the project.
        settings: Passed to `wandb.init`, e.g. `mode="offline"`, `dir=...`, `name=...`, `id=...` with `resume="must"`.

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(self, project: str = "scope_lens", **settings: Any) -> None:
        try:
            import wandb
        except ImportError:
            raise ImportError(_missing("WandbLog", "wandb")) from None
        self.run: Any = wandb.init(project=project, **settings)

    def __call__(self, result: StepResult, /) -> None:
        """Record one result."""
        self.run.log({f"{result.name}/{name}": value for name, value in scalars(result).items()}, step=result.step)

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


class TensorboardLog:
    """Writes results as TensorBoard's event files, one set of curves a dictionary.

    Args:
        folder: Where the files go.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ImportError(_missing("TensorboardLog", "tensorboard")) from None
        self._writer: Any = SummaryWriter(str(folder))

    def __call__(self, result: StepResult, /) -> None:
        """Write one result."""
        for name, value in scalars(result).items():
            self._writer.add_scalar(f"{result.name}/{name}", value, result.step)

    def close(self) -> None:
        """Write what is still in memory and close the files."""
        self._writer.close()


def scalars(result: StepResult) -> dict[str, float]:
    """Give the numbers of a result by name, those of its evaluation below `held_out/`."""
    numbers = {name: float(getattr(result, name)) for name in _FLOATS}
    if result.evaluation is not None:
        for name in ("delta_loss", "loss_recovered", "kl"):
            numbers[f"held_out/{name}"] = float(getattr(result.evaluation, name))
        for name in ("fvu", "l0", "dead"):
            (numbers[f"held_out/{name}"],) = getattr(result.evaluation, name).values()
    return numbers


def _missing(name: str, package: str) -> str:
    return f"{name} needs {package}, which is not installed: pip install 'scope-lens[train]'."
