"""What the progress bar of a run shows."""

from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from scope_lens.training.step_result import StepResult


def show(bar: "tqdm[Any]", results: Sequence[StepResult]) -> None:
    """Move the progress bar; with several dictionaries it shows the range of each number.

    Args:
        bar: Of the run.
        results: Of the step that was made.
    """
    if results and not bar.disable:
        shown: list[str] = []
        for label, name, form in (
            ("loss", "loss", ".3g"),
            ("L0", "l0", ".1f"),
            ("FVU", "fvu", ".3f"),
            ("tokens/s", "tokens_per_second", ",.0f"),
        ):
            values = [float(getattr(result, name)) for result in results]
            ends = dict.fromkeys(format(value, form) for value in (min(values), max(values)))
            shown.append(f"{label} {' to '.join(ends)}")
        bar.set_postfix_str(", ".join(shown), refresh=False)
    bar.update()
