"""Train any number of dictionaries from one store of activations, such that nothing is lost when the run is killed.

    trainer = Trainer([TrainConfig.short_run(site="res", layer=0, width=1024, sparsity=3e-3)], folder=Path("run"))
    for result in trainer.run(store):
        ...
    saes = trainer.result()

`Trainer.run` is a generator: the caller's loop decides what to draw or stop. A step:

1. Each group of dictionaries of one batch size reads a batch, and each of them makes its update on it.
2. Where results are due, the numbers that the updates left on the device are read at once and checked.
3. Where it is due, each dictionary is evaluated on held-out text.
4. The results go into `folder/log.jsonl` and to the other logs.
5. Where it is due, a checkpoint is written: learners, readers, the length of the log.
6. The results are given to the caller.

The dictionaries have nothing in common but the rows, so a run of several equals separate runs bit for bit (same
`Trainer(seed=)`, same number of threads), and a run that is taken up again equals an unbroken one, on the CPU. Ctrl-C
and SIGTERM finish the step and write a checkpoint; only a kill loses the steps since the last one.

On several devices every process makes a Trainer with the same arguments and `mesh=`, and iterates over `run` on the
same store (`scope_lens.training.ranks`). All of them get the same results. The first one alone writes the log,
evaluates, and shows a progress bar.
"""

import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from tqdm import tqdm

from scope_lens.evaluation import EvalResult
from scope_lens.sae import HookedSAE
from scope_lens.training.checkpoint import (
    checkpoints,
    config_of,
    read_checkpoint,
    remove_newer,
    write_checkpoint,
)
from scope_lens.training.config import TrainConfig
from scope_lens.training.evaluations import Evaluations
from scope_lens.training.fused_step import kernels_for
from scope_lens.training.held_out import HeldOut
from scope_lens.training.interrupts import Interrupts
from scope_lens.training.kernels.choice import KernelChoice, obstacle
from scope_lens.training.learner import Learner, check_divides
from scope_lens.training.log import LOG_NAME, JsonLog, Log
from scope_lens.training.progress import show
from scope_lens.training.ranks import Ranks
from scope_lens.training.readings import Reading, Readings
from scope_lens.training.run_state import learner_shapes, learners_of, refuse_others, run_tensors, state_of
from scope_lens.training.shared_rows import Group, groups_of, identity_of, refuse_another
from scope_lens.training.step_result import StepResult, config_name
from scope_lens.training.store import ActivationStore

_SETTINGS = ("checkpoint_every", "keep", "seed", "evaluate_every", "report_every")


class Trainer:
    """Trains dictionaries on shared rows.

    Args:
        configs: Settings, one for each dictionary.
        folder: Where checkpoints and the log go; None keeps none.
        checkpoint_every: Updates between checkpoints.
        keep: Checkpoints that stay.
        seed: Of the order of the rows. A config's own seed is that of its initialisation.
        device: Where the dictionaries are; None takes the mesh's device, or a GPU where there is one.
        held_out: Text to evaluate on; None evaluates nothing. On several ranks only the first one's counts.
        evaluate_every: Updates between evaluations; a dictionary's last update is evaluated too.
        report_every: Updates between results; None takes 1, and 50 on a GPU, where each result waits for the device.
        log: Called with each result, e.g. `TensorboardLog(folder)`; on several ranks, by the first one.
        mesh: The processes that train together, with the dimensions "data" and "latent"; None is this one alone.
            Every process makes a Trainer then, with the same arguments.
        kernels: What updates are made of: "triton" for the fused kernels, which need CUDA; "eager" for torch's own
            operations; "auto" for the kernels where they can run. The kernels multiply in bfloat16, sum up in float32.

    Raises:
        ValueError: No config, a setting that is not positive, kernels that cannot run here, or `folder` holds a run of
            other configs; or a mesh that widths or batches do not divide among, or ranks that were given different
            arguments.
        FileExistsError: `folder` holds a run of these configs already.
    """

    def __init__(
        self,
        configs: TrainConfig | Sequence[TrainConfig],
        *,
        folder: str | Path | None = None,
        checkpoint_every: int = 1_000,
        keep: int = 3,
        seed: int = 0,
        device: str | torch.device | None = None,
        held_out: HeldOut | None = None,
        evaluate_every: int = 1_000,
        report_every: int | None = None,
        log: Sequence[Log] = (),
        mesh: DeviceMesh | None = None,
        kernels: KernelChoice = "auto",
    ) -> None:
        self._ranks = Ranks(mesh)
        self.device = self._ranks.device(device)
        self.configs = (configs,) if isinstance(configs, TrainConfig) else tuple(configs)
        if not self.configs:
            raise ValueError("A Trainer needs at least one TrainConfig; found none.")
        self.checkpoint_every, self.evaluate_every = checkpoint_every, evaluate_every
        usual = 50 if self.device.type == "cuda" else 1
        self.report_every = usual if report_every is None else report_every
        self.keep, self.seed = keep, seed
        for name in ("checkpoint_every", "keep", "evaluate_every", "report_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more.")
        self.names = tuple(config_name(index, cfg) for index, cfg in enumerate(self.configs))
        with self._ranks.agreement.together():
            self._kernels = kernels_for(kernels, self.device, self.configs, self._ranks)
        self._without_kernels = obstacle(self.device) if kernels == "auto" else None
        self.log = tuple(log)
        self.folder = None if folder is None else Path(folder)
        self._ranks.agreement.refuse_differences(
            configs=[asdict(cfg) for cfg in self.configs],
            settings=self._settings(),
            folder=str(self.folder),
            kernels=self._kernels and self._kernels.name,
        )
        for cfg in self.configs:
            check_divides(cfg, self._ranks)
        if self.folder is not None and checkpoints(self.folder):
            there = [config_of(fields) for fields in read_checkpoint(self.folder, ranks=self._ranks).header["configs"]]
            refuse_others(self.folder, kept=there, asked=self.configs)
            raise FileExistsError(
                f"{self.folder} holds a run of these configs already; take it up with "
                f"Trainer.resume({str(self.folder)!r}), or choose another folder."
            )
        self.step = 0
        self._evaluations = Evaluations(held_out, every=evaluate_every, ranks=self._ranks)
        self._learners: list[Learner] = []
        self._groups: list[Group] = []
        self._store: ActivationStore | None = None
        self._store_identity: dict[str, Any] = {}
        self._reader_states: dict[int, dict[str, Tensor]] = {}
        self._readings = Readings(self.names, ranks=self._ranks)
        self._undelivered: deque[StepResult] = deque()
        self._seconds = 0.0
        self._reported: dict[int, tuple[int, float]] = {}
        self._json: JsonLog | None = None
        self._log_size: int | None = None
        self._saved_step = -1
        # Whether the state is that after `step` updates of every dictionary, all of it checked and logged.
        self._settled = True

    @classmethod
    def resume(
        cls,
        folder: str | Path,
        *,
        configs: TrainConfig | Sequence[TrainConfig] | None = None,
        step: int | None = None,
        device: str | torch.device | None = None,
        held_out: HeldOut | None = None,
        log: Sequence[Log] = (),
        mesh: DeviceMesh | None = None,
        kernels: KernelChoice = "auto",
    ) -> "Trainer":
        """Take up the run in `folder` from its newest checkpoint.

        Its settings come from the checkpoint. `run` needs the store that the run began with, and its held-out text if
        it had one. It may have been written by another number of processes, or by a single one.

        Args:
            folder: What `Trainer(configs, folder=...)` was given.
            configs: What the run has to be of; None takes any.
            step: Go on from an older checkpoint, that after `step` updates. `run` then removes the newer ones.
            device: As for `Trainer`.
            held_out: As for `Trainer`.
            log: As for `Trainer`.
            mesh: As for `Trainer`.
            kernels: As for `Trainer`; they may be others than before.

        Raises:
            FileNotFoundError: `folder` holds no checkpoint, or none of `step`.
            ValueError: The checkpoint is damaged, the run is of other configs, or the kernels cannot run here.
        """
        folder, ranks = Path(folder), Ranks(mesh)
        path, header, _ = checkpoint = read_checkpoint(folder, step=step, ranks=ranks)
        with state_of(path):
            kept = [config_of(fields) for fields in header["configs"]]
        kernels_for(kernels, ranks.device(device), kept, ranks)
        with state_of(path):
            trainer = cls(
                kept, device=device, held_out=held_out, log=log, mesh=mesh, kernels=kernels, **header["settings"]
            )
            trainer._learners = learners_of(
                checkpoint, kept, device=trainer.device, ranks=trainer._ranks, kernels=trainer._kernels
            )
            trainer._reader_states = {cfg.batch_size: checkpoint.below(f"reader.{cfg.batch_size}.") for cfg in kept}
            trainer.evaluations.update(
                (int(i), EvalResult.from_json(text)) for i, text in header["evaluations"].items()
            )
            trainer._store_identity, trainer._evaluations.identity = header["store"], header["held_out"]
            trainer.step = trainer._saved_step = header["step"]
            trainer._log_size = header["log_size"]
        if configs is not None:
            refuse_others(folder, kept=kept, asked=[configs] if isinstance(configs, TrainConfig) else configs)
        trainer.folder = folder
        return trainer

    @property
    def evaluations(self) -> dict[int, EvalResult]:
        """The last evaluation of each dictionary, by the number of its config."""
        return self._evaluations.found

    def run(self, store: ActivationStore, *, progress: bool = True) -> Iterator[StepResult]:
        """Train until every dictionary has made its steps, from where the trainer stands.

        A checkpoint is written before the first update, every `checkpoint_every` updates, at the end, and when the loop
        is broken off: by the caller, by an error, by Ctrl-C or SIGTERM. Where a step could not be finished, or a number
        in it is not finite, the last checkpoint stays instead. A loop that is broken off can be taken up by another
        call.

        On several ranks all of them break off at the same step or none does: a signal to one of them stops all. Where
        one goes elsewhere by itself, or dies, the others fail, and the last checkpoint stays.

        Args:
            store: Activations at the sites of all configs; on several ranks, every one opens the same.
            progress: Whether a progress bar is shown.

        Yields:
            A result for each dictionary, every `report_every` steps.

        Raises:
            KeyError: The store lacks a site.
            ValueError: The store has fewer rows than a batch, or is not the one the run began with, or has seen the
                held-out text; activations or loss are not finite; or an earlier call could not finish its step.
            OSError: A checkpoint cannot be written.
            KeyboardInterrupt: Ctrl-C, once the step is finished and saved.
            SystemExit: SIGTERM, likewise; the code is 143.
        """
        self._begin(store)
        total = max(cfg.steps for cfg in self.configs)
        label = "train, resumed" if self.step else "train"
        agreement = self._ranks.agreement
        interrupts = Interrupts(
            self._checkpoint, self._interrupted, agree=None if self._ranks.alone else agreement.largest
        )
        hidden = not (progress and self._ranks.first)
        self._say_once_without_kernels()
        with (
            interrupts.handled(),
            tqdm(total=total, initial=self.step, desc=label, unit="step", disable=hidden) as bar,
        ):
            try:
                with interrupts.working():
                    self._checkpoint()
                yield from self._deliver()
                while self.step < total:
                    with interrupts.working():
                        results = self._advance()
                        if self.step % self.checkpoint_every == 0 or self.step == total:
                            self._checkpoint()
                    show(bar, results)
                    yield from self._deliver()
            except BaseException:
                # A checkpoint is written together, so only where all ranks have come to this point.
                if agreement.all_reach(self.step):
                    with interrupts.working():
                        self._checkpoint()
                raise
            finally:
                if self._json is not None:
                    self._json.close()

    def result(self) -> list[HookedSAE]:
        """Give the dictionaries in their inference form: they read and write raw activations.

        On several ranks all of them ask for it, and each gets the whole dictionaries.

        Raises:
            ValueError: Nothing has been trained yet.
        """
        if not self._learners:
            raise ValueError("Nothing is trained yet: iterate over Trainer.run(store) first.")
        return [learner.result() for learner in self._learners]

    def _say_once_without_kernels(self) -> None:
        if self._without_kernels is not None and self._ranks.first:
            why, _ = self._without_kernels
            tqdm.write(f"Training runs on torch's own operations, without the fused kernels: {why}.", file=sys.stderr)
        self._without_kernels = None

    def _begin(self, store: ActivationStore) -> None:
        """Check that this store fits the run, and make what the first call of `run` lacks."""
        if not self._settled:
            raise ValueError(
                f"Step {self.step} of this run was broken off halfway, or a number in it was not finite. Take the run "
                "up from its last checkpoint with Trainer.resume(folder), or train anew."
            )
        ranks = self._ranks
        with ranks.agreement.together():
            identity = identity_of(store, self.configs)
            if self._learners:
                refuse_another(self._store_identity, identity)
        ranks.agreement.refuse_differences(store=identity, step=self.step, folder=str(self.folder))
        self._evaluations.begin(store, goes_on=bool(self._learners))
        groups = self._groups
        with ranks.agreement.together():
            if self._store is not store:
                groups = groups_of(self.configs, store, seed=self.seed, ranks=ranks)
                for group in groups:
                    if group.batch_size in self._reader_states:
                        group.reader.load_state(self._reader_states[group.batch_size])
            if self.folder is not None and ranks.first:
                remove_newer(self.folder, step=self.step)
                self._json = JsonLog(self.folder / LOG_NAME, size=self._log_size)
                self._log_size = self._json.size
        if not self._learners:
            for cfg in self.configs if ranks.first else ():
                for message in filter(None, (cfg.threshold_warning(), cfg.warm_up_warning())):
                    warnings.warn(message, UserWarning, stacklevel=3)
            self._learners = [self._learner(cfg, store) for cfg in self.configs]
        self._store, self._store_identity, self._groups = store, identity, groups
        self._reported = dict.fromkeys(range(len(self.configs)), (self.step, self._seconds))

    def _learner(self, cfg: TrainConfig, store: ActivationStore) -> Learner:
        return Learner(
            cfg,
            d_in=store.width(cfg.hook_in),
            d_out=store.width(cfg.hook_out),
            scale=store.scale(cfg.hook_in),
            model=store.manifest.model,
            device=self.device,
            ranks=self._ranks,
            kernels=self._kernels,
        )

    def _advance(self) -> list[StepResult]:
        """Make one step, and give the results that are due after it."""
        start = time.perf_counter()
        self._settled = False
        for group in self._groups:
            active = [index for index, cfg in group.members.items() if self.step < cfg.steps]
            if active:
                batch = group.next(self.device)
                for index in active:
                    cfg, learner = self.configs[index], self._learners[index]
                    parts = learner.update(batch.rows[cfg.hook_in], batch.rows[cfg.hook_out])
                    self._readings.note(index, learner, parts, batch)
        self.step += 1
        due = [index for index, cfg in enumerate(self.configs) if self._is_due(cfg)]
        readings = self._readings.read(remedy=self._last_checkpoint()) if due else {}
        self._seconds += time.perf_counter() - start
        results = [self._result(index, readings[index]) for index in due]
        for result in results:
            if self._json is not None:
                self._json(result)
                self._log_size = self._json.size
        self._undelivered.extend(results)
        self._settled = True
        for result in results if self._ranks.first else ():
            for log in self.log:
                log(result)
        return results

    def _is_due(self, cfg: TrainConfig) -> bool:
        running = self.step <= cfg.steps
        return running and (
            self.step % self.report_every == 0 or self.step == cfg.steps or self._evaluations.due(cfg, step=self.step)
        )

    def _result(self, index: int, reading: Reading) -> StepResult:
        cfg, learner = self.configs[index], self._learners[index]
        evaluates = self._evaluations.due(cfg, step=self.step)
        evaluation = self._evaluations.make(index, learner) if evaluates else None
        (step, seconds), self._reported[index] = self._reported[index], (self.step, self._seconds)
        return StepResult(
            index=index,
            name=self.names[index],
            step=self.step,
            loss=reading.loss,
            fvu=reading.fvu,
            l0=reading.l0,
            dead=learner.dead(),
            tokens_per_second=cfg.batch_size * (self.step - step) / (self._seconds - seconds),
            evaluation=evaluation,
        )

    def _deliver(self) -> Iterator[StepResult]:
        while self._undelivered:
            yield self._undelivered.popleft()

    def _checkpoint(self) -> None:
        """Write the state, unless it is on disk already or the step could not be finished."""
        if self.folder is None or not self._settled or self._saved_step == self.step:
            return
        self._settled = False  # until the numbers of the last updates have been checked
        self._readings.read(remedy=self._last_checkpoint())
        with self._ranks.agreement.together():
            state = run_tensors(self._learners, self._groups, names=self.names, remedy=self._last_checkpoint())
        self._settled = True
        header = {
            "configs": [asdict(cfg) for cfg in self.configs],
            "settings": self._settings(),
            "learners": learner_shapes(self._learners),
            "store": self._store_identity,
            "held_out": self._evaluations.identity,
            "evaluations": {index: result.to_json() for index, result in self.evaluations.items()},
            "log_size": self._log_size,
        }
        write_checkpoint(self.folder, header, state, step=self.step, keep=self.keep, ranks=self._ranks)
        self._saved_step = self.step

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _SETTINGS}

    def _last_checkpoint(self) -> str:
        if self.folder is None:
            return "Nothing was kept: the trainer has no folder."
        return f"The last checkpoint, after step {self._saved_step}, is whole: Trainer.resume({str(self.folder)!r})."

    def _interrupted(self) -> str:
        text = f"interrupted after step {self.step}"
        return text if self.folder is None else f"{text}; Trainer.resume({str(self.folder)!r}) goes on from there"
