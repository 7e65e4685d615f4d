"""How the learning rate and the sparsity coefficient move over a run, as factors between 0 and 1.

Updates are counted from 0. Source: Gemma Scope (arXiv 2408.05147), section 3.2; the decay at the end is a short run's.
"""

import math


def cosine_warm_up(step: int, *, steps: int, start: float) -> float:
    """`start + (1 - start) * (1 - cos(pi * step / steps)) / 2` for step < steps, then 1."""
    if step >= steps:
        return 1.0
    return start + (1 - start) * (1 - math.cos(math.pi * step / steps)) / 2


def linear_warm_up(step: int, *, steps: int) -> float:
    """`step / steps` for step < steps, then 1."""
    return 1.0 if step >= steps else step / steps


def linear_decay(step: int, *, last: int, total: int) -> float:
    """1 until `last` updates are left, then the share of them that is left; 0 only after the end of the run."""
    left = max(total - step, 0)
    return 1.0 if last == 0 or left >= last else left / last
