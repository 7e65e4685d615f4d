"""Write trained dictionaries in Gemma Scope's layout, with the L0 that was measured.

    <site>/layer_{layer}/width_{1k|16k|...}/average_l0_{N}/params.npz      five float32 arrays, as Gemma Scope's files
                                                           config.json     the same dictionary as HookedSAE.save writes
                                                           sae.safetensors
                                                           measured.json   N unrounded, and what it was measured on

`params.npz` and its path have no place for a TopK activation, a skip term, or a hook that is no site of Gemma Scope.
Such a dictionary is saved natively only, and its record says why.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from scope_lens.evaluation import EvalResult
from scope_lens.releases.release import FILE_NAME, width_name
from scope_lens.releases.sites import Hooks, place_of
from scope_lens.sae import HookedSAE
from scope_lens.sae_config import UNTRAINED
from scope_lens.training.held_out import HeldOut
from scope_lens.training.store import ActivationStore
from scope_lens.whole_file import whole_file

_ARRAYS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
_BATCH = 4_096


class MeasuredL0(NamedTuple):
    """A dictionary's mean number of active latents.

    Attributes:
        average_l0: The mean.
        measured_on: What the mean is over.
    """

    average_l0: float
    measured_on: str


class Saved(NamedTuple):
    """Where one dictionary went.

    Attributes:
        folder: Its folder.
        l0: What was measured, and on what.
        native_only: Why there is no `params.npz`; empty where there is one.
    """

    folder: Path
    l0: MeasuredL0
    native_only: str


def gemma_scope_path(*, layer: int, width: int, l0: float) -> str:
    """Give the folder of a dictionary in Gemma Scope's layout, e.g. "layer_20/width_16k/average_l0_71".

    Args:
        layer: Layer of the language model.
        width: Number of latents.
        l0: Measured mean number of active latents.
    """
    return f"layer_{layer}/width_{width_name(width)}/average_l0_{round(l0)}"


def save_gemma_scope(sae: HookedSAE, folder: str | Path) -> Path:
    """Write `folder/params.npz`, whole or not at all.

    A ReLU dictionary is written as a JumpReLU with thresholds of 0, which is the same function.

    Args:
        sae: A JumpReLU or ReLU dictionary in its inference form.
        folder: Created if missing; `gemma_scope_path` names it as Gemma Scope would.

    Returns:
        The file.

    Raises:
        ValueError: The format has no place for what the dictionary is.
    """
    if reason := _unfit(sae):
        raise ValueError(
            f"Gemma Scope's format has no place for {reason}: it holds JumpReLU dictionaries. Fold a pre-encoder bias "
            "with to_inference, or keep the dictionary with HookedSAE.save."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / FILE_NAME
    state = sae.state_dict()
    state.setdefault("threshold", torch.zeros_like(sae.b_enc))
    arrays: dict[str, Any] = {name: state[name].detach().float().cpu().numpy() for name in _ARRAYS}
    with whole_file(file) as part, part.open("wb") as stream:
        np.savez(stream, **arrays)
    return file


def save_suite(
    saes: Sequence[HookedSAE],
    folder: str | Path,
    *,
    on: ActivationStore | HeldOut | Sequence[EvalResult],
    rows: int = 100_000,
) -> list[Saved]:
    """Measure each dictionary's L0 and write it in both formats, for `releases.open_suite` and `HookedSAE.load`.

    Args:
        saes: What `Trainer.result` gave.
        folder: Of the suite; created if missing. What it holds at the same path is replaced. Of several dictionaries
            that agree in site, layer, width and rounded L0 the second goes below `twin_2/`, and so on.
        on: What the L0 is measured on: rows of the store, or held-out text; or what each dictionary's evaluation on
            held-out text has measured already.
        rows: Most rows of a store to measure on.

    Returns:
        A record of each dictionary.
    """
    if isinstance(on, ActivationStore | HeldOut):
        measured = [measure_l0(sae, on=on, rows=rows) for sae in saes]
    else:
        measured = [_l0_of(result) for result in on]
    times: Counter[str] = Counter()
    saved: list[Saved] = []
    for sae, l0 in zip(saes, measured, strict=True):
        path = _path(sae, l0.average_l0)
        times[path] += 1
        saved.append(_save(sae, l0, path if times[path] == 1 else f"twin_{times[path]}/{path}", Path(folder)))
    return saved


def measure_l0(sae: HookedSAE, *, on: ActivationStore | HeldOut, rows: int = 100_000) -> MeasuredL0:
    """Measure a dictionary's mean number of active latents.

    Args:
        sae: In its inference form.
        on: Rows of a store, or held-out text.
        rows: Most rows of a store.

    Raises:
        KeyError: The store lacks the site.
    """
    if isinstance(on, HeldOut):
        return _l0_of(on.evaluate(sae))
    counted = active = 0
    for (batch,) in on.batches(sae.cfg.hook_in, size=_BATCH):
        x = batch[: rows - counted].to(sae.W_enc.device)
        with torch.no_grad():
            active += int(torch.count_nonzero(sae.activate(sae.pre_activation(x))))
        counted += len(x)
        if counted >= rows:
            break
    return MeasuredL0(active / counted, f"{counted:,} rows of the activation store {on.manifest.source}")


def _l0_of(result: EvalResult) -> MeasuredL0:
    (l0,) = result.l0.values()
    return MeasuredL0(l0, f"held-out text, {result.n_tokens:,} predictions, {result.tokens_hash}")


def _save(sae: HookedSAE, l0: MeasuredL0, path: str, folder: Path) -> Saved:
    own = folder / path
    named = HookedSAE.from_tensors(replace(sae.cfg, path=path), sae.state_dict(), source=path)
    named.save(own)
    reason = _unfit(sae) or _unplaced(sae)
    if reason:
        (own / FILE_NAME).unlink(missing_ok=True)
    else:
        save_gemma_scope(sae, own)
    record = {**l0._asdict(), "native_only": reason, "config": asdict(named.cfg)}
    with whole_file(own / "measured.json") as part:
        part.write_text(json.dumps(record, indent=2) + "\n")
    return Saved(own, l0, reason)


def _path(sae: HookedSAE, l0: float) -> str:
    place = place_of(Hooks(sae.cfg.hook_in, sae.cfg.hook_out))
    own = f"width_{width_name(sae.cfg.d_sae)}/average_l0_{round(l0)}"
    if place is None:
        hooks = dict.fromkeys((sae.cfg.hook_in, sae.cfg.hook_out))
        return f"{'-'.join(hooks)}/{own}"
    if place.layer is None:
        return f"{place.site}/{own}"
    return f"{place.site}/{gemma_scope_path(layer=place.layer, width=sae.cfg.d_sae, l0=l0)}"


def _unfit(sae: HookedSAE) -> str:
    """What a `params.npz` cannot say of the dictionary; empty where it can say all."""
    cfg = sae.cfg
    if cfg.activation not in ("jumprelu", "relu"):
        return f"activation={cfg.activation!r}"
    if cfg.skip:
        return "skip=True"
    return "pre_encoder_bias=True" if cfg.pre_encoder_bias else ""


def _unplaced(sae: HookedSAE) -> str:
    """What the layout cannot say of where and at which positions the dictionary belongs; empty where it can."""
    hooks = Hooks(sae.cfg.hook_in, sae.cfg.hook_out)
    place = place_of(hooks)
    if place is None:
        return f"the hooks {hooks.hook_in} and {hooks.hook_out}, which are no site of its layout"
    if place.site == "embedding":
        return "dictionaries of hook_embed: its embedding files are for embeddings before Gemma's scaling"
    if set(sae.cfg.untrained) != set(UNTRAINED):  # which a reader of the layout takes for granted
        return f"untrained={sae.cfg.untrained}"
    return ""
