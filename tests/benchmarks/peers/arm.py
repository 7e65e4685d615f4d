"""What every arm of bench_training_peers.py shares: rows in, dictionaries out.

Runs in each peer's own virtual environment, so it needs torch and NumPy only.

    python <peer>_train.py plan.json     trains the plan's runs that have no file yet

A plan names the files of the rows, the row numbers of every batch, the width, and the runs. A run becomes
`<folder>/<name>.npz`: W_enc, b_enc, W_dec, b_dec and a threshold or k, on raw activations, with the peer's own
reconstruction of some held-out rows beside them, so that the caller can see that it computes the same dictionary.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CHECKED = 512  # held-out rows that the peer reconstructs itself


class Arm(NamedTuple):
    """One run of one peer.

    Attributes:
        step: One update on raw rows.
        export: Arrays of the inference form on raw activations.
        reconstruct: The peer's own reconstruction of raw rows; called after `export`.
    """

    step: Callable[[Tensor], object]
    export: Callable[[], dict[str, np.ndarray]]
    reconstruct: Callable[[Tensor], Tensor]


def main(make: Callable[[dict, dict, Tensor], Arm]) -> None:
    """Do what the command line says.

    Args:
        make: (plan, run, first rows) -> Arm. The first rows are for whatever a peer measures before it trains.
    """
    plan = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    rows, order = np.load(plan["rows"], mmap_mode="r"), np.load(plan["order"], mmap_mode="r")

    def batch(i: int) -> Tensor:
        return torch.from_numpy(rows[order[i]])

    first = torch.cat([batch(i) for i in range(min(100, len(order)))])
    held_out = torch.from_numpy(np.load(plan["held_out"])[:CHECKED])
    for run in plan["runs"]:
        file = Path(plan["folder"]) / f"{run['name']}.npz"
        if file.exists():
            continue
        torch.manual_seed(plan["seed"])
        arm = make(plan, run, first)
        start = time.process_time()
        for i in range(plan["steps"]):
            arm.step(batch(i))
        seconds = time.process_time() - start
        arrays = arm.export()
        with torch.no_grad():
            arrays["reconstruction"] = arm.reconstruct(held_out).numpy()
        part = file.with_suffix(".part.npz")
        np.savez(part, **arrays, seconds=seconds)
        part.replace(file)
        print(run["name"], f"{seconds:.0f} CPU seconds", file=sys.stderr, flush=True)
