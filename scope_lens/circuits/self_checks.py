"""What attribution checks of every graph: the linear model is the model, and every row adds up."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import TransformerBridge
from transformer_lens.hook_points import HookPoint

from scope_lens.circuits.frozen import NamedHook, norm_edits_expected
from scope_lens.circuits.graph import Kind
from scope_lens.circuits.nodes import Nodes
from scope_lens.circuits.places import FINAL, Place
from scope_lens.circuits.rows import Piece

_LOGITS_OFF = 1e-3
_LOGITS_OFF_IN_HALF = 5e-2
_UNACCOUNTED = {torch.float32: 1e-3, torch.float64: 1e-8}


def logits_off(
    bridge: TransformerBridge,
    tokens: Int[Tensor, "1 pos"],
    *,
    hooks: Sequence[NamedHook],
    final: Float[Tensor, "pos d_model"],
    logits: Float[Tensor, "1 pos d_vocab"],
) -> float:
    """Largest deviation of the linear model's logits from the model's, over the largest logit.

    The bridge itself unembeds: what stands behind its final norm (a soft cap, a scale) is its architecture's own.

    Args:
        bridge: The model.
        tokens: The prompt.
        hooks: Those of the pass that gave `logits`.
        final: What the linear model's final norm gives.
        logits: The model's own.

    Raises:
        ValueError: They differ by more than rounding.
    """

    def put(tensor: Tensor, hook: HookPoint) -> Tensor:  # noqa: ARG001
        return final[None].to(tensor.dtype)

    with norm_edits_expected():
        ours: Tensor = bridge.run_with_hooks(tokens, fwd_hooks=[*hooks, (FINAL, put)], use_cache=False)
    difference = float((ours - logits).abs().max())
    off = difference / float(logits.abs().max()) if difference else 0.0
    limit = _LOGITS_OFF_IN_HALF if logits.dtype in (torch.bfloat16, torch.float16) else _LOGITS_OFF
    if not off <= limit:
        raise ValueError(
            f"The linear model of this prompt does not give the model's logits: they differ by {off:.1e} of the "
            f"largest, more than {limit:.0e}. Something between the embeddings and the final norm is not frozen, or a "
            "hook edits the model (reset_hooks() removes yours), or the model gave numbers that are not finite."
        )
    return off


def unaccounted(nodes: Nodes, pieces: Sequence[Piece], places: Sequence[Place]) -> float:
    """Largest |sum of the row + bias - pre_activation| / (sum of |row| + |bias|) of all targets.

    Bias and pre-activation come from forward passes of the linear model, the row from the sweep.

    Args:
        nodes: The nodes.
        pieces: All rows.
        places: The dictionaries, by stage.

    Raises:
        ValueError: A target that does not add up within the rounding of the sweep's dtype.
    """
    total = torch.zeros_like(nodes.bias, dtype=torch.float64)
    size = torch.zeros_like(total)
    for piece in pieces:
        total[piece.rows] = piece.block.sum(1, dtype=torch.float64)
        size[piece.rows] = torch.linalg.vector_norm(piece.block, ord=1, dim=1, dtype=torch.float64)
    rows = torch.cat([piece.rows for piece in pieces])
    bias, pre = nodes.bias[rows].double(), nodes.pre_activation[rows].double()
    residual = (total[rows] + bias - pre).abs()
    share = torch.where(residual == 0, 0, residual / (size[rows] + bias.abs()))
    off = float(share.max())
    limit = _UNACCOUNTED[nodes.bias.dtype]
    if not off <= limit:
        worst = int(share.nan_to_num(nan=torch.inf).argmax())
        node = int(rows[worst])
        stage, index, pos = int(nodes.stage[node]), int(nodes.index[node]), int(nodes.pos[node])
        is_latent = int(nodes.kind[node]) == Kind.LATENT
        what = f"latent {index} of {places[stage].sae.cfg.hook_out!r}" if is_latent else "a logit or direction"
        raise ValueError(
            f"The effects on {what} at position {pos} do not add up: with the bias they miss its pre-activation "
            f"{float(pre[worst]):.4g} by {float(residual[worst]):.1e}, {off:.1e} of their size, more than {limit:.0e}. "
            "What it reads is no linear function of what writes: is its site on the residual stream, at an output of "
            "attention or MLP, or at the norm before the MLP?"
        )
    return off
