"""What a linear view of the model holds constant: attention patterns, norm denominators, MLP outputs.

With these taken from one clean forward pass and kept, every other tensor of the residual stream is an affine function
of what is written into it. Attribution (`attribution`) and interventions with `freeze` both rest on it.

1. `frozen_points` names the hook points of each part.
2. `record` reads any hook points in one clean forward pass, and `frozen_values` takes those of the frozen parts.
3. `holding` makes the hooks that put recorded values back, and `refuse_loose_patterns` sees whether that does anything.
"""

import warnings
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import TransformerBridge
from transformer_lens.hook_points import HookPoint

Part = Literal["patterns", "norms", "mlps"]
PARTS: tuple[Part, ...] = get_args(Part)
NamedHook = tuple[str, Callable[[Tensor, HookPoint], Tensor | None]]


def frozen_points(bridge: TransformerBridge, parts: Collection[Part] = PARTS) -> list[str]:
    """Names of the hook points of some parts, each HookPoint once.

    Args:
        bridge: The model.
        parts: "patterns" (attention after the softmax), "norms" (the denominator of every norm, the final one and those
            of queries and keys included), "mlps" (what each MLP adds to the residual stream).
    """
    ends = {"patterns": ".hook_pattern", "norms": ".hook_scale", "mlps": ".hook_mlp_out"}
    wanted = tuple(ends[part] for part in parts)
    by_point: dict[HookPoint, str] = {}
    for name, point in bridge.hook_dict.items():
        if wanted and name.endswith(wanted):
            by_point.setdefault(point, name)
    return list(by_point.values())


@torch.no_grad()
def record(
    bridge: TransformerBridge, tokens: Int[Tensor, "1 pos"], names: Iterable[str], *, hooks: Sequence[NamedHook] = ()
) -> tuple[Float[Tensor, "1 pos d_vocab"], dict[str, Tensor]]:
    """Logits of one forward pass and what flowed at the named hook points, as the model's other hooks left it.

    Args:
        bridge: The model; what is attached to it stays attached.
        tokens: One prompt.
        names: Hook names.
        hooks: Hooks of this pass alone, which fire before what flows is read; e.g. `float64.exact_hooks`.
    """
    seen: dict[str, Tensor] = {}

    def note(name: str) -> NamedHook:
        return name, lambda tensor, hook: seen.__setitem__(name, tensor.detach().clone())  # noqa: ARG005

    with norm_edits_expected():
        logits = bridge.run_with_hooks(tokens, fwd_hooks=[*hooks, *(note(name) for name in names)], use_cache=False)
    return logits.detach(), seen


def frozen_values(
    bridge: TransformerBridge, seen: Mapping[str, Tensor], parts: Collection[Part] = PARTS
) -> dict[str, Tensor]:
    """What a pass recorded of some parts.

    Args:
        bridge: The model.
        seen: What flowed in the pass.
        parts: Which parts.

    Raises:
        ValueError: A hook of theirs did not fire, so that it would not hold either.
    """
    names = frozen_points(bridge, parts)
    silent = [name for name in names if name not in seen]
    if silent:
        raise ValueError(
            f"{silent} did not fire in a forward pass, so what they show cannot be held. Does this model compute "
            "attention or norms without TransformerLens' hooks?"
        )
    return {name: seen[name] for name in names}


def refuse_loose_patterns(bridge: TransformerBridge, tokens: Int[Tensor, "1 pos"]) -> None:
    """Refuse a model whose attention does not use what a hook makes of its pattern.

    TransformerLens leaves the attention of some architectures to Hugging Face and shows its pattern alone. With a
    pattern of zeros the heads' outputs must be zero.

    Args:
        bridge: The model.
        tokens: A prompt, of which the first token is run.

    Raises:
        ValueError: A pattern that cannot be held.
    """
    points = bridge.hook_dict
    patterns = frozen_points(bridge, ["patterns"])
    heads = [name for name in (name.replace("hook_pattern", "hook_z") for name in patterns) if name in points]
    zeros: list[NamedHook] = [(name, lambda tensor, hook: torch.zeros_like(tensor)) for name in patterns]  # noqa: ARG005
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*The edit is discarded")
        _, seen = record(bridge, tokens[:, :1], heads, hooks=zeros)
    loose = [name for name, z in seen.items() if bool(z.any())]
    if loose:
        raise ValueError(
            f"Patterns that hooks put into {bridge.cfg.architecture} change nothing (seen at {loose}): TransformerLens "
            "leaves this attention to Hugging Face. It cannot be frozen, and nothing behind it is linear."
        )


def holding(constants: Mapping[str, Tensor]) -> list[NamedHook]:
    """Hooks that put recorded values in place of what flows."""

    def hold(name: str, value: Tensor) -> NamedHook:
        return name, lambda tensor, hook: value.to(tensor.dtype)  # noqa: ARG005

    return [hold(name, value) for name, value in constants.items()]


@contextmanager
def norm_edits_expected() -> Generator[None]:
    """Silence TransformerLens' warning, one for each norm, that an edited denominator changes the last bits."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="A forward hook edited hook_scale/hook_normalized")
        warnings.filterwarnings("ignore", message="Backward hooks on hook_scale/hook_normalized")
        yield
