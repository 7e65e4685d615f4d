"""Set, add to or scale single latents and see what the model says; Ameisen et al. 2025, "Circuit Tracing".

A dictionary is spliced in with its error term, so that the model computes what it did until a latent is edited; an edit
adds the change of the latent times its decoder row at the dictionary's output. `freeze` chooses what may respond:

- nothing frozen: the model runs freely, later latents are what they become.
- "patterns": attention after the softmax is the clean run's.
- "norms": so is the denominator of every norm, the final one and those of queries and keys included.
- "mlps": so is what every MLP adds to the residual stream, save for a dictionary's skip term, which is linear in its
  input. Then a change is based on the clean run's activations: "set" adds `value - clean activation`, whatever other
  edits did to the latent.

With all three frozen, edits have their direct effects. In a graph of transcoders these are its edges. Edges of a graph
with attention or residual dictionaries end at their sites, and an edit here passes through them: `verify` holds those.

1. Resolve every edit against the dictionaries and the prompt, and refuse what would do nothing.
2. Record what is frozen in one clean forward pass.
3. Run the prompt with the frozen parts held and the latents edited; to generate, go on with the KV cache, nothing
   frozen any more, and with the edits whose positions reach behind the prompt.
"""

import math
import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens import TransformerBridge

from scope_lens.attachments import attachments_of, flat_activation
from scope_lens.circuits.frozen import (
    PARTS,
    NamedHook,
    Part,
    frozen_points,
    frozen_values,
    holding,
    norm_edits_expected,
    refuse_loose_patterns,
)
from scope_lens.circuits.places import Place, clean_pass, hook_names, refuse_overwritten, untrained_in
from scope_lens.circuits.prompt import token_ids
from scope_lens.eval_mode import in_eval_mode
from scope_lens.model import ScopeModel
from scope_lens.sae import HookedSAE

Edit = Literal["set", "add", "scale"]


class Intervention(NamedTuple):
    """One edit of one latent.

    Attributes:
        site: Where its dictionary writes (`cfg.hook_out`), by any name of that hook.
        latent: Its number in the dictionary.
        pos: A position, negative counted from the end of the prompt, or a slice of positions. A slice that is open at
            its end, or ends behind the prompt, goes on in generation.
        value: What the activation is set to, or what is added to it, or what it is multiplied with.
        kind: Which of these.
    """

    site: str
    latent: int
    pos: int | slice
    value: float
    kind: Edit = "set"


class _LatentEdit(NamedTuple):
    latent: int
    positions: range
    value: float
    kind: Edit


@torch.no_grad()
def run_with_interventions(
    model: ScopeModel,
    tokens: Int[Tensor, " pos"] | Int[Tensor, "1 pos"] | str,
    *,
    saes: Sequence[HookedSAE],
    interventions: Sequence[Intervention],
    freeze: Sequence[Part] = (),
    generate: int = 0,
) -> Float[Tensor, "1 pos d_vocab"] | Int[Tensor, "1 pos_and_generated"]:
    """Run one prompt with latents edited: out += sum over edits of (new - old activation) * W_dec[latent].

    The model is left as it was found; what is attached to it is set aside for the run. Several edits of one latent
    apply in their order. Where a generated token is special, its dictionary was not trained and no edit reaches it.

    Args:
        model: The model.
        tokens: The prompt: token ids, or text that the model's tokenizer turns into them.
        saes: The dictionaries whose latents are edited, one a site.
        interventions: The edits; none leaves the frozen model.
        freeze: Which parts of the prompt's pass come from the clean run: "patterns", "norms", "mlps".
        generate: How many tokens to generate greedily; an end-of-sequence token does not end it.

    Returns:
        Logits (1, pos, d_vocab), or with `generate` the prompt with the generated tokens, (1, pos + generate).

    Raises:
        KeyError: No dictionary of `saes` writes at an edit's site, or the model has no hook that one of them names.
        ValueError: An empty prompt or several; a latent or position out of range; a position where the dictionary was
            never trained, so that it is not spliced there; an unknown part or kind; an edit that a frozen part would
            overwrite; a dictionary that does not fit the model.
    """
    bridge, saes = model.model, [*saes]
    prompt = _one_prompt(bridge, tokens)
    if generate < 0:
        raise ValueError(f"generate is {generate}; give the number of tokens to generate, 0 for logits.")
    parts = _checked_parts(bridge, freeze)
    edits = _resolve(bridge, prompt, saes, interventions, n_seen=prompt.shape[1] + max(generate - 1, 0))
    edited = list(edits)
    with attachments_of(bridge).set_aside(bridge), in_eval_mode(bridge), norm_edits_expected():
        held, clean = _freeze(bridge, prompt, saes=saes, edited=edited, parts=parts) if parts else (Held([], []), {})
        found = [prompt]
        step, cache, offset = prompt, None, 0
        for _ in range(max(generate, 1)):
            hooks = [_edit_hook(sae, edits[sae], clean.get(sae), offset) for sae in edited]
            # Hooks run in the order in which they were added.
            with (
                bridge.hooks(fwd_hooks=held.before),
                model.saes(edited, use_error_term=True),
                model.hooks(fwd_hooks=[*held.behind, *hooks]),
            ):
                logits, cache = bridge(
                    step, return_type="logits_and_cache", past_key_values=cache, use_cache=generate > 1
                )
            if generate == 0:
                return logits
            offset += step.shape[1]
            step = logits[:, -1:].argmax(-1)
            found.append(step)
            held, clean = Held([], []), {}  # the clean run has shown nothing of the positions that come now
    return torch.cat(found, dim=1)


class Held(NamedTuple):
    """Hooks that hold parts of a forward pass.

    Attributes:
        before: To be added before dictionaries are spliced in, so that these edit what is held.
        behind: To be added behind them: these read what the dictionaries leave.
    """

    before: list[NamedHook]
    behind: list[NamedHook]


def held_output(place: Place, seen: Mapping[str, Tensor]) -> Held:
    """Hold what flows where a dictionary writes; a skip term, linear in its input, lets the change of that through.

    out = recorded + (x - recorded x) @ W_skip where the dictionary is trained, the recorded output elsewhere, except in
    the residual stream, which flows on there.

    Args:
        place: The dictionary.
        seen: What a pass recorded where it writes, and with a skip term where it reads.
    """
    sae, recorded = place.sae, seen[place.writes]
    # Heads are an axis of their own at some sites.
    free = ~place.trained.reshape(-1, *[1] * (recorded.ndim - 2)) if place.passes else torch.zeros((), dtype=torch.bool)
    change: list[Tensor] = []

    def note(tensor: Tensor, hook: Any) -> None:  # noqa: ARG001
        assert sae.W_skip is not None
        exact = torch.promote_types(sae.dtype, torch.float32)
        now, before = (flat_activation(x, sae.cfg.d_in, sae.cfg.hook_in).to(exact) for x in (tensor, seen[place.reads]))
        change[:] = [((now - before) @ sae.W_skip.to(exact)).masked_fill(~place.trained[:, None], 0)]

    def hold(tensor: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        value = recorded
        if sae.W_skip is not None:
            moved = change.pop()
            value = recorded.to(moved.dtype) + moved.reshape(-1, *recorded.shape[1:])
        return torch.where(free.to(tensor.device), tensor, value.to(tensor.dtype))

    if sae.W_skip is None:
        return Held([(place.writes, hold)], [])
    if place.reads == place.writes:
        return Held([(place.reads, note), (place.writes, hold)], [])
    return Held([(place.writes, hold)], [(place.reads, note)])


def _freeze(
    bridge: TransformerBridge,
    prompt: Int[Tensor, "1 pos"],
    *,
    saes: Sequence[HookedSAE],
    edited: Collection[HookedSAE],
    parts: Collection[Part],
) -> tuple[Held, dict[HookedSAE, Tensor]]:
    """What holds the frozen parts, and with frozen MLPs the clean activations of the edited dictionaries."""
    for sae in edited:
        refuse_overwritten(bridge, sae, parts, instead=f"Take what overwrites it out of freeze={[*parts]}.")
    if "patterns" in parts:
        refuse_loose_patterns(bridge, prompt)
    _, seen, places = clean_pass(bridge, prompt, saes, frozen_points(bridge, parts))
    constants = frozen_values(bridge, seen, parts)
    if "mlps" not in parts:
        return Held(holding(constants), []), {}
    points = bridge.hook_dict
    mlps = {points[name] for name in frozen_points(bridge, ["mlps"])}
    held, clean = Held(holding(constants), []), dict[HookedSAE, Tensor]()
    for place in places:
        sae = place.sae
        if points[place.writes] in mlps and sae.W_skip is not None:
            output = held_output(place, seen)
            held.before.extend(output.before)
            held.behind.extend(output.behind)
        if sae in edited:
            x = flat_activation(seen[place.reads], sae.cfg.d_in, sae.cfg.hook_in)
            clean[sae] = sae.activate(sae.pre_activation(x))
    return held, clean


def _edit_hook(sae: HookedSAE, edits: Sequence[_LatentEdit], clean: Tensor | None, offset: int) -> NamedHook:
    """The hook that edits latents in a pass whose first token is at position `offset`."""

    def edit(acts: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        old = acts if clean is None else clean
        new = old.clone()
        for latent, positions, value, kind in edits:
            here = [position - offset for position in positions if 0 <= position - offset < acts.shape[1]]
            match kind:
                case "set":
                    new[0, here, latent] = value
                case "add":
                    new[0, here, latent] += value
                case "scale":
                    new[0, here, latent] *= value
        return new if clean is None else acts + (new - clean)

    return f"{sae.cfg.hook_out}.hook_sae_acts_post", edit


def _resolve(
    bridge: TransformerBridge,
    prompt: Int[Tensor, "1 pos"],
    saes: Sequence[HookedSAE],
    interventions: Sequence[Intervention],
    *,
    n_seen: int,
) -> dict[HookedSAE, list[_LatentEdit]]:
    """The edits of each dictionary that has any; `n_seen` positions pass through the model in all."""
    by_write: dict[str, HookedSAE] = {}
    for sae in saes:
        writes = hook_names(bridge, sae)[1]
        if writes in by_write:
            raise ValueError(f"Two of the dictionaries write {sae.cfg.hook_out!r}; pass one of them.")
        by_write[writes] = sae
    sites = attachments_of(bridge).sites
    edits: dict[HookedSAE, list[_LatentEdit]] = {}
    for number, intervention in enumerate(interventions):
        site, latent, pos, value, kind = intervention
        point = sites.find(bridge, site)
        sae = None if point is None else by_write.get(sites.names(point)[0])
        if sae is None:
            raise KeyError(
                f"Intervention {number} is at {site!r}, where none of the dictionaries given writes; they write "
                f"{[sae.cfg.hook_out for sae in saes]}."
            )
        latent = operator.index(latent)
        if not 0 <= latent < sae.cfg.d_sae:
            raise ValueError(
                f"Intervention {number} edits latent {latent} of {site!r}; that dictionary has the latents 0 to "
                f"{sae.cfg.d_sae - 1}."
            )
        if kind not in get_args(Edit):
            raise ValueError(f"Intervention {number} has kind {kind!r}; expected one of {list(get_args(Edit))}.")
        if not math.isfinite(value):
            raise ValueError(f"Intervention {number} has the value {float(value)}; it must be finite.")
        positions = _positions(number, pos, n_prompt=prompt.shape[1], n_seen=n_seen)
        _refuse_untrained(number, site, positions, untrained_in(bridge, prompt, sae))
        edits.setdefault(sae, []).append(_LatentEdit(latent, positions, float(value), kind))
    return edits


def _one_prompt(bridge: TransformerBridge, tokens: Int[Tensor, "*batch pos"] | str) -> Int[Tensor, "1 pos"]:
    if isinstance(tokens, str):
        return token_ids(bridge, tokens)
    shape = tuple(torch.as_tensor(tokens).shape)
    if len(shape) == 2 and shape[0] != 1:
        raise ValueError(f"tokens has shape {shape}; give one prompt, (pos,) or (1, pos).")
    return token_ids(bridge, tokens[0] if len(shape) == 2 else tokens)


def _positions(number: int, pos: int | slice, *, n_prompt: int, n_seen: int) -> range:
    """The positions an edit means, counted from the start of the prompt."""

    def absolute(bound: int) -> int:
        return bound if bound >= 0 else bound + n_prompt

    if isinstance(pos, slice):
        # A negative bound counts from the end of the prompt, not of what is generated.
        start, stop = (None if bound is None else max(absolute(bound), 0) for bound in (pos.start, pos.stop))
        positions = range(n_seen)[slice(start, stop, pos.step)]
        if not positions:
            raise ValueError(
                f"Intervention {number} selects no position: {pos} of {n_seen} positions, {n_prompt} of them the "
                "prompt's."
            )
        return positions
    position = absolute(operator.index(pos))
    if not 0 <= position < n_seen:
        raise ValueError(
            f"Intervention {number} is at position {pos}; the prompt has {n_prompt} tokens, and {n_seen} positions "
            "pass through the model in all."
        )
    return range(position, position + 1)


def _refuse_untrained(number: int, site: str, positions: range, untrained: Bool[Tensor, " pos"]) -> None:
    never = [position for position in untrained.nonzero()[:, 0].tolist() if position in positions]
    if never:
        raise ValueError(
            f"Intervention {number} edits {site!r} at position {never[0]}, whose token is special: the dictionary was "
            f"never trained there and is not spliced in. Leave out the positions {never} of the prompt."
        )


def _checked_parts(bridge: TransformerBridge, freeze: Sequence[str]) -> list[Part]:
    parts: list[Part] = [part for part in PARTS if part in freeze]
    if isinstance(freeze, str) or len(parts) != len({*freeze}):
        raise ValueError(f"freeze is {freeze!r}; give a sequence of any of {list(PARTS)}.")
    for part in parts:
        if not frozen_points(bridge, [part]):
            raise ValueError(
                f"freeze={freeze!r}: this model ({bridge.cfg.model_name}) has no hook points for {part!r}, so they "
                "cannot be held."
            )
    return parts
