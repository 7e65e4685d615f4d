"""The columns of a graph's nodes, and how latents that are no nodes of their own fold into rests.

1. `nodes_of` tabulates latents, errors, tokens, and the goals behind them.
2. `folded` takes latents out and puts one REST in for each site and position that lost some.
3. `graph_of` adds what the model knows: layers, names, strings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens import TransformerBridge

from scope_lens.circuits.edges import Edges
from scope_lens.circuits.graph import AttributionGraph, GraphChecks, Kind
from scope_lens.circuits.places import EMBED, FINAL, Place
from scope_lens.circuits.prompt import token_string
from scope_lens.circuits.sources import Sources
from scope_lens.circuits.targets import Goal
from scope_lens.sae_config import SAEConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class Nodes:
    """Columns of nodes; their meaning is that of `AttributionGraph`."""

    kind: Int[Tensor, " node"]
    stage: Int[Tensor, " node"]
    pos: Int[Tensor, " node"]
    index: Int[Tensor, " node"]
    activation: Float[Tensor, " node"]
    start: Float[Tensor, " node"]
    bias: Float[Tensor, " node"]
    pre_activation: Float[Tensor, " node"]


def nodes_of(
    sources: Sources,
    tokens: Int[Tensor, " pos"],
    goals: Sequence[Goal],
    *,
    bias: Float[Tensor, " end"],
    pre_activation: Float[Tensor, " end"],
) -> Nodes:
    """Tabulate latents, errors and tokens as `sources` numbers them, then logits and directions.

    Args:
        sources: All that writes.
        tokens: The prompt.
        goals: The targets asked for.
        bias: Of those that are no latents.
        pre_activation: Of those that are no latents.
    """
    parts, n_pos, device = sources.parts, len(tokens), tokens.device
    ends = [goal for goal in goals if goal.kind is not Kind.LATENT]
    positions = torch.arange(n_pos, device=device)
    stages = torch.arange(len(parts), device=device)
    counts = torch.tensor([len(part.pos) for part in parts], dtype=torch.long, device=device)

    def longs(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    def kinds(kind: Kind, count: int) -> Tensor:
        return torch.full((count,), kind, device=device)

    unread = bias.new_full((sources.n_nodes - sources.n_latents,), float("nan"))
    start = torch.zeros(sources.n_nodes + len(ends), dtype=bias.dtype, device=device)
    start[sources.n_nodes :] = torch.tensor([goal.start for goal in ends], dtype=bias.dtype)
    for goal in goals:
        if goal.kind is Kind.LATENT:
            start[sources.latent(goal.stage, goal.pos, goal.index)] = goal.start
    return Nodes(
        kind=torch.cat(
            [
                kinds(Kind.LATENT, sources.n_latents),
                kinds(Kind.ERROR, len(parts) * n_pos),
                kinds(Kind.TOKEN, n_pos),
                longs([goal.kind for goal in ends]),
            ]
        ),
        stage=torch.cat(
            [
                stages.repeat_interleave(counts),
                stages.repeat_interleave(n_pos),
                torch.full_like(positions, -1),
                longs([goal.stage for goal in ends]),
            ]
        ),
        pos=torch.cat(
            [
                *(part.pos for part in parts),
                positions.repeat(len(parts)),
                positions,
                longs([goal.pos for goal in ends]),
            ]
        ),
        index=torch.cat(
            [
                *(part.index for part in parts),
                torch.full_like(positions, -1).repeat(len(parts)),
                tokens,
                longs([goal.index for goal in ends]),
            ]
        ),
        activation=torch.cat([*(part.activation for part in parts), unread, start[sources.n_nodes :]]),
        start=start,
        bias=torch.cat([*(part.bias for part in parts), unread, bias]),
        pre_activation=torch.cat([*(part.pre_activation for part in parts), unread, pre_activation]),
    )


def folded(nodes: Nodes, keep: Bool[Tensor, " node"]) -> tuple[Nodes, Int[Tensor, " node"]]:
    """Fold latents into rests.

    Args:
        nodes: All of them.
        keep: False for the latents that are to be folded.

    Returns:
        The nodes that are left, rests behind the latents, and for each earlier node the number of the one that holds it
        now.
    """
    places, which = torch.stack([nodes.stage, nodes.pos])[:, ~keep].unique(dim=1, return_inverse=True)
    n_rests = places.shape[1]
    is_latent = (nodes.kind == Kind.LATENT) & keep
    latents, others = is_latent.nonzero()[:, 0], (keep & ~is_latent).nonzero()[:, 0]
    number = torch.empty_like(nodes.kind)
    number[latents] = torch.arange(len(latents), device=keep.device)
    number[~keep] = len(latents) + which
    number[others] = len(latents) + n_rests + torch.arange(len(others), device=keep.device)

    def column(values: Tensor, of_rests: Tensor) -> Tensor:
        return torch.cat([values[latents], of_rests.to(values.dtype), values[others]])

    nan = torch.full((n_rests,), float("nan"), device=keep.device)
    left = Nodes(
        kind=column(nodes.kind, torch.full_like(places[0], Kind.REST)),
        stage=column(nodes.stage, places[0]),
        pos=column(nodes.pos, places[1]),
        index=column(nodes.index, torch.full_like(places[0], -1)),
        activation=column(nodes.activation, nan),
        start=column(nodes.start, torch.zeros_like(nan)),
        bias=column(nodes.bias, nan),
        pre_activation=column(nodes.pre_activation, nan),
    )
    return left, number


def graph_of(
    bridge: TransformerBridge,
    tokens: Int[Tensor, " pos"],
    nodes: Nodes,
    edges: Edges,
    *,
    places: Sequence[Place],
    goals: Sequence[Goal],
    directions: Float[Tensor, "direction d_model"],
    checks: GraphChecks,
    settings: Mapping[str, str | int | float | bool | None],
) -> AttributionGraph:
    """Put a graph together.

    Args:
        bridge: The model.
        tokens: The prompt.
        nodes: Its nodes, logits and directions last, in the order of `goals`.
        edges: Its edges.
        places: The dictionaries, by stage.
        goals: The targets asked for.
        directions: What those that are directions read, in their order.
        checks: What attribution found when it checked itself.
        settings: How the graph was made.
    """
    configs = [place.sae.cfg for place in places]
    strings = [token_string(bridge, token) for token in tokens.tolist()]
    ends = [goal for goal in goals if goal.kind is not Kind.LATENT]
    kinds, stages = nodes.kind.tolist(), nodes.stage.tolist()
    named = {Kind.TOKEN: EMBED, Kind.LOGIT: FINAL, Kind.DIRECTION: FINAL}
    n_unlabelled = len(kinds) - len(strings) - len(ends)
    layers = torch.tensor([*(place.layer for place in places), bridge.cfg.n_layers, -1], device=tokens.device)
    return AttributionGraph(
        tokens=tokens,
        kind=nodes.kind,
        layer=layers[nodes.stage],  # the stage of tokens, -1, finds the last
        pos=nodes.pos,
        index=nodes.index,
        stage=nodes.stage,
        site=[named.get(kind) or configs[stage].hook_out for kind, stage in zip(kinds, stages, strict=True)],
        label=[*[""] * n_unlabelled, *strings, *(goal.label for goal in ends)],
        activation=nodes.activation,
        start=nodes.start,
        bias=nodes.bias,
        pre_activation=nodes.pre_activation,
        dropped=torch.zeros_like(nodes.bias).where(~nodes.bias.isnan(), float("nan")),
        cumulative=torch.full_like(nodes.bias, float("nan")),
        directions=directions,
        edges=edges,
        token_strings=strings,
        n_layers=bridge.cfg.n_layers,
        d_vocab=bridge.cfg.d_vocab,
        model=_model_id(bridge, configs),
        sites=[cfg.hook_out for cfg in configs],
        sources=["/".join(filter(None, (cfg.release, cfg.path))) for cfg in configs],
        checks=checks,
        settings=settings,
    )


def _model_id(bridge: TransformerBridge, configs: Sequence[SAEConfig]) -> str:
    """The model's id; where it was loaded from a folder, the one that its dictionaries were made for."""
    name = str(bridge.cfg.model_name)
    made_for = {cfg.model for cfg in configs if cfg.model}
    return made_for.pop() if Path(name).is_absolute() and len(made_for) == 1 else name
