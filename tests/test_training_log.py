"""Logs of a run besides its own file."""

import dataclasses
import sys

import pytest
import torch

from scope_lens.evaluation import EvalResult
from scope_lens.training import ActivationStore, StepResult, TensorboardLog, TrainConfig, Trainer, WandbLog
from scope_lens.training.log import scalars

A = "blocks.0.hook_resid_post"
CFG = TrainConfig(
    hook_in=A, hook_out=A, width=32, sparsity=0.01, steps=4, batch_size=16, lr_warmup=1, sparsity_warmup=1,
    threshold="direct",
)  # fmt: skip
EVALUATION = EvalResult(
    ce_clean=2.0, ce_spliced=2.5, ce_spliced_out=2.4, ce_ablated=4.0, delta_loss=0.5, delta_loss_se=0.01,
    delta_loss_out=0.4, loss_recovered=0.75, kl=0.3, fvu={A: 0.2}, l0={A: 9.0}, dead={A: 0.5}, n_tokens=9, n_masked=1,
    tokens_hash="", settings={},
)  # fmt: skip
RESULT = StepResult(
    index=1, name="1_res", step=7, loss=1.5, fvu=0.25, l0=12.0, dead=0.125, tokens_per_second=1e4, evaluation=EVALUATION
)


@pytest.fixture
def store():
    return ActivationStore.from_rows({A: torch.randn(100, 8)})


def test_logs_get_every_result_in_order(store):
    seen, other = [], []
    results = list(Trainer([CFG, CFG], log=[seen.append, other.append]).run(store, progress=False))
    assert seen == other == results


def test_a_log_that_fails_costs_no_update(store, tmp_path):
    def fail(result):
        if result.step == 3:
            raise ConnectionError("no network")

    trainer = Trainer(CFG, folder=tmp_path, log=[fail])
    with pytest.raises(ConnectionError, match="no network"):
        list(trainer.run(store, progress=False))
    assert Trainer.resume(tmp_path).step == 3


def test_scalars_of_a_result():
    plain = {"loss": 1.5, "fvu": 0.25, "l0": 12.0, "dead": 0.125, "tokens_per_second": 1e4}
    assert scalars(dataclasses.replace(RESULT, evaluation=None)) == plain
    assert scalars(RESULT) == plain | {
        "held_out/delta_loss": 0.5, "held_out/loss_recovered": 0.75, "held_out/kl": 0.3, "held_out/fvu": 0.2,
        "held_out/l0": 9.0, "held_out/dead": 0.5,
    }  # fmt: skip


def test_tensorboard_files_hold_the_curves(store, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = TensorboardLog(tmp_path)
    results = list(Trainer(CFG, log=[log]).run(store, progress=False))
    log(RESULT)
    log.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    curve = events.Scalars("0_res_layer_0_width_32/loss")
    assert [(e.step, e.value) for e in curve] == [(r.step, pytest.approx(r.loss)) for r in results]
    assert [e.value for e in events.Scalars("1_res/held_out/delta_loss")] == [0.5]


def test_wandb_offline(store, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    log = WandbLog("some_project", mode="offline", dir=str(tmp_path))
    results = list(Trainer([CFG, CFG], log=[log]).run(store, progress=False))
    summary = dict(log.run.summary)  # a step counts once the next one has begun
    log.close()
    of_step_3 = next(r for r in results if (r.index, r.step) == (1, 3))
    assert summary["1_res_layer_0_width_32/loss"] == pytest.approx(of_step_3.loss)
    assert summary["0_res_layer_0_width_32/l0"] > 0
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    ("make", "package", "modules"),
    [
        (lambda folder: WandbLog(dir=folder), "wandb", ["wandb"]),
        (TensorboardLog, "tensorboard", ["tensorboard", "torch.utils.tensorboard"]),
    ],
)
def test_a_package_that_is_missing_is_named(make, package, modules, monkeypatch, tmp_path):
    for name in modules:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ImportError, match=rf"needs {package}, which is not installed: pip install 'scope-lens\[train\]'"
    ):
        make(tmp_path)
