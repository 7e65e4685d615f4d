"""When a run evaluates its dictionaries on held-out text, and what it found.

On several ranks the first one has the language model and evaluates, while the others wait for the result.
"""

from typing import Any

from scope_lens.evaluation import EvalResult
from scope_lens.training.config import TrainConfig
from scope_lens.training.held_out import HeldOut
from scope_lens.training.learner import Learner
from scope_lens.training.ranks import Ranks
from scope_lens.training.store import ActivationStore


class Evaluations:
    """The evaluations of one run.

    Args:
        held_out: Text to evaluate on; None evaluates nothing. On several ranks only the first one's counts.
        every: Updates between evaluations.
        ranks: Who trains together.

    Attributes:
        found: The last result of each dictionary, by the number of its config.
        identity: What the text is; None where nothing is evaluated, and before `begin`.
    """

    def __init__(self, held_out: HeldOut | None, *, every: int, ranks: Ranks) -> None:
        self._held_out, self._every, self._ranks = held_out, every, ranks
        self.found: dict[int, EvalResult] = {}
        self.identity: dict[str, Any] | None = None

    def begin(self, store: ActivationStore, *, goes_on: bool) -> None:
        """Check that the text fits the store and the run; all ranks do it together.

        Args:
            store: What the dictionaries train on.
            goes_on: Whether the run began before, with the text of `identity`.

        Raises:
            ValueError: The run began with other text, or the store has seen some of it or is of another model.
        """
        agreement, held_out = self._ranks.agreement, self._held_out
        # All ranks have to know when the first one evaluates.
        identity = agreement.from_first(None if held_out is None else held_out.identity)
        if goes_on and identity != self.identity:
            raise ValueError(
                f"This run began with other held-out text: {self.identity}, now {identity}. Give "
                "Trainer.resume(folder, held_out=...) the same, so that the run equals an unbroken one."
            )
        with agreement.together():
            if held_out is not None and self._ranks.first:
                held_out.check(store)
        self.identity = identity

    def due(self, cfg: TrainConfig, *, step: int) -> bool:
        """Say whether a dictionary is evaluated after update `step`, counted from 1."""
        return self.identity is not None and (step % self._every == 0 or step == cfg.steps)

    def make(self, index: int, learner: Learner) -> EvalResult:
        """Evaluate a dictionary, on all ranks together.

        Args:
            index: Number of its config.
            learner: Its learner.
        """
        agreement, evaluated = self._ranks.agreement, None
        sae = learner.result()
        with agreement.together():
            if self._ranks.first:
                assert self._held_out is not None
                evaluated = self._held_out.evaluate(sae)
        evaluated = agreement.from_first(evaluated)
        assert evaluated is not None
        self.found[index] = evaluated
        return evaluated
