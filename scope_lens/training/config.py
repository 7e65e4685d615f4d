"""What one training run does: the published recipe and a short one.

The published recipe is that of Gemma Scope (arXiv 2408.05147, section 3.2 and Appendix B). A short run departs from it
in four settings, because 4 billion tokens are not at hand:

1. The threshold is trained directly. Under Adam, log(threshold) moves by at most the learning rate a step; from 0.001
   to 0.1 at 7e-5 takes more than 65,000 steps.
2. The learning rate is a hundred times larger and falls linearly to zero over the last third of the run.
3. Both warm-ups are shorter.
4. The estimator's window is wider and batches are smaller: more updates from the same rows, each with enough rows in
   the window.
"""

import math
from dataclasses import dataclass
from typing import Literal

from scope_lens.releases.release import parse_width
from scope_lens.releases.sites import Site, hooks_for


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one dictionary's training; the defaults are Gemma Scope's.

    Attributes:
        hook_in: Hook the encoder reads.
        hook_out: Hook the decoder writes; equal to `hook_in` for an autoencoder.
        width: Number of latents.
        sparsity: Coefficient of L0, in units of the normalised squared error.
        steps: Updates.
        batch_size: Rows of an update.
        learning_rate: Adam's, after the warm-up.
        lr_warmup: Steps over which a cosine takes the learning rate from a tenth of its value to all of it.
        lr_decay: Steps at the end over which it falls linearly to zero; 0 keeps it constant.
        sparsity_warmup: Steps over which `sparsity` grows linearly from zero.
        betas: Adam's.
        adam_eps: Adam's.
        bandwidth: Width of the straight-through estimator's window, in units of the normalised pre-activation.
        threshold_init: Initial threshold, in the same units.
        threshold: Whether Adam sees the threshold or its logarithm.
        dead_after: Rows without a firing after which a latent counts as dead.
        seed: Of the initialisation and of the order of the rows.

    Raises:
        ValueError: A setting outside its range.
    """

    hook_in: str
    hook_out: str
    width: int
    sparsity: float
    steps: int
    batch_size: int = 4096
    learning_rate: float = 7e-5
    lr_warmup: int = 1_000
    lr_decay: int = 0
    sparsity_warmup: int = 10_000
    betas: tuple[float, float] = (0.0, 0.999)
    adam_eps: float = 1e-8
    bandwidth: float = 0.001
    threshold_init: float = 0.001
    threshold: Literal["direct", "log"] = "log"
    dead_after: int = 1_000_000
    seed: int = 0

    def __post_init__(self) -> None:
        positive = ("width", "steps", "batch_size", "learning_rate", "adam_eps", "bandwidth", "threshold_init")
        for name in (*positive, "dead_after"):
            if not getattr(self, name) > 0:
                raise ValueError(f"TrainConfig.{name} is {getattr(self, name)}; it must be positive.")
        for name in ("sparsity", "lr_warmup", "lr_decay", "sparsity_warmup"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"TrainConfig.{name} is {getattr(self, name)}; it must not be negative.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"TrainConfig.betas is {self.betas}; expected two numbers, each at least 0 and below 1.")
        if self.threshold not in ("direct", "log"):
            raise ValueError(f"TrainConfig.threshold is {self.threshold!r}; expected 'direct' or 'log'.")
        if self.lr_decay > self.steps:
            raise ValueError(f"TrainConfig.lr_decay is {self.lr_decay}, more than the run's {self.steps} steps.")

    @classmethod
    def gemma_scope(cls, *, site: Site, layer: int, width: int | str, sparsity: float, seed: int = 0) -> "TrainConfig":
        """Give the published recipe, its 4, 8 or 16 billion tokens included.

        The text does not say whether the threshold or its logarithm is trained; the logarithm is the choice of the
        paper it builds on (arXiv 2407.14435).

        Args:
            site: Kind of site.
            layer: Layer of the language model.
            width: Number of latents, or a name such as "16k".
            sparsity: Coefficient of L0.
            seed: Of the initialisation and of the order of the rows.

        Raises:
            KeyError: An unknown site or width.
            ValueError: A setting outside its range.

        Source: Gemma Scope, sections 3.1 and 3.2, Table 1.
        """
        hook_in, hook_out = hooks_for(site, layer)
        tokens = {2**14: 4e9, 2**20: 16e9}.get(parse_width(width), 8e9)
        return cls(
            hook_in=hook_in,
            hook_out=hook_out,
            width=parse_width(width),
            sparsity=sparsity,
            steps=math.ceil(tokens / 4096),
            seed=seed,
        )

    @classmethod
    def short_run(
        cls, *, site: Site, layer: int, width: int | str, sparsity: float, steps: int = 4_000, seed: int = 0
    ) -> "TrainConfig":
        """Give a recipe for a few million rows: the same loss, with the four departures of the module docstring.

        Args:
            site: Kind of site.
            layer: Layer of the language model.
            width: Number of latents, or a name such as "16k".
            sparsity: Coefficient of L0.
            steps: Updates.
            seed: Of the initialisation and of the order of the rows.

        Raises:
            KeyError: An unknown site or width.
            ValueError: A setting outside its range.
        """
        hook_in, hook_out = hooks_for(site, layer)
        return cls(
            hook_in=hook_in,
            hook_out=hook_out,
            width=parse_width(width),
            sparsity=sparsity,
            steps=steps,
            batch_size=1024,
            learning_rate=8e-3,
            lr_warmup=min(100, steps // 10),
            lr_decay=steps // 3,
            sparsity_warmup=steps // 4,
            bandwidth=0.01,
            threshold_init=0.01,
            threshold="direct",
            dead_after=100_000,
            seed=seed,
        )

    def learning_rate_at(self, step: int) -> float:
        """Give the learning rate of update `step`, counted from 0."""
        rate = self.learning_rate
        if step < self.lr_warmup:
            rate *= 0.1 + 0.9 * (1 - math.cos(math.pi * step / self.lr_warmup)) / 2
        left = self.steps - step
        if left < self.lr_decay:
            rate *= left / self.lr_decay
        return rate

    def sparsity_at(self, step: int) -> float:
        """Give the coefficient of L0 at update `step`, counted from 0."""
        return self.sparsity if step >= self.sparsity_warmup else self.sparsity * step / self.sparsity_warmup
