r"""FVU at matched L0 against other trainers: the same rows in the same order, the same steps, batch and width.

    python tests/benchmarks/bench_training_peers.py all --work <folder> \
        --sae-lens <python> --dictionary-learning <python>

1. `rows`: activations of one residual layer of the embedded model, for training and from the hold-out text.
2. `tune`: every peer at one sparsity and three learning rates, with fewer steps. Ours takes its preset's.
3. `train`: every arm at four sparsities or more.
4. `report`: docs/benchmarks/training_peers.md, .json and .png. A Chromium draws the figure's own HTML.

A stage that was broken off goes on where it stopped. Each peer has a virtual environment of its own:

    pip install torch==2.13.0 transformer-lens==3.9.0 sae-lens==6.54.12
    pip install torch==2.13.0 numpy einops; pip install --no-deps dictionary-learning==0.1.0

The peers run by peers/<name>_train.py, with the settings that their documentation recommends, and the learning rate
that did best in `tune`. Everything is measured here, by one function in float64, on the inference form: JumpReLU and
TopK dictionaries are five arrays, and the peer's own reconstruction of 512 rows has to agree with them.
"""

import argparse
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import torch
from arms import RESULTS, cpu_name

from scope_lens import demo
from scope_lens.figures.axes import log_axis
from scope_lens.training import ActivationStore

ROOT = Path(__file__).resolve().parents[2]
PEERS = Path(__file__).parent / "peers"
SEPARATOR = "\n<|endoftext|>\n"
SITE = "blocks.2.hook_resid_post"
WIDTH, BATCH, STEPS, TUNE_STEPS = 1024, 1024, 800, 300
ROWS, HELD_OUT = STEPS * BATCH // 2, 16_384  # every training row is seen twice
TUNED_AT = 20  # latents
ARMS_AT_ONCE = 3  # of `tune` and `train`, one thread each


@dataclass(frozen=True)
class Arm:
    """One trainer with one kind of dictionary.

    Attributes:
        label: In the table and the figure.
        package: Whose Python and script; ours, or the name of the option that gives the Python.
        kind: jumprelu or topk.
        colour: In the figure.
        sparsities: What `settings` takes, one for each run, from few latents to many.
        tuned_at: The one of `tune`.
        learning_rates: Those of `tune`; ours has none.
        learning_rate: The one it chose.
        settings: (sparsity, steps, learning rate) -> the run's settings for the script.
        source: Where the settings come from.
    """

    label: str
    package: str
    kind: str
    colour: str
    sparsities: tuple[float, ...]
    tuned_at: float
    learning_rates: tuple[float, ...]
    learning_rate: float
    settings: Callable[[float, int, float], dict]
    source: str

    @property
    def script(self) -> Path:
        return PEERS / f"{self.package}_train.py"

    def run(self, sparsity: float, steps: int, learning_rate: float) -> dict:
        name = f"{self.package}-{self.kind}-{sparsity:g}-{learning_rate:g}"
        return {"name": name, "kind": self.kind} | self.settings(sparsity, steps, learning_rate)


def sae_lens_jumprelu(sparsity: float, steps: int, learning_rate: float) -> dict:
    sae = {
        "l0_coefficient": sparsity, "l0_warm_up_steps": steps, "jumprelu_sparsity_loss_mode": "tanh",
        "jumprelu_tanh_scale": 4.0, "jumprelu_bandwidth": 2.0, "jumprelu_init_threshold": 0.1,
        "pre_act_loss_coefficient": 3e-6,
    }  # fmt: skip
    return {"sae": sae, "trainer": {"lr": learning_rate, "lr_decay_steps": steps // 5}}


def sae_lens_topk(sparsity: float, steps: int, learning_rate: float) -> dict:
    return {"sae": {"k": int(sparsity)}, "trainer": {"lr": learning_rate, "lr_decay_steps": steps // 5}}


def dictionary_learning(sparsity: float, steps: int, learning_rate: float) -> dict:
    warm_ups = {"warmup_steps": steps // 10, "sparsity_warmup_steps": steps // 4, "decay_start": int(0.8 * steps)}
    return {"trainer": {"target_l0": sparsity, "lr": learning_rate} | warm_ups}


TARGETS = (10, 20, 35, 60)
ARMS = {
    "ours_jumprelu": Arm(
        "scope_lens JumpReLU", "scope_lens", "jumprelu", "#0072B2",
        (1.2e-2, 6e-3, 3e-3, 1.6e-3, 1.1e-3, 8e-4), 3e-3, (), 0,
        lambda sparsity, steps, rate: {"preset": {"sparsity": sparsity}},
        "`TrainConfig.short_run` as it is",
    ),
    "ours_target": Arm(
        "scope_lens JumpReLU, target L0", "scope_lens", "jumprelu", "#56B4E9", TARGETS, TUNED_AT, (), 0,
        lambda sparsity, steps, rate: {"preset": {"target_l0": sparsity}},
        "`TrainConfig.short_run(target_l0=...)` as it is",
    ),
    "ours_topk": Arm(
        "scope_lens TopK", "scope_lens", "topk", "#009E73", TARGETS, TUNED_AT, (), 0,
        lambda sparsity, steps, rate: {"preset": {"activation": "topk", "k": int(sparsity)}},
        '`TrainConfig.short_run(activation="topk")` as it is',
    ),
    "sae_lens_jumprelu": Arm(
        "sae-lens JumpReLU", "sae_lens", "jumprelu", "#D55E00",
        (0.6, 0.3, 0.15, 0.08), 2.0, (3e-3, 6e-3, 1.2e-2), 6e-3,
        sae_lens_jumprelu,
        "the tanh loss with Anthropic's settings, which its page on training recommends: tanh scale 4, bandwidth 2, "
        "initial threshold 0.1, loss of dead pre-activations 3e-6, sparsity warm-up over the whole run, last fifth of "
        "the learning rate linear to zero, `expected_average_only_in`",
    ),
    "sae_lens_topk": Arm(
        "sae-lens TopK", "sae_lens", "topk", "#E69F00", TARGETS, TUNED_AT, (3e-3, 6e-3, 1.2e-2), 6e-3,
        sae_lens_topk,
        "its defaults (auxiliary loss 1, rescaling by decoder norms) with `expected_average_only_in` and the last "
        "fifth of the learning rate linear to zero",
    ),
    "dictionary_learning": Arm(
        "dictionary_learning JumpReLU", "dictionary_learning", "jumprelu", "#CC79A7", TARGETS, TUNED_AT,
        (3e-3, 6e-3, 1.2e-2), 6e-3,
        dictionary_learning,
        "its defaults (bandwidth 0.001, penalty 1 on the squared relative distance from the target L0, norms clipped "
        "at 1), unit mean squared norm, warm-ups over a tenth and a quarter of the run, decay over the last fifth",
    ),
}  # fmt: skip


# ---- stages ----


def make_rows(work: Path, corpus: Path, store: Path | None) -> None:
    if not (work / "rows.npy").exists():
        if store is None:
            documents = corpus.read_text(encoding="utf-8").removesuffix(SEPARATOR).split(SEPARATOR)
            harvested = ActivationStore.harvest(demo.load_model(), documents, sites=SITE, rows=ROWS)
        else:
            harvested = ActivationStore.open(store)
        reader = harvested.reader([SITE], size=ROWS, seed=0)
        save(work / "rows.npy", reader.next()[SITE])
    if not (work / "held_out.npy").exists():
        harvested = ActivationStore.harvest(demo.load_model(), demo.text(), sites=SITE, rows=HELD_OUT)
        save(work / "held_out.npy", harvested.reader([SITE], size=HELD_OUT, seed=0).next()[SITE])


def save(file: Path, rows: torch.Tensor) -> None:
    part = file.with_suffix(".part.npy")
    np.save(part, rows.numpy())
    part.replace(file)


def tune(work: Path, pythons: dict[str, str]) -> None:
    runs = {
        name: [arm.run(arm.tuned_at, TUNE_STEPS, rate) for rate in arm.learning_rates]
        for name, arm in ARMS.items()
        if arm.learning_rates
    }
    train_all(work / "tune", work, pythons, runs, TUNE_STEPS)


def train(work: Path, pythons: dict[str, str]) -> None:
    runs = {name: [arm.run(s, STEPS, arm.learning_rate) for s in arm.sparsities] for name, arm in ARMS.items()}
    train_all(work / "train", work, pythons, runs, STEPS)


def train_all(folder: Path, work: Path, pythons: dict[str, str], runs: dict[str, list[dict]], steps: int) -> None:
    plans = {name: write_plan(folder, work, name, found, steps) for name, found in runs.items()}

    def one(name: str) -> None:
        command = [pythons[ARMS[name].package], ARMS[name].script, plans[name]]
        subprocess.run(command, check=True, env=environment())

    with ThreadPoolExecutor(ARMS_AT_ONCE) as pool:
        list(pool.map(one, runs))


def write_plan(folder: Path, work: Path, name: str, runs: list[dict], steps: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = len(np.load(work / "rows.npy", mmap_mode="r"))
    generator, passes = np.random.default_rng(0), math.ceil(steps * BATCH / rows)
    order = np.concatenate([generator.permutation(rows) for _ in range(passes)])[: steps * BATCH]
    np.save(folder / "order.npy", order.astype(np.int32).reshape(steps, BATCH))
    plan = folder / f"{name}.json"
    files = {"rows": work / "rows.npy", "held_out": work / "held_out.npy", "order": folder / "order.npy"}
    numbers = {"steps": steps, "batch_size": BATCH, "width": WIDTH, "seed": 0}
    content = {key: str(path.resolve()) for key, path in (files | {"folder": folder}).items()} | numbers
    plan.write_text(json.dumps(content | {"runs": runs}, indent=1))
    return plan


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


# ---- measurement ----


@torch.no_grad()
def measure(file: Path, rows: torch.Tensor) -> dict[str, float]:
    """L0, FVU and dead latents of a dictionary on held-out rows, all sums in float64.

    Raises:
        ValueError: The peer's own reconstruction is another.
    """
    with np.load(file) as arrays:
        own, seconds = torch.from_numpy(arrays["reconstruction"]).double(), float(arrays["seconds"])
        k = int(arrays["k"]) if "k" in arrays else None
        names = ("W_enc", "b_enc", "W_dec", "b_dec", *(() if k else ("threshold",)))
        W_enc, b_enc, W_dec, b_dec, *threshold = (torch.from_numpy(arrays[name]).double() for name in names)
    mean = rows.mean(0)
    error, active, fired = 0.0, 0, torch.zeros(len(b_enc), dtype=torch.bool)
    for i, x in enumerate(rows.split(4_096)):
        pre = x @ W_enc + b_enc
        if k:
            values, latents = pre.topk(k, dim=-1)
            acts = torch.zeros_like(pre).scatter_(-1, latents, values.relu())
        else:
            acts = pre * (pre > threshold[0])
        recons = acts @ W_dec + b_dec
        if i == 0:
            difference = float((recons[: len(own)] - own).norm() / (own - mean).norm())
            if difference > 1e-3:
                raise ValueError(f"{file} reconstructs otherwise here than in its own package, by {difference:.2g}.")
        error += float((x - recons).pow(2).sum())
        active += int((acts > 0).sum())
        fired |= (acts > 0).any(0)
    return {
        "l0": active / len(rows),
        "fvu": error / float((rows - mean).pow(2).sum()),
        "dead": float((~fired).double().mean()),
        "cpu_seconds": round(seconds, 1),
    }


def at_l0(points: list[dict], l0: float, *, beyond: bool = False) -> float | None:
    """FVU of a frontier at this L0, log-log between its points; beyond them None, or its end segments continued."""
    ordered = sorted((math.log(p["l0"]), math.log(p["fvu"])) for p in points)
    x = math.log(l0)
    if not (beyond or ordered[0][0] <= x <= ordered[-1][0]):
        return None
    left = next((i for i, (end, _) in enumerate(ordered[1:-1]) if x <= end), len(ordered) - 2)
    (x0, y0), (x1, y1) = ordered[left : left + 2]
    return math.exp(y0 + (y1 - y0) * (x - x0) / (x1 - x0))


def comparisons(points: dict[str, list[dict]]) -> Iterator[tuple[str, str, list[tuple[float, float]]]]:
    """(ours, peer, [(L0, our FVU / theirs)]): each of the peer's points within our range, and ours within theirs."""
    ours = [name for name in ARMS if ARMS[name].package == "scope_lens"]
    for own, peer in itertools.product(ours, [name for name in ARMS if name not in ours]):
        ratios = [(p["l0"], fvu / p["fvu"]) for p in points[peer] if (fvu := at_l0(points[own], p["l0"]))]
        ratios += [(p["l0"], p["fvu"] / fvu) for p in points[own] if (fvu := at_l0(points[peer], p["l0"]))]
        yield own, peer, sorted(ratios)


# ---- report ----


def report(work: Path, pythons: dict[str, str], chromium: str, corpus: Path, store: Path | None) -> None:
    held_out = torch.from_numpy(np.load(work / "held_out.npy")).double()
    points = {name: [] for name in ARMS}
    tuned = {name: [] for name in ARMS}
    for name, arm in ARMS.items():
        for sparsity in arm.sparsities:
            run = arm.run(sparsity, STEPS, arm.learning_rate)["name"]
            points[name].append({"sparsity": sparsity} | measure(work / "train" / f"{run}.npz", held_out))
        for rate in arm.learning_rates:
            run = arm.run(arm.tuned_at, TUNE_STEPS, rate)["name"]
            tuned[name].append({"learning_rate": rate} | measure(work / "tune" / f"{run}.npz", held_out))
    environments = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{cpu_name()}, one thread",
        "versions": {package: versions(python) for package, python in pythons.items()},
        "site": SITE, "rows": ROWS, "held_out_rows": len(held_out), "corpus": corpus.name,
        "store": store is not None,
        "width": WIDTH, "batch_size": BATCH, "steps": STEPS,
    }  # fmt: skip
    ratios = {f"{own} / {peer}": found for own, peer, found in comparisons(points)}
    result = {
        "environment": environments, "points": points, "fvu_ratios": ratios, "tuning": tuned,
    }  # fmt: skip
    (RESULTS / "training_peers.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "training_peers.md").write_text(page(environments, points, tuned))
    screenshot(figure(points), RESULTS / "training_peers.png", chromium)


def versions(python: str) -> dict[str, str]:
    code = (
        "import importlib.metadata as m, json\n"
        "names = ('torch', 'sae-lens', 'transformer-lens', 'dictionary-learning')\n"
        "print(json.dumps({d.name: d.version for d in m.distributions() if d.name in names}))"
    )
    found = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout
    return json.loads(found)


def page(where: dict, points: dict[str, list[dict]], tuned: dict[str, list[dict]]) -> str:
    packages = sorted({f"{name} {version}" for found in where["versions"].values() for name, version in found.items()})
    source = "the store that the embedded suite is trained on" if where["store"] else f"`{where['corpus']}`"
    head = f"""# Training against other trainers

date: {where["date"]} · machine: {where["machine"]} · {", ".join(packages)}

Command: `python tests/benchmarks/bench_training_peers.py all --work <folder> --sae-lens <python>
--dictionary-learning <python>{" --store <folder>" if where["store"] else ""}`

Rows of `{SITE}` of the embedded model: {where["rows"]:,} for training from
{source}, and {where["held_out_rows"]:,} of the hold-out text. All arms see the same rows in
the same order: {STEPS:,} steps of {BATCH:,} rows, {WIDTH:,} latents, float32, one seed. L0 and FVU are those of the
inference form on the held-out rows, computed by one function in float64; FVU is relative to the rows' mean.

![FVU over L0 of every arm](training_peers.png)

## Ours over theirs at matched L0

Each point of one frontier against the other frontier, interpolated log-log at its L0. Below 1 our FVU is lower.
Pairs of one kind compare trainers; the others compare TopK with JumpReLU as well.

| ours | peer | points | L0 | FVU ratio, median | lowest | highest |
|---|---|--:|--:|--:|--:|--:|"""
    lines = [head]
    for own, peer, found in comparisons(points):
        ratios = [ratio for _, ratio in found]
        if ratios:
            span = f"{found[0][0]:.0f} to {found[-1][0]:.0f}"
            numbers = f"{statistics.median(ratios):.3f} | {min(ratios):.3f} | {max(ratios):.3f}"
            lines.append(f"| {ARMS[own].label} | {ARMS[peer].label} | {len(ratios)} | {span} | {numbers} |")
    lines += ["", "## Points", "", "| arm | sparsity | L0 | FVU | dead |", "|---|--:|--:|--:|--:|"]
    for name, found in points.items():
        lines += [
            f"| {ARMS[name].label} | {p['sparsity']:g} | {p['l0']:.1f} | {p['fvu']:.4f} | {p['dead']:.3f} |"
            for p in found
        ]
    rates = {name: f", learning rate {arm.learning_rate:g}" if arm.learning_rates else "" for name, arm in ARMS.items()}
    settings = "\n".join(f"- **{arm.label}**{rates[name]}: {arm.source}." for name, arm in ARMS.items())
    lines.append(f"""
The sparsity is λ for scope_lens' JumpReLU, `l0_coefficient` for sae-lens', k for TopK, and the
target L0 for the others.

## Settings

{settings}

The peers' learning rates were compared with {TUNE_STEPS:,} steps at one sparsity. To rank runs that came out at
different L0, the last column divides by the frontier of scope_lens' JumpReLU at that L0, continued log-log beyond its
ends:

| arm | learning rate | L0 | FVU | relative |
|---|--:|--:|--:|--:|""")
    for name, found in tuned.items():
        lines += [
            f"| {ARMS[name].label} | {p['learning_rate']:g} | {p['l0']:.1f} | {p['fvu']:.4f}"
            f" | {p['fvu'] / at_l0(points['ours_jumprelu'], p['l0'], beyond=True):.2f} |"
            for p in found
        ]
    lines.append(f"""
## Speed

CPU seconds of a whole run of {STEPS:,} steps on one thread, the arms side by side on one machine: the median over the
sparsities, and rows per CPU second relative to scope_lens' JumpReLU.

| arm | CPU seconds | rows per CPU second, relative |
|---|--:|--:|""")
    medians = {name: statistics.median(p["cpu_seconds"] for p in found) for name, found in points.items()}
    lines += [
        f"| {ARMS[name].label} | {seconds:.0f} | {medians['ours_jumprelu'] / seconds:.2f} |"
        for name, seconds in medians.items()
    ]
    return "\n".join(lines) + "\n"


def figure(points: dict[str, list[dict]]) -> go.Figure:
    drawn = go.Figure()
    for name, found in points.items():
        arm = ARMS[name]
        ordered = sorted(found, key=lambda p: p["l0"])
        ours = arm.package == "scope_lens"
        drawn.add_scatter(
            x=[p["l0"] for p in ordered],
            y=[p["fvu"] for p in ordered],
            name=arm.label,
            mode="lines+markers",
            line={"color": arm.colour, "width": 2.5 if ours else 1.5, "dash": "solid" if ours else "dot"},
            marker={"size": 9 if ours else 7, "symbol": "circle" if arm.kind == "jumprelu" else "diamond"},
        )
    axes = {key: log_axis([p[key] for found in points.values() for p in found]) for key in ("l0", "fvu")}
    line = {"showline": True, "linecolor": "#888", "gridcolor": "#eee", "ticks": "outside", "type": "log"}
    for key, update, title in (
        ("l0", drawn.update_xaxes, "L0 (active latents per token, held-out)"),
        ("fvu", drawn.update_yaxes, "variance unexplained (FVU, held-out)"),
    ):
        update(range=axes[key].range, tickvals=axes[key].ticks, title=title, **line)
    drawn.update_layout(
        title={
            "text": "Variance unexplained at matched sparsity: lower is better<br><sup>"
            f"{SITE} of the embedded model, {WIDTH:,} latents, {STEPS:,} steps of {BATCH:,} rows, the same rows for all"
            "</sup>"
        },
        width=860, height=560, plot_bgcolor="white", paper_bgcolor="white",
        font={"family": "Helvetica, Arial, sans-serif", "size": 14, "color": "#222"},
        legend={"x": 0.98, "y": 0.98, "xanchor": "right", "yanchor": "top", "bgcolor": "rgba(255,255,255,0.8)"},
        margin={"l": 80, "r": 30, "t": 80, "b": 70},
    )  # fmt: skip
    return drawn


def screenshot(drawn: go.Figure, image: Path, chromium: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        html = Path(folder) / "figure.html"
        drawn.write_html(html, config={"displayModeBar": False})
        size = f"{drawn.layout.width + 16},{drawn.layout.height + 16}"
        subprocess.run(
            [
                chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                "--virtual-time-budget=5000", f"--window-size={size}", f"--screenshot={image}", html.as_uri(),
            ],
            check=True,
            capture_output=True,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("rows", "tune", "train", "report", "all"))
    parser.add_argument("--work", type=Path, required=True, help="folder for rows and dictionaries (1 GB)")
    parser.add_argument("--sae-lens", required=True, help="Python of the environment with sae-lens")
    parser.add_argument("--dictionary-learning", required=True, help="Python of the one with dictionary-learning")
    parser.add_argument(
        "--corpus", type=Path, default=ROOT.parent / "shared" / "data" / "corpora" / "tinystories_train.txt"
    )
    parser.add_argument("--store", type=Path, help="a store that holds the site, in place of a harvest of the corpus")
    parser.add_argument("--chromium", default=shutil.which("chromium") or "chromium")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.work.mkdir(parents=True, exist_ok=True)
    pythons = {
        "scope_lens": sys.executable,
        "sae_lens": given.sae_lens,
        "dictionary_learning": given.dictionary_learning,
    }
    stages = {
        "rows": lambda: make_rows(given.work, given.corpus, given.store),
        "tune": lambda: tune(given.work, pythons),
        "train": lambda: train(given.work, pythons),
        "report": lambda: report(given.work, pythons, given.chromium, given.corpus, given.store),
    }
    for stage, work in stages.items():
        if given.stage in (stage, "all"):
            work()


if __name__ == "__main__":
    main()
