"""What `torch.optim.Adam` remembers of each parameter, by the parameter's name.

    adam.W_enc.step, adam.W_enc.exp_avg, adam.W_enc.exp_avg_sq, ...

These are the names in a checkpoint, whatever made the updates.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def adam_state(adam: torch.optim.Adam, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the state by name; empty before the first update.

    Args:
        adam: The optimiser.
        parameters: What it updates, by name.
    """
    return {
        f"adam.{name}.{key}": value
        for name, parameter in parameters.items()
        for key, value in adam.state[parameter].items()
    }


def load_adam_state(adam: torch.optim.Adam, parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Take up what `adam_state` gave.

    Args:
        adam: The optimiser.
        parameters: What it updates, by name.
        state: Holds their state, and may hold more.
    """
    for name, parameter in parameters.items():
        keys = [key for key in state if key.startswith(f"adam.{name}.")]
        adam.state[parameter] = {key.rsplit(".", 1)[1]: _beside(parameter, state[key]) for key in keys}


def _beside(parameter: Tensor, value: Tensor) -> Tensor:
    """A copy in the memory layout of the parameter: Adam's fused implementation goes through both in one order."""
    if value.shape != parameter.shape:
        return value.clone().to(parameter.device)
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
