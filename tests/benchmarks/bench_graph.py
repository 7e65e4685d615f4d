r"""An attribution graph beside circuit-tracer 0.5.0: the same weights, the same prompt, the same graph.

    python tests/benchmarks/bench_graph.py --circuit-tracer <python>

circuit-tracer needs TransformerLens 3, so it cannot be installed beside this package. Make its environment with

    pip install torch==2.13.0 && pip install transformer-lens==3.2.1 transformers==4.57.3 circuit-tracer==0.5.0

and give that environment's Python. This file

1. writes a random Gemma 2 with transcoders (graph_weights.py) to a temporary folder, or to `--work`,
2. starts one process for each package (peers/scope_lens_graph.py, peers/circuit_tracer_graph.py) and lets them take
   turns at the graph, its pruning and its JSON, each process timing itself,
3. compares the two graphs node by node and edge by edge,
4. writes docs/pages/benchmarks/graph.md and .json.

`--sizes` names the sizes; those not run keep what the record has. The size of Gemma 2 2B needs a CUDA GPU.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from arms import RESULTS, cpu_name
from graph_page import page
from graph_weights import Size, write
from safetensors.torch import load_file
from torch import Tensor

PEERS = Path(__file__).parent / "peers"
OURS, THEIRS = "scope_lens", "circuit_tracer"
WORK = ("attribute", "prune", "export")
SIZES = {
    "tiny": Size(
        layers=4, d_model=128, d_head=16, d_mlp=512, d_vocab=1024, d_sae=1024, positions=16, latents=1509, batch=32,
        repeats=12,
    ),
    "mid": Size(
        layers=12, d_model=512, d_head=64, d_mlp=2048, d_vocab=4096, d_sae=8192, positions=16, latents=7626, batch=32,
        repeats=4,
    ),
    "gemma-2-2b": Size(
        layers=26, d_model=2304, d_head=256, d_mlp=9216, d_vocab=256_000, d_sae=16_384, positions=16, latents=27_300,
        batch=64, repeats=4, device="cuda",
    ),
}  # fmt: skip


class Arm:
    """One package's process."""

    def __init__(self, name: str, python: str, folder: Path) -> None:
        script = PEERS / f"{name}_graph.py"
        self.log = folder / f"{name}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, script, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.about = self.answer()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args[1]} ended:\n{self.log.read_text()[-4000:]}")
        return json.loads(line)

    def ask(self, word: str) -> dict:
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def measure(size: Size, pythons: dict[str, str], folder: Path, threads: int) -> dict:
    """Both packages at one size: seconds and memory of every round but the first, and how far they agree."""
    write(folder, size, threads=threads)
    load = os.getloadavg()
    arms = {name: Arm(name, python, folder) for name, python in pythons.items()}
    rounds: dict[str, dict[str, list[dict]]] = {name: {word: [] for word in WORK} for name in arms}
    try:
        for turn in range(size.repeats):
            # Who goes first changes, so that neither always follows on the other's heels.
            for name in list(arms) if turn % 2 else list(arms)[::-1]:
                for word in WORK:
                    found = arms[name].ask(word)
                    if turn:
                        rounds[name][word].append({key: round(value, 4) for key, value in found.items()})
        saved = {name: load_file(arm.ask("save")["file"]) for name, arm in arms.items()}
    finally:
        for arm in arms.values():
            arm.end()
    return {
        "size": size.describe(),
        "device": torch.cuda.get_device_name() if size.device == "cuda" else cpu_name(),
        "batch": size.batch,
        "load": [round(value, 1) for value in (load[0], os.getloadavg()[0])],
        "versions": {name: arm.about["versions"] for name, arm in arms.items()},
        "held_mib": {name: round(arm.about["held_mib"]) for name, arm in arms.items()},
        "threads": threads,
        "rounds": rounds,
        "table": [row(word, rounds) for word in (*WORK, "prune and export")],
        "json_bytes": {name: (folder / f"{name}_graph" / "graph.json").stat().st_size for name in arms},
        "agreement": compare(saved[OURS], saved[THEIRS]),
    }


def row(word: str, rounds: dict[str, dict[str, list[dict]]]) -> dict:
    """Medians over the rounds, and the ratio theirs / ours of each pair of turns: median, least and greatest."""

    def of(name: str, key: str) -> list[float]:
        both = zip(*(rounds[name][part] for part in word.split(" and ")), strict=True)
        combine = max if key == "peak_mib" else sum
        return [combine(part[key] for part in parts) for parts in both]

    found: dict[str, str | float] = {"work": word}
    for key in ("wall", "cpu", "peak_mib"):
        ours, theirs = of(OURS, key), of(THEIRS, key)
        found |= {f"{key}_{OURS}": statistics.median(ours), f"{key}_{THEIRS}": statistics.median(theirs)}
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        found |= {f"{key}_ratio": statistics.median(ratios), f"{key}_low": min(ratios), f"{key}_high": max(ratios)}
    return {key: value if isinstance(value, str) else float(f"{value:.4g}") for key, value in found.items()}


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """How far two graphs agree, over the nodes that both have, matched by kind, layer, position and index.

    Args:
        ours: What `result` of the arm gave.
        theirs: Likewise.
    """
    number = {tuple(node): i for i, node in enumerate(theirs["nodes"].tolist())}
    place = torch.tensor([number.get(tuple(node), -1) for node in ours["nodes"].tolist()])
    shared, n = place >= 0, len(theirs["nodes"])

    def dense(graph: dict[str, Tensor], prefix: str, places: Tensor) -> Tensor:
        """Edges by the peer's node numbers; those at nodes of one graph alone are left out."""
        target, source = places[graph[f"{prefix}target"].long()], places[graph[f"{prefix}source"].long()]
        both = (target >= 0) & (source >= 0)
        values = graph["weight"] if not prefix else torch.ones(len(target), dtype=torch.bool)
        matrix = torch.zeros(n, n, dtype=values.dtype)
        matrix[target[both], source[both]] = values[both]
        return matrix

    a, b = dense(ours, "", place), dense(theirs, "", torch.arange(n))
    row_scale = b.abs().amax(dim=1).clamp(min=1e-30)
    activation, expected = ours["activation"][shared], theirs["activation"][place[shared]]
    known = ~expected.isnan() & ~activation.isnan()
    kept_a, kept_b = dense(ours, "kept_", place), dense(theirs, "kept_", torch.arange(n))
    mask = torch.zeros(n, dtype=torch.bool)
    mask[place[shared]] = ours["kept"][shared]
    return {
        "nodes": n,
        "nodes of one graph alone": int((~shared).sum()) + n - int(shared.sum()),
        "adjacency, relative Frobenius norm": float(f"{(a - b).norm() / b.norm():.2g}"),
        "adjacency, largest difference beside its row's largest entry": float(
            f"{((a - b).abs().amax(dim=1) / row_scale).max():.2g}"
        ),
        "activations and probabilities, largest relative difference": float(
            f"{((activation - expected).abs() / expected.abs())[known].max():.2g}"
        ),
        "nodes kept by pruning": int(theirs["kept"].sum()),
        "nodes kept in one graph alone": int((mask != theirs["kept"]).sum()),
        "edges kept by pruning": int(kept_b.sum()),
        "edges kept in one graph alone": int((kept_a != kept_b).sum()),
        "replacement score, difference": float(f"{abs(ours['scores'][0] - theirs['scores'][0]):.2g}"),
        "completeness score, difference": float(f"{abs(ours['scores'][1] - theirs['scores'][1]):.2g}"),
    }


@contextlib.contextmanager
def working_folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--circuit-tracer", required=True, help="Python of the environment with circuit-tracer")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, help="rounds, the first of which does not count; each size has its own")
    parser.add_argument("--work", type=Path, help="folder for the weights, kept; otherwise a temporary one")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the page and its record")
    given = parser.parse_args()
    pythons = {OURS: sys.executable, THEIRS: given.circuit_tracer}
    file = given.out / "graph.json"
    measured = json.loads(file.read_text())["measured"] if file.is_file() else {}
    for name in given.sizes:
        size = SIZES[name] if given.repeats is None else replace(SIZES[name], repeats=given.repeats)
        if size.device == "cuda" and not torch.cuda.is_available():
            print(f"{name}: no CUDA device here, not run. {size.describe()}. {size.needs()}")
            continue
        with working_folder(given.work and given.work / name) as folder:
            measured[name] = measure(size, pythons, folder, given.threads)
            measured[name]["date"] = datetime.now(UTC).date().isoformat()
        print(name, json.dumps(measured[name]["table"], indent=1), json.dumps(measured[name]["agreement"], indent=1))
    record = {
        "environment": {"python": platform.python_version()},
        "needs": {name: f"{size.describe()}.\n{size.needs()}" for name, size in SIZES.items() if size.device == "cuda"},
        "measured": {name: measured[name] for name in SIZES if name in measured},
    }
    file.write_text(json.dumps(record, indent=1) + "\n")
    file.with_suffix(".md").write_text(page(record))


if __name__ == "__main__":
    main()
