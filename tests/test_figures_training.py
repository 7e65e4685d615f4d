"""Curves of a training run."""

import dataclasses
import math

import pytest
import torch
from test_training_log import EVALUATION, RESULT

from scope_lens import figures
from scope_lens.training import ActivationStore, TrainConfig, Trainer

A = "blocks.0.hook_resid_post"
CFG = TrainConfig(
    hook_in=A, hook_out=A, width=32, sparsity=0.01, steps=6, batch_size=16, lr_warmup=1, sparsity_warmup=1,
    threshold="direct",
)  # fmt: skip


def curves(figure, panel):
    """Traces of one panel, by its number."""
    axis = "x" if panel == 0 else f"x{panel + 1}"
    return [trace for trace in figure.data if (trace.xaxis or "x") == axis]


def test_the_curves_are_the_results(tmp_path):
    store = ActivationStore.from_rows({A: torch.randn(100, 8)})
    trainer = Trainer([CFG, dataclasses.replace(CFG, steps=4, seed=1)], folder=tmp_path)
    results = list(trainer.run(store, progress=False))
    figure = figures.training_curves(results)
    assert (
        figure
        == figures.training_curves(tmp_path / "log.jsonl")
        == figures.training_curves(str(tmp_path / "log.jsonl"))
    )
    titles = [a.text for a in figure.layout.annotations]
    assert titles == [
        "loss (normalised units)", "variance unexplained (FVU)", "L0 (active latents per token)",
        "dead latents (fraction)",
    ]  # fmt: skip
    for panel, name in enumerate(("loss", "fvu", "l0", "dead")):
        for index, trace in enumerate(curves(figure, panel)):
            own = [r for r in results if r.index == index]
            assert list(trace.x) == [r.step for r in own]
            assert list(trace.y) == [getattr(r, name) for r in own]
    assert [t.name for t in figure.data if t.showlegend] == ["0_res_layer_0_width_32", "1_res_layer_0_width_32"]
    assert "2 dictionaries" in figure.layout.title.text


def test_held_out_evaluations_have_panels_of_their_own():
    results = [
        dataclasses.replace(
            RESULT,
            step=step,
            evaluation=dataclasses.replace(EVALUATION, delta_loss=1 / step) if step % 3 == 0 else None,
        )
        for step in range(1, 10)
    ]
    figure = figures.training_curves(results)
    assert [a.text for a in figure.layout.annotations][4:] == [
        "held-out delta loss (nats per token)", "held-out loss recovered",
    ]  # fmt: skip
    (delta,), (recovered,) = curves(figure, 4), curves(figure, 5)
    assert (list(delta.x), list(delta.y)) == ([3, 6, 9], [1 / 3, 1 / 6, 1 / 9])
    assert list(recovered.y) == [0.75] * 3
    assert "1 dictionary" in figure.layout.title.text


def test_long_runs_are_thinned_and_keep_their_ends():
    results = [dataclasses.replace(RESULT, step=step, evaluation=None) for step in range(1, 10_001)]
    (loss,) = curves(figures.training_curves(results), 0)
    assert len(loss.x) <= 2_001
    assert (loss.x[0], loss.x[-1]) == (1, 10_000)


def test_what_no_axis_can_show_does_not_break_it():
    results = [dataclasses.replace(RESULT, evaluation=None, fvu=math.inf, l0=0.0)]
    figure = figures.training_curves(results)
    assert figure.layout.yaxis3.type is None  # an L0 of 0 is on no logarithmic axis
    assert figures.training_curves([dataclasses.replace(RESULT, evaluation=None, fvu=math.nan)]).data
    with pytest.raises(ValueError, match="There is nothing to draw: no results"):
        figures.training_curves([])
