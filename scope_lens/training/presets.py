"""The settings behind the presets: the published numbers, and those that are this package's own.

`docs/pages/training_recipe.md` lists every number with its paper and section; a test reads the presets against it.

What the Gemma Scope 2 paper does not print is ours: both coefficients, the prefixes of Matryoshka training, and the
number of tokens, for which Gemma Scope's stands.

A short run departs from the published recipe, because billions of tokens are not at hand:

1. The learning rate is a hundred times larger and falls linearly to zero over the last third of the run. The published
   rate moves log(threshold) from 0.001 to 0.1 in no less than 65,000 steps.
2. Adam's memory is 50 steps and not 1,000: the first gradients are huge, because a wide dictionary with a tied encoder
   overshoots, and a long memory of them keeps the updates of the whole run small. Momentum takes out the noise that
   the larger rate brings in.
3. Thresholds start at half of where they end up, which is the square root of the price of a latent. The estimator's
   window is wide: where latents are cheap, a narrow one holds so few rows that thresholds wander and latents die.
4. The warm-ups are shares of the run, and batches are smaller: more updates from the same rows. A JumpReLU's learning
   rate warms up for longer than the others', because a wide one that overshoots at once is dead within 100 updates.
"""

import math
from typing import Any

_BATCH = 4_096
_TOKENS = {2**14: 4e9, 2**20: 16e9}
_TOKENS_ELSE = 8e9
_SMALLEST_THRESHOLD = 1e-3  # Gemma Scope's own start
_TARGETS_THRESHOLD = 0.05  # where the price of a latent follows from the target and is not known beforehand


def published_steps(width: int) -> int:
    """Give Gemma Scope's number of updates for a width: 4, 8 or 16 billion tokens in batches of 4,096.

    Source: Gemma Scope (arXiv 2408.05147), section 3.1.
    """
    return math.ceil(_TOKENS.get(width, _TOKENS_ELSE) / _BATCH)


def usual_threshold(*, sparsity: float, target_l0: float | None) -> float:
    """`sqrt(sparsity)`: about where the thresholds of a trained dictionary are, in normalised units.

    A latent of size v lowers the squared error by about v^2, so it is worth its price from sqrt(price) on.

    Args:
        sparsity: The price of L0.
        target_l0: L0 aimed at; then the price is not known beforehand, and a usual value stands for it.
    """
    return _TARGETS_THRESHOLD if target_l0 is not None else max(math.sqrt(sparsity), _SMALLEST_THRESHOLD)


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


def short_run_settings(
    *, activation: str, width: int, steps: int, sparsity: float | None, target_l0: float | None
) -> dict[str, Any]:
    """Give the settings of a run over a few million rows; `sparsity` None takes the kind's own."""
    settings: dict[str, Any] = {
        "activation": activation,
        "batch_size": 1_024,
        "learning_rate": 8e-3,
        "lr_warmup": min(100, steps // 10),
        "lr_decay": steps // 3,
        "betas": (0.9, 0.98),
        "sparsity_warmup": steps // 4,
        "dead_after": 100_000,
    }
    match activation:
        case "jumprelu":
            middling = 3e-3 if target_l0 is None else 1e-3
            price = middling if sparsity is None else sparsity
            usual = usual_threshold(sparsity=price, target_l0=target_l0)
            settings |= {"sparsity": price, "threshold_init": usual / 2, "bandwidth": 0.07}
            settings["lr_warmup"] = min(1_000, steps // 4)
        case "relu" | "gated":
            settings |= {"sparsity": 0.15 if sparsity is None else sparsity}
        case _:
            kept = 0.0 if sparsity is None else sparsity
            settings |= {"sparsity": kept, "sparsity_warmup": 0, "aux_k": max(1, width // 8)}
    return settings
