"""The record of an evaluation, and its JSON form.

JSON has no NaN and no infinity, so `to_json` writes such a float as the string "NaN", "Infinity" or "-Infinity", and
`from_json` reads it back.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """How well dictionaries stand in for the activations they were trained on.

    Attributes:
        ce_clean: Cross-entropy of the model with nothing attached, nats per token.
        ce_spliced: The same with every site replaced by its reconstruction (splice-in).
        ce_spliced_out: The same with every site losing what the latents write, `y - f @ W_dec` (splice-out).
        ce_ablated: The same with every site replaced by zero or by its mean.
        delta_loss: `ce_spliced - ce_clean`.
        delta_loss_se: Standard error of `delta_loss`, paired by token and clustered by sequence; NaN for one sequence.
        delta_loss_out: `ce_spliced_out - ce_clean`.
        loss_recovered: `(ce_ablated - ce_spliced) / (ce_ablated - ce_clean)`, a fraction; NaN where the ablation
            changes nothing.
        kl: `KL(clean || spliced)` of the next-token distributions, nats per token.
        fvu: Fraction of variance unexplained, by site (`hook_out`). A site that does not vary has infinity, or NaN
            where it is reconstructed without error.
        l0: Active latents per position, by site.
        dead: Fraction of latents that never fired on a counted position, by site.
        n_tokens: Loss terms, the denominator of the `ce_*` and of `kl`.
        n_masked: Predictions left out: the input is at a position that the dictionaries were not trained on, or the
            target is BOS or PAD. `n_tokens + n_masked` is the number of tokens that have one in front.
        tokens_hash: SHA-256 of the evaluated token ids, row by row; it does not depend on the batch size.
        settings: What is needed to repeat the evaluation; `complete` is False for what an interrupt left.
    """

    ce_clean: float
    ce_spliced: float
    ce_spliced_out: float
    ce_ablated: float
    delta_loss: float
    delta_loss_se: float
    delta_loss_out: float
    loss_recovered: float
    kl: float
    fvu: dict[str, float]
    l0: dict[str, float]
    dead: dict[str, float]
    n_tokens: int
    n_masked: int
    tokens_hash: str
    settings: dict[str, Any]

    def to_json(self) -> str:
        """Every field as one JSON object, valid by the standard."""
        return json.dumps(_spell(dataclasses.asdict(self)), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "EvalResult":
        """Read what `to_json` wrote.

        Raises:
            ValueError: The text is no JSON, or has other fields.
        """
        try:
            fields: dict[str, Any] = json.loads(text)
            for name in _FLOATS:
                fields[name] = float(fields[name])
            for name in _BY_SITE:
                fields[name] = {site: float(value) for site, value in fields[name].items()}
            return cls(**fields)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"The text is no EvalResult ({type(error).__name__}: {error}). Expected what EvalResult.to_json writes."
            ) from None


_BY_SITE = ("fvu", "l0", "dead")
_FLOATS = tuple(field.name for field in dataclasses.fields(EvalResult) if field.type is float)


class EvaluationInterrupted(KeyboardInterrupt):
    """Ctrl-C in an evaluation that has finished at least one batch.

    It is a KeyboardInterrupt, so code that does not know it stops as ever.

    Attributes:
        result: The numbers over the finished batches; `ce_ablated` and `loss_recovered` are NaN, and
            `settings["complete"]` is False.
    """

    def __init__(self, result: EvalResult) -> None:
        done, total = result.settings["n_sequences"], result.settings["n_sequences_given"]
        super().__init__(f"The evaluation was interrupted after {done} of {total} sequences; .result holds them.")
        self.result = result


def _spell(value: Any) -> Any:
    """The same structure with non-finite floats as strings."""
    if isinstance(value, dict):
        return {key: _spell(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_spell(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
