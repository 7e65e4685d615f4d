"""What checking a file costs beside reading it: `python tests/benchmarks/bench_load.py`.

A `params.npz` of 2304 x 16384 (302 MB, the size of the 16k residual dictionaries of Gemma 2 2B) in the page cache:

1. time of `read_npz`, every check included, beside `np.load` and `torch.from_numpy`, interleaved in one process;
2. growth of the resident memory at its peak beside the file's size, each arm in a fresh process (Linux only: the peak
   is reset through /proc/self/clear_refs before the load).
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from arms import interleaved, ratio, write

from scope_lens.releases import read_npz

BASELINE = "np.load + from_numpy"
GOALS = {BASELINE: "", "read_npz, float32": "1.2x time, 1.05x peak", "read_npz, bfloat16": "0.6x peak + one array"}
NOTES = """A {d_in} x {d_sae} params.npz of {size:.0f} MB, in the page cache. `read_npz` checks names, dtypes, shapes,
sizes, the archive's checksums and that every number is finite. The peak is the growth of the resident memory in a fresh
process."""

D_IN, D_SAE = 2304, 16384


def write_file(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    np.savez(
        folder / "params.npz",
        W_enc=rng.standard_normal((D_IN, D_SAE), dtype=np.float32),
        W_dec=rng.standard_normal((D_SAE, D_IN), dtype=np.float32),
        b_enc=rng.standard_normal(D_SAE, dtype=np.float32),
        b_dec=rng.standard_normal(D_IN, dtype=np.float32),
        threshold=rng.uniform(size=D_SAE).astype(np.float32),
    )
    return folder / "params.npz"


def plain(file: Path) -> dict[str, torch.Tensor]:
    with np.load(file, allow_pickle=False) as archive:
        return {name: torch.from_numpy(archive[name]) for name in archive.files}


def arms(file: Path) -> dict[str, Callable[[], object]]:
    site = {"hook_in": "blocks.20.hook_resid_post", "hook_out": "blocks.20.hook_resid_post"}
    return {
        BASELINE: lambda: plain(file),
        "read_npz, float32": lambda: read_npz(file, **site),
        "read_npz, bfloat16": lambda: read_npz(file, **site, dtype=torch.bfloat16),
    }


def memory_kib(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(field)))


def peak_growth(arm: str, file: Path) -> int:
    """Bytes by which the resident memory of this process grows at most while the arm runs."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:  # a small file first: code and buffers that any load needs
        np.savez(Path(folder) / "params.npz", **{name: array[..., :4] for name, array in small().items()})
        arms(Path(folder) / "params.npz")[arm]()
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_kib("VmRSS")
    kept = arms(file)[arm]()
    peak = memory_kib("VmHWM")
    del kept
    return 1024 * (peak - before)


def small() -> dict[str, np.ndarray]:
    one = np.ones(4, np.float32)
    return {"W_enc": np.ones((4, 4), np.float32), "W_dec": np.ones((4, 4), np.float32), "b_enc": one, "b_dec": one,
            "threshold": one}  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = write_file(Path(folder))
        size = file.stat().st_size
        seconds = interleaved(arms(file), rounds=15)
        rows = []
        for arm in seconds:
            command = [sys.executable, __file__, arm, str(file)]
            growth = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            rows.append(
                {
                    "arm": arm,
                    "median ms": round(1e3 * sorted(seconds[arm])[len(seconds[arm]) // 2]),
                    **ratio(seconds, arm, BASELINE),
                    "peak over the file": round(growth / size, 3),
                    "goal": GOALS[arm],
                }
            )
    write("load", "Loading a dictionary", rows, notes=NOTES.format(d_in=D_IN, d_sae=D_SAE, size=size / 1e6))


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(peak_growth(sys.argv[1], Path(sys.argv[2])))
    else:
        main()
