"""Make the embedded model's folder and train its suite of dictionaries, `scope_lens/demo/`.

    python tests/scripts/train_demo_model.py --work /path/for/the/work
    python tests/scripts/build_demo_suite.py all --work /path/for/the/work

1. `model`: the trained model as bfloat16 safetensors with its tokenizer, and the hold-out text.
2. `harvest`: activations of the corpora the model was trained on, at every site, once.
3. `train`: four dictionaries at a time, layer by layer, then the ladder of one layer; `--run` trains one of these runs.
   Killed, it goes on from its last checkpoint.
4. `export`: `params.npz` of every dictionary that is trained, its L0 measured on the hold-out text; into the package
   once all are.
5. `evaluate`: fidelity of every exported dictionary on the hold-out text, each once.
6. `report`: these results, the model's losses and its agreement, to `docs/benchmarks/demo_suite.md`.

For the speed of one thread set MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000
MALLOC_TOP_PAD_=500000000, so that freed memory is reused.
"""

import argparse
import dataclasses
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from train_demo_model import BATCH, CONTEXT, SEPARATOR, SHARES, UNSEEN, corpora, held_out_text, measure, sentence_nouns
from transformers import AutoModelForCausalLM

from scope_lens import demo
from scope_lens.evaluation import EvalResult
from scope_lens.evaluation.each import evaluate_each
from scope_lens.releases import hooks_for, loaders, width_name
from scope_lens.sae import HookedSAE
from scope_lens.training import ActivationStore, TrainConfig, Trainer, gemma_scope_path, save_gemma_scope
from scope_lens.training.checkpoint import checkpoints

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "scope_lens" / "demo"
LAYERS = range(4)
SITES = ("res", "mlp", "att", "transcoder")
WIDTH = 1024
ROWS = 2_000_000
STEPS = 4_000
# Of each corpus, so many documents: two million tokens, three quarters of them stories.
HARVESTED = {"stories": 6_300, "fairytales": 620, "classics": 620, "agreement": 8_000}
# Coefficient of L0 for each site, layer by layer, chosen by trial runs of 400 to 1,000 steps.
SPARSITY = {
    "res": (1.5e-3, 2e-3, 2.3e-3, 2.8e-3),
    "mlp": (1.5e-3, 2e-3, 2.2e-3, 2.5e-3),
    "att": (1.5e-3, 1.5e-3, 2e-3, 2.5e-3),
    "transcoder": (5e-4, 7e-4, 9e-4, 1.1e-3),
}
# Beside the residual SAE of layer 2 above: width and coefficients of L0.
LADDER = {1024: (6e-3, 1.1e-3), 4096: (6e-3, 2.6e-3, 1.1e-3)}
LADDER_LAYER = 2
# Pinned, so that a change of the preset does not change the suite that this script makes.
RECIPE: dict[str, Any] = {
    "learning_rate": 8e-3, "betas": (0.0, 0.999), "threshold": "direct", "threshold_init": 0.01, "bandwidth": 0.01
}  # fmt: skip
# (site, layer, width): at the learning rate above half of these latents die.
OWN_SETTINGS = {("att", 1, WIDTH): {"learning_rate": 5e-3}}


def runs() -> dict[str, list[tuple[str, int, TrainConfig]]]:
    """Site, layer and settings of every dictionary, by the run that trains it."""
    layers = {f"layer_{layer}": [_config(site, layer, SPARSITY[site][layer]) for site in SITES] for layer in LAYERS}
    rungs = {
        f"ladder_{width_name(width)}": [_config("res", LADDER_LAYER, coefficient, width) for coefficient in of]
        for width, of in LADDER.items()
    }
    return layers | rungs


def _config(site: str, layer: int, sparsity: float, width: int = WIDTH) -> tuple[str, int, TrainConfig]:
    config = TrainConfig.short_run(site=site, layer=layer, width=width, sparsity=sparsity, steps=STEPS)
    return site, layer, dataclasses.replace(config, **RECIPE | OWN_SETTINGS.get((site, layer, width), {}))


def write_model(data: Path, work: Path) -> None:
    architecture, target = data / "tiny-gemma2-stories", DEMO / "model"
    target.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(work / "model" / "model.safetensors").items()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    (target / "model.safetensors").chmod(0o644)
    config = json.loads((architecture / "config.json").read_text()) | {"dtype": "bfloat16"}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(architecture / name, target / name)
    (DEMO / "text.txt").write_text(SEPARATOR.join(held_out_text(data)), encoding="utf-8")


def harvest(data: Path, work: Path) -> None:
    names = sorted({hook for site in SITES for layer in LAYERS for hook in hooks_for(site, layer)})
    draw = random.Random(1)  # noqa: S311  (no secret)
    text = [text for name, texts in corpora(data).items() for text in draw.sample(texts, HARVESTED[name])]
    draw.shuffle(text)
    start = time.process_time()
    ActivationStore.harvest(demo.load_model(), text, sites=names, path=work / "store", rows=ROWS)
    note_seconds(work, "harvest", time.process_time() - start)


def note_seconds(work: Path, part: str, seconds: float) -> None:
    """Keep the CPU time of a part; what an earlier process spent on it is added."""
    file = work / f"{part}.seconds"
    earlier = float(file.read_text()) if file.exists() else 0.0
    file.write_text(f"{earlier + seconds:.1f}\n")


def train(work: Path, only: str | None) -> None:
    store = ActivationStore.open(work / "store")
    for run, dictionaries in runs().items():
        if only not in (None, run):
            continue
        folder = work / run
        configs = [config for _, _, config in dictionaries]
        trainer = (
            Trainer.resume(folder) if checkpoints(folder) else Trainer(configs, folder=folder, checkpoint_every=200)
        )
        start = time.process_time()
        for result in trainer.run(store, progress=False):
            if result.step % 100 == 0:
                print(run, *dictionaries[result.index][:2], json.dumps(dataclasses.asdict(result)), flush=True)
            if result.step % 100 == 0 and result.index == len(configs) - 1:
                note_seconds(work, run, time.process_time() - start)
                start = time.process_time()


def export(work: Path) -> None:
    model, suite, missing = demo.load_model(), work / "suite", []
    shutil.rmtree(suite, ignore_errors=True)
    for run, dictionaries in runs().items():
        trainer = Trainer.resume(work / run) if checkpoints(work / run) else None
        if trainer is None or trainer.step < STEPS:
            missing.append(run)
            continue
        saes = trainer.result()
        names = sorted({sae.cfg.hook_in for sae in saes})
        rows = ActivationStore.harvest(model, demo.text(), sites=names, dtype=torch.float32)
        for (site, layer, config), sae in zip(dictionaries, saes, strict=True):
            with torch.no_grad():
                active = sum(int((sae.encode(x) > 0).sum()) for (x,) in rows.batches(sae.cfg.hook_in, size=4096))
            path = gemma_scope_path(layer=layer, width=config.width, l0=active / rows.rows)
            print(save_gemma_scope(sae, suite / site / path))
    if missing:
        print("Not into the package yet; still to be trained:", ", ".join(missing))
        return
    shutil.rmtree(DEMO / "suite", ignore_errors=True)
    shutil.copytree(suite, DEMO / "suite")


def results(work: Path) -> dict[str, EvalResult]:
    """Evaluate what is exported, on the whole hold-out text; what was evaluated before is read from a file."""
    saes = loaders(str(work / "suite"), model=demo.MODEL_NAME)
    return dict(evaluate_each(demo.load_model(), demo.text(), saes=saes, path=work / "results.json", progress=False))


def report(data: Path, work: Path) -> None:
    seconds = {run: float((work / f"{run}.seconds").read_text()) for run in ("harvest", *runs())}
    trained = json.loads((work / "model_log.jsonl").read_text().splitlines()[-1])
    sparsity = "; ".join(f"{site} {', '.join(f'{value:g}' for value in SPARSITY[site])}" for site in SITES)
    rungs = "; ".join(f"width {width_name(width)} {', '.join(f'{c:g}' for c in of)}" for width, of in LADDER.items())
    own = "; ".join(
        f"{site} of layer {layer}, width {width_name(width)}, {name} {value:g}"
        for (site, layer, width), settings in OWN_SETTINGS.items()
        for name, value in settings.items()
    )
    nouns = sentence_nouns(data)
    known = ", ".join(noun for noun, _ in (*nouns.people, *nouns.things))
    shares = ", ".join(f"{name} {share:.0%}" for name, share in SHARES.items())
    parts = ", ".join(f"{part} {value:.0f} s" for part, value in seconds.items())
    tokens = trained["step"] * BATCH * CONTEXT
    cfg = runs()["layer_0"][0][2]
    found = results(work)
    suite, ladder = (_table(saes, found) for saes in (demo.load_saes(), demo.load_ladder()))
    one = next(iter(found.values()))
    page = f"""# The embedded suite

## The model

A Gemma 2 of 3.1 million parameters, trained from scratch by `tests/scripts/train_demo_model.py`:
{trained["step"]:,} steps of {BATCH} rows of {CONTEXT} tokens, {tokens / 1e6:.1f} million in all,
{trained["cpu_seconds"] / 60:.0f} CPU-minutes on one thread of a shared CPU. Rows by source: {shares}.
Stories are TinyStories; `agreement` is sentences that `tests/scripts/agreement_sentences.py` makes from nouns of the
*training* files of feature-circuits' agreement pairs (Marks et al. 2024, arXiv 2403.19647). Their nouns:
{known}.

Measured in float32 on the embedded bfloat16 weights. Loss is in nats per token on the 161 stories of `demo.text()`,
which are in none of the corpora. Agreement is the share of prompts after which the agreeing verb has the larger logit
(BOS, the prompt, last position), over the training files of the pairs; the test files were not used. A prompt counts
as held out if one of its nouns is in none of the sentences. "Other nouns" are {len(UNSEEN)} nouns of people that are
neither in the sentences nor in the pairs, in both numbers before has/have, does/do, is/are and goes/go.

| | loss | simple | simple, held out | nounpp | nounpp, held out | other nouns |
|---|--:|--:|--:|--:|--:|--:|
| embedded | {_measured(data, DEMO / "model")} |
| the one before, stories alone | {_measured(data, data / "tiny-gemma2-stories")} |

## The dictionaries

Fidelity of the dictionaries in `scope_lens/demo/suite`, measured by `scope_lens.evaluation.evaluate` on the hold-out
stories ({one.n_tokens:,} loss terms), float32, splice-in at trained positions. Delta loss is in nats per token with its
standard error clustered by sequence. The model's own loss is {one.ce_clean:.4f} here, because `evaluate` packs the
stories into rows of {CONTEXT} tokens and so cuts some of them. Loss recovered is relative to mean ablation. `dead` is
the fraction of latents that never fire on this text.

{suite}

## The ladder

The residual stream after layer {LADDER_LAYER} at two widths and three L0s each (`demo.load_ladder()`); the middle one
of width {width_name(WIDTH)} is that of the table above.

{ladder}

Latents of the wide ones died in training. With half the learning rate, 0.004, fewer did (3 to 10 % without a firing in
100,000 rows, against 9 to 20 %), but FVU was worse at every L0, so these were kept.

## How they were made

`python tests/scripts/build_demo_suite.py all --work <folder>`: {ROWS:,} rows at most from the corpora of the model,
three quarters of them stories; {cfg.steps:,} updates of {cfg.batch_size:,} rows for each dictionary, learning rate
{cfg.learning_rate:g}, otherwise `TrainConfig.short_run` with Adam {cfg.betas}, thresholds trained directly from
{cfg.threshold_init:g} on and a window of {cfg.bandwidth:g}. One thread of a shared CPU took
{sum(seconds.values()) / 60:.0f} CPU-minutes in all: {parts}.
torch {torch.__version__}.

Coefficients of L0, layers 0 to 3: {sparsity}. Ladder: {rungs}. Settings of their own: {own}.
"""
    (ROOT / "docs" / "benchmarks" / "demo_suite.md").write_text(page)


def _measured(data: Path, folder: Path) -> str:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    found = measure(model, Tokenizer.from_file(str(folder / "tokenizer.json")), data, "cpu")
    shares = (found[name] for name in ("simple_known", "simple_held_out", "nounpp_known", "nounpp_held_out", "unseen"))
    return f"{found['held_out_loss']:.3f} | " + " | ".join(f"{share:.1%}" for share in shares)


def _table(saes: list[HookedSAE], found: dict[str, EvalResult]) -> str:
    lines = [
        "| site | layer | width | L0 | FVU | dead | delta loss | loss recovered |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for sae in saes:
        result, out = found[sae.cfg.path], sae.cfg.hook_out
        site, layer = sae.cfg.path.split("/")[:2]
        lines.append(
            f"| {site} | {layer.removeprefix('layer_')} | {width_name(sae.cfg.d_sae)} | {result.l0[out]:.1f} "
            f"| {result.fvu[out]:.3f} | {result.dead[out]:.3f} | {result.delta_loss:.4f} ± {result.delta_loss_se:.4f} "
            f"| {result.loss_recovered:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("model", "harvest", "train", "export", "evaluate", "report", "all"))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, required=True, help="folder of the model, the store and the checkpoints")
    parser.add_argument("--run", choices=tuple(runs()), help="train this run alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.step in ("model", "all"):
        write_model(arguments.data, arguments.work)
    if arguments.step in ("harvest", "all"):
        harvest(arguments.data, arguments.work)
    if arguments.step in ("train", "all"):
        train(arguments.work, arguments.run)
    if arguments.step in ("export", "all"):
        export(arguments.work)
    if arguments.step == "evaluate":
        results(arguments.work)
    if arguments.step in ("report", "all"):
        report(arguments.data, arguments.work)


if __name__ == "__main__":
    main()
