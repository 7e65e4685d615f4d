"""Attribution graphs: the direct effect of everything that writes on everything that is read, in one prompt.

    A[t, s] = read_t · J · write_s

J is the Jacobian of the residual stream with attention patterns, norm denominators and MLP outputs held constant. The
definition is that of Ameisen et al. 2025, "Circuit Tracing", extended to dictionaries at any mix of sites.

* A site with a dictionary is cut where the dictionary was trained. What enters reaches its latents through the encoder
  alone; what leaves is latents, error, `b_dec` and, with a skip term, `x @ W_skip`, which is a path of its own.
* At untrained positions (BOS) a site is not cut: it has no latents, and its error is zero.
* An MLP output is a constant, so an MLP-output SAE, which reads it, has latents without edges into them: all of their
  pre-activation is bias. They are sources. So is the MLP of a layer without a dictionary a part of the bias.

How:

1. One clean forward pass at batch 1, with nothing attached, shows what is frozen and what each dictionary reads.
2. The linear model runs twice: with its sources, for pre-activations, and with none, for the bias.
3. Targets are swept back by position (`rows`), with matrices where they are known (`WrittenOut`), else through the
   bridge (`ThroughAutograd`).
4. What comes out is checked: the linear model's logits are the model's own, and every row with its bias adds up to the
   pre-activation, which steps 2 and 3 found independently of each other.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformer_lens import TransformerBridge
from transformer_lens.hook_points import HookPoint

from scope_lens.attachments import attachments_of
from scope_lens.circuits.frozen import frozen_points, record
from scope_lens.circuits.graph import AttributionGraph, GraphChecks, Kind
from scope_lens.circuits.places import Place, hook_names, places_of
from scope_lens.circuits.rows import Piece, Reads, assemble, edges_of
from scope_lens.circuits.sources import Numbering, Written, written
from scope_lens.circuits.targets import Goal, Target, resolve, token_string, vectors
from scope_lens.circuits.through_autograd import EMBED, FINAL, ThroughAutograd
from scope_lens.model import ScopeModel
from scope_lens.sae import HookedSAE
from scope_lens.sites import layer_of
from scope_lens.special_tokens import special_token_ids, untrained_positions


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
        dtype: float32 or float64, of everything behind the forward pass; for float64 the forward pass is exact too.
        progress: Whether a bar shows the rows.

    Returns:
        The graph, checked; `graph.checks` has what the checks found.

    Raises:
        KeyError: A dictionary of a hook that the model does not have.
        ValueError: A prompt of nothing or of special tokens alone, dictionaries that cannot be in one graph, targets
            that have no one meaning, or a check that failed.
    """
    _check_settings(logit_mass, max_logits, max_latents, dtype)
    bridge = model.model
    ids = _token_ids(bridge, tokens)
    with torch.no_grad(), attachments_of(bridge).set_aside(bridge), _in_eval_mode(bridge):
        _refuse_other_depths(bridge, saes)
        sites = [name for sae in saes for name in hook_names(bridge, sae)]
        logits, seen = record(bridge, ids, dict.fromkeys([EMBED, *frozen_points(bridge), *sites]))
        places = places_of(bridge, ids, saes, list(seen))
        goals = resolve(bridge, targets, logits=logits[0], places=places, logit_mass=logit_mass, max_logits=max_logits)
        linear = ThroughAutograd(bridge, ids, seen=seen, places=places, dtype=dtype)
        stream, nothing = linear.forward(sources=True), linear.forward(sources=False)
        off = _logits_off(bridge, ids, stream.final, logits)
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
        numbering = Numbering(parts, ids.shape[1])
        ends = [goal for goal in goals if goal.kind is not Kind.LATENT]
        read_ends = vectors(bridge, ends, dtype=dtype) if ends else stream.final[:0]
        pieces: list[Piece] = []
        n_rows = numbering.errors + len(ends)
        with tqdm(total=n_rows, desc="attribute", unit="target", disable=not progress, leave=None) as bar:
            for pos, reads in _by_position(parts, numbering, ends, read_ends):
                pieces += edges_of(linear, parts, stream.embed, numbering, pos=pos, reads=reads)
                bar.update(sum(len(found.nodes) for found in reads.values()))
        return _graph(
            bridge, ids[0], parts=parts, numbering=numbering, goals=goals, pieces=pieces,
            finals=(
                torch.stack([vector @ stream.final[goal.pos] for vector, goal in zip(read_ends, ends, strict=True)])
                if ends else stream.final.new_zeros(0),
                torch.stack([vector @ nothing.final[goal.pos] for vector, goal in zip(read_ends, ends, strict=True)])
                if ends else stream.final.new_zeros(0),
            ),
            logits_off=off,
            settings={
                "logit_mass": logit_mass, "max_logits": max_logits, "max_latents": max_latents,
                "dtype": str(dtype).removeprefix("torch."), "path": type(linear).__name__,
            },
        )  # fmt: skip


def _by_position(
    parts: Sequence[Written], numbering: Numbering, ends: Sequence[Goal], read_ends: Float[Tensor, "goal d_model"]
) -> Iterator[tuple[int, dict[int, Reads]]]:
    for pos in range(numbering.n_pos):
        reads: dict[int, Reads] = {}
        for part in parts:
            here = (part.pos == pos).nonzero()[:, 0]
            if len(here):
                stage = part.place.stage
                reads[stage] = Reads(numbering.latents[stage] + here, part.reads(here))
        here = torch.tensor([goal.pos == pos for goal in ends], dtype=torch.bool).nonzero()[:, 0]
        if len(here):
            here = here.to(read_ends.device)
            reads[len(parts)] = Reads(numbering.goals + here, read_ends[here])
        if reads:
            yield pos, reads


def _graph(
    bridge: TransformerBridge,
    tokens: Int[Tensor, " pos"],
    *,
    parts: Sequence[Written],
    numbering: Numbering,
    goals: Sequence[Goal],
    pieces: Sequence[Piece],
    finals: tuple[Tensor, Tensor],
    logits_off: float,
    settings: dict[str, str | int | float | bool | None],
) -> AttributionGraph:
    n_pos, n_layers = len(tokens), bridge.cfg.n_layers
    ends = [goal for goal in goals if goal.kind is not Kind.LATENT]
    device, dtype = finals[0].device, finals[0].dtype
    positions = torch.arange(n_pos, device=device)

    def same(value: float, count: int, of: torch.dtype = torch.long) -> Tensor:
        return torch.full((count,), value, dtype=of, device=device)

    def cat(latents: list[Tensor], errors: list[Tensor], tokens: Tensor, goals: Tensor) -> Tensor:
        return torch.cat([*latents, *errors, tokens, goals])

    nan = float("nan")
    counts = [len(part.pos) for part in parts]
    stages = [part.place.stage for part in parts]
    layers = [part.place.layer for part in parts]
    outs = [part.place.sae.cfg.hook_out for part in parts]
    total, size = torch.zeros(numbering.goals + len(ends), dtype=dtype, device=device).repeat(2, 1)
    for piece in pieces:
        total[piece.rows], size[piece.rows] = piece.total, piece.size
    unread = same(nan, n_pos * len(parts) + n_pos, dtype)
    bias = torch.cat([*(part.bias for part in parts), unread, finals[1]])
    pre = torch.cat([*(part.pre_activation for part in parts), unread, finals[0]])
    start = torch.zeros_like(pre)
    start[numbering.goals :] = torch.tensor([goal.start for goal in ends], dtype=dtype)
    for goal in goals:
        if goal.kind is Kind.LATENT:
            part = parts[goal.stage]
            found = ((part.pos == goal.pos) & (part.index == goal.index)).nonzero()[0, 0]
            start[numbering.latents[goal.stage] + found] = goal.start
    label = [""] * len(pre)
    label[numbering.tokens : numbering.goals] = strings = [token_string(bridge, token) for token in tokens.tolist()]
    label[numbering.goals :] = [goal.label for goal in ends]
    residual = (total + bias - pre).abs() / (size + bias.abs())
    residual = torch.where((total + bias - pre) == 0, 0, residual)
    worst = float(residual[~residual.isnan()].max())
    graph = AttributionGraph(
        tokens=tokens,
        kind=cat([same(Kind.LATENT, n) for n in counts], [same(Kind.ERROR, n_pos) for _ in parts],
                 same(Kind.TOKEN, n_pos), torch.tensor([goal.kind for goal in ends], dtype=torch.long, device=device)),
        layer=cat([same(at, n) for at, n in zip(layers, counts, strict=True)], [same(at, n_pos) for at in layers],
                  same(-1, n_pos), same(n_layers, len(ends))),
        stage=cat([same(at, n) for at, n in zip(stages, counts, strict=True)], [same(at, n_pos) for at in stages],
                  same(-1, n_pos), same(len(parts), len(ends))),
        pos=cat([part.pos for part in parts], [positions for _ in parts], positions,
                torch.tensor([goal.pos for goal in ends], dtype=torch.long, device=device)),
        index=cat([part.index for part in parts], [same(-1, n_pos) for _ in parts], tokens,
                  torch.tensor([goal.index for goal in ends], dtype=torch.long, device=device)),
        site=[
            *(name for name, n in zip(outs, counts, strict=True) for _ in range(n)),
            *(name for name in outs for _ in range(n_pos)),
            *([EMBED] * n_pos),
            *([FINAL] * len(ends)),
        ],
        label=label,
        activation=torch.cat([*(part.activation for part in parts), unread, start[numbering.goals :]]),
        start=start,
        bias=bias,
        pre_activation=pre,
        dropped=torch.where(pre.isnan(), nan, 0).to(dtype),
        cumulative=torch.full_like(pre, nan),
        edges=assemble(pieces, len(pre)),
        token_strings=strings,
        n_layers=n_layers,
        d_vocab=bridge.cfg.d_vocab,
        model=str(bridge.cfg.model_name),
        sites=outs,
        sources=[
            f"{part.place.sae.cfg.release}/{part.place.sae.cfg.path}" if part.place.sae.cfg.release else ""
            for part in parts
        ],
        checks=GraphChecks(logits=logits_off, conservation=worst, forward_only=True),
        settings=settings,
    )  # fmt: skip
    return graph


def _check_settings(logit_mass: float, max_logits: int, max_latents: int | None, dtype: torch.dtype) -> None:
    if not 0 < logit_mass <= 1:
        raise ValueError(f"logit_mass is a share of probability, above 0 and at most 1; found {logit_mass}.")
    if max_logits < 1:
        raise ValueError(f"max_logits must be at least 1; found {max_logits}.")
    if max_latents is not None and max_latents < 0:
        raise ValueError(f"max_latents must be at least 0, or None for all; found {max_latents}.")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64; found {dtype}.")


def _token_ids(bridge: TransformerBridge, tokens: Int[Tensor, " pos"] | str) -> Int[Tensor, "1 pos"]:
    if isinstance(tokens, str):
        if bridge.tokenizer is None:
            raise ValueError("The prompt is text, and the model has no tokenizer. Pass token ids.")
        tokens = bridge.to_tokens(tokens)[0]
    device = next(iter(bridge.parameters())).device
    ids = tokens.to(device, torch.long)[None]
    if ids.numel() == 0:
        raise ValueError("The prompt is empty; a graph needs at least one token besides BOS.")
    if bool(untrained_positions(ids, special_token_ids(bridge), ("bos", "eos", "pad")).all()):
        raise ValueError(
            f"The prompt is special tokens alone ({ids[0].tolist()}); a graph needs at least one token besides BOS."
        )
    if int(ids.min()) < 0 or int(ids.max()) >= bridge.cfg.d_vocab:
        raise ValueError(
            f"The prompt has token ids from {int(ids.min())} to {int(ids.max())}; the model's vocabulary has 0 to "
            f"{bridge.cfg.d_vocab - 1}."
        )
    return ids


def _refuse_other_depths(bridge: TransformerBridge, saes: Sequence[HookedSAE]) -> None:
    for sae in saes:
        for name in (sae.cfg.hook_in, sae.cfg.hook_out):
            layer = layer_of(name)
            if layer is not None and layer >= bridge.cfg.n_layers:
                raise ValueError(
                    f"A dictionary is for {name!r}, and the model has {bridge.cfg.n_layers} layers, 0 to "
                    f"{bridge.cfg.n_layers - 1}. Is it for another model?"
                )


def _logits_off(
    bridge: TransformerBridge,
    tokens: Int[Tensor, "1 pos"],
    final: Float[Tensor, "pos d_model"],
    logits: Float[Tensor, "1 pos d_vocab"],
) -> float:
    """Largest deviation of the linear model's logits from the model's, relative to the largest logit.

    The bridge itself unembeds and caps: what it does behind its final norm is its architecture's own.
    """

    def put(tensor: Tensor, hook: HookPoint) -> Tensor:  # noqa: ARG001
        return final[None].to(tensor.dtype)

    ours: Tensor = bridge.run_with_hooks(tokens, fwd_hooks=[(FINAL, put)], use_cache=False)
    off = float((ours - logits).abs().max() / logits.abs().max())
    limit = 5e-2 if logits.dtype in (torch.bfloat16, torch.float16) else 1e-3
    if not off <= limit:
        raise ValueError(
            f"The linear model of this prompt does not give the model's logits: they differ by {off:.1e} of the "
            f"largest, more than {limit:.0e}. Something between the embedding and the final norm is not frozen, or a "
            "hook edits the model; reset_hooks() removes yours."
        )
    return off


@contextmanager
def _in_eval_mode(bridge: TransformerBridge) -> Generator[None]:
    training = [module for module in bridge.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
