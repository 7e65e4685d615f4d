"""Which latents are nodes of their own when not all of them may be.

As circuit-tracer does, rows are chosen greedily: the influence over the rows that are known so far says which latents
come next, and their rows say more. The latents that are never chosen are folded, not lost (`nodes.folded`).
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from scope_lens.circuits.rows import Piece, piece

_ROUNDS = 12  # the choice is made anew this often; more rounds cost more passes over the rows that are known


def select(
    sweep: Callable[[Int[Tensor, " row"]], list[Piece]],
    pieces: list[Piece],
    chosen: Bool[Tensor, " latent"],
    *,
    start: Float[Tensor, " node"],
    stage: Int[Tensor, " node"],
    max_latents: int,
) -> None:
    """Choose latents by influence until there are `max_latents`, and sweep them.

    Args:
        sweep: Gives the rows of latents, by their nodes, ascending.
        pieces: The rows of the targets asked for; those of the chosen latents are added.
        chosen: The latents asked for; marked further in place.
        start: Start weight of every node.
        stage: Stage of every node.
        max_latents: How many are chosen in the end, those asked for included.
    """
    left = min(max_latents, len(chosen)) - int(chosen.sum())
    step = max(1, -(-left // _ROUNDS))
    while left > 0:
        found = _influence(pieces, start, stage)[: len(chosen)].masked_fill(chosen, -1)
        # A stable order: latents without any influence come in the order of their nodes.
        new = found.sort(descending=True, stable=True).indices[: min(step, left)].sort().values
        chosen[new] = True
        pieces += sweep(new)
        left -= len(new)


def fold(pieces: Sequence[Piece], number: Int[Tensor, " node"], n_nodes: int) -> list[Piece]:
    """Rows between the nodes that are left, the edges from folded latents summed.

    Args:
        pieces: Rows between all nodes.
        number: For each node the number of the one that holds it now.
        n_nodes: How many are left.
    """
    columns = torch.arange(n_nodes, device=number.device)
    return [
        piece(
            number[rows],
            columns,
            block.new_zeros(len(rows), n_nodes).index_add_(1, number[of_columns], block),
        )
        for rows, of_columns, block in pieces
    ]


def _influence(
    pieces: Sequence[Piece], start: Float[Tensor, " node"], stage: Int[Tensor, " node"]
) -> Float[Tensor, " node"]:
    """`influence.influence` over the rows that are known: a latent without a row passes nothing on."""
    received = torch.zeros_like(start)
    for rows, columns, block in sorted(pieces, key=lambda piece: -int(stage[piece.rows[0]])):
        size = block.abs()
        through = (start[rows] + received[rows]) / size.sum(1).clamp(min=1e-10)
        received.index_add_(0, columns, through @ size)
    return received
