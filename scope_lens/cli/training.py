"""`scope-lens harvest | train`: activations once, and then any number of dictionaries from them."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from scope_lens.cli.app import app
from scope_lens.cli.inputs import ModelDtype, SiteName, documents, language_model
from scope_lens.cli.processes import is_first, sharing
from scope_lens.cli.terminal import say, table

if TYPE_CHECKING:
    from scope_lens.training import HeldOut, Saved, StepResult, TensorboardLog, TrainConfig, WandbLog

Preset = Literal["short_run", "gemma_scope", "gemma_scope_it", "gemma_scope_2"]
Kind = Literal["jumprelu", "topk", "batchtopk", "relu", "gated"]


@app.command(name="harvest")
def harvest(
    *,
    model: str,
    text: tuple[str, ...],
    out: Path,
    site: tuple[SiteName, ...] = (),
    layer: tuple[int, ...] = (),
    hook: tuple[str, ...] = (),
    rows: int = 1_000_000,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    chat: bool = False,
    batch_size: int = 16,
    seed: int = 0,
    model_dtype: ModelDtype = "float32",
    device: str | None = None,
) -> None:
    """Run a model over a text and keep its activations in a folder; the same command again goes on where it stopped.

    Args:
        model: Language model: a hub name, a folder in the Hugging Face layout, or "demo" for the embedded one.
        text: UTF-8 files; documents in a file are separated by a line <|endoftext|>. "demo" are 121 embedded stories.
        out: Folder of the store.
        site: Kinds of site, each at every layer given.
        layer: Layers of these sites.
        hook: Further sites, by hook name.
        rows: Most rows to keep.
        dtype: Of the rows.
        chat: Wrap each document as the user's turn of a chat, and leave the prefix out (for gemma_scope_it).
        batch_size: Sequences in a forward pass.
        seed: Of the sample of rows and of their order.
        model_dtype: Of the language model.
        device: E.g. cuda:1; a GPU where there is one.
    """
    sites = _hooks(site, layer, hook)
    stories = documents(text, embedded="first")
    import torch

    from scope_lens.training import ActivationStore

    loaded = language_model(model, device=device, dtype=model_dtype)
    settings: dict[str, Any] = {}
    tokens: Any = stories
    if chat:
        from scope_lens.sae_config import UNTRAINED
        from scope_lens.training import wrap_in_chat

        tokens = wrap_in_chat(loaded, stories)
        settings["untrained"] = (*UNTRAINED, "chat_prefix")
    try:
        store = ActivationStore.harvest(
            loaded,
            tokens,
            sites=sites,
            path=out,
            rows=rows,
            dtype=getattr(torch, dtype),
            seed=seed,
            batch_size=batch_size,
            **settings,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command goes on from there") from None
    table(
        ("hook", "width", "root mean square norm"),
        [(name, str(store.width(name)), f"{store.scale(name):.2f}") for name in store.sites],
        left=(0,),
    )
    say(f"\n{store.rows:,} rows in {out}")


@app.command(name="train")
def train(
    *,
    store: Path,
    site: tuple[SiteName, ...],
    layer: tuple[int, ...],
    width: tuple[str, ...],
    out: Path,
    sparsity: tuple[float, ...] = (),
    target_l0: tuple[float, ...] = (),
    k: tuple[int, ...] = (),
    preset: Preset = "short_run",
    activation: Kind = "jumprelu",
    steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    seed: tuple[int, ...] = (0,),
    rows_seed: int = 0,
    held_out: tuple[str, ...] = (),
    model: str | None = None,
    model_dtype: ModelDtype = "float32",
    evaluate_every: int = 1_000,
    checkpoint_every: int = 1_000,
    keep: int = 3,
    report_every: int | None = None,
    resume: bool = True,
    tensorboard: bool = False,
    wandb: str | None = None,
    device: str | None = None,
    data_parallel: int = 1,
    latent_parallel: int = 1,
    kernels: Literal["auto", "eager", "triton"] = "auto",
) -> None:
    """Train dictionaries on a store, one for each combination of what is named; the same command again goes on.

    The folder gets checkpoints, log.jsonl and, at the end, the dictionaries in Gemma Scope's layout below saes/. Ctrl-C
    leaves a folder that the same command goes on with, on another number of processes too.

    On several devices: torchrun --nproc-per-node 8 -m scope_lens.cli train ... --data-parallel 2 --latent-parallel 4

    Args:
        store: Folder that `scope-lens harvest` wrote.
        site: Kinds of site.
        layer: Layers.
        width: Numbers of latents, e.g. 16k.
        out: Folder of the run.
        sparsity: Coefficients of the sparsity term.
        target_l0: L0s aimed at, in place of a price on L0 (short_run, gemma_scope_2).
        k: Latents kept by the TopK kinds.
        preset: Recipe: a short run, or a published one.
        activation: Kind of dictionary (short_run).
        steps: Updates; the preset's.
        batch_size: Rows of an update; the preset's.
        learning_rate: The preset's.
        seed: Of the initialisation.
        rows_seed: Of the order of the rows.
        held_out: Text files to evaluate on, which the store has not seen. "demo" are 40 embedded stories.
        model: Language model of the store, for the evaluation.
        model_dtype: Of the language model.
        evaluate_every: Updates between evaluations.
        checkpoint_every: Updates between checkpoints.
        keep: Checkpoints that stay.
        report_every: Updates between lines of the log; 1, and 50 on a GPU.
        resume: Go on with the run that the folder holds; otherwise one that is there is refused.
        tensorboard: Write the log for TensorBoard too.
        wandb: Project of Weights & Biases to log to.
        device: E.g. cuda:1; a GPU where there is one.
        data_parallel: Processes that share the rows of each batch.
        latent_parallel: Processes that share the latents of each dictionary.
        kernels: "triton" insists on the fused kernels, which need CUDA; "eager" leaves them out.
    """
    if not sparsity and preset in ("gemma_scope", "gemma_scope_it"):
        raise ValueError(f"--preset {preset} needs --sparsity.")
    if not target_l0 and preset == "gemma_scope_2":
        raise ValueError("--preset gemma_scope_2 needs --target-l0.")
    if held_out and model is None:
        raise ValueError("--held-out needs --model, the language model that the store was harvested from.")
    stories = documents(held_out) if is_first() else []
    from scope_lens.releases.placement import check_device
    from scope_lens.training import ActivationStore, Trainer, checkpoints

    if device is not None:
        check_device(device)
    overrides = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate}
    configs = [
        _config(preset, kind=activation, place=place, numbers=numbers, seed=one, overrides=overrides)
        for *place, one in product(site, layer, width, seed)
        for numbers in _combinations(sparsity=sparsity, target_l0=target_l0, k=k)
    ]
    with sharing(data_parallel=data_parallel, latent_parallel=latent_parallel, device=device) as mesh:
        opened = ActivationStore.open(store)
        text = _held_out(stories, model=model, dtype=model_dtype, device=device) if stories else None
        log = _logs(out, tensorboard=tensorboard, wandb=wandb) if is_first() else []
        if resume and checkpoints(out):
            trainer = Trainer.resume(
                out, configs=configs, device=device, held_out=text, log=log, mesh=mesh, kernels=kernels
            )
        else:
            trainer = Trainer(
                configs,
                folder=out,
                checkpoint_every=checkpoint_every,
                keep=keep,
                seed=rows_seed,
                device=device,
                held_out=text,
                evaluate_every=evaluate_every,
                report_every=report_every,
                log=log,
                mesh=mesh,
                kernels=kernels,
            )
        try:
            for _ in trainer.run(opened):
                pass
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted after step {trainer.step} of {max(cfg.steps for cfg in configs)}; the same command goes "
                "on from there"
            ) from None
        finally:
            for one in log:
                one.close()
        trained = trainer.result()
    if not is_first():
        return
    from scope_lens.training import read_log, save_suite

    last = {result.index: result for result in read_log(out / "log.jsonl")}
    # Each dictionary's last update was evaluated.
    on = opened if text is None else [trainer.evaluations[index] for index in range(len(configs))]
    saved = save_suite(trained, out / "saes", on=on)
    _table_of([last[index] for index in range(len(configs))], saved)


def _hooks(site: Sequence[SiteName], layer: Sequence[int], hook: Sequence[str]) -> list[str]:
    """Every hook that dictionaries at these sites read or write, once."""
    from scope_lens.releases import hooks_for

    if bool(layer) != bool([name for name in site if name != "embedding"]) or not (site or hook):
        raise ValueError("Name --site with --layer, or --hook.")
    places = [(name, number) for name in site for number in ((None,) if name == "embedding" else layer)]
    return list(dict.fromkeys([name for place in places for name in hooks_for(*place)] + list(hook)))


def _combinations(**numbers: Sequence[float]) -> list[dict[str, float]]:
    """Every combination of the settings that were given."""
    given = {name: values for name, values in numbers.items() if values}
    return [dict(zip(given, values, strict=True)) for values in product(*given.values())]


def _config(
    preset: Preset,
    *,
    kind: Kind,
    place: Sequence[Any],
    numbers: dict[str, Any],
    seed: int,
    overrides: dict[str, Any],
) -> "TrainConfig":
    from scope_lens.training import TrainConfig

    given = {name: value for name, value in overrides.items() if value is not None}
    settings: dict[str, Any] = {**dict(zip(("site", "layer", "width"), place, strict=True)), "seed": seed} | numbers
    if settings["site"] == "embedding":
        settings["layer"] = None
    if preset == "short_run":
        # Its warm-ups are shares of the run.
        settings |= {"activation": kind} | {name: given.pop(name) for name in ("steps",) if name in given}
    elif kind != "jumprelu" or "k" in numbers:
        raise ValueError(f"--preset {preset} trains JumpReLU dictionaries; leave out --activation and --k.")
    elif preset != "gemma_scope_2" and "target_l0" in numbers:
        raise ValueError(f"--preset {preset} has a price on L0; leave out --target-l0.")
    return replace(getattr(TrainConfig, preset)(**settings), **given)


def _held_out(stories: Sequence[str], *, model: str | None, dtype: ModelDtype, device: str | None) -> "HeldOut":
    from scope_lens.training import HeldOut

    assert model is not None, "checked before"
    return HeldOut(model=language_model(model, device=device, dtype=dtype), text=stories)


def _logs(out: Path, *, tensorboard: bool, wandb: str | None) -> "list[TensorboardLog | WandbLog]":
    from scope_lens.training import TensorboardLog, WandbLog

    logs: list[TensorboardLog | WandbLog] = []
    try:
        if tensorboard:
            logs.append(TensorboardLog(out / "tensorboard"))
        if wandb is not None:
            out.mkdir(parents=True, exist_ok=True)  # wandb writes elsewhere where there is no such folder
            logs.append(WandbLog(wandb, dir=str(out)))
    except ImportError as error:
        raise ValueError(str(error)) from None
    return logs


def _table_of(last: "Sequence[StepResult]", saved: "Sequence[Saved]") -> None:
    rows = [
        (
            result.name,
            f"{record.l0.average_l0:.1f}",
            f"{result.fvu:.3f}",
            f"{result.dead:.1%}",
            "-" if result.evaluation is None else f"{result.evaluation.delta_loss:.4f}",
            "-" if result.evaluation is None else f"{result.evaluation.loss_recovered:.1%}",
            str(record.folder),
        )
        for result, record in zip(last, saved, strict=True)
    ]
    table(("dictionary", "L0", "FVU", "dead", "delta loss", "recovered", "saved to"), rows, left=(0, 6))
    say(f"\nL0 is of {saved[0].l0.measured_on}; FVU is of the last batch.")
    for record in saved:
        if record.native_only:
            say(f"{record.folder} has no params.npz, which has no place for {record.native_only}.")
