"""What one training run does: the settings of a dictionary, with the published recipes and short ones as presets.

The defaults are Gemma Scope's (arXiv 2408.05147, section 3.2 and Appendix B). A config that cannot be trained is
refused when it is made. `docs/pages/training_recipe.md` tells the presets apart.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from scope_lens.releases.release import parse_width
from scope_lens.releases.sites import Site, hooks_for
from scope_lens.sae_config import UNTRAINED, SpecialPosition
from scope_lens.training.presets import (
    gemma_scope_2_settings,
    published_steps,
    short_run_settings,
    usual_threshold,
)
from scope_lens.training.schedules import cosine_warm_up, linear_decay, linear_warm_up
from scope_lens.training.sparsity import SparsityTerm

Activation = Literal["jumprelu", "topk", "batchtopk", "relu", "gated"]

_NEAR_ENOUGH = 3.0  # a threshold this factor off costs little
_WITH_K = ("topk", "batchtopk")
_POSITIVE = (
    "width", "steps", "batch_size", "learning_rate", "adam_eps", "bandwidth", "threshold_init", "dead_after",
    "frequency_limit", "aux_coefficient",
)  # fmt: skip
_NOT_NEGATIVE = ("sparsity", "lr_warmup", "lr_decay", "sparsity_warmup", "frequency_penalty", "aux_k")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one dictionary's training; the defaults are Gemma Scope's.

    Attributes:
        hook_in: Hook the encoder reads.
        hook_out: Hook the decoder writes; equal to `hook_in` for an autoencoder.
        width: Number of latents.
        sparsity: Coefficient of the sparsity term, in units of the normalised squared error: of L0, of the squared
            distance from `target_l0`, or of the L1 norm (relu, gated). 0 for the TopK kinds.
        steps: Updates.
        batch_size: Rows of an update.
        learning_rate: Adam's, after the warm-up.
        lr_warmup: Steps over which a cosine takes the learning rate from a tenth of its value to all of it.
        lr_decay: Steps at the end over which it falls linearly to zero; 0 keeps it constant.
        sparsity_warmup: Steps over which `sparsity` and `frequency_penalty` grow linearly from zero.
        betas: Adam's.
        adam_eps: Adam's.
        bandwidth: Width of the straight-through estimator's window, in units of the normalised pre-activation.
        threshold_init: Initial threshold, in the same units.
        threshold: Whether Adam sees the threshold or its logarithm.
        activation: Kind of dictionary; all but "jumprelu" are baselines.
        k: Latents kept by the TopK kinds, of each row or on average; None for the others.
        target_l0: L0 that the sparsity term aims at; None puts a price on L0 instead.
        quadratic_factor: Factor of the squared distance from `target_l0`; None takes the published 2 / target_l0.
        frequency_penalty: Coefficient of the squared firing frequencies; 0 leaves them out.
        frequency_limit: Frequency p0 of that penalty, a fraction of the rows.
        matryoshka: Widths of nested prefixes that have to reconstruct alone, ascending; the whole width is always one.
        skip: Whether a transcoder has an affine skip term `x @ W_skip`.
        aux_k: Dead latents of a TopK kind that reconstruct what is left of a row; 0 leaves the auxiliary loss out.
        aux_coefficient: Of that loss.
        untrained: Kinds of position that the activations leave out.
        dead_after: Rows without a firing after which a latent counts as dead.
        seed: Of the initialisation.

    Raises:
        ValueError: A setting outside its range, or settings that contradict each other.
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
    activation: Activation = "jumprelu"
    k: int | None = None
    target_l0: float | None = None
    quadratic_factor: float | None = None
    frequency_penalty: float = 0.0
    frequency_limit: float = 0.1
    matryoshka: tuple[int, ...] = ()
    skip: bool = False
    aux_k: int = 0
    aux_coefficient: float = 1 / 32
    untrained: tuple[SpecialPosition, ...] = UNTRAINED
    dead_after: int = 1_000_000
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_kind()
        self._check_sparsity()

    # ---- presets ----

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
            seed: Of the initialisation.

        Raises:
            KeyError: An unknown site or width.
            ValueError: A setting outside its range.

        Source: Gemma Scope (arXiv 2408.05147), sections 3.1 and 3.2, Table 1.
        """
        hook_in, hook_out = hooks_for(site, layer)
        latents = parse_width(width)
        return cls(
            hook_in=hook_in,
            hook_out=hook_out,
            width=latents,
            sparsity=sparsity,
            steps=published_steps(latents),
            seed=seed,
        )

    @classmethod
    def gemma_scope_it(
        cls, *, site: Site, layer: int, width: int | str, sparsity: float, seed: int = 0
    ) -> "TrainConfig":
        """Give the published recipe for an instruction-tuned model: that of `gemma_scope`, without the user prefix.

        The activations come from documents that the chat template wraps as the user's turn, with the model's prefix
        behind them. Every position is trained on but the user prefix, whose norm is huge.

        Args:
            site: Kind of site.
            layer: Layer of the language model.
            width: Number of latents, or a name such as "16k".
            sparsity: Coefficient of L0.
            seed: Of the initialisation.

        Raises:
            KeyError: An unknown site or width.
            ValueError: A setting outside its range.

        Source: Gemma Scope (arXiv 2408.05147), section 4.5.
        """
        published = cls.gemma_scope(site=site, layer=layer, width=width, sparsity=sparsity, seed=seed)
        return replace(published, untrained=(*UNTRAINED, "chat_prefix"))

    @classmethod
    def gemma_scope_2(
        cls,
        *,
        site: Site,
        layer: int,
        width: int | str,
        target_l0: float,
        sparsity: float = 2e-3,
        skip: bool | None = None,
        seed: int = 0,
    ) -> "TrainConfig":
        """Give the recipe of Gemma Scope 2: target L0, frequency penalty, Matryoshka prefixes, affine skip.

        A transcoder reads the MLP's input with the norm's gain, `blocks.L.ln2.hook_out`, on a model whose norms are not
        folded.

        Args:
            site: Kind of site.
            layer: Layer of the language model.
            width: Number of latents, or a name such as "16k".
            target_l0: Mean L0 aimed at; the published suites have 20, 60 and 150, or 20 and 120.
            sparsity: Coefficient of both penalties; not published, so the default is ours.
            skip: Whether a transcoder has an affine skip term; None gives it one. No other site has one.
            seed: Of the initialisation.

        Raises:
            KeyError: An unknown site or width.
            ValueError: A setting outside its range, or a skip term for an autoencoder.

        Source: Gemma Scope 2 technical paper, sections 2 and 3.
        """
        hook_in, hook_out = hooks_for(site, layer)
        if site == "transcoder":
            hook_in = f"blocks.{layer}.ln2.hook_out"
        latents = parse_width(width)
        return cls(
            hook_in=hook_in,
            hook_out=hook_out,
            width=latents,
            steps=published_steps(latents),
            skip=site == "transcoder" if skip is None else skip,
            seed=seed,
            **gemma_scope_2_settings(width=latents, target_l0=target_l0, sparsity=sparsity),
        )

    @classmethod
    def short_run(
        cls,
        *,
        site: Site,
        layer: int,
        width: int | str,
        sparsity: float | None = None,
        activation: Activation = "jumprelu",
        k: int | None = None,
        target_l0: float | None = None,
        steps: int = 4_000,
        seed: int = 0,
    ) -> "TrainConfig":
        """Give a recipe for a few million rows; `scope_lens.training.presets` says where it departs from the paper's.

        Args:
            site: Kind of site.
            layer: Layer of the language model.
            width: Number of latents, or a name such as "16k".
            sparsity: Coefficient of the sparsity term; None takes a middling one for the kind.
            activation: Kind of dictionary.
            k: Latents kept; for the TopK kinds, and needed there.
            target_l0: L0 that a JumpReLU dictionary aims at, in place of a price on L0.
            steps: Updates.
            seed: Of the initialisation.

        Raises:
            KeyError: An unknown site or width.
            ValueError: A setting outside its range, or settings that contradict each other.
        """
        hook_in, hook_out = hooks_for(site, layer)
        latents = parse_width(width)
        settings = short_run_settings(
            activation=activation, width=latents, steps=steps, sparsity=sparsity, target_l0=target_l0
        )
        return cls(
            hook_in=hook_in,
            hook_out=hook_out,
            width=latents,
            steps=steps,
            k=k,
            target_l0=target_l0,
            seed=seed,
            **settings,
        )

    # ---- schedules ----

    def learning_rate_at(self, step: int) -> float:
        """Give the learning rate of update `step`, counted from 0."""
        warm = cosine_warm_up(step, steps=self.lr_warmup, start=0.1)
        return self.learning_rate * warm * linear_decay(step, last=self.lr_decay, total=self.steps)

    def sparsity_at(self, step: int) -> float:
        """Give the coefficient of the sparsity term at update `step`, counted from 0."""
        return self.sparsity * linear_warm_up(step, steps=self.sparsity_warmup)

    def sparsity_term_at(self, step: int) -> SparsityTerm:
        """Give the sparsity term of a JumpReLU dictionary at update `step`, counted from 0."""
        term = SparsityTerm(
            coefficient=self.sparsity_at(step),
            frequency=self.frequency_penalty * linear_warm_up(step, steps=self.sparsity_warmup),
            limit=self.frequency_limit,
        )
        if self.target_l0 is None:
            return term
        factor = 2 / self.target_l0 if self.quadratic_factor is None else self.quadratic_factor
        return term._replace(target_l0=self.target_l0, quadratic_factor=factor)

    def threshold_warning(self) -> str | None:
        """Say why this run cannot move its thresholds to where they are needed, or None if it can.

        Adam moves a parameter by about the learning rate a step at most, whatever the gradient. A threshold trained as
        its logarithm changes at most by the factor exp(sum of the learning rates): at the published rate, from 0.001,
        it reaches 0.01 after 33,000 updates and 0.1 after 66,000. It is needed near the square root of `sparsity`.
        """
        if self.activation != "jumprelu" or self.threshold != "log":
            return None
        warming = 0.45 * self.learning_rate * min(self.lr_warmup, self.steps)
        reach = self.learning_rate * (self.steps - self.lr_decay / 2) - warming
        needed = usual_threshold(sparsity=self.sparsity, target_l0=self.target_l0)
        if reach >= abs(math.log(needed / self.threshold_init)) - math.log(_NEAR_ENOUGH):
            return None
        return (
            f"{self.steps} updates at learning rate {self.learning_rate:g} change log(threshold) by {reach:.2g} at "
            f"most: thresholds for {self.hook_out!r} stay within a factor of {math.exp(reach):.3g} of "
            f"{self.threshold_init:g}, and this sparsity needs them near {needed:.2g}, so L0 will be off. Train "
            "longer, set threshold='direct', start them nearer (threshold_init), or use TrainConfig.short_run."
        )

    def warm_up_warning(self) -> str | None:
        """Say which warm-up the run ends in, or None if it outlasts both."""
        longest = max(self.lr_warmup, self.sparsity_warmup)
        if longest < self.steps:
            return None
        return (
            f"The run for {self.hook_out!r} has {self.steps} updates, and its warm-ups last {self.lr_warmup} (learning "
            f"rate) and {self.sparsity_warmup} (sparsity), so it ends before they do. Train longer, or shorten them."
        )

    # ---- checks ----

    def _check_ranges(self) -> None:
        for name in _POSITIVE:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"TrainConfig.{name} is {getattr(self, name)}; it must be positive and finite.")
        for name in _NOT_NEGATIVE:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"TrainConfig.{name} is {getattr(self, name)}; it must be finite and not negative.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"TrainConfig.betas is {self.betas}; expected two numbers, each at least 0 and below 1.")
        if self.lr_decay > self.steps:
            raise ValueError(f"TrainConfig.lr_decay is {self.lr_decay}, more than the run's {self.steps} steps.")
        for name, known in (("threshold", ("direct", "log")), ("activation", get_args(Activation))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"TrainConfig.{name} is {getattr(self, name)!r}; expected {' or '.join(map(repr, known))}."
                )
        if unknown := set(self.untrained) - set(get_args(SpecialPosition)):
            raise ValueError(
                f"TrainConfig.untrained holds {sorted(unknown)}; known are {', '.join(get_args(SpecialPosition))}."
            )

    def _check_kind(self) -> None:
        """Refuse what the kind of dictionary cannot have."""
        if self.activation in _WITH_K:
            if self.k is None or not 1 <= self.k <= self.width:
                raise ValueError(
                    f"{self.activation} keeps k latents, 1 <= k <= width={self.width}; found k={self.k}. Pass k=."
                )
            if self.aux_k > self.width:
                raise ValueError(f"TrainConfig.aux_k is {self.aux_k}, more than the width {self.width}.")
        elif self.k is not None or self.aux_k:
            raise ValueError(
                f"k={self.k} and aux_k={self.aux_k} belong to topk and batchtopk; leave them out for "
                f"activation={self.activation!r}."
            )
        if self.skip and self.hook_in == self.hook_out:
            raise ValueError(
                f"skip=True for an autoencoder of {self.hook_in!r} would learn the identity; only a transcoder has a "
                "skip term. Leave it out, or name another hook_out."
            )
        ascending = all(a < b for a, b in zip((0, *self.matryoshka), (*self.matryoshka, self.width), strict=True))
        if not ascending:
            raise ValueError(
                f"TrainConfig.matryoshka is {self.matryoshka}; expected ascending widths between 1 and "
                f"{self.width - 1}. The whole width is always the last prefix and is not listed."
            )
        if self.matryoshka and self.activation == "gated":
            raise ValueError("A gated dictionary has no Matryoshka training; leave matryoshka out.")

    def _check_sparsity(self) -> None:
        """Refuse a sparsity term that the kind of dictionary does not have."""
        if self.activation in _WITH_K and self.sparsity:
            raise ValueError(
                f"k={self.k} sets the sparsity of a {self.activation} dictionary; found sparsity={self.sparsity}. "
                "Pass sparsity=0."
            )
        if self.activation != "jumprelu" and (self.target_l0 is not None or self.frequency_penalty):
            raise ValueError(
                "target_l0 and frequency_penalty train thresholds, which only a jumprelu dictionary has; found "
                f"target_l0={self.target_l0}, frequency_penalty={self.frequency_penalty} with "
                f"activation={self.activation!r}. Leave them out."
            )
        if self.target_l0 is not None and not 0 < self.target_l0 <= self.width:
            raise ValueError(
                f"TrainConfig.target_l0 is {self.target_l0}; expected a number of latents above 0 and up to the width "
                f"{self.width}."
            )
        if self.quadratic_factor is not None and (self.target_l0 is None or not 0 < self.quadratic_factor < math.inf):
            raise ValueError(
                f"quadratic_factor={self.quadratic_factor} is a positive factor of the distance from target_l0; found "
                f"target_l0={self.target_l0}. Set both, or leave quadratic_factor out."
            )
