"""Numbers that updates leave on the device, fetched together and checked.

On several ranks each one's numbers are shares; they are summed in one go when they are fetched, and all ranks get the
same. On a GPU the host runs ahead of the device and waits whenever it reads a number. So an update's loss, errors and
checks stay where they are until a result is due, and then all of them come over in one transfer.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from scope_lens.training.learner import Learner
from scope_lens.training.losses import LossParts
from scope_lens.training.ranks import ALONE, Ranks
from scope_lens.training.shared_rows import Batch


class Reading(NamedTuple):
    """What is known of one update.

    Attributes:
        loss: What was minimised, normalised units.
        fvu: Squared error over the squared distance from the batch's mean.
        l0: Mean number of active latents of a row.
    """

    loss: float
    fvu: float
    l0: float


class _Noted(NamedTuple):
    step: int
    which: int
    learner: Learner
    numbers: tuple[Tensor, ...]


class Readings:
    """Collects the numbers of updates until they are read.

    Args:
        names: Of the dictionaries, for errors.
        ranks: Whose shares these are.
    """

    def __init__(self, names: tuple[str, ...], *, ranks: Ranks = ALONE) -> None:
        self._names = names
        self._ranks = ranks
        self._noted: list[_Noted] = []

    def note(self, index: int, learner: Learner, parts: LossParts, batch: Batch) -> None:
        """Keep the numbers of an update that `learner` has just made on `batch`."""
        reads, writes = learner.cfg.hook_in, learner.cfg.hook_out
        # What an update has only launched is not final, so nothing is made of it before it is read.
        numbers = (parts.loss, parts.squared_error, parts.l0, batch.spread(writes), batch.sum(reads))
        self._noted.append(_Noted(learner.step, index, learner, numbers))

    def read(self, *, remedy: str) -> dict[int, Reading]:
        """Fetch everything noted so far, and give what is known of each dictionary's last update.

        Args:
            remedy: Last sentence of the error.

        Raises:
            ValueError: Activations or a loss are not finite, in any of these updates.
        """
        if not self._noted:
            return {}
        noted, self._noted = self._noted, []
        # In the order of the dictionaries: on several ranks, what is made again is made together.
        for learner in dict.fromkeys(update.learner for update in noted):
            learner.settle()
        found: dict[int, Reading] = {}
        numbers = torch.stack([torch.stack(update.numbers) for update in noted])
        table = self._ranks.sum_over_rows_(numbers).tolist()
        for (step, index, learner, _), (loss, error, l0, spread, total) in zip(noted, table, strict=True):
            cfg = learner.cfg
            for site, number in ((cfg.hook_in, total), (cfg.hook_out, spread)):
                if not math.isfinite(number):
                    raise ValueError(
                        f"The activations at {site!r} are not finite in the batch of step {step}. Harvest again with "
                        f"the model in float32 or bfloat16. {remedy}"
                    )
            if not math.isfinite(loss):
                raise ValueError(
                    f"The loss of {self._names[index]} at {cfg.hook_out!r} is {loss} at step {step}; lower the "
                    f"learning rate. {remedy}"
                )
            variance = spread / learner.scale**2
            fvu = error / variance if variance else math.inf if error else math.nan
            found[index] = Reading(loss, fvu, l0)
        return found
