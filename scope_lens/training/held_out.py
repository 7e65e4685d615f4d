"""Held-out evaluation while dictionaries train: each one's inference form, spliced into the model it was trained for.

Loss and FVU of a batch say how well the rows are reconstructed, not what the model loses, and they are those of rows
that are trained on. `evaluate` on other text says both (Gemma Scope, arXiv 2408.05147, section 4.1: delta loss is the
primary measure). So text that the store has seen is refused, and so is another model than the store's.
"""

from typing import Any

from torch import Tensor

from scope_lens.evaluation import EvalResult, evaluate
from scope_lens.evaluation.fidelity import Ablation
from scope_lens.evaluation.tokens import rows_hash
from scope_lens.model import ScopeModel
from scope_lens.packing import Tokens, token_rows
from scope_lens.sae import HookedSAE
from scope_lens.training.store import ActivationStore

_LISTED = 5


class HeldOut:
    """Text to evaluate on, and how.

    Args:
        model: The language model that the store was made with.
        text: Documents or token ids, as for `evaluate`.
        batch_size: As for `evaluate`.
        context: As for `evaluate`.
        ablation: As for `evaluate`.

    Raises:
        ValueError: Tokens that `evaluate` refuses too.
    """

    def __init__(
        self,
        *,
        model: ScopeModel,
        text: Tokens,
        batch_size: int = 8,
        context: int = 1024,
        ablation: Ablation = "mean",
    ) -> None:
        given: Any = [text] if isinstance(text, Tensor | str) else list(text)  # one-shot iterables are read twice
        self.model = model
        self.rows = token_rows(model, given, context=context)
        self.batch_size = batch_size
        self.ablation: Ablation = ablation
        self._documents: Tokens = given

    @property
    def identity(self) -> dict[str, Any]:
        """What two evaluations have in common that can be compared; a checkpoint keeps it."""
        return {"tokens_hash": rows_hash(self.rows), "ablation": self.ablation}

    def check(self, store: ActivationStore) -> None:
        """Refuse a store of another model, or one that has seen some of the text.

        Raises:
            ValueError: It is one of them.
        """
        store.check_model(self.model)
        seen = store.saw(self.model, self._documents)
        if seen:
            listed = ", ".join(map(str, seen[:_LISTED])) + (", ..." if len(seen) > _LISTED else "")
            raise ValueError(
                f"{len(seen)} of the held-out documents (number {listed}) are in the text that the store was harvested "
                "from, so the dictionaries train on them. Leave them out, or harvest from other text."
            )

    def evaluate(self, sae: HookedSAE) -> EvalResult:
        """Splice one dictionary in its inference form and measure it.

        Args:
            sae: The dictionary; it is moved to the model's device.
        """
        device = next(iter(self.model.model.parameters())).device
        return evaluate(
            self.model,
            self.rows,
            saes=sae.to(device),
            batch_size=self.batch_size,
            ablation=self.ablation,
            progress=False,
        )
