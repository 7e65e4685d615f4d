"""Fidelity of dictionaries: what the model loses when they are spliced in, and how well they reconstruct.

`evaluate` is the function, `EvalResult` its record, `pack` turns text into rows of token ids.
"""

from scope_lens.evaluation.fidelity import evaluate
from scope_lens.evaluation.result import EvalResult, EvaluationInterrupted
from scope_lens.packing import pack

__all__ = ["EvalResult", "EvaluationInterrupted", "evaluate", "pack"]
