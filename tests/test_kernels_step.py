"""Whole updates on the Triton kernels: against their twins, and against the learner that has no kernels."""

import dataclasses

import pytest
import torch
from test_training_fused_step import ALWAYS, KINDS, SITE, compare_states

from scope_lens.training import TrainConfig
from scope_lens.training.kernels.kernel_set import eager_kernels, triton_kernels
from scope_lens.training.learner import Learner

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def learner(cfg, d, *, kernels=None, **settings):
    (x, _), *_ = batches(cfg, d, 1)
    scale = float(x.square().sum(1).mean().sqrt())
    return Learner(cfg, d_in=d, d_out=d, scale=scale, model="m", device=DEVICE, kernels=kernels, **settings)


def batches(cfg, d, number):
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4 * d, d, generator=generator)
    for _ in range(number):
        on = torch.rand(cfg.batch_size, 4 * d, generator=generator)
        on = on * (torch.rand(cfg.batch_size, 4 * d, generator=generator) < 2 / d)
        x = (on @ directions + 0.05 * torch.randn(cfg.batch_size, d, generator=generator)).to(DEVICE)
        yield (x, x) if cfg.hook_in == cfg.hook_out else (x, x.roll(1, 1).relu())


def run(one, cfg, d, number):
    parts = [one.update(x, y) for x, y in batches(cfg, d, number)]
    one.settle()
    return parts


@pytest.mark.parametrize("kind", ["as published", "skip transcoder", "topk"])
def test_updates_equal_those_on_the_twins(kind):
    cfg = dataclasses.replace(KINDS[kind], width=32, batch_size=16)
    twin = learner(cfg, 8, kernels=eager_kernels(), operands=torch.float32, break_even=ALWAYS)
    ours = learner(cfg, 8, kernels=triton_kernels(), operands=torch.float32, break_even=ALWAYS)
    for found, expected in zip(run(ours, cfg, 8, 5), run(twin, cfg, 8, 5), strict=True):  # 2 dense ones, then sparse
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=0)
        assert found.l0 == expected.l0
        assert torch.equal(found.fired, expected.fired)
    compare_states(ours.state(), twin.state(), cfg, rtol=2e-4, atol=2e-6)


def follow(found, expected, *, worst=1e-3):
    losses, others = (torch.tensor([parts.loss for parts in run]) for run in (found, expected))
    torch.testing.assert_close(losses, others, rtol=worst, atol=0)
    assert (losses / others - 1).abs().mean() < 1e-3
    l0, other = (torch.tensor([parts.l0 for parts in run]) for run in (found, expected))
    torch.testing.assert_close(l0, other, rtol=1e-2, atol=0)


@pytest.mark.slow
def test_a_run_of_200_updates_follows_the_run_without_kernels():
    """About five minutes in the interpreter."""
    cfg = dataclasses.replace(KINDS["as published"], width=32, batch_size=16)
    plain = learner(cfg, 8)
    ours = learner(cfg, 8, kernels=triton_kernels(), operands=torch.float32, break_even=0.4)
    follow(run(ours, cfg, 8, 200), run(plain, cfg, 8, 200))


@pytest.mark.gpu
@pytest.mark.parametrize("transcoder", [False, True])
def test_a_run_in_bfloat16_follows_the_run_without_kernels(transcoder):
    cfg = TrainConfig(
        hook_in="blocks.1.ln2.hook_normalized" if transcoder else SITE,
        hook_out="blocks.1.hook_mlp_out" if transcoder else SITE,
        width=8192, sparsity=2e-3, steps=400, batch_size=2048, learning_rate=1e-3, lr_warmup=10, sparsity_warmup=40,
        bandwidth=0.05, threshold_init=0.02,
    )  # fmt: skip
    plain = learner(cfg, 512)
    ours = learner(cfg, 512, kernels=triton_kernels(), break_even=0.2)
    follow(run(ours, cfg, 512, 200), run(plain, cfg, 512, 200), worst=5e-3)
    assert ours._fused._dispatch.choose(200).sparse
