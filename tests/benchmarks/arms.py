"""Timing arms against each other: one process, one thread, no gradients, arms interleaved, ratios of medians.

Absolute times on a shared machine say little; the ratio of two arms that took turns says what one costs beside the
other.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

RESULTS = Path(__file__).parents[2] / "docs" / "benchmarks"


def interleaved(arms: dict[str, Callable[[], object]], *, rounds: int = 15) -> dict[str, list[float]]:
    """Seconds of each arm in each round, after one round that does not count."""
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    with torch.no_grad():
        for turn in range(rounds + 1):
            for name, run in arms.items():
                start = time.perf_counter()
                run()
                if turn:
                    seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], arm: str, baseline: str) -> dict[str, float]:
    """Median over rounds of arm / baseline, with the quartiles of that ratio."""
    pairs = sorted(a / b for a, b in zip(seconds[arm], seconds[baseline], strict=True))
    low, middle, high = statistics.quantiles(pairs, n=4)
    return {"ratio": round(middle, 3), "low": round(low, 3), "high": round(high, 3)}


def write(name: str, title: str, rows: list[dict], *, notes: str = "") -> None:
    """Write `docs/benchmarks/<name>.json` and a Markdown page beside it."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    where = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{cpu_name()}, one thread",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformer_lens": version("transformer-lens"),
        "command": f"python tests/benchmarks/bench_{name}.py",
    }
    (RESULTS / f"{name}.json").write_text(json.dumps({"environment": where, "rows": rows}, indent=2) + "\n")
    columns = list(rows[0])
    lines = [f"# {title}", "", " · ".join(f"{key}: {value}" for key, value in where.items()), ""]
    if notes:
        lines += [notes, ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row.get(column, "")) for column in columns) + " |" for row in rows]
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")


def cpu_name() -> str:
    """The processor's model name as the kernel gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
