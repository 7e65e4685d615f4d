"""This package's learner on the same rows; see arm.py."""

import dataclasses

import numpy as np
from arm import Arm, main
from torch import Tensor

from scope_lens.training import TrainConfig
from scope_lens.training.learner import Learner


def make(plan: dict, run: dict, first: Tensor) -> Arm:
    sizes = {name: plan[name] for name in ("width", "steps", "seed")}
    cfg = TrainConfig.short_run(site="res", layer=2, **sizes, **run["preset"])
    cfg = dataclasses.replace(cfg, batch_size=plan["batch_size"])
    scale = float(first.pow(2).sum(-1).mean().sqrt())
    learner = Learner(cfg, d_in=first.shape[1], d_out=first.shape[1], scale=scale, model="embedded")

    def export() -> dict[str, np.ndarray]:
        arrays = {name: value.detach().numpy() for name, value in learner.result().named_parameters()}
        return arrays | ({"k": np.array(cfg.k)} if run["kind"] == "topk" else {})

    def reconstruct(rows: Tensor) -> Tensor:
        return learner.result()(rows)

    return Arm(lambda x: learner.update(x, x), export, reconstruct)


if __name__ == "__main__":
    main(make)
