"""Updates that the host has launched and whose counts it has not seen yet.

On a GPU the host runs ahead: it launches an update, has the update's few counts copied into its own memory, and goes
on. It looks at them a fixed number of updates later, when they have long arrived, so that the device never waits.

1. `Counts` are copied behind the update's kernels, without waiting.
2. `InFlight` holds what an update needs to be made again: it may turn out that nothing of it was applied.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from scope_lens.training.losses import LossParts

LAG = 2  # updates that the host may be ahead


class Counts:
    """Some integers on their way from the device to the host.

    Args:
        numbers: int64, on any device.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if numbers.device.type == "cuda":
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._host = numbers.clone()

    def read(self) -> list[int]:
        """Give the integers, and wait if they have not arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()


@dataclass
class InFlight:
    """An update that has been launched.

    Attributes:
        step: Updates made before it.
        batch: Its rows, normalised.
        parts: Where its loss goes; what stands there is final once the update has landed.
        counts: What `fused_update.launch` counts, and whether updates have been halted.
        again: Whether it had been halted and is made again.
    """

    step: int
    batch: tuple[Tensor, Tensor]
    parts: LossParts
    counts: Counts | None = None
    again: bool = False
