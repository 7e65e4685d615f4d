"""What a graph explains: logits by mass, chosen tokens, directions, and latents.

1. `resolve` turns what a user asks for into `Goal`s and refuses what has no one meaning.
2. `vectors` gives what each of them reads at the final norm's output.

A logit reads `W_U[:, y] - mean_y' W_U[:, y']`: the mean is what all logits share and the softmax ignores, as in
Ameisen et al. 2025.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import TransformerBridge

from scope_lens.attachments import attachments_of
from scope_lens.circuits.graph import Kind
from scope_lens.circuits.places import Place
from scope_lens.circuits.prompt import token_string


class Target(NamedTuple):
    """One thing that a graph explains: a direction at the final norm's output, or a latent's pre-activation.

    Attributes:
        label: Its name in the graph.
        pos: Position it is read at; negative counts from the end.
        vector: Direction, (d_model,), read at the final norm's output, gain included: a logit difference is
            `W_U[:, a] - W_U[:, b]`.
        latent: (site, index) of a latent; any name of the site. It need not be active.
    """

    label: str
    pos: int
    vector: Tensor | None = None
    latent: tuple[str, int] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Goal:
    """A target with everything looked up.

    Attributes:
        kind: LOGIT, DIRECTION or LATENT.
        pos: Position, counted from the start.
        index: Vocabulary id or latent; -1 for a direction.
        label: Its string.
        start: Its weight in influence: a logit's probability, else 1.
        stage: Of a latent, the stage of its dictionary; of others the number of dictionaries.
        vector: Of a direction, what it reads at the final norm's output.
    """

    kind: Kind
    pos: int
    index: int
    label: str
    start: float
    stage: int
    vector: Tensor | None = None


def resolve(
    bridge: TransformerBridge,
    targets: Sequence[int | str | Target] | None,
    *,
    logits: Float[Tensor, "pos d_vocab"],
    places: Sequence[Place],
    logit_mass: float,
    max_logits: int,
) -> list[Goal]:
    """Look every target up.

    Args:
        bridge: The model.
        targets: As `attribute` takes them.
        logits: The model's own, soft cap included.
        places: The dictionaries.
        logit_mass: Share of probability that the logits of `targets=None` hold together.
        max_logits: How many of these there are at most.

    Raises:
        TypeError: One target that is in no list.
        ValueError: A string that is not one token, a token, position or latent that does not exist, a vector of another
            width, a target without or with two things to read, no target at all, or one that is there twice.
    """
    probabilities = logits[-1].double().softmax(-1)
    if targets is None:
        mass, tokens = probabilities.topk(min(max_logits, len(probabilities)))
        enough = int(torch.searchsorted(mass.cumsum(0), logit_mass)) + 1
        targets = tokens[:enough].tolist()
    if isinstance(targets, str | Target):  # both are sequences, of letters and of fields
        raise TypeError(f"targets takes a list; found {targets!r} alone. Pass [{targets!r}].")
    if len(targets) == 0:
        raise ValueError("targets is empty, so there is nothing to explain. Leave it None for the likeliest logits.")
    goals: list[Goal] = []
    for target in targets:
        if isinstance(target, Target):
            goals.append(_chosen(bridge, target, places=places, n_pos=len(logits)))
        else:
            token = _one_token(bridge, target) if isinstance(target, str) else operator.index(target)
            if not 0 <= token < len(probabilities):
                raise ValueError(
                    f"The target token {token} is not in the vocabulary of {len(probabilities)} tokens. A latent or a "
                    "direction is asked for with Target(...)."
                )
            goals.append(
                Goal(
                    kind=Kind.LOGIT,
                    pos=len(logits) - 1,
                    index=token,
                    label=token_string(bridge, token),
                    start=float(probabilities[token]),
                    stage=len(places),
                )
            )
    _refuse_twice(goals)
    return goals


def vectors(bridge: TransformerBridge, goals: Sequence[Goal], *, dtype: torch.dtype) -> Float[Tensor, "goal d_model"]:
    """What logits and directions read at the final norm's output."""
    unembed: Tensor = bridge.W_U
    if not goals:
        return unembed.new_zeros(0, len(unembed), dtype=dtype)
    mean = unembed.detach().mean(dim=1, dtype=dtype)
    return torch.stack(
        [
            unembed.detach()[:, goal.index].to(dtype) - mean
            if goal.vector is None
            else goal.vector.detach().to(mean.device, dtype)
            for goal in goals
        ]
    )


def _one_token(bridge: TransformerBridge, text: str) -> int:
    if bridge.tokenizer is None:
        raise ValueError(f"The target {text!r} is text, and the model has no tokenizer. Pass the token's id.")
    ids: list[int] = bridge.tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        parts = [token_string(bridge, token) for token in ids]
        raise ValueError(
            f"The target {text!r} is {len(ids)} tokens, {parts}; a logit is of one. Choose one of them, check the "
            "space in front, or pass an id."
        )
    return ids[0]


def _chosen(bridge: TransformerBridge, target: Target, *, places: Sequence[Place], n_pos: int) -> Goal:
    if not -n_pos <= target.pos < n_pos:
        raise ValueError(f"{_named(target)} is at position {target.pos}; the prompt has {n_pos} tokens.")
    pos = target.pos % n_pos
    if (target.vector is None) == (target.latent is None):
        raise ValueError(f"{_named(target)} needs a vector or a latent, one of them; found both or none.")
    if target.latent is not None:
        return _latent(bridge, target, target.latent, places=places, pos=pos)
    assert target.vector is not None
    finite = bool(target.vector.isfinite().all())
    if tuple(target.vector.shape) != (bridge.cfg.d_model,) or not finite:
        raise ValueError(
            f"{_named(target)} needs a finite vector of shape ({bridge.cfg.d_model},), the width of the final norm's "
            f"output; found {'' if finite else 'numbers that are not finite, '}shape {tuple(target.vector.shape)}."
        )
    return Goal(
        kind=Kind.DIRECTION, pos=pos, index=-1, label=target.label, start=1.0, stage=len(places), vector=target.vector
    )


def _latent(
    bridge: TransformerBridge, target: Target, latent: tuple[str, int], *, places: Sequence[Place], pos: int
) -> Goal:
    site, index = latent
    sites = attachments_of(bridge).sites
    name = sites.names(sites.resolve(bridge, site))[0]
    place = next((place for place in places if place.writes == name), None)
    if place is None:
        raise ValueError(
            f"{_named(target)} is at {site!r}, where no dictionary of this graph writes; they write "
            f"{[place.sae.cfg.hook_out for place in places]}."
        )
    if not 0 <= index < place.sae.cfg.d_sae:
        raise ValueError(
            f"{_named(target)} asks for latent {index} of {site!r}, which has latents 0 to {place.sae.cfg.d_sae - 1}."
        )
    if not bool(place.trained[pos]):
        raise ValueError(
            f"{_named(target)} is at position {pos}, a special token that the dictionary of {site!r} was not trained "
            "on; it has no latents there."
        )
    return Goal(kind=Kind.LATENT, pos=pos, index=index, label=target.label, start=1.0, stage=place.stage)


def _refuse_twice(goals: Sequence[Goal]) -> None:
    seen: set[tuple[int, ...] | tuple[int, int, str]] = set()
    for goal in goals:
        key = (
            (goal.kind, goal.pos, goal.label)
            if goal.kind is Kind.DIRECTION
            else (goal.kind, goal.pos, goal.stage, goal.index)
        )
        if key in seen:
            raise ValueError(
                f"The target {goal.label!r} at position {goal.pos} is asked for twice. Ask once; directions of one "
                "position need labels of their own."
            )
        seen.add(key)


def _named(target: Target) -> str:
    return f"The target {target.label!r}"
