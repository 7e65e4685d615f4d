"""Passes of one prompt in which single sources are taken away: a latent, an error, a token's embedding.

1. `held_probe` holds everything that the linear model of a graph holds, the dictionaries' outputs included, so that a
   source reaches what later reads it on direct paths alone. `free_probe` holds nothing.
2. `Probe.flow` takes several sources away, each in a row of a batch of its own, by edits of the splice; the first row
   is left whole. What is read is recorded.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import TransformerBridge

from scope_lens.attachments import flat_activation
from scope_lens.circuits.float64 import copy_in, in_float64
from scope_lens.circuits.frozen import NamedHook, frozen_points, frozen_values, holding
from scope_lens.circuits.graph_records import Kind
from scope_lens.circuits.interventions import Held, held_output
from scope_lens.circuits.places import EMBED, FINAL, Place, clean_pass, refuse_overwritten
from scope_lens.circuits.sources import in_dtype
from scope_lens.model import ScopeModel
from scope_lens.sae import HookedSAE

_NUMBERS = 2**27  # in the widest tensor of a pass: half a gigabyte in float32


class Source(NamedTuple):
    """What is taken away.

    Attributes:
        kind: A latent, an error or a token.
        pos: Where.
        latent: Which latent; of no meaning for others.
        stage: Of its dictionary; -1 for tokens.
    """

    kind: Kind
    pos: int
    latent: int
    stage: int


class Probe(NamedTuple):
    """A way of running the prompt with sources taken away, each in a row of its own.

    Attributes:
        model: What is run; a copy where the dtype is not the model's own.
        ids: The prompt.
        places: The dictionaries, in that dtype too.
        exact: What makes a float64 pass exact.
        constants: Recorded values that are held before anything else happens.
        outputs: What holds the dictionaries' outputs.
        dtype: What changes are computed in.
    """

    model: ScopeModel
    ids: Int[Tensor, "1 pos"]
    places: list[Place]
    exact: list[NamedHook]
    constants: Mapping[str, Tensor]
    outputs: Held
    dtype: torch.dtype

    @property
    def at_once(self) -> int:
        """How many sources go through the model together: what is widest, logits or latents, takes the memory."""
        widest = max([self.model.model.cfg.d_vocab, *(place.sae.cfg.d_sae for place in self.places)])
        return max(1, _NUMBERS // (widest * self.ids.shape[1]))

    def flow(self, sources: Sequence[Source]) -> dict[int, Float[Tensor, "source_plus_1 pos _"]]:
        """What is read by stage: each dictionary's input, and last the final norm's output.

        The first row has all sources, each of the others lacks one.

        Args:
            sources: At most `at_once`.
        """
        n_rows = 1 + len(sources)
        seen: dict[int, Tensor] = {}

        def reader(stage: int, name: str, width: int) -> NamedHook:
            def read(tensor: Tensor, hook: Any) -> None:  # noqa: ARG001
                seen[stage] = flat_activation(tensor, width, name).clone()

            return name, read

        # An autoencoder reads what arrives at its site, others what the dictionary there leaves.
        inside = [reader(p.stage, p.reads, p.sae.cfg.d_in) for p in self.places if p.reads == p.writes]
        others = [reader(p.stage, p.reads, p.sae.cfg.d_in) for p in self.places if p.reads != p.writes]
        others.append(reader(len(self.places), FINAL, self.model.model.cfg.d_model))
        held = holding({name: value.expand(n_rows, *value.shape[1:]) for name, value in self.constants.items()})
        rows = {kind: [(row, source) for row, source in enumerate(sources, 1) if source.kind is kind] for kind in Kind}
        spliced = [place for place in self.places if any(source.stage == place.stage for source in sources)]
        edits = [edit for place in spliced for edit in _edits(place, rows)]
        with (
            self.model.model.hooks(
                fwd_hooks=[*self.exact, *held, (EMBED, _zeroed(rows[Kind.TOKEN])), *inside, *self.outputs.before]
            ),
            self.model.saes([place.sae for place in spliced], use_error_term=True),
            self.model.hooks(fwd_hooks=[*others, *self.outputs.behind, *edits]),
        ):
            self.model(self.ids.expand(n_rows, -1), use_cache=False)
        return seen


def _edits(place: Place, rows: Mapping[Kind, Sequence[tuple[int, Source]]]) -> list[NamedHook]:
    """Hooks that take away a dictionary's latents and errors."""
    hooks: list[NamedHook] = []
    for kind, name in ((Kind.LATENT, "acts_post"), (Kind.ERROR, "error")):
        own = [(row, source) for row, source in rows[kind] if source.stage == place.stage]
        if own:
            hooks.append((f"{place.sae.cfg.hook_out}.hook_sae_{name}", _zeroed(own)))
    return hooks


def _zeroed(rows: Sequence[tuple[int, Source]]) -> Callable[[Tensor, Any], Tensor]:
    """Write zeros where sources are: at a latent, or, without a number, at all of a position."""

    def zero(tensor: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        tensor = tensor.clone()
        for row, source in rows:
            at = (row, source.pos, source.latent) if source.kind is Kind.LATENT else (row, source.pos)
            tensor[at] = 0
        return tensor

    return zero


def held_probe(
    bridge: TransformerBridge, ids: Int[Tensor, "1 pos"], saes: Sequence[HookedSAE], *, dtype: torch.dtype
) -> Probe:
    """The linear model: patterns, norms, MLPs and the dictionaries' outputs held at the clean pass's.

    Args:
        bridge: The model, with nothing attached.
        ids: The prompt.
        saes: The dictionaries.
        dtype: What everything but the clean pass is computed in; for float64 that is too.

    Raises:
        ValueError: A dictionary that frozen parts overwrite, or they cannot be in one graph.
    """
    for sae in saes:
        refuse_overwritten(bridge, sae)
    exact: list[NamedHook] = []
    if dtype == torch.float64:
        bridge, exact = in_float64(bridge)
    _, seen, places = clean_pass(bridge, ids, saes, [EMBED, *frozen_points(bridge)], hooks=exact)
    if next(iter(bridge.parameters())).dtype != dtype:
        bridge = copy_in(bridge, dtype)
    places = [replace(place, sae=in_dtype(place.sae, dtype)) for place in places]
    outputs = Held([], [])
    for place in places:
        output = held_output(place, seen)
        outputs.before.extend(output.before)
        outputs.behind.extend(output.behind)
    constants = {EMBED: seen[EMBED]} | frozen_values(bridge, seen)
    return Probe(ScopeModel(bridge), ids, places, exact, constants, outputs, dtype)


def free_probe(model: ScopeModel, ids: Int[Tensor, "1 pos"], saes: Sequence[HookedSAE]) -> Probe:
    """The model itself, nothing held.

    Args:
        model: The model, with nothing attached.
        ids: The prompt.
        saes: The dictionaries.
    """
    places = clean_pass(model.model, ids, saes).places
    exact = torch.promote_types(next(iter(model.model.parameters())).dtype, torch.float32)
    return Probe(model, ids, places, [], {}, Held([], []), exact)
