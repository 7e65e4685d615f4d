"""Train any number of dictionaries from one store of activations.

`Trainer.run` is a generator: the caller's loop decides what to log, draw or stop. Dictionaries that read the same rows
share them. The order of the rows follows from the seed and the number of updates, so a checkpoint needs no reader's
state, and a run that is taken up again equals an unbroken one bit for bit on the same machine. A run that is broken off
writes a checkpoint on its way out, so that only a kill loses the updates since the last one.

    trainer = Trainer([TrainConfig.short_run(site="res", layer=0, width=1024, sparsity=3e-3)], folder=Path("run"))
    for result in trainer.run(store):
        ...
    saes = trainer.result()

The checkpoint is one safetensors file, written whole or not at all; its header holds the configs and the position.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from scope_lens.sae import HookedSAE
from scope_lens.training.config import TrainConfig
from scope_lens.training.learner import Learner
from scope_lens.training.store import ActivationStore, Batch
from scope_lens.whole_file import whole_file

_CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One update of one dictionary; the numbers are those of its batch, before the update.

    Attributes:
        index: Which of the trainer's configs.
        step: Updates made, this one included.
        loss: Squared error plus the sparsity term, normalised units.
        fvu: Squared error over the squared distance from the batch's mean, a fraction.
        l0: Mean number of active latents of a row.
        dead: Fraction of latents that did not fire in the last `dead_after` rows.
        tokens_per_second: Rows this dictionary took in, over the wall time of its update.
    """

    index: int
    step: int
    loss: float
    fvu: float
    l0: float
    dead: float
    tokens_per_second: float


class Trainer:
    """Trains dictionaries with Gemma Scope's recipe.

    Args:
        configs: Settings, one for each dictionary.
        folder: Where checkpoints go; None keeps none.
        checkpoint_every: Updates between checkpoints.

    Raises:
        ValueError: No config, or `checkpoint_every` is not positive.
        FileExistsError: `folder` holds a checkpoint already.
    """

    def __init__(
        self,
        configs: TrainConfig | Sequence[TrainConfig],
        *,
        folder: Path | None = None,
        checkpoint_every: int = 1_000,
    ) -> None:
        self.configs = (configs,) if isinstance(configs, TrainConfig) else tuple(configs)
        if not self.configs:
            raise ValueError("A Trainer needs at least one TrainConfig; found none.")
        if checkpoint_every < 1:
            raise ValueError(f"checkpoint_every is {checkpoint_every}; expected 1 update or more.")
        self.folder = None if folder is None else Path(folder)
        self.checkpoint_every = checkpoint_every
        self.step = 0
        self._learners: list[Learner] = []
        self._source = ""
        if self.folder is not None and (self.folder / _CHECKPOINT).exists():
            raise FileExistsError(
                f"{self.folder} holds a checkpoint already; take it up with Trainer.resume(folder), or choose another."
            )

    @classmethod
    def resume(cls, folder: Path) -> "Trainer":
        """Take up the run whose last checkpoint is in `folder`.

        Raises:
            FileNotFoundError: `folder` holds no checkpoint.
            ValueError: The checkpoint is damaged.
        """
        folder = Path(folder)
        file = folder / _CHECKPOINT
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; Trainer.resume takes up a run that wrote a checkpoint.")
        try:
            with safe_open(file, framework="pt") as tensors:
                header: dict[str, Any] = json.loads(tensors.metadata()["trainer"])
                state = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
            configs = [TrainConfig(**c | {"betas": tuple(c["betas"])}) for c in header["configs"]]
            trainer = cls(configs, checkpoint_every=header["checkpoint_every"])
            for i, (cfg, shape) in enumerate(zip(configs, header["learners"], strict=True)):
                learner = Learner(cfg, **shape)
                learner.load_state({n.removeprefix(f"{i}."): t for n, t in state.items() if n.startswith(f"{i}.")})
                trainer._learners.append(learner)
            trainer.step, trainer._source = header["step"], header["source"]
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is no whole checkpoint ({type(error).__name__}: {error}); train anew.") from None
        trainer.folder = folder
        return trainer

    def run(self, store: ActivationStore, *, progress: bool = True) -> Iterator[StepResult]:
        """Train until every dictionary has made its steps, from where the trainer stands.

        A loop that is broken off can be taken up by another call. A checkpoint is written every `checkpoint_every`
        updates, at the end, and when the loop is broken off, by an error too. In the middle of an update, and where the
        loss was not finite, the last checkpoint stays instead.

        Args:
            store: Activations at the sites of all configs.
            progress: Whether a progress bar is shown.

        Yields:
            One result for each update of each dictionary.

        Raises:
            KeyError: The store lacks a site.
            ValueError: The store has fewer rows than a batch or is not the one the run began with, the loss is not
                finite, or an earlier call was broken off in the middle of an update.
        """
        self._prepare(store)
        reader = _Reader(store)
        total = max(cfg.steps for cfg in self.configs)
        label = "train, resumed" if self.step else "train"
        with tqdm(total=total, initial=self.step, desc=label, unit="step", disable=not progress) as bar:
            try:
                while self.step < total:
                    for index, learner in enumerate(self._learners):
                        # A loop broken off between two dictionaries goes on with the second.
                        if learner.step == self.step < learner.cfg.steps:
                            yield self._update(index, learner, reader)
                    self.step += 1
                    bar.update()
                    if self.step % self.checkpoint_every == 0 or self.step == total:
                        self._checkpoint()
            except BaseException:
                if all(learner.whole for learner in self._learners):
                    self._checkpoint()
                raise

    def result(self) -> list[HookedSAE]:
        """Give the dictionaries in their inference form: they read and write raw activations.

        Raises:
            ValueError: Nothing has been trained yet.
        """
        if not self._learners:
            raise ValueError("Nothing is trained yet: iterate over Trainer.run(store) first.")
        return [learner.result() for learner in self._learners]

    def _prepare(self, store: ActivationStore) -> None:
        for cfg in self.configs:
            store.width(cfg.hook_in)
            store.width(cfg.hook_out)
            if store.rows < cfg.batch_size:
                raise ValueError(
                    f"The store has {store.rows} rows, fewer than a batch of {cfg.batch_size} for {cfg.hook_out!r}; "
                    "harvest more, or set a smaller batch_size."
                )
        for learner in self._learners:
            cfg = learner.sae.cfg
            if not learner.whole:
                raise ValueError(
                    f"Update {learner.step} for {cfg.hook_out!r} was broken off halfway, or its loss was not finite. "
                    "Take the run up from its last checkpoint with Trainer.resume(folder), or train anew."
                )
            began, found = (cfg.d_in, cfg.d_out), (store.width(cfg.hook_in), store.width(cfg.hook_out))
            if began != found or store.manifest.source != self._source:
                raise ValueError(
                    f"This run began on another store (data {self._source!r}, widths {began}); this one is "
                    f"{store.manifest.source!r} with widths {found}. Resume it on the store it began with."
                )
        if self._learners:
            return
        self._source = store.manifest.source
        for cfg in self.configs:
            learner = Learner(
                cfg,
                d_in=store.width(cfg.hook_in),
                d_out=store.width(cfg.hook_out),
                scale=store.scale(cfg.hook_in),
                model=store.manifest.model,
            )
            self._learners.append(learner)

    def _update(self, index: int, learner: Learner, reader: "_Reader") -> StepResult:
        start = time.perf_counter()
        batch = reader.batch(learner.cfg, learner.step)
        x, y = batch[0], batch[-1]
        parts = learner.update(x, y)
        spread = (y - y.mean(0)).pow(2).sum(-1).mean() / learner.scale**2
        result = StepResult(
            index=index,
            step=learner.step,
            loss=parts.loss.item(),
            fvu=(parts.squared_error / spread).item(),
            l0=parts.l0.item(),
            dead=learner.dead(),
            tokens_per_second=len(x) / (time.perf_counter() - start),
        )
        if not math.isfinite(result.loss):
            raise ValueError(
                f"The loss for {learner.cfg.hook_out!r} is {result.loss} at step {result.step}; lower the learning "
                "rate. The last checkpoint is whole."
            )
        return result

    def _checkpoint(self) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        state: dict[str, Tensor] = {}
        for i, learner in enumerate(self._learners):
            state |= {f"{i}.{name}": tensor.contiguous() for name, tensor in learner.state().items()}
        header = {
            "configs": [asdict(cfg) for cfg in self.configs],
            "learners": [
                {"d_in": s.cfg.d_in, "d_out": s.cfg.d_out, "scale": learner.scale, "model": s.cfg.model}
                for learner in self._learners
                for s in (learner.sae,)
            ],
            "step": self.step,
            "source": self._source,
            "checkpoint_every": self.checkpoint_every,
        }
        with whole_file(self.folder / _CHECKPOINT) as part:
            save_file(state, part, metadata={"trainer": json.dumps(header)})


class _Reader:
    """Batches by number: pass after pass over the store, each in its own order, partial batches left out."""

    def __init__(self, store: ActivationStore) -> None:
        self._store = store
        self._orders: dict[int, tuple[int, Tensor]] = {}
        self._latest: tuple[object, Batch] | None = None

    def batch(self, cfg: TrainConfig, step: int) -> Batch:
        """The rows of update `step`; the same tensors for the next dictionary that asks for them."""
        sites = (cfg.hook_in,) if cfg.hook_in == cfg.hook_out else (cfg.hook_in, cfg.hook_out)
        key = (sites, cfg.batch_size, cfg.seed, step)
        if self._latest is None or self._latest[0] != key:
            pass_number, i = divmod(step, self._store.rows // cfg.batch_size)
            seed = cfg.seed * 1_000_003 + pass_number
            if self._orders.get(cfg.seed, (None,))[0] != seed:
                self._orders[cfg.seed] = (seed, self._store.order(seed))
            rows = self._orders[cfg.seed][1][i * cfg.batch_size : (i + 1) * cfg.batch_size]
            self._latest = (key, self._store.take(sites, rows))
        return self._latest[1]
