"""Make the embedded model's folder and train its suite of dictionaries, `scope_lens/demo/`.

    python tests/scripts/build_demo_suite.py all --data ../shared/data --work /path/for/the/store

1. `model`: the trained tiny Gemma 2 as bfloat16 safetensors with its tokenizer, and the hold-out text.
2. `harvest`: activations of the training corpus at every site, once.
3. `train`: four dictionaries at a time, layer by layer. Killed, it goes on from its last checkpoint. Harvest and
   training take most of one CPU-hour on one thread.
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
from scope_lens.releases import hooks_for
from scope_lens.training import ActivationStore, TrainConfig, Trainer, gemma_scope_path, save_gemma_scope

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "scope_lens" / "demo"
SEPARATOR = "\n<|endoftext|>\n"
LAYERS = range(4)
SITES = ("res", "mlp", "att", "transcoder")
WIDTH = 1024
ROWS = 1_300_000
STEPS = 5_200
# Coefficient of L0 for each site, layer by layer, from trial runs of 1,000 steps.
SPARSITY = {
    "res": (3e-3, 3e-3, 3e-3, 3e-3),
    "mlp": (3e-3, 3e-3, 3e-3, 3e-3),
    "att": (3e-3, 3e-3, 3e-3, 3e-3),
    "transcoder": (3e-3, 3e-3, 3e-3, 3e-3),
}


def documents(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").split(SEPARATOR)


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
    shutil.copyfile(data / "corpora" / "tinystories_val.txt", DEMO / "text.txt")


def configs(layer: int) -> list[TrainConfig]:
    return [
        TrainConfig.short_run(site=site, layer=layer, width=WIDTH, sparsity=SPARSITY[site][layer], steps=STEPS)
        for site in SITES
    ]


def harvest(data: Path, work: Path) -> None:
    names = sorted({hook for site in SITES for layer in LAYERS for hook in hooks_for(site, layer)})
    text = documents(data / "corpora" / "tinystories_train.txt")
    start = time.process_time()
    ActivationStore.harvest(demo.load_model(), text, sites=names, path=work / "store", rows=ROWS)
    print("CPU seconds of the harvest", time.process_time() - start, flush=True)


def train(work: Path) -> None:
    store = ActivationStore.open(work / "store")
    seconds: dict[str, float] = {}
    for layer in LAYERS:
        folder = work / f"layer_{layer}"
        made = (folder / "checkpoint.safetensors").exists()
        trainer = Trainer.resume(folder) if made else Trainer(configs(layer), folder=folder)
        start = time.process_time()
        for result in trainer.run(store):
            if result.step % 250 == 0:
                print(layer, SITES[result.index], json.dumps(dataclasses.asdict(result)), flush=True)
        seconds[f"layer {layer}"] = time.process_time() - start
        print("CPU seconds", json.dumps(seconds), flush=True)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("model", "harvest", "train", "export", "all"))
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


if __name__ == "__main__":
    main()
