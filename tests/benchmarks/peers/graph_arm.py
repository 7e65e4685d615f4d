"""What both arms of bench_graph.py share: work on request, timed inside the process that does it.

Runs in the peer's own virtual environment too, so it needs torch and safetensors only.

    python <package>_graph.py <folder>

`<folder>` holds plan.json, the weights and the tokenizer. Standard input gives one word a line ("attribute", "prune",
"export", "save"); each is answered by one line of JSON: wall and processor seconds, and the peak of memory meanwhile.
The caller lets the arms take turns.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM

LATENT, ERROR, TOKEN, LOGIT = range(4)  # first column of a saved graph's nodes; then layer, position, index


class GraphArm(NamedTuple):
    """One package at work on one prompt.

    Attributes:
        attribute: Make the graph, and forget the one before.
        prune: Prune the graph made last.
        export: Write what `prune` gave as JSON into this folder.
        result: The graph and what is left of it after pruning, as named tensors; see `bench_graph.compare`.
    """

    attribute: Callable[[], object]
    prune: Callable[[], object]
    export: Callable[[Path], object]
    result: Callable[[], dict[str, Tensor]]


def hf_model(folder: Path, plan: dict) -> Gemma2ForCausalLM:
    """The random Gemma 2, the same whatever the version of transformers."""
    with torch.device(plan["device"]):
        model = Gemma2ForCausalLM(Gemma2Config(**plan["config"]))
    state = load_file(folder / "model.safetensors", device=plan["device"])
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], []), (missing, unexpected)  # tied to the embedding
    return model.eval()


def peak_mib(device: str) -> float:
    """Peak of memory since `forget_peak`: resident memory on the CPU, allocated memory on a GPU."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def forget_peak(device: str) -> None:
    gc.collect()
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.cuda.reset_peak_memory_stats()


def measured(work: Callable[[], object], device: str) -> dict[str, float]:
    forget_peak(device)
    start, cpu = time.perf_counter(), time.process_time()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return {
        "wall": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
        "peak_mib": peak_mib(device),
    }


def main(make: Callable[[Path, dict], GraphArm], packages: tuple[str, ...]) -> None:
    """Answer requests until standard input ends.

    Args:
        make: (folder, plan) -> GraphArm.
        packages: Whose versions the page names.
    """
    folder = Path(sys.argv[1])
    plan = json.loads((folder / "plan.json").read_text())
    torch.set_num_threads(plan["threads"])
    # What a library prints goes to standard error; answers alone to standard output.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content: dict) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    arm = make(folder, plan)
    forget_peak(plan["device"])
    answer({"versions": {name: version(name) for name in packages}, "held_mib": peak_mib(plan["device"])})
    own = folder / Path(sys.argv[0]).stem
    own.mkdir(exist_ok=True)
    work = {"attribute": arm.attribute, "prune": arm.prune, "export": lambda: arm.export(own)}
    for line in sys.stdin:
        word = line.strip()
        if word == "save":
            tensors = {name: tensor.contiguous().cpu() for name, tensor in arm.result().items()}
            save_file(tensors, own / "graph.safetensors")
            answer({"file": str(own / "graph.safetensors")})
        else:
            answer(measured(work[word], plan["device"]))
