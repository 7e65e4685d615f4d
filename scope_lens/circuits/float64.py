"""A model in float64 whose every step is in float64.

Hugging Face computes norms, the softmax, the rotary tables and Gemma's embedding scale in float32 whatever the model's
dtype, so that a model cast to float64 is still only good to 1e-7. `in_float64` copies the model and gives hooks that
redo these four:

1. Norms: an edited denominator makes TransformerLens compute the norm itself, in the dtype of what flows.
2. Softmax: again, from the scores.
3. Rotary tables: again, from the config's base and scaling.
4. Gemma's embeddings: again, from the table and the exact square root.

Where an architecture has another softmax or another table than these, what it computed stays, and so does what a user's
hook made of it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens import TransformerBridge
from transformer_lens.hook_points import HookPoint

from scope_lens.attachments import attachments_of
from scope_lens.circuits.frozen import NamedHook


def in_float64(bridge: TransformerBridge) -> tuple[TransformerBridge, list[NamedHook]]:
    """A copy of the model in float64, without what is attached, and the hooks that make its forward pass exact.

    The rotary tables of scalings other than "default", "linear" and "llama3" keep frequencies of float32; patterns are
    constants of the linear model, so conservation does not depend on them.

    Args:
        bridge: The model; it stays as it is.
    """
    copied = copy_in(bridge, torch.float64)
    return copied, exact_hooks(copied)


def copy_in(bridge: TransformerBridge, dtype: torch.dtype) -> TransformerBridge:
    """A copy of the model in some dtype, without what is attached.

    TransformerLens' `to(dtype)` lists every parameter once for each parameter: 10 s for a tiny model of 26 layers.

    Args:
        bridge: The model; it stays as it is.
        dtype: What the copy computes in.
    """
    copied = attachments_of(bridge).deepcopy_bridge(bridge, {})
    copied.cfg.dtype = dtype
    nn.Module.to(copied, dtype)
    copied.original_model.to(dtype)
    return copied


def exact_hooks(bridge: TransformerBridge) -> list[NamedHook]:
    """Hooks that redo in the dtype of what flows what Hugging Face computes in float32."""
    hooks = _embedding_hooks(bridge)
    for name in bridge.hook_dict:
        if name.endswith(".hook_scale"):
            hooks.append((name, lambda tensor, hook: tensor.clone()))  # noqa: ARG005
        elif name.endswith(".hook_attn_scores"):
            hooks += _softmax_hooks(name)
        elif name.endswith((".attn.hook_cos", ".attn.hook_sin")):
            hooks += _rotary_hooks(bridge, name)
    return hooks


def _softmax_hooks(scores_name: str) -> list[NamedHook]:
    scores: list[Tensor] = []

    def note(tensor: Tensor, hook: HookPoint) -> None:  # noqa: ARG001
        scores[:] = [tensor]

    def redo(tensor: Tensor, hook: HookPoint) -> Tensor:  # noqa: ARG001
        # Some architectures show a pattern and no scores.
        return _better(torch.softmax(scores.pop().to(tensor.dtype), dim=-1), tensor) if scores else tensor

    return [(scores_name, note), (scores_name.replace("hook_attn_scores", "hook_pattern"), redo)]


def _embedding_hooks(bridge: TransformerBridge) -> list[NamedHook]:
    table: Any = bridge.embed.original_component
    scale = getattr(table, "scalar_embed_scale", None)
    if scale is None:
        return []
    tokens: list[Tensor] = []

    def note(tensor: Tensor, hook: HookPoint) -> None:  # noqa: ARG001
        tokens[:] = [tensor]

    def redo(tensor: Tensor, hook: HookPoint) -> Tensor:  # noqa: ARG001
        exact = table.weight[tokens.pop()] * scale
        return exact if torch.allclose(exact, tensor, rtol=1e-2, atol=0) else tensor

    return [("embed.hook_in", note), ("hook_embed", redo)]


def _rotary_hooks(bridge: TransformerBridge, name: str) -> list[NamedHook]:
    config: Any = bridge.original_model.config
    parameters: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        parameters = parameters.get(layer_types[int(name.split(".")[1])], parameters)
    frequencies = _rotary_frequencies(config, parameters) if parameters else None
    if frequencies is None:
        return []
    curve: Callable[[Tensor], Tensor] = torch.cos if name.endswith("cos") else torch.sin

    def redo(tensor: Tensor, hook: HookPoint) -> Tensor:  # noqa: ARG001
        position = torch.arange(tensor.shape[-2], dtype=tensor.dtype, device=tensor.device)
        angles = position[:, None] * frequencies.to(tensor)
        return _better(curve(torch.cat([angles, angles], dim=-1)), tensor)

    return [(name, redo)]


def _rotary_frequencies(config: Any, parameters: Mapping[str, Any]) -> Float[Tensor, " half_d_head"] | None:
    """Angle by position of each rotated pair (RoFormer, arXiv 2104.09864, section 3.2.2); None for other scalings."""
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = int(d_head * parameters.get("partial_rotary_factor", 1.0))
    exponent = torch.arange(0, width, 2, dtype=torch.float64) / width
    frequencies = parameters["rope_theta"] ** -exponent
    match parameters["rope_type"]:
        case "default":
            return frequencies
        case "linear":
            return frequencies / parameters["factor"]
        case "llama3":
            wavelength = 2 * math.pi / frequencies
            low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
            length = parameters["original_max_position_embeddings"]
            # Long waves are stretched, short ones kept, and between them the share that is kept grows linearly.
            kept = ((length / wavelength - low) / (high - low)).clamp(0, 1)
            return kept * frequencies + (1 - kept) * frequencies / parameters["factor"]
        case _:
            return None


def _better(exact: Tensor, given: Tensor) -> Tensor:
    """What was computed again, if it is what was given but for rounding."""
    same = exact.shape[-2:] == given.shape[-2:] and torch.allclose(exact.expand_as(given), given, atol=1e-2)
    return exact.expand_as(given) if same else given
