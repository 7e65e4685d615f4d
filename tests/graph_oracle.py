"""Attribution graphs in float64 by forward mode, from Hugging Face weights alone; shares no code with the package.

Every source is one row of a batch that runs through the model with its patterns, norm denominators and MLP outputs held
at their clean values; a last row carries all constants. What a target reads of a row is that source's edge, so nothing
is differentiated and nothing swept backwards.

1. `Dictionary` and `point_name`: arrays, and which point of the walk a hook name means.
2. `trace` walks the model twice, cleanly and a row for each source, and reads off the adjacency matrix.
3. `influence`, `scores` and `pruned` are the peer's definitions on a dense matrix, by a linear solve.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from written_out_models import Pass, network_of

LATENT, ERROR, TOKEN, LOGIT, DIRECTION = "LATENT", "ERROR", "TOKEN", "LOGIT", "DIRECTION"


class Node(NamedTuple):
    """What identifies a node: the kind's name, the hook the dictionary writes (its own spelling), and where.

    `label` tells directions apart; the others have none.
    """

    kind: str
    site: str
    layer: int
    pos: int
    index: int
    label: str = ""


# ---- 1. dictionaries ----


@dataclass
class Dictionary:
    """A dictionary as arrays; `site` is how its config spells what it writes."""

    reads: str
    writes: str
    site: str
    layer: int
    arrays: dict[str, Tensor]
    trained: Tensor  # (pos,) bool
    activation: str = "jumprelu"
    k: int | None = None
    pre_encoder_bias: bool = False

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pre-activations and latents; untrained positions have no latents."""
        a = self.arrays
        offset = -a["b_dec"] @ a["W_enc"] if self.pre_encoder_bias else 0.0
        pre = x @ a["W_enc"] + a["b_enc"] + offset
        match self.activation:
            case "jumprelu":
                acts = torch.where(pre > a["threshold"], pre, 0.0)
            case "relu":
                acts = pre.clamp(min=0)
            case "topk":
                least = pre.sort(dim=-1, descending=True).values[..., self.k - 1, None]
                acts = torch.where(pre >= least, pre, 0.0).clamp(min=0)
            case _:
                raise ValueError(self.activation)
        return pre, acts * self.trained[:, None]

    def decode(self, acts: Tensor, x: Tensor) -> Tensor:
        y = acts @ self.arrays["W_dec"] + self.arrays["b_dec"]
        return y + x @ self.arrays["W_skip"] if "W_skip" in self.arrays else y

    def read(self, walk: Pass) -> Tensor:
        """What reaches the encoder: an autoencoder's own site before it is cut, any other site as it flows on."""
        return (walk.seen if self.reads == self.writes else walk.left)[self.reads]


# TransformerLens' canonical names for the sites of the walk, in a layer with and without norms behind the two halves.
_CANONICAL = {
    "hook_in": "hook_resid_pre", "hook_out": "hook_resid_post", "ln1.hook_in": "hook_resid_pre",
    "attn.o.hook_in": "attn.hook_z", "ln2.hook_in": "hook_resid_mid", "mlp.hook_in": "ln2.hook_out",
    "ln1_post.hook_out": "hook_attn_out", "ln2_post.hook_out": "hook_mlp_out",
}  # fmt: skip


def point_name(hook: str, *, post_norms: bool) -> str:
    """The walk's name of a hook, whatever TransformerLens' spelling of it."""
    if hook == "embed.hook_out":
        return "hook_embed"
    found = re.fullmatch(r"(blocks\.\d+)\.(.+)", hook)
    if found is None:
        return hook
    layer, rest = found.groups()
    if not post_norms and rest in ("attn.hook_out", "mlp.hook_out"):
        rest = "hook_attn_out" if rest.startswith("attn") else "hook_mlp_out"
    return f"{layer}.{_CANONICAL.get(rest, rest)}"


# ---- 2. the graph ----


class OracleGraph(NamedTuple):
    """Adjacency over all nodes, rows targets. NaN in `bias` and `pre` of nodes that are no targets."""

    nodes: list[Node]
    adjacency: Tensor
    bias: Tensor
    pre: Tensor
    activation: Tensor
    logits: Tensor  # (pos, vocab), soft-capped
    clean: dict[str, Tensor]  # what flowed at every point, (pos, width)


def dictionary_of(sae, hf: PreTrainedModel, tokens: Tensor) -> Dictionary:
    """Read the arrays and hook names of a `HookedSAE`; special tokens are those of the model's config."""
    special = {getattr(hf.config, f"{kind}_token_id") for kind in sae.cfg.untrained}
    post_norms = hf.config.model_type.startswith("gemma")
    cfg = sae.cfg
    layer = re.match(r"blocks\.(\d+)\.", cfg.hook_out)
    trained = torch.tensor([token not in special for token in tokens.tolist()])
    return Dictionary(
        reads=point_name(cfg.hook_in, post_norms=post_norms),
        writes=point_name(cfg.hook_out, post_norms=post_norms),
        site=cfg.hook_out,
        layer=-1 if layer is None else int(layer.group(1)),
        arrays={name: value.detach().double() for name, value in sae.named_parameters() if value is not None},
        trained=trained,
        activation=cfg.activation,
        k=cfg.k,
        pre_encoder_bias=cfg.pre_encoder_bias,
    )


def trace(
    hf: PreTrainedModel,
    tokens: Tensor,
    dictionaries: Sequence[Dictionary],
    *,
    logits: Sequence[tuple[int, int]] = (),
    directions: Sequence[tuple[str, int, Tensor]] = (),
    latents: Sequence[tuple[str, int, int]] = (),
) -> OracleGraph:
    """The attribution graph of one prompt.

    Args:
        hf: The model.
        tokens: (pos,) ids.
        dictionaries: At most one for each point written.
        logits: (position, vocabulary id) of each logit target.
        directions: (label, position, vector at the final norm's output).
        latents: (site, position, latent) that are nodes though they may be silent.
    """
    net = network_of(hf)
    n_layers, length = len(net.layers), len(tokens)
    embed = net.embed[tokens]
    clean = Pass(net, tokens, torch.ones(1, 1, 1, dtype=torch.float64), None)
    final = clean.run(embed[None])[0]
    flowed = {name: value[0] for name, value in clean.seen.items()}
    raw = final @ net.unembed
    capped = raw if net.cap is None else torch.tanh(raw / net.cap) * net.cap

    nodes: list[Node] = []
    written: dict[Node, Tensor] = {}
    activation: dict[Node, float] = {}
    by_site: dict[str, list[Node]] = {}
    for d in dictionaries:
        x, y = flowed[d.reads], flowed[d.writes]
        _, acts = d.encode(x)
        here = {(int(p), int(i)) for p, i in acts.nonzero()}
        here |= {(p % length, i) for site, p, i in latents if site == d.site}
        mine = [Node(LATENT, d.site, d.layer, p, i) for p, i in sorted(here)]
        for node in mine:
            activation[node] = acts[node.pos, node.index].item()
            written[node] = activation[node] * d.arrays["W_dec"][node.index]
        error = (y - d.decode(acts, x)) * d.trained[:, None]
        for p in range(length):
            node = Node(ERROR, d.site, d.layer, p, -1)
            written[node] = error[p]
            mine.append(node)
        by_site[d.writes] = mine
        nodes += mine
    token_nodes = [Node(TOKEN, "hook_embed", -1, p, int(tokens[p])) for p in range(length)]
    nodes += token_nodes
    written |= {node: embed[node.pos] for node in token_nodes}
    sources = len(nodes)
    row = {node: number for number, node in enumerate(nodes)}

    one = torch.zeros(sources + 1, 1, 1, dtype=torch.float64)
    one[-1] = 1
    walk = Pass(net, tokens, one, clean.kept)
    at = {d.writes: d for d in dictionaries}
    assert len(at) == len(dictionaries)

    def cut(name: str, x: Tensor) -> Tensor:
        if name not in at:
            return x
        d = at[name]
        out = one * d.arrays["b_dec"].expand(length, -1)
        if "W_skip" in d.arrays:
            out = out + d.read(walk) @ d.arrays["W_skip"]
        for node in by_site[name]:
            out[row[node], node.pos] += written[node]
        # Where it is not trained, what attention writes is a constant, as an MLP output is everywhere.
        if name.endswith(("attn.hook_z", "hook_attn_out")):
            x = one * flowed[name]
        return torch.where(d.trained[:, None], out, x)

    walk.cut = cut
    start = torch.zeros(sources + 1, length, embed.shape[1], dtype=torch.float64)
    for node in token_nodes:
        start[row[node], node.pos] = written[node]
    last = walk.run(start)
    for name in walk.seen:
        torch.testing.assert_close(walk.seen[name].sum(0), flowed[name], rtol=1e-9, atol=1e-9)

    columns: dict[Node, Tensor] = {}  # target -> its value in every row
    for d in dictionaries:
        constant = d.arrays["b_enc"] - (d.arrays["b_dec"] @ d.arrays["W_enc"] if d.pre_encoder_bias else 0.0)
        seen = d.read(walk) @ d.arrays["W_enc"] + one * constant
        for node in by_site[d.writes]:
            if node.kind == LATENT:
                columns[node] = seen[:, node.pos, node.index]
    probabilities = capped.softmax(-1)
    for pos, token in logits:
        node = Node(LOGIT, "ln_final.hook_out", n_layers, pos % length, token)
        columns[node] = last[:, node.pos] @ (net.unembed[:, token] - net.unembed.mean(1))
        activation[node] = probabilities[node.pos, token].item()
        nodes.append(node)
    for label, pos, vector in directions:
        node = Node(DIRECTION, "ln_final.hook_out", n_layers, pos % length, -1, label)
        columns[node] = last[:, node.pos] @ vector.double()
        activation[node] = 1.0
        nodes.append(node)

    nan = torch.full((len(nodes),), torch.nan, dtype=torch.float64)
    adjacency = torch.zeros(len(nodes), len(nodes), dtype=torch.float64)
    bias, pre, active = nan.clone(), nan.clone(), nan.clone()
    for number, node in enumerate(nodes):
        if node in columns:
            adjacency[number, :sources] = columns[node][:-1]
            bias[number], pre[number] = columns[node][-1], columns[node].sum()
        if node in activation:
            active[number] = activation[node]
    return OracleGraph(nodes, adjacency, bias, pre, active, capped, flowed)


def top_logits(graph: OracleGraph, *, mass: float = 0.95, at_most: int = 10) -> list[tuple[int, int]]:
    """The smallest set of last-position tokens that holds `mass`, likeliest first."""
    probabilities, tokens = graph.logits[-1].softmax(-1).sort(descending=True)
    count = int((probabilities.cumsum(0) < mass).sum()) + 1
    return [(len(graph.logits) - 1, int(token)) for token in tokens[: min(count, at_most)]]


# ---- 3. the peer's measures on a dense matrix ----


def influence(adjacency: Tensor, start: Tensor) -> Tensor:
    """`start @ (M + M^2 + ...)` with M the rows of |A| over their sums, by one linear solve."""
    shares = _shares(adjacency)
    return torch.linalg.solve((torch.eye(len(start), dtype=start.dtype) - shares).T, start) - start


def scores(adjacency: Tensor, start: Tensor, kinds: Sequence[str]) -> tuple[float, float]:
    """Replacement and completeness."""
    total = influence(adjacency, start)
    error = torch.tensor([kind == ERROR for kind in kinds])
    token = torch.tensor([kind == TOKEN for kind in kinds])
    replacement = total[token].sum() / (total[token].sum() + total[error].sum())
    weight = total + start
    unexplained = _shares(adjacency)[:, error].sum(1)
    return replacement.item(), ((weight * (1 - unexplained)).sum() / weight.sum()).item()


def pruned(
    adjacency: Tensor, start: Tensor, kinds: Sequence[str], *, node_mass: float = 0.8, edge_mass: float = 0.98
) -> tuple[Tensor, Tensor]:
    """Masks of the nodes and edges that are kept."""
    fixed = torch.tensor([kind in (TOKEN, LOGIT, DIRECTION) for kind in kinds])
    latent = torch.tensor([kind == LATENT for kind in kinds])
    free = torch.tensor([kind in (LATENT, ERROR) for kind in kinds])
    total = influence(adjacency, start)
    nodes = (total >= _threshold(total, node_mass)) | fixed
    kept = adjacency * nodes[:, None] * nodes[None]
    edge = _shares(kept) * (influence(kept, start) + start)[:, None]
    edges = edge >= _threshold(edge.flatten(), edge_mass)
    while True:
        edges = edges & nodes[:, None] & nodes[None]
        still = nodes & ~(free & ~edges.any(0)) & ~(latent & ~edges.any(1))
        if bool((still == nodes).all()):
            return nodes, edges & (kept != 0)
        nodes = still


def _threshold(score: Tensor, mass: float) -> Tensor:
    ordered = score.sort(descending=True).values
    return ordered[int((ordered.cumsum(0) / ordered.sum() < mass).sum())]


def _shares(adjacency: Tensor) -> Tensor:
    size = adjacency.abs()
    return size / size.sum(1, keepdim=True).clamp(min=1e-10)
