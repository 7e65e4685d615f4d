"""dictionary_learning's JumpReLU trainer; see arm.py.

Its package imports nnsight and a language model's tools on the way in. Only the trainer's mathematics is wanted, so the
package is entered by a bare module of its name that knows its folder.
"""

import importlib.util
import sys
import types

import numpy as np
from arm import Arm, main
from torch import Tensor

package = types.ModuleType("dictionary_learning")
package.__path__ = list(importlib.util.find_spec("dictionary_learning").submodule_search_locations)
sys.modules["dictionary_learning"] = package

from dictionary_learning.trainers.jumprelu import JumpReluTrainer  # noqa: E402


def make(plan: dict, run: dict, first: Tensor) -> Arm:
    trainer = JumpReluTrainer(
        steps=plan["steps"], activation_dim=first.shape[1], dict_size=plan["width"], layer=0, lm_name="", seed=None,
        **run["trainer"],
    )  # fmt: skip
    # Unit mean squared norm, as trainSAE(normalize_activations=True) makes it.
    scale = float(first.pow(2).sum(-1).mean().sqrt())
    steps = iter(range(2**62))

    def step(x: Tensor) -> None:
        trainer.update(next(steps), x / scale)

    def export() -> dict[str, np.ndarray]:
        trainer.ae.scale_biases(scale)
        arrays = {name: value.detach().numpy() for name, value in trainer.ae.state_dict().items()}
        # Its encoder has a ReLU behind the jump, so that a threshold below zero is one of zero.
        return arrays | {"threshold": arrays["threshold"].clip(min=0)}

    return Arm(step, export, trainer.ae)


if __name__ == "__main__":
    main(make)
