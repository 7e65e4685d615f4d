"""The settings behind the presets: the published numbers, and those that are this package's own.

`docs/pages/training_recipe.md` lists every number with its paper and section; a test reads the presets against it.

What the Gemma Scope 2 paper does not print is ours: both coefficients, the prefixes of Matryoshka training, and the
number of tokens, for which Gemma Scope's stands.

A short run departs from the published recipe, because billions of tokens are not at hand:

1. The threshold is trained directly. Under Adam, log(threshold) moves by at most the learning rate a step; from 0.001
   to 0.1 at 7e-5 takes more than 65,000 steps.
2. The learning rate is a hundred times larger and falls linearly to zero over the last third of the run.
3. The warm-ups are shares of the run.
4. The estimator's window is wider and batches are smaller: more updates from the same rows, each with enough rows in
   the window.
"""

import math
from typing import Any

_BATCH = 4_096
_TOKENS = {2**14: 4e9, 2**20: 16e9}
_TOKENS_ELSE = 8e9


def published_steps(width: int) -> int:
    """Give Gemma Scope's number of updates for a width: 4, 8 or 16 billion tokens in batches of 4,096.

    Source: Gemma Scope (arXiv 2408.05147), section 3.1.
    """
    return math.ceil(_TOKENS.get(width, _TOKENS_ELSE) / _BATCH)


def gemma_scope_2_settings(*, width: int, target_l0: float, sparsity: float) -> dict[str, Any]:
    """Give what Gemma Scope 2 changes: target L0, frequency penalty and Matryoshka prefixes.

    Source: Gemma Scope 2 technical paper, sections 2 and 3; the frequency penalty is that of the interpretability
    team's update of March 2025.
    """
    return {
        "sparsity": sparsity,
        "target_l0": target_l0,
        "sparsity_warmup": 50_000,
        "frequency_penalty": sparsity,
        "frequency_limit": 0.1,
        "matryoshka": tuple(width // share for share in (16, 8, 4, 2) if width >= share),
    }


def short_run_settings(*, activation: str, width: int, steps: int, sparsity: float | None) -> dict[str, Any]:
    """Give the settings of a run over a few million rows; `sparsity` None takes the kind's own."""
    settings: dict[str, Any] = {
        "activation": activation,
        "batch_size": 1_024,
        "lr_warmup": min(100, steps // 10),
        "lr_decay": steps // 3,
        "sparsity_warmup": steps // 4,
        "dead_after": 100_000,
    }
    match activation:
        case "jumprelu":
            own = {"sparsity": 2e-3, "learning_rate": 8e-3, "bandwidth": 0.01, "threshold_init": 0.01}
            settings |= own | {"threshold": "direct"}
        case "relu" | "gated":
            settings |= {"sparsity": 2e-2, "learning_rate": 2e-3}
        case _:
            settings |= {"sparsity": 0.0, "sparsity_warmup": 0, "learning_rate": 2e-3, "aux_k": max(1, width // 8)}
    if sparsity is not None:
        settings["sparsity"] = sparsity
    return settings
