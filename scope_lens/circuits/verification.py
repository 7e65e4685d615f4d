"""Predicted against measured: does taking a source away change its targets as the graph says?

Ameisen et al. 2025, "Circuit Tracing", compare a graph's predictions with perturbations of the model ("mechanistic
faithfulness"); circuit-tracer does so for every edge in its tests. Here it is a call.

1. The sources with the largest influence are taken away one after the other: a latent or an error by an edit of the
   splice, a token by its embedding.
2. "direct": attention patterns, norm denominators, MLP outputs and every dictionary's output are held, so that nothing
   but the source's own write can reach a target. Each target's change is one edge of the graph. They agree up to
   rounding, or the graph is wrong.
3. "total": the model runs freely. The graph's prediction follows all paths, latents moving in proportion to their
   pre-activation. This measures how far the frozen, linear picture carries.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import TransformerBridge

from scope_lens.attachments import attachments_of
from scope_lens.circuits.frozen import norm_edits_expected
from scope_lens.circuits.graph import AttributionGraph
from scope_lens.circuits.graph_records import Kind
from scope_lens.circuits.influence import last_stage_first
from scope_lens.circuits.places import Place
from scope_lens.circuits.probes import Probe, Source, free_probe, held_probe
from scope_lens.circuits.prompt import token_ids
from scope_lens.circuits.targets import Goal, vectors
from scope_lens.eval_mode import in_eval_mode
from scope_lens.model import ScopeModel
from scope_lens.sae import HookedSAE

_SOURCES = (Kind.LATENT, Kind.ERROR, Kind.TOKEN)


class Verification(NamedTuple):
    """How predicted and measured changes compare.

    Attributes:
        predicted: What the graph says that a source gives to a target's pre-activation, one entry a pair.
        measured: By how much the pre-activation fell when the source was taken away.
        slope: Of the line through the origin that fits measured to predicted best.
        r2: 1 - sum (measured - slope * predicted)^2 / sum measured^2.
    """

    predicted: Float[Tensor, " pair"]
    measured: Float[Tensor, " pair"]
    slope: float
    r2: float


@torch.no_grad()
def verify(
    graph: AttributionGraph,
    model: ScopeModel,
    *,
    saes: Sequence[HookedSAE],
    n: int = 32,
    mode: Literal["direct", "total"] = "direct",
) -> Verification:
    """Take sources away and compare what happens with what the graph says.

    A pair is a source and a target at a later stage and no earlier position. "direct" compares every target; pairs
    without an edge are left out in rows that lost some (pruning, `subgraph`). "total" compares what influence starts
    from: logits, and the targets asked for.

    A direct check of a graph in float64 runs in float64. A half-precision model is checked in float32, with the frozen
    parts of its own pass; its activations are then rounded ones, and the slope is 1 to their rounding. The model is
    left as it was found.

    Args:
        graph: Made of this model and these dictionaries; it may be pruned, but not merged.
        model: The model.
        saes: The graph's dictionaries.
        n: How many latents, errors and tokens are taken away, those of largest influence first.
        mode: "direct" or "total".

    Raises:
        KeyError: A dictionary for a hook that the model does not have.
        ValueError: Another model's or other dictionaries' graph, a merged one, one without anything to compare, or a
            dictionary that writes inside an MLP.
    """
    if mode not in ("direct", "total"):
        raise ValueError(f"mode is {mode!r}; expected 'direct' or 'total'.")
    if n < 1:
        raise ValueError(f"n is {n}; at least one source has to be taken away.")
    bridge, saes = model.model, [*saes]
    _check_model(graph, bridge)
    ids = token_ids(bridge, graph.tokens)
    with attachments_of(bridge).set_aside(bridge), in_eval_mode(bridge), norm_edits_expected():
        direct = mode == "direct"
        probe = held_probe(bridge, ids, saes, dtype=_dtype(graph)) if direct else free_probe(model, ids, saes)
        stages = _stages(graph, bridge, probe.places)
        nodes = _strongest(graph, n)
        readers = _readers(graph, probe, stages, start_only=not direct)
        sources = [_source(graph, node, stages) for node in nodes.tolist()]
        starts = range(0, len(sources), probe.at_once)
        changes = [readers.changes(probe.flow(sources[first : first + probe.at_once])) for first in starts]
        measured = torch.cat(changes, dim=1)
    possible = graph.pos[nodes] <= graph.pos[readers.nodes][:, None]
    possible &= graph.stage[nodes] < graph.stage[readers.nodes][:, None]
    if not direct:
        return _compare(total_effects(graph, readers.nodes)[:, nodes], measured, compared=possible)
    predicted = _direct(graph, readers.nodes, nodes)
    whole = (graph.dropped[readers.nodes] == 0)[:, None]
    return _compare(predicted, measured, compared=(predicted != 0) | (possible & whole))


def total_effects(graph: AttributionGraph, targets: Int[Tensor, " target"]) -> Float[Tensor, "target node"]:
    """What each node gives to each target along all paths, in float64.

        T[t, s] = A[t, s] + sum over latents l of T[t, l] / activation_l * A[l, s]

    A latent's activation moves as its pre-activation does; errors and tokens depend on nothing. Latents that are not
    active pass nothing on.

    Args:
        graph: The graph.
        targets: Node numbers of targets.
    """
    edges = graph.edges
    active = (graph.kind == Kind.LATENT) & (graph.activation.nan_to_num(0) != 0)
    share = torch.where(active, 1 / graph.activation.double(), 0)
    effect = share.new_zeros(len(targets), graph.n_nodes)
    own = torch.zeros_like(effect)
    own[torch.arange(len(targets), device=targets.device), targets] = 1
    for rows, span in last_stage_first(edges, graph.stage):
        through = own[:, rows] + effect[:, rows] * share[rows]
        lengths = edges.row_lengths[rows]
        passed = through.repeat_interleave(lengths, dim=1) * edges.weight[span]
        effect.index_add_(1, edges.source[span], passed)
    return effect


# ---- what is compared ----


class _Readers(NamedTuple):
    """The targets that can be measured."""

    nodes: Int[Tensor, " target"]
    stage: list[int]  # the stages that have any; `nodes` stand in this order
    pos: list[Tensor]  # by stage, where they read
    reads: list[Tensor]  # by stage, the vectors they read with

    def changes(self, seen: Mapping[int, Tensor]) -> Float[Tensor, "target source"]:
        """By how much each target's pre-activation is smaller where a source lacks."""
        changes: list[Tensor] = []
        for stage, pos, reads in zip(self.stage, self.pos, self.reads, strict=True):
            flowed = seen[stage].to(reads.dtype)
            gone = flowed[:1] - flowed[1:]
            found = reads.new_empty(len(pos), len(gone))
            for at in pos.unique().tolist():
                here = pos == at
                found[here] = reads[here] @ gone[:, at].T
            changes.append(found)
        return torch.cat(changes).to(self.nodes.device, torch.float64)


def _readers(
    graph: AttributionGraph,
    probe: Probe,
    stages: Mapping[str, int],
    *,
    start_only: bool,
) -> _Readers:
    directions = dict(zip((graph.kind == Kind.DIRECTION).nonzero()[:, 0].tolist(), graph.directions, strict=True))
    by_stage: dict[int, list[int]] = {}
    goals: list[Goal] = []
    nodes: list[int] = graph.targets.tolist()
    for node in nodes:
        if start_only and not graph.start[node] > 0:
            continue
        kind, pos, index = Kind(int(graph.kind[node])), int(graph.pos[node]), int(graph.index[node])
        if kind is Kind.LATENT:
            by_stage.setdefault(stages[graph.site[node]], []).append(node)
            continue
        vector = directions.get(node)
        by_stage.setdefault(len(probe.places), []).append(node)
        goals.append(Goal(kind=kind, pos=pos, index=index, label="", start=0, stage=len(probe.places), vector=vector))
    if not by_stage:
        raise ValueError(
            "The graph has no target to measure: none has an incoming edge or is asked for. Keep some when you take a "
            "subgraph."
        )
    measured = torch.tensor([node for found in by_stage.values() for node in found], device=graph.kind.device)
    readers = _Readers(measured, [], [], [])
    for stage, found in by_stage.items():
        readers.stage.append(stage)
        readers.pos.append(graph.pos[found].to(probe.ids.device))
        if stage == len(probe.places):
            readers.reads.append(vectors(probe.model.model, goals, dtype=probe.dtype))
        else:
            index = graph.index[found].to(probe.ids.device)
            readers.reads.append(probe.places[stage].sae.W_enc.detach().T[index].to(probe.dtype))
    return readers


def _strongest(graph: AttributionGraph, n: int) -> Int[Tensor, " source"]:
    fits = torch.isin(graph.kind, torch.tensor(_SOURCES, device=graph.kind.device))
    fits &= ~((graph.kind == Kind.LATENT) & (graph.activation == 0))
    nodes = fits.nonzero()[:, 0]
    order = graph.influence()[nodes].argsort(descending=True, stable=True)
    return nodes[order[:n]]


def _source(graph: AttributionGraph, node: int, stages: Mapping[str, int]) -> Source:
    stage = stages.get(graph.site[node], -1)
    return Source(Kind(int(graph.kind[node])), int(graph.pos[node]), int(graph.index[node]), stage)


def _direct(
    graph: AttributionGraph, targets: Int[Tensor, " target"], sources: Int[Tensor, " source"]
) -> Float[Tensor, "target source"]:
    """The edges between some nodes, dense, in float64."""
    number = torch.full_like(graph.kind, -1)
    number[sources] = torch.arange(len(sources), device=number.device)
    row_start = graph.edges.row_start.tolist()
    found = torch.zeros(len(targets), len(sources), dtype=torch.float64, device=number.device)
    for row, target in enumerate(targets.tolist()):
        span = slice(row_start[target], row_start[target + 1])
        column = number[graph.edges.source[span].long()]
        found[row, column[column >= 0]] = graph.edges.weight[span][column >= 0].double()
    return found


def _compare(predicted: Tensor, measured: Tensor, *, compared: Tensor) -> Verification:
    p, m = predicted[compared], measured[compared]
    squares = float(p @ p), float(m @ m)
    if min(squares) == 0:
        raise ValueError(
            f"There is nothing to compare: of {len(p)} pairs of a target and a source, the graph predicts "
            f"{int((p != 0).sum())} changes and {int((m != 0).sum())} were measured."
        )
    slope = float(p @ m) / squares[0]
    left = m - slope * p
    return Verification(p, m, slope, 1 - float(left @ left) / squares[1])


# ---- what is refused ----


def _dtype(graph: AttributionGraph) -> torch.dtype:
    return torch.float64 if graph.settings.get("dtype") == "float64" else torch.float32


def _check_model(graph: AttributionGraph, bridge: TransformerBridge) -> None:
    if graph.settings.get("merged", False):
        raise ValueError("The graph was merged, and no group can be taken away. Verify the graph it was merged from.")
    found = int(bridge.cfg.n_layers), int(bridge.cfg.d_vocab)
    if found != (graph.n_layers, graph.d_vocab):
        raise ValueError(
            f"The graph is of a model with {graph.n_layers} layers and {graph.d_vocab} tokens "
            f"({graph.model or 'unnamed'}), this one has {found[0]} and {found[1]}."
        )


def _stages(graph: AttributionGraph, bridge: TransformerBridge, places: Sequence[Place]) -> dict[str, int]:
    """The number of the place that each of the graph's sites means."""
    sites = attachments_of(bridge).sites
    by_write = {place.writes: place for place in places}
    stages: dict[str, int] = {}
    for name in graph.sites:
        place = by_write.pop(sites.names(sites.resolve(bridge, name))[0], None)
        if place is None:
            break
        stages[name] = place.stage
    if by_write or len(stages) < len(graph.sites):
        raise ValueError(
            f"The graph has dictionaries that write {list(graph.sites)}, those given write "
            f"{[place.sae.cfg.hook_out for place in places]}. Pass the ones it was made with."
        )
    of_latents = graph.kind == Kind.LATENT
    widths = graph.index.new_tensor(
        [places[stages[site]].sae.cfg.d_sae if site in stages else 0 for site in graph.site]
    )
    if bool((of_latents & ((graph.index < 0) | (graph.index >= widths))).any()):
        raise ValueError("The graph has latents that these dictionaries do not have. Pass the ones it was made with.")
    return stages
