"""What a graph says about itself: the kinds of its nodes, its scores, and what attribution found when it checked it."""

from enum import IntEnum
from typing import NamedTuple


class Kind(IntEnum):
    """What a node is."""

    LATENT = 0
    ERROR = 1  # what a dictionary misses at one position
    TOKEN = 2
    LOGIT = 3
    DIRECTION = 4  # read at the final norm's output
    REST = 5  # the latents of one site and position that are no nodes of their own, folded; a source only


class GraphScores(NamedTuple):
    """How much of the graph's influence runs through latents. Missed are errors, rests, and what was dropped.

    Attributes:
        replacement: Influence of the tokens over that of tokens and of what is missed; NaN where neither has any.
        completeness: Share of the inputs of all nodes, weighted by their influence, that is not missed.
    """

    replacement: float
    completeness: float


class GraphChecks(NamedTuple):
    """What attribution found when it checked itself.

    Attributes:
        logits: Largest deviation of the linear model's logits from the model's own, over the largest logit.
        conservation: Largest residual of `AttributionGraph.conservation`.
        forward_only: Whether every edge runs to a later stage.
    """

    logits: float
    conservation: float
    forward_only: bool
