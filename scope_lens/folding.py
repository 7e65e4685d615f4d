"""Folding the pre-MLP norm's gain into the MLP's input weights, and nothing else.

RMSNorm gives `x / rms(x) * gain`; the MLP multiplies that by W_in and W_gate. Moving the gain into their columns leaves
the function as it was (Gemma Scope, Appendix B, where the transcoders' input has no gain). TransformerLens'
`enable_compatibility_mode` folds every norm at once, in place, at about 11 bytes a parameter; this folds one kind, with
no extra memory.
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformer_lens import TransformerBridge

from scope_lens.attachments import attachments_of
from scope_lens.sites import uses_gain


@torch.no_grad()
def fold_mlp_norm(bridge: TransformerBridge, layers: Sequence[int] | None) -> None:
    """See `scope_lens.fold_mlp_norm`."""
    blocks = bridge.blocks
    wanted = list(range(len(blocks))) if layers is None else list(layers)
    attachments = attachments_of(bridge)
    # Everything is checked before anything is changed.
    for layer in wanted:
        if not 0 <= layer < len(blocks):
            raise IndexError(f"The model has layers 0 to {len(blocks) - 1}; found {layer}.")
        if layer in attachments.folded_layers or wanted.count(layer) > 1:
            raise ValueError(f"The pre-MLP gain of layer {layer} is folded already; folding twice would square it.")
        _norm_and_linears(bridge, layer)
    if getattr(bridge, "compatibility_mode", False):
        raise ValueError(
            "The model is in TransformerLens' compatibility mode, which has folded its norms or may do so. "
            "Fold a model that was loaded without it."
        )
    for attachment in attachments:
        for name, layer in uses_gain(bridge, attachment.sae, attachments.sites):
            if layer in wanted:
                raise ValueError(
                    f"The attached dictionary uses {name!r}, which loses its gain by folding. Detach it first "
                    f"(reset_saes({attachment.sae.cfg.hook_out!r}))."
                )
    for layer in wanted:
        norm, linears = _norm_and_linears(bridge, layer)
        offset = 1.0 if bridge.cfg.rmsnorm_uses_offset else 0.0
        gain = norm.get_parameter("weight").float() + offset
        for linear in linears:
            linear.weight.copy_(linear.weight.float() * gain)
        norm.get_parameter("weight").fill_(1.0 - offset)
        attachments.folded_layers.add(layer)


def _norm_and_linears(bridge: TransformerBridge, layer: int) -> tuple[nn.Module, list[nn.Linear]]:
    """The pre-MLP norm of a layer and the linear maps that read it."""
    block = bridge.blocks[layer]
    linears = [getattr(block.mlp, name, None) for name in ("gate", "in")]
    originals = [linear.original_component for linear in linears if linear is not None]
    if bridge.cfg.normalization_type != "RMS" or not all(isinstance(linear, nn.Linear) for linear in originals):
        raise ValueError(
            f"fold_mlp_norm folds an RMSNorm gain into nn.Linear weights; layer {layer} of "
            f"{bridge.cfg.architecture} has a {bridge.cfg.normalization_type!r} norm before "
            f"{[type(linear).__name__ for linear in originals]}. A LayerNorm also has a bias and cannot be folded so."
        )
    return block.ln2.original_component, originals
