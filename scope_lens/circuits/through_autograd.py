"""The linear model of one prompt, taken from the bridge by autograd: for every architecture.

1. Run the bridge once with its frozen parts held, the token embeddings and what each dictionary writes as leaves.
2. Pull cotangents back from what is read to the leaves: one backward pass for all rows of a reader, batched by `vmap`.

Only the batch of cotangents is batched, never the forward pass, so memory grows with the rows of a sweep alone.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import TransformerBridge
from transformer_lens.hook_points import HookPoint

from scope_lens.attachments import flat_activation
from scope_lens.circuits.float64 import copy_in
from scope_lens.circuits.frozen import (
    NamedHook,
    frozen_values,
    holding,
    norm_edits_expected,
    refuse_loose_patterns,
)
from scope_lens.circuits.linear import TOKENS, Absorb, LinearModel, Stream
from scope_lens.circuits.places import EMBED, FINAL, Place


class ThroughAutograd(LinearModel):
    """The affine map of one prompt, as the bridge computes it with its frozen parts held.

    Args:
        bridge: The model, with nothing attached.
        tokens: The prompt.
        seen: What one clean forward pass showed at the frozen points, at `hook_embed` and at the dictionaries' sites.
        places: The dictionaries.
        dtype: What it is computed in. A model of another dtype is copied, and one that was loaded in inference mode,
            whose parameters autograd refuses.

    Raises:
        ValueError: Patterns that cannot be held, or a frozen part whose hook did not fire.
    """

    def __init__(
        self,
        bridge: TransformerBridge,
        tokens: Int[Tensor, "1 pos"],
        *,
        seen: Mapping[str, Tensor],
        places: Sequence[Place],
        dtype: torch.dtype,
    ) -> None:
        self.places = places
        parameters = [*bridge.parameters()]
        if parameters[0].dtype != dtype or any(parameter.is_inference() for parameter in parameters):
            bridge = copy_in(bridge, dtype)
        self._bridge, self._tokens, self._dtype = bridge, tokens, dtype
        refuse_loose_patterns(bridge, tokens)
        self._constants = {name: value.to(dtype) for name, value in frozen_values(bridge, seen).items()}
        self._kept = [
            flat_activation(seen[place.writes], place.sae.cfg.d_out, place.writes).to(dtype) for place in places
        ]
        self._sources = [
            kept - self._skip(place, seen[place.reads]) for place, kept in zip(places, self._kept, strict=True)
        ]
        self._embed = seen[EMBED].to(dtype)
        self._leaves: dict[int, Tensor] = {}
        self._readers: dict[int, Tensor] = {}
        with _without_parameter_gradients(bridge), torch.enable_grad():
            self._stream = self._run(sources=True)

    def forward(self, *, sources: bool) -> Stream:
        """Run the linear model; see `LinearModel.forward`."""
        if sources:
            return self._stream
        with torch.no_grad():
            return self._run(sources=False)

    def sweep(self, pos: int, cotangents: Mapping[int, Float[Tensor, "row d"]], absorb: Absorb) -> None:
        """Pull cotangents at one position back to everything that writes; see `LinearModel.sweep`."""
        readers = sorted(cotangents, reverse=True)
        found: dict[int, list[Tensor]] = {stage: [] for stage in range(readers[0] - 1, TOKENS - 1, -1)}
        for reader in readers:
            stages = range(reader - 1, TOKENS - 1, -1)
            for stage, gradient in zip(stages, self._pull(reader, pos, cotangents[reader], stages), strict=True):
                found[stage].append(gradient)
        for stage, gradients in found.items():
            gradient = gradients[0] if len(gradients) == 1 else torch.cat(gradients, dim=1)
            absorb(stage, gradient.shape[1], gradient)

    def _skip(self, place: Place, read: Tensor) -> Tensor | int:
        """What the skip term of a dictionary makes of what it reads."""
        if place.sae.W_skip is None:
            return 0
        flat = flat_activation(read, place.sae.cfg.d_in, place.sae.cfg.hook_in).to(self._dtype)
        return flat @ place.sae.W_skip.detach().to(self._dtype)

    def _pull(
        self, reader: int, pos: int, cotangents: Float[Tensor, "row d"], stages: Sequence[int]
    ) -> list[Float[Tensor, "reached row d_out"]]:
        read = self._readers[reader]
        leaves = [self._leaves[stage] for stage in stages]
        gradients: Sequence[Tensor | None] = [None] * len(leaves)
        if read.requires_grad:
            with torch.enable_grad():
                here = read[0, pos]
            gradients = torch.autograd.grad(
                here, leaves, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
        return [
            cotangents.new_zeros(pos + 1, len(cotangents), leaf.shape[-1])
            if gradient is None
            else rearrange(gradient[:, 0, : pos + 1], "row reached d -> reached row d")
            for leaf, gradient in zip(leaves, gradients, strict=True)
        ]

    def _run(self, *, sources: bool) -> Stream:
        """One forward pass; with sources, and gradients on, its leaves and readers are kept."""
        embed = self._embed if sources else torch.zeros_like(self._embed)
        reads: dict[int, Tensor] = {}
        writes: dict[int, Tensor] = {}
        leaves = {TOKENS: embed.requires_grad_()} if torch.is_grad_enabled() else {}

        def place_hooks(place: Place) -> list[NamedHook]:
            cfg = place.sae.cfg
            trained = rearrange(place.trained, "pos -> 1 pos 1")

            def read(tensor: Tensor, hook: HookPoint) -> None:  # noqa: ARG001
                reads[place.stage] = flat_activation(tensor, cfg.d_in, cfg.hook_in)

            def write(tensor: Tensor, hook: HookPoint) -> Tensor:  # noqa: ARG001
                flowing = flat_activation(tensor, cfg.d_out, cfg.hook_out)
                skip = self._skip(place, reads[place.stage])
                leaf = place.sae.b_dec.detach().to(self._dtype).expand_as(flowing)
                if sources:
                    leaf = self._sources[place.stage].detach()
                if torch.is_grad_enabled():
                    leaves[place.stage] = leaf.requires_grad_()
                untrained = flowing if place.passes else self._kept[place.stage]
                writes[place.stage] = torch.where(trained, leaf + skip, untrained)
                return writes[place.stage].reshape(tensor.shape)

            return [(place.reads, read), (place.writes, write)]

        def final(tensor: Tensor, hook: HookPoint) -> None:  # noqa: ARG001
            reads[len(self.places)] = tensor

        # A dictionary that reads where an earlier one writes sees what that one wrote: hooks run in this order.
        hooks: list[NamedHook] = [
            *holding(self._constants),
            (EMBED, lambda tensor, hook: embed),  # noqa: ARG005
            *(named for place in self.places for named in place_hooks(place)),
            (FINAL, final),
        ]
        with norm_edits_expected():
            self._bridge.run_with_hooks(self._tokens, fwd_hooks=[*hooks], use_cache=False)
        if torch.is_grad_enabled():
            self._leaves, self._readers = leaves, reads
        return Stream(
            embed=embed[0].detach(),
            reads=[reads[stage][0].detach() for stage in range(len(self.places))],
            writes=[writes[stage][0].detach() for stage in range(len(self.places))],
            final=reads[len(self.places)][0].detach(),
        )


@contextmanager
def _without_parameter_gradients(bridge: TransformerBridge) -> Generator[None]:
    """Keep the graph free of the parameters, which would hold every activation of the pass."""
    asking = [parameter for parameter in bridge.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_()
