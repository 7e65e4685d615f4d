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


def interleaved(
    arms: dict[str, Callable[[], object]], *, rounds: int = 15, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each arm in each round, after one round that does not count."""
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    with torch.no_grad():
        for turn in range(rounds + 1):
            for name, run in arms.items():
                start = clock()
                run()
                if turn:
                    seconds[name].append(clock() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], arm: str, baseline: str) -> dict[str, float]:
    """Median over rounds of arm / baseline, with the quartiles of that ratio."""
    pairs = sorted(a / b for a, b in zip(seconds[arm], seconds[baseline], strict=True))
    low, middle, high = statistics.quantiles(pairs, n=4)
    return {"ratio": round(middle, 3), "low": round(low, 3), "high": round(high, 3)}


def bare_codecs(saes: list, x: torch.Tensor) -> None:
    """Encode, compare and decode in bare torch: the sums that a splice cannot do without."""
    for sae in saes:
        pre = x @ sae.W_enc + sae.b_enc
        acts = pre * (pre > sae.threshold)
        acts @ sae.W_dec + sae.b_dec


def fill_randomly(sae, *, density: float, std: float = 1.0) -> None:
    """Random weights, and thresholds at which latents fire with this probability on normal input of this deviation."""
    with torch.no_grad():
        sae.W_enc.normal_(std=sae.W_enc.shape[0] ** -0.5)
        sae.W_dec.normal_(std=sae.W_enc.shape[0] ** -0.5)
        sae.threshold.fill_(std * float(torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - density))))


def splice_rows(random_model: Callable, random_sae: Callable, run: Callable) -> list[dict]:
    """Rows for one package: 4 dictionaries, the same with the error term, and 42 small ones.

    Args:
        random_model: (d_model, layers) -> model of 4,096 words.
        random_sae: (layer, d, d_sae) -> residual dictionary, to be filled.
        run: (model, tokens, saes, use_error_term) -> None: one spliced forward pass, attaching included.
    """
    rows = []
    sizes = ((768, 8, 8192, 0.5, 7), (768, 8, 8192, 0.01, 7), (256, 8, 2048, 0.03, 25))
    for d, layers, d_sae, density, rounds in sizes:
        model, tokens, x = random_model(d, layers), torch.randint(3, 4096, (4, 128)), torch.randn(4, 128, d)
        saes = [random_sae(layer, d, d_sae) for layer in range(0, layers, layers // 4)]
        for layer, sae in zip(range(0, layers, layers // 4), saes, strict=True):
            name = f"blocks.{layer}.hook_resid_post"
            _, cache = model.run_with_cache(tokens, names_filter=name)
            fill_randomly(sae, density=density, std=float(cache[name].detach().std()))
        seconds = interleaved({
            "plain": lambda m=model, t=tokens, s=saes, x=x: (m(t), bare_codecs(s, x)),
            "spliced": lambda m=model, t=tokens, s=saes: run(m, t, s, False),
            "error": lambda m=model, t=tokens, s=saes: run(m, t, s, True),
        }, rounds=rounds)  # fmt: skip
        size = f"d {d}, {layers} layers, {d_sae} latents, 4 x 128 tokens, {density:.0%} active"
        rows += [
            {"work": f"forward with 4 SAEs ({size})", "baseline": "plain forward + bare codecs"}
            | ratio(seconds, "spliced", "plain"),
            {"work": f"the same, error term, unedited ({size})", "baseline": "without error term"}
            | ratio(seconds, "error", "spliced"),
        ]
    model, tokens, x = random_model(256, 42), torch.randint(3, 4096, (1, 16)), torch.randn(1, 16, 256)
    saes = [random_sae(layer, 256, 512) for layer in range(42)]
    for sae in saes:
        fill_randomly(sae, density=0.1)
    seconds = interleaved({
        "plain": lambda: (model(tokens), bare_codecs(saes, x)),
        "spliced": lambda: run(model, tokens, saes, False),
    }, rounds=30)  # fmt: skip
    work = "42 SAEs on 42 layers (d 256, 512 latents), 1 x 16 tokens, attach included"
    rows.append({"work": work, "baseline": "plain forward + 42 bare codecs"} | ratio(seconds, "spliced", "plain"))
    return rows


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
