"""Make the embedded model's folder and train its suite of dictionaries, `scope_lens/demo/`.

    python tests/scripts/build_demo_suite.py all --data ../shared/data --work /path/for/the/store

1. `model`: the trained tiny Gemma 2 as bfloat16 safetensors with its tokenizer, and the hold-out text.
2. `harvest`: activations of the training corpus at every site, once.
3. `train`: four dictionaries at a time, layer by layer. Killed, it goes on from its last checkpoint. Harvest and
   training take a quarter of a CPU-hour on one thread.
4. `export`: `params.npz` of every dictionary, its L0 measured on the hold-out text.
5. `report`: fidelity of every dictionary on the hold-out text, to `docs/benchmarks/demo_suite.md`.

For the speed of one thread set MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000
MALLOC_TOP_PAD_=500000000, so that freed memory is reused.
"""

import argparse
import dataclasses
import json
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from scope_lens import demo
from scope_lens.evaluation import evaluate
from scope_lens.releases import hooks_for
from scope_lens.training import ActivationStore, TrainConfig, Trainer, gemma_scope_path, save_gemma_scope

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "scope_lens" / "demo"
SEPARATOR = "\n<|endoftext|>\n"
LAYERS = range(4)
SITES = ("res", "mlp", "att", "transcoder")
WIDTH = 1024
ROWS = 1_300_000
STEPS = 2_500
REPORTED = 100
# Coefficient of L0 for each site, layer by layer, chosen by trial runs of 400 to 1,000 steps.
SPARSITY = {
    "res": (1.5e-3, 2e-3, 2.2e-3, 2.5e-3),
    "mlp": (1.5e-3, 2e-3, 2.2e-3, 2.5e-3),
    "att": (1.5e-3, 1.5e-3, 1.5e-3, 2e-3),
    "transcoder": (5e-4, 6e-4, 7e-4, 8e-4),
}
# At the preset's learning rate half of these latents die.
OWN_SETTINGS = {("att", 1): {"learning_rate": 5e-3}}


def documents(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").removesuffix(SEPARATOR).split(SEPARATOR)


def write_model(data: Path) -> None:
    source, target = data / "tiny-gemma2-stories", DEMO / "model"
    target.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    (target / "model.safetensors").chmod(0o644)
    config = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, target / name)
    # Part of the corpus called held-out is in the training corpora, word for word or with another middle.
    trained_on = [(data / "corpora" / f"tinystories_{name}.txt").read_text() for name in ("train", "truecased_extra")]
    held_out = [
        document
        for document in documents(data / "corpora" / "tinystories_val.txt")
        if not any(document[:120] in corpus or document[-120:] in corpus for corpus in trained_on)
    ]
    (DEMO / "text.txt").write_text(SEPARATOR.join(held_out), encoding="utf-8")


def configs(layer: int) -> list[TrainConfig]:
    return [
        dataclasses.replace(
            TrainConfig.short_run(site=site, layer=layer, width=WIDTH, sparsity=SPARSITY[site][layer], steps=STEPS),
            **OWN_SETTINGS.get((site, layer), {}),
        )
        for site in SITES
    ]


def harvest(data: Path, work: Path) -> None:
    names = sorted({hook for site in SITES for layer in LAYERS for hook in hooks_for(site, layer)})
    text = documents(data / "corpora" / "tinystories_train.txt")
    start = time.process_time()
    ActivationStore.harvest(demo.load_model(), text, sites=names, path=work / "store", rows=ROWS)
    note_seconds(work, "harvest", time.process_time() - start)


def note_seconds(work: Path, part: str, seconds: float) -> None:
    """Keep the CPU time of a part; what an earlier process spent on it is added."""
    file = work / "seconds.json"
    noted = json.loads(file.read_text()) if file.exists() else {}
    noted[part] = round(noted.get(part, 0) + seconds, 1)
    file.write_text(json.dumps(noted) + "\n")
    print("CPU seconds", noted, flush=True)


def train(work: Path) -> None:
    store = ActivationStore.open(work / "store")
    for layer in LAYERS:
        folder = work / f"layer_{layer}"
        made = (folder / "checkpoint.safetensors").exists()
        trainer = Trainer.resume(folder) if made else Trainer(configs(layer), folder=folder, checkpoint_every=100)
        start = time.process_time()
        for result in trainer.run(store, progress=False):
            if result.step % 100 == 0:
                print(layer, SITES[result.index], json.dumps(dataclasses.asdict(result)), flush=True)
        note_seconds(work, f"layer {layer}", time.process_time() - start)


def export(work: Path) -> None:
    model = demo.load_model()
    for layer in LAYERS:
        if not (work / f"layer_{layer}" / "checkpoint.safetensors").exists():
            continue
        saes = Trainer.resume(work / f"layer_{layer}").result()
        names = sorted({sae.cfg.hook_in for sae in saes})
        rows = ActivationStore.harvest(model, demo.text(), sites=names, dtype=torch.float32)
        for site, sae in zip(SITES, saes, strict=True):
            with torch.no_grad():
                active = sum(int((sae.encode(x) > 0).sum()) for (x,) in rows.batches(sae.cfg.hook_in, size=4096))
            path = gemma_scope_path(layer=layer, width=WIDTH, l0=active / rows.rows)
            shutil.rmtree(DEMO / "suite" / site / f"layer_{layer}", ignore_errors=True)
            print(save_gemma_scope(sae, DEMO / "suite" / site / path))


def report(work: Path) -> None:
    model, text = demo.load_model(), demo.text()[:REPORTED]
    lines = []
    for sae in demo.load_saes():
        result = evaluate(model, text, saes=sae, progress=False)
        site, layer = sae.cfg.path.split("/")[:2]
        out = sae.cfg.hook_out
        lines.append(
            f"| {site} | {layer.removeprefix('layer_')} | {result.l0[out]:.1f} | {result.fvu[out]:.3f} "
            f"| {result.dead[out]:.3f} | {result.delta_loss:.4f} ± {result.delta_loss_se:.4f} "
            f"| {result.loss_recovered:.3f} |"
        )
        print(lines[-1], flush=True)
    seconds = json.loads((work / "seconds.json").read_text())
    minutes = sum(seconds.values()) / 60
    parts = ", ".join(f"{part} {value:.0f} s" for part, value in seconds.items())
    sparsity = "; ".join(f"{site} {', '.join(f'{value:g}' for value in SPARSITY[site])}" for site in SITES)
    cfg = configs(0)[0]
    own = "; ".join(
        f"{site} of layer {layer}, {name} {value:g}"
        for (site, layer), settings in OWN_SETTINGS.items()
        for name, value in settings.items()
    )
    page = f"""# The embedded suite

Fidelity of the dictionaries in `scope_lens/demo/suite`, measured by `scope_lens.evaluation.evaluate` on the first
{REPORTED} held-out stories ({result.n_tokens:,} loss terms), float32, splice-in at trained positions. Delta loss is in
nats per token with its standard error clustered by sequence; the model's own loss is {result.ce_clean:.4f}. Loss
recovered is relative to mean ablation. `dead` is the fraction of latents that never fire on this text.

| site | layer | L0 | FVU | dead | delta loss | loss recovered |
|---|--:|--:|--:|--:|--:|--:|
{chr(10).join(lines)}

Made by `python tests/scripts/build_demo_suite.py all --work <folder>`: {ROWS:,} rows at most of TinyStories,
{cfg.steps:,} updates of {cfg.batch_size:,} rows for each dictionary of {WIDTH:,} latents, learning rate
{cfg.learning_rate:g}, threshold trained directly (`TrainConfig.short_run`). One thread of a shared CPU took
{minutes:.0f} CPU-minutes in all: {parts}.
torch {torch.__version__}.

Coefficients of L0, layers 0 to 3: {sparsity}. Settings of their own: {own}.
"""
    (ROOT / "docs" / "benchmarks" / "demo_suite.md").write_text(page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("model", "harvest", "train", "export", "report", "all"))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, required=True, help="folder for the store and the checkpoints (10 GB)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.step in ("model", "all"):
        write_model(arguments.data)
    if arguments.step in ("harvest", "all"):
        harvest(arguments.data, arguments.work)
    if arguments.step in ("train", "all"):
        train(arguments.work)
    if arguments.step in ("export", "all"):
        export(arguments.work)
    if arguments.step in ("report", "all"):
        report(arguments.work)


if __name__ == "__main__":
    main()
