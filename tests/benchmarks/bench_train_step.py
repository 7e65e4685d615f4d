"""A whole update of a JumpReLU dictionary beside bare eager torch: `python tests/benchmarks/bench_train_step.py`.

`Learner.update` (normalise the rows, loss, gradients, projection, Adam, unit rows, counters of firings) takes turns
with `eager_step.py`, which does the same maths with autograd, once straightforward and once in place. How much the
hand-written step saves depends on how many latents are active, so each size is timed in the state of the first steps
and in that of a trained dictionary. The learning rate is too small to leave that state.

`--peer PYTHON` adds sae-lens' own training step: the Python of an environment with sae-lens (bench_peer.py says how to
make one), where the ratio to the same bare step is taken.
"""

import argparse
import json
import subprocess
import time
from pathlib import Path

import torch
from arms import interleaved, ratio, write
from eager_step import EagerLearner

from scope_lens.training import TrainConfig
from scope_lens.training.learner import Learner

BANDWIDTH, SPARSITY, LR = 0.01, 1e-3, 1e-9
NOTES = (
    "`ratio` is the median over rounds of baseline / arm in processor time, so above 1 the arm is faster; `low` and "
    "`high` are its quartiles. Goal: 1.2 x bare eager torch at 256 -> 4096, batch 2048. With 44 % of the latents "
    "active the five dense products remain, which are half to two thirds of the bare update."
)


def row(d: int, d_sae: int, batch: int, density: float, *, transcoder: bool = False, rounds: int = 9) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, d, generator=generator)
    y = torch.randn(batch, d, generator=generator) if transcoder else x
    # Rows of norm 1 after scaling and encoder columns of norm 1: pre-activations of deviation 1 / sqrt(d).
    threshold = float(torch.distributions.Normal(0, d**-0.5).icdf(torch.tensor(1 - density)))
    settings = {"threshold": threshold, "scale": d**0.5, "lr": LR, "sparsity": SPARSITY, "bandwidth": BANDWIDTH}
    bare, in_place = (
        EagerLearner(d, d_sae, d_out=d if transcoder else None, in_place=flag, **settings) for flag in (False, True)
    )
    site, target = "blocks.0.hook_resid_mid", "blocks.0.hook_mlp_out"
    cfg = TrainConfig(
        hook_in=site, hook_out=target if transcoder else site,
        width=d_sae, sparsity=SPARSITY, steps=10**6, batch_size=batch, learning_rate=LR, lr_warmup=0,
        sparsity_warmup=0, bandwidth=BANDWIDTH, threshold_init=threshold, threshold="direct",
    )  # fmt: skip
    ours = Learner(cfg, d_in=d, d_out=d, scale=d**0.5, model="random")
    with torch.no_grad():
        for name in ("W_enc", "W_dec"):
            getattr(ours.sae, name).copy_(getattr(bare, name))
    torch.testing.assert_close(ours.update(x, y).loss, bare.update(x, y), rtol=1e-5, atol=0)
    seconds = interleaved(
        {name: lambda a=arm: a.update(x, y) for name, arm in (("bare", bare), ("in place", in_place), ("ours", ours))},
        rounds=rounds,
        clock=time.process_time,
    )
    state = f"L0 {density * d_sae:.0f}" if density < 0.05 else f"{density:.0%} active"
    work = f"{'transcoder' if transcoder else 'autoencoder'} {d} -> {d_sae}, batch {batch}, {state}"
    return [
        {"work": work, "over": "bare eager"} | ratio(seconds, "bare", "ours"),
        {"work": work, "over": "bare eager, in place"} | ratio(seconds, "in place", "ours"),
    ]


def peer_rows(python: str) -> list[dict]:
    script = Path(__file__).with_name("peer_train_step.py")
    run = subprocess.run([python, str(script)], capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer")
    python = parser.parse_args().peer
    rows = [
        *row(256, 4096, 2048, 0.436, rounds=11),
        *row(256, 4096, 2048, 0.10, rounds=11),
        *row(256, 4096, 2048, 64 / 4096, rounds=15),
        *row(256, 4096, 2048, 0.436, transcoder=True),
        *row(256, 4096, 2048, 64 / 4096, transcoder=True),
        *row(192, 1024, 1024, 0.436, rounds=31),
        *row(192, 1024, 1024, 40 / 1024, rounds=31),
        *row(512, 8192, 1024, 0.436, rounds=7),
        *row(512, 8192, 1024, 64 / 8192, rounds=7),
    ]
    if python:
        rows += peer_rows(python)
    write("train_step", "A training step beside bare eager torch", rows, notes=NOTES)


if __name__ == "__main__":
    main()
