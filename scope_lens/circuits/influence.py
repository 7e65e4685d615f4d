"""Influence: how much of the start targets' input runs through each node (Ameisen et al. 2025, "Circuit Tracing").

A row's absolute weights, over their sum, are the shares in which a target's importance goes to its sources. Bias and
`dropped` are no part of a row. Followed back along all paths,

    I = w M + w M^2 + w M^3 + ...,    M[t, s] = |A[t, s]| / sum_s' |A[t, s']|,    w = start weights

1. Edges run forward in stages, so one pass over the rows from the last stage to the first gives the whole series.
2. `scores` are the two that circuit-tracer made common, the replacement and the completeness score.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from scope_lens.circuits.edges import Edges, row_blocks, row_sums
from scope_lens.circuits.graph_records import GraphScores

_LEAST = 1e-10  # a row that sums to less counts for less


def influence(
    edges: Edges,
    stage: Int[Tensor, " node"],
    start: Float[Tensor, " node"],
    beside: Float[Tensor, " node"] | None = None,
) -> Float[Tensor, " node"]:
    """I = w M + w M^2 + ..., in float64; the start weights themselves are not in it.

    Args:
        edges: Direct effects, each from a smaller to a larger stage.
        stage: Place of every node in the order of the graph.
        start: Start weight of every node.
        beside: Weight in each row that is no edge, and counts for the sum it is divided by; none if None.
    """
    start = start.double()
    received = torch.zeros_like(start)
    for rows, span in last_stage_first(edges, stage):
        passed = _passed_on(edges, rows, span, start[rows] + received[rows], beside)
        received.index_add_(0, edges.source[span], passed)
    return received


def edge_influence(
    edges: Edges, received: Float[Tensor, " node"], start: Float[Tensor, " node"]
) -> Float[Tensor, " edge"]:
    """M[t, s] (I_t + w_t) of every edge, in float64: what runs through it.

    Args:
        edges: Direct effects.
        received: Their `influence`.
        start: Start weight of every node.
    """
    through = received + start.double()
    scores = through.new_empty(len(edges.source))
    for rows, span in row_blocks(edges, 0, edges.n_nodes):
        scores[span] = _passed_on(edges, rows, span, through[rows])
    return scores


def scores(
    edges: Edges,
    stage: Int[Tensor, " node"],
    start: Float[Tensor, " node"],
    *,
    token: Bool[Tensor, " node"],
    missed: Bool[Tensor, " node"],
    beside: Float[Tensor, " node"],
) -> GraphScores:
    """I(tokens) / (I(tokens) + I(missed)), and 1 - I(missed) / sum_t (I_t + w_t).

    The second is sum_t (I_t + w_t) (1 - sum_{s missed} M[t, s]) / sum_t (I_t + w_t), summed over the targets first.

    Args:
        edges: Direct effects.
        stage: Place of every node in the order of the graph.
        start: Start weight of every node.
        token: Which nodes are tokens.
        missed: Which nodes are errors, or latents that were folded.
        beside: Weight of what is missed in each row and is no edge; not negative.
    """
    received = influence(edges, stage, start, beside)
    through = received + start.double()
    size = (row_sums(edges, edges.weight.abs()) + beside.double()).clamp(min=_LEAST)
    aside = float(through @ (beside.double() / size))  # what a node that writes `beside` would receive
    lost = float(received[missed].sum()) + aside
    tokens, total = float(received[token].sum()), float(through.sum()) + aside
    return GraphScores(
        replacement=tokens / (tokens + lost) if tokens + lost > 0 else float("nan"),
        completeness=1 - lost / total if total > 0 else float("nan"),
    )


def _passed_on(edges: Edges, rows: slice, span: slice, through: Tensor, beside: Tensor | None = None) -> Tensor:
    """M[t, s] through_t of the edges `span`, which are the whole rows `rows`, in float64."""
    value, lengths = edges.weight[span].abs().double(), edges.row_lengths[rows]
    size = torch.segment_reduce(value, "sum", lengths=lengths)
    size = size if beside is None else size + beside[rows].double()
    each = through / size.clamp(min=_LEAST)
    return value.mul_(each.repeat_interleave(lengths, output_size=len(value)))


def last_stage_first(edges: Edges, stage: Int[Tensor, " node"]) -> Iterator[tuple[slice, slice]]:
    """Blocks of rows of one stage that lie together, the last stage first: what a row passes on has then arrived."""
    rows = (edges.row_lengths > 0).nonzero()[:, 0]
    rows = rows[stage[rows].argsort(descending=True, stable=True)]
    apart = (edges.row_start[rows[1:]] != edges.row_start[rows[:-1] + 1]) | (stage[rows].diff() != 0)
    firsts = torch.cat([rows[:1], rows[1:][apart]]).tolist()
    lasts = torch.cat([rows[:-1][apart], rows[-1:]]).tolist()
    for first, last in zip(firsts, lasts, strict=True):
        yield from row_blocks(edges, first, last + 1)
