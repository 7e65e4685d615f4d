"""Attribution graphs in float64 by forward mode, from Hugging Face weights alone; shares no code with the package.

Every source is one row of a batch that runs through the model with its patterns, norm denominators and MLP outputs held
at their clean values; a last row carries all constants. What a target reads of a row is that source's edge, so nothing
is differentiated and nothing swept backwards.

1. `network_of` writes a Gemma 2, Gemma 3, Llama or GPT-2 out as matrices.
2. `_Pass` walks them twice: cleanly (one row, recording the constants) and linearly (a row for each source).
3. `trace` reads the second walk into an adjacency matrix over `Node`s.
4. `influence`, `scores` and `pruned` are the peer's definitions on a dense matrix, by a linear solve.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu
from transformers import PreTrainedModel

LATENT, ERROR, TOKEN, LOGIT, DIRECTION = "LATENT", "ERROR", "TOKEN", "LOGIT", "DIRECTION"


class Node(NamedTuple):
    """What identifies a node: the kind's name, the hook the dictionary writes (its own spelling), and where."""

    kind: str
    site: str
    layer: int
    pos: int
    index: int


# ---- 1. the model as matrices ----


class Affine(NamedTuple):
    weight: Tensor  # (in, out)
    bias: Tensor | None = None

    def __call__(self, x: Tensor, one: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + one * self.bias


class Norm(NamedTuple):
    gain: Tensor
    shift: Tensor | None
    eps: float
    centred: bool


class Attention(NamedTuple):
    query: Affine
    key: Affine
    value: Affine
    out: Affine
    query_norm: Norm | None
    key_norm: Norm | None
    heads: int
    kv_heads: int
    width: int  # of one head
    scale: float
    cap: float | None
    window: int | None
    theta: float | None  # None: no rotation


class Layer(NamedTuple):
    ln1: Norm
    attention: Attention
    ln1_post: Norm | None
    ln2: Norm
    mlp: Callable[[Tensor], Tensor]
    ln2_post: Norm | None


class Network(NamedTuple):
    embed: Tensor  # (vocab, d_model), with Gemma's scale
    positions: Tensor | None
    layers: list[Layer]
    final: Norm
    unembed: Tensor  # (d_model, vocab)
    cap: float | None


def network_of(hf: PreTrainedModel) -> Network:
    """Write out a Hugging Face model in float64."""
    weights = {name: value.detach().double() for name, value in hf.state_dict().items()}
    return _gpt2(hf.config, weights) if hf.config.model_type == "gpt2" else _rotary(hf.config, weights)


def _rotary(config, weights: Mapping[str, Tensor]) -> Network:
    gemma = config.model_type.startswith("gemma")
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    scale = (config.query_pre_attn_scalar if gemma else width) ** -0.5
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers

    def norm(name: str) -> Norm | None:
        gain = weights.get(f"{name}.weight")
        return None if gain is None else Norm(gain + 1 if gemma else gain, None, config.rms_norm_eps, centred=False)

    def linear(name: str) -> Affine:
        return Affine(weights[f"{name}.weight"].T, weights.get(f"{name}.bias"))

    def mlp(name: str) -> Callable[[Tensor], Tensor]:
        gate, up, down = (linear(f"{name}.{part}_proj") for part in ("gate", "up", "down"))
        one = torch.ones((), dtype=torch.float64)
        bend = (lambda x: gelu(x, approximate="tanh")) if gemma else silu
        return lambda x: down(bend(gate(x, one)) * up(x, one), one)

    layers: list[Layer] = []
    for number, kind in enumerate(kinds):
        p = f"model.layers.{number}"
        rope = config.rope_parameters
        attention = Attention(
            *(linear(f"{p}.self_attn.{part}_proj") for part in "qkvo"),
            query_norm=norm(f"{p}.self_attn.q_norm"),
            key_norm=norm(f"{p}.self_attn.k_norm"),
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            width=width,
            scale=scale,
            cap=getattr(config, "attn_logit_softcapping", None),
            window=config.sliding_window if kind == "sliding_attention" else None,
            theta=(rope.get(kind) or rope)["rope_theta"],
        )
        # Llama's "post_attention_layernorm" is the norm before the MLP; Gemma has both kinds.
        before_mlp = norm(f"{p}.pre_feedforward_layernorm" if gemma else f"{p}.post_attention_layernorm")
        after_attention = norm(f"{p}.post_attention_layernorm") if gemma else None
        after_mlp = norm(f"{p}.post_feedforward_layernorm")
        first = norm(f"{p}.input_layernorm")
        assert first is not None
        assert before_mlp is not None
        layers.append(Layer(first, attention, after_attention, before_mlp, mlp(f"{p}.mlp"), after_mlp))
    embed = weights["model.embed_tokens.weight"]
    final = norm("model.norm")
    assert final is not None
    return Network(
        embed=embed * math.sqrt(config.hidden_size) if gemma else embed,
        positions=None,
        layers=layers,
        final=final,
        unembed=weights["lm_head.weight"].T,
        cap=getattr(config, "final_logit_softcapping", None),
    )


def _gpt2(config, weights: Mapping[str, Tensor]) -> Network:
    width = config.n_embd // config.n_head

    def norm(name: str) -> Norm:
        return Norm(weights[f"{name}.weight"], weights[f"{name}.bias"], config.layer_norm_epsilon, centred=True)

    def linear(name: str) -> Affine:
        return Affine(weights[f"{name}.weight"], weights[f"{name}.bias"])

    def mlp(name: str) -> Callable[[Tensor], Tensor]:
        up, down, one = linear(f"{name}.c_fc"), linear(f"{name}.c_proj"), torch.ones((), dtype=torch.float64)
        return lambda x: down(gelu(up(x, one), approximate="tanh"), one)

    layers: list[Layer] = []
    for number in range(config.n_layer):
        p = f"transformer.h.{number}"
        joint = linear(f"{p}.attn.c_attn")
        assert joint.bias is not None
        thirds = zip(joint.weight.chunk(3, dim=1), joint.bias.chunk(3), strict=True)
        query, key, value = (Affine(weight, bias) for weight, bias in thirds)
        attention = Attention(
            query, key, value, linear(f"{p}.attn.c_proj"), None, None,
            heads=config.n_head, kv_heads=config.n_head, width=width, scale=width**-0.5,
            cap=None, window=None, theta=None,
        )  # fmt: skip
        layers.append(Layer(norm(f"{p}.ln_1"), attention, None, norm(f"{p}.ln_2"), mlp(f"{p}.mlp"), None))
    return Network(
        embed=weights["transformer.wte.weight"],
        positions=weights["transformer.wpe.weight"],
        layers=layers,
        final=norm("transformer.ln_f"),
        unembed=weights["lm_head.weight"].T,
        cap=None,
    )


# ---- 2. the two walks ----


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


class _Pass:
    """One walk. Tensors are (row, pos, width); `one` is 1 in the row that carries constants."""

    def __init__(self, net: Network, tokens: Tensor, one: Tensor, kept: dict[str, Tensor] | None) -> None:
        self.net, self.tokens, self.one = net, tokens, one
        self.linear = kept is not None
        self.kept: dict[str, Tensor] = {} if kept is None else kept
        self.seen: dict[str, Tensor] = {}
        self.order: list[str] = []
        self.cut: Callable[[str, Tensor], Tensor] = lambda name, x: x

    def keep(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        if not self.linear:
            self.kept[name] = compute()[0]
        return self.kept[name]

    def point(self, name: str, x: Tensor) -> Tensor:
        self.seen[name] = x
        self.order.append(name)
        return self.cut(name, x)

    def norm(self, name: str, x: Tensor, norm: Norm) -> Tensor:
        if norm.centred:
            x = x - x.mean(-1, keepdim=True)
        rms = self.keep(f"{name}.scale", lambda: _root_mean_square(x, norm.eps))
        x = self.point(f"{name}.hook_normalized", x / rms)
        x = x * norm.gain
        if norm.shift is not None:
            x = x + self.one * norm.shift
        return self.point(f"{name}.hook_out", x)

    def attention(self, name: str, x: Tensor, a: Attention) -> Tensor:
        pattern = self.keep(f"{name}.pattern", lambda: _pattern(x, self.one, a))
        values = _heads(a.value(x, self.one), a.kv_heads).repeat_interleave(a.heads // a.kv_heads, dim=1)
        z = (pattern @ values).transpose(1, 2).flatten(2)
        return a.out(self.point(f"{name}.hook_z", z), self.one)

    def run(self, embed: Tensor) -> Tensor:
        """What the final norm gives."""
        x = self.point("hook_embed", embed)
        if self.net.positions is not None:
            x = x + self.one * self.net.positions[: len(self.tokens)]
        for number, layer in enumerate(self.net.layers):
            b = f"blocks.{number}"
            x = self.point(f"{b}.hook_resid_pre", x)
            y = self.attention(f"{b}.attn", self.norm(f"{b}.ln1", x, layer.ln1), layer.attention)
            if layer.ln1_post is not None:
                y = self.norm(f"{b}.ln1_post", y, layer.ln1_post)
            x = x + self.point(f"{b}.hook_attn_out", y)
            self.point(f"{b}.hook_resid_mid", x)
            y = self.one * self.keep(f"{b}.mlp", lambda x=x, b=b, layer=layer: self._mlp(b, x, layer))
            if self.linear:
                self.norm(f"{b}.ln2", x, layer.ln2)  # transcoders read it
            x = x + self.point(f"{b}.hook_mlp_out", y)
            x = self.point(f"{b}.hook_resid_post", x)
        return self.norm("ln_final", x, self.net.final)

    def _mlp(self, b: str, x: Tensor, layer: Layer) -> Tensor:
        y = layer.mlp(self.norm(f"{b}.ln2", x, layer.ln2))
        return y if layer.ln2_post is None else self.norm(f"{b}.ln2_post", y, layer.ln2_post)


def _root_mean_square(x: Tensor, eps: float) -> Tensor:
    return (x.square().mean(-1, keepdim=True) + eps).sqrt()


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _rotated(x: Tensor, theta: float) -> Tensor:
    """Rotary position embedding with float64 tables: pairs are (i, i + width / 2)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * theta ** (
        -torch.arange(half, dtype=torch.float64) / half
    )
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


def _pattern(x: Tensor, one: Tensor, a: Attention) -> Tensor:
    def part(affine: Affine, heads: int, norm: Norm | None) -> Tensor:
        y = _heads(affine(x, one), heads)
        if norm is not None:
            y = y / _root_mean_square(y, norm.eps) * norm.gain
        return y if a.theta is None else _rotated(y, a.theta)

    query = part(a.query, a.heads, a.query_norm)
    key = part(a.key, a.kv_heads, a.key_norm).repeat_interleave(a.heads // a.kv_heads, dim=1)
    scores = query @ key.transpose(-1, -2) * a.scale
    if a.cap is not None:
        scores = torch.tanh(scores / a.cap) * a.cap
    i = torch.arange(x.shape[1])
    hidden = i[None] > i[:, None]
    if a.window is not None:
        hidden = hidden | (i[:, None] - i[None] >= a.window)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


# ---- 3. the graph ----


class OracleGraph(NamedTuple):
    """Adjacency over all nodes, rows targets. NaN in `bias` and `pre` of nodes that are no targets."""

    nodes: list[Node]
    adjacency: Tensor
    bias: Tensor
    pre: Tensor
    activation: Tensor
    logits: Tensor  # (pos, vocab), soft-capped
    clean: dict[str, Tensor]  # what flowed at every point, (pos, width)


def dictionary_of(sae, hf: PreTrainedModel, tokens: Tensor, *, untrained_ids: Iterable[int]) -> Dictionary:
    """Read the arrays and hook names of a `HookedSAE`; positions whose token is in `untrained_ids` are untrained."""
    post_norms = hf.config.model_type.startswith("gemma")
    cfg = sae.cfg
    layer = re.match(r"blocks\.(\d+)\.", cfg.hook_out)
    trained = torch.tensor([int(token) not in set(untrained_ids) for token in tokens])
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
    directions: Sequence[tuple[int, Tensor]] = (),
    latents: Sequence[tuple[str, int, int]] = (),
    attention_at_untrained: Literal["constant", "passes"] = "constant",
) -> OracleGraph:
    """The attribution graph of one prompt.

    Args:
        hf: The model.
        tokens: (pos,) ids.
        dictionaries: At most one for each point written.
        logits: (position, vocabulary id) of each logit target.
        directions: (position, vector at the final norm's output); numbered in the node's `index`.
        latents: (site, position, latent) that are nodes though they may be silent.
        attention_at_untrained: Whether attention that has a dictionary is a constant at untrained positions, as MLP
            outputs are everywhere, or passes through there as the residual stream does.
    """
    net = network_of(hf)
    n_layers, length = len(net.layers), len(tokens)
    embed = net.embed[tokens]
    clean = _Pass(net, tokens, torch.ones(1, 1, 1, dtype=torch.float64), None)
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
    walk = _Pass(net, tokens, one, clean.kept)
    at = {d.writes: d for d in dictionaries}
    assert len(at) == len(dictionaries)

    def cut(name: str, x: Tensor) -> Tensor:
        if name not in at:
            return x
        d = at[name]
        out = one * d.arrays["b_dec"].expand(length, -1)
        if "W_skip" in d.arrays:
            out = out + walk.seen[d.reads] @ d.arrays["W_skip"]
        for node in by_site[name]:
            out[row[node], node.pos] += written[node]
        if attention_at_untrained == "constant" and name.endswith(("attn.hook_z", "hook_attn_out")):
            x = one * flowed[name]
        return torch.where(d.trained[:, None], out, x)

    walk.cut = cut
    start = torch.zeros(sources + 1, length, embed.shape[1], dtype=torch.float64)
    for node in token_nodes:
        start[row[node], node.pos] = written[node]
    last = walk.run(start)
    for name in (*(name for name in walk.seen if name not in at), "ln_final.hook_out"):
        torch.testing.assert_close(walk.seen[name].sum(0), flowed[name], rtol=1e-9, atol=1e-9)

    columns: dict[Node, Tensor] = {}  # target -> its value in every row
    for d in dictionaries:
        constant = d.arrays["b_enc"] - (d.arrays["b_dec"] @ d.arrays["W_enc"] if d.pre_encoder_bias else 0.0)
        seen = walk.seen[d.reads] @ d.arrays["W_enc"] + one * constant
        for node in by_site[d.writes]:
            if node.kind == LATENT:
                columns[node] = seen[:, node.pos, node.index]
    probabilities = capped.softmax(-1)
    for pos, token in logits:
        node = Node(LOGIT, "ln_final.hook_out", n_layers, pos % length, token)
        columns[node] = last[:, node.pos] @ (net.unembed[:, token] - net.unembed.mean(1))
        activation[node] = probabilities[node.pos, token].item()
        nodes.append(node)
    for number, (pos, vector) in enumerate(directions):
        node = Node(DIRECTION, "ln_final.hook_out", n_layers, pos % length, -1 - number)
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


# ---- 4. the peer's measures on a dense matrix ----


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
