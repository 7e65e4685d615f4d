"""Attribution graphs: the direct effect of everything that writes on everything that is read, in one prompt.

    A[t, s] = read_t · J · write_s

J is the Jacobian of the residual stream with attention patterns, norm denominators and MLP outputs held constant. The
definition is that of Ameisen et al. 2025, "Circuit Tracing", extended to dictionaries at any mix of sites.

* A site with a dictionary is cut where the dictionary was trained. What enters reaches its latents through the encoder
  alone; what leaves is latents, error, `b_dec` and, with a skip term, `x @ W_skip`, which is a path of its own.
* At untrained positions (BOS) a dictionary has no latents, and its error is zero. The residual stream passes there;
  outputs of attention and MLP that have a dictionary are constants there.
* An MLP output is a constant everywhere, so an MLP-output SAE, which reads it, has latents without edges into them: all
  of their pre-activation is bias. They are sources. The MLP of a layer without a dictionary is part of the bias.

How:

1. One clean forward pass at batch 1, with nothing attached, shows what is frozen and what each dictionary reads.
2. The linear model runs twice: with its sources, for pre-activations, and with none, for the bias.
3. Targets are swept back by position (`rows`), with matrices where they are known (`WrittenOut`), else through the
   bridge (`ThroughAutograd`).
4. What comes out is checked (`self_checks`): the linear model's logits are the model's own, and every row with its bias
   adds up to the pre-activation, which steps 2 and 3 found independently of each other.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm
from transformer_lens import TransformerBridge

from scope_lens.attachments import attachments_of
from scope_lens.circuits.float64 import in_float64
from scope_lens.circuits.frozen import frozen_points
from scope_lens.circuits.graph import AttributionGraph, GraphChecks, Kind
from scope_lens.circuits.linear import LinearModel, Stream
from scope_lens.circuits.memory import refuse_long_prompt, rows_that_fit
from scope_lens.circuits.nodes import Nodes, folded, graph_of, nodes_of
from scope_lens.circuits.places import EMBED, Place, clean_pass, refuse_overwritten
from scope_lens.circuits.prompt import token_ids
from scope_lens.circuits.rows import Ends, Piece, assemble, batches, edges_of
from scope_lens.circuits.selection import fold, select
from scope_lens.circuits.self_checks import logits_off, unaccounted
from scope_lens.circuits.sources import Sources, written
from scope_lens.circuits.targets import Goal, Target, resolve, vectors
from scope_lens.circuits.through_autograd import ThroughAutograd
from scope_lens.circuits.written_out import WrittenOut, covers
from scope_lens.eval_mode import in_eval_mode
from scope_lens.model import ScopeModel
from scope_lens.sae import HookedSAE
from scope_lens.sites import layer_of


def attribute(
    model: ScopeModel,
    tokens: Int[Tensor, " pos"] | str,
    *,
    saes: Sequence[HookedSAE],
    targets: Sequence[int | str | Target] | None = None,
    logit_mass: float = 0.95,
    max_logits: int = 10,
    max_latents: int | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> AttributionGraph:
    """Compute the attribution graph of one prompt.

    Args:
        model: The model; what is attached to it is set aside for the time, and it is left as it was found.
        tokens: Token ids, BOS included, or text, which the model's tokenizer puts BOS in front of.
        saes: Dictionaries of any sites and layers, at most one a site.
        targets: What is explained: token ids or strings of one token (logits at the last position) and `Target`s. None
            takes the likeliest tokens.
        logit_mass: Share of probability that the logits of `targets=None` hold together.
        max_logits: How many of these there are at most.
        max_latents: How many latents are nodes of their own; the rest is folded, by site and position, into REST nodes.
            None keeps every active latent.
        dtype: float32 or float64, of everything behind the forward pass. For float64 a copy of the model in float64
            makes the forward pass too.
        progress: Whether a bar shows the targets that are done.

    Returns:
        The graph; its `checks` say how exact it is.

    Raises:
        KeyError: A dictionary or target of a hook that the model does not have.
        ValueError: A prompt without a token of its own or too long for the memory, dictionaries that cannot be in one
            graph, targets that have no one meaning, or a check that failed.
    """
    _check_settings(logit_mass, max_logits, max_latents, dtype)
    bridge, saes = model.model, [*saes]
    ids = token_ids(bridge, tokens)
    _refuse_other_depths(bridge, saes)
    for sae in saes:
        refuse_overwritten(bridge, sae)
    refuse_long_prompt(bridge, ids.shape[1], dtype=dtype, device=ids.device)
    with (
        # Inference mode would keep `ThroughAutograd` from gradients, and its tensors cannot be taken back into it.
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(ids.device.type, enabled=False),
        attachments_of(bridge).set_aside(bridge),
        in_eval_mode(bridge),
    ):
        ids = ids.clone()
        bridge, hooks = in_float64(bridge) if dtype == torch.float64 else (bridge, [])
        logits, seen, places = clean_pass(bridge, ids, saes, [EMBED, *frozen_points(bridge)], hooks=hooks)
        goals = resolve(bridge, targets, logits=logits[0], places=places, logit_mass=logit_mass, max_logits=max_logits)
        linear = _linear_model(bridge, ids, seen, places, dtype)
        stream, nothing = linear.forward(sources=True), linear.forward(sources=False)
        off = logits_off(bridge, ids, hooks=hooks, final=stream.final, logits=logits)

        sources = _sources(places, stream, nothing, goals)
        finals = [goal for goal in goals if goal.kind is not Kind.LATENT]
        ends = Ends(
            pos=torch.tensor([goal.pos for goal in finals], dtype=torch.long, device=ids.device),
            vectors=vectors(bridge, finals, dtype=dtype),
        )
        nodes = nodes_of(
            sources,
            ids[0],
            goals,
            bias=(ends.vectors * nothing.final[ends.pos]).sum(1),
            pre_activation=(ends.vectors * stream.final[ends.pos]).sum(1),
        )
        at_once = rows_that_fit(sources, len(finals), max_latents=max_latents, sweep_width=_sweep_width(bridge, linear))
        nodes, pieces = _swept(
            linear, sources, ends, nodes, max_latents=max_latents, at_once=at_once, progress=progress
        )
        conservation = unaccounted(nodes, pieces, places)
        return graph_of(
            bridge,
            ids[0],
            nodes,
            assemble(pieces, len(nodes.kind)),
            places=places,
            goals=goals,
            directions=ends.vectors[[goal.kind is Kind.DIRECTION for goal in finals]],
            # A graph with an edge that runs backwards is refused when it is made.
            checks=GraphChecks(logits=off, conservation=conservation, forward_only=True),
            settings={
                "logit_mass": logit_mass,
                "max_logits": max_logits,
                "max_latents": max_latents,
                "dtype": str(dtype).removeprefix("torch."),
                "path": "written out" if isinstance(linear, WrittenOut) else "autograd",
            },
        )


def _linear_model(
    bridge: TransformerBridge,
    tokens: Int[Tensor, "1 pos"],
    seen: Mapping[str, Tensor],
    places: Sequence[Place],
    dtype: torch.dtype,
) -> LinearModel:
    if covers(bridge, places):
        return WrittenOut(bridge, seen, places, dtype)
    return ThroughAutograd(bridge, tokens, seen=seen, places=places, dtype=dtype)


def _sweep_width(bridge: TransformerBridge, linear: LinearModel) -> int:
    """Numbers that a sweep holds for each row and position: gradients at the stream and at z, and what is made of them.

    Autograd gives the gradients of all sites at the end, together.
    """
    sites = 0 if isinstance(linear, WrittenOut) else sum(place.sae.cfg.d_out for place in linear.places)
    return 3 * (bridge.cfg.d_model + bridge.cfg.n_heads * bridge.cfg.d_head) + sites


def _swept(
    linear: LinearModel,
    sources: Sources,
    ends: Ends,
    nodes: Nodes,
    *,
    max_latents: int | None,
    at_once: int,
    progress: bool,
) -> tuple[Nodes, list[Piece]]:
    """Rows of all targets, and the nodes that are left when latents beyond `max_latents` are folded."""
    n_latents = sources.n_latents
    wanted = n_latents if max_latents is None else min(max_latents, n_latents)
    with tqdm(total=len(ends.pos) + wanted, desc="attribute", unit="target", disable=not progress, leave=None) as bar:

        def sweep(latents: Int[Tensor, " row"], ends: Ends | None = None) -> list[Piece]:
            pieces: list[Piece] = []
            for pos, reads in batches(sources, latents, ends, at_once=at_once):
                pieces += edges_of(linear, sources, pos=pos, reads=reads)
                bar.update(sum(len(found.nodes) for found in reads.values()))
            return pieces

        if wanted == n_latents:
            return nodes, sweep(torch.arange(n_latents, device=nodes.kind.device), ends)
        keep = torch.ones_like(nodes.kind, dtype=torch.bool)
        chosen = keep[:n_latents].copy_(nodes.start[:n_latents] > 0)  # those asked for
        pieces = sweep(chosen.nonzero()[:, 0], ends)
        select(sweep, pieces, chosen, start=nodes.start, stage=nodes.stage, max_latents=wanted)
    left, number = folded(nodes, keep)
    return left, fold(pieces, number, len(left.kind))


def _sources(places: Sequence[Place], stream: Stream, nothing: Stream, goals: Sequence[Goal]) -> Sources:
    asked_for = [goal for goal in goals if goal.kind is Kind.LATENT]
    parts = [
        written(
            place,
            read=stream.reads[place.stage],
            read_of_nothing=nothing.reads[place.stage],
            flowing=stream.writes[place.stage],
            asked_for=[(goal.pos, goal.index) for goal in asked_for if goal.stage == place.stage],
        )
        for place in places
    ]
    return Sources(parts, stream.embed)


def _check_settings(logit_mass: float, max_logits: int, max_latents: int | None, dtype: torch.dtype) -> None:
    if not 0 < logit_mass <= 1:
        raise ValueError(f"logit_mass is a share of probability, above 0 and at most 1; found {logit_mass}.")
    if max_logits < 1:
        raise ValueError(f"max_logits must be at least 1; found {max_logits}.")
    if max_latents is not None and max_latents < 0:
        raise ValueError(f"max_latents must be at least 0, or None for all; found {max_latents}.")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64; found {dtype}.")


def _refuse_other_depths(bridge: TransformerBridge, saes: Sequence[HookedSAE]) -> None:
    depth = int(bridge.cfg.n_layers)
    for sae in saes:
        for name in (sae.cfg.hook_in, sae.cfg.hook_out):
            layer = layer_of(name)
            if layer is not None and layer >= depth:
                raise ValueError(
                    f"A dictionary is for {name!r}, and the model has {depth} layers, 0 to {depth - 1}. Is it for "
                    "another model?"
                )
