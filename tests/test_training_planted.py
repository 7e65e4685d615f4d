"""A dictionary that is known: sums of a few of 256 directions in 64 dimensions, which training has to find."""

import torch

from scope_lens.training import TrainConfig
from scope_lens.training.learner import Learner

DIRECTIONS, WIDTH, BATCH = 256, 64, 1024


def planted(*, active):
    """Unit directions, and endless rows in which each of them is present with probability active / 256."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(DIRECTIONS, WIDTH, generator=generator), dim=1)
    present = torch.rand(64 * BATCH, DIRECTIONS, generator=generator) < active / DIRECTIONS
    rows = (present * (0.5 + torch.rand(present.shape, generator=generator))) @ directions

    def batch():
        return rows[torch.randint(len(rows), (BATCH,), generator=generator)]

    return directions, rows, batch


def recovered(cfg, *, active=2):
    """Cosine of each planted direction with the nearest latent, and the learner."""
    directions, rows, batch = planted(active=active)
    learner = Learner(cfg, d_in=WIDTH, d_out=WIDTH, scale=float(rows.pow(2).sum(1).mean().sqrt()), model="m")
    started = (directions @ learner.sae.W_dec.detach().T).amax(1)
    for _ in range(cfg.steps):
        x = batch()
        learner.update(x, x)
    assert started.mean() < 0.5  # random latents are far from every direction
    return (directions @ learner.sae.W_dec.detach().T).amax(1), learner


def test_jumprelu_finds_the_planted_directions():
    cfg = TrainConfig.short_run(site="res", layer=0, width=512, sparsity=3e-2, steps=700)
    cosine, learner = recovered(cfg)
    assert cosine.mean() >= 0.95
    assert (cosine > 0.9).float().mean() > 0.9
    _, rows, _ = planted(active=2)
    assert 1.5 < (learner.result().encode(rows[:4096]) > 0).sum(1).float().mean() < 2.5  # of 2 directions a row


def test_topk_finds_the_planted_directions():
    cfg = TrainConfig.short_run(site="res", layer=0, width=512, activation="topk", k=2, steps=250)
    cosine, _ = recovered(cfg)
    assert cosine.mean() >= 0.95
    assert (cosine > 0.9).float().mean() > 0.9
