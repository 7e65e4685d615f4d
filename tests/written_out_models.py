"""Gemma 2, Gemma 3, Llama and GPT-2 written out as matrices in float64, from Hugging Face weights alone.

1. `network_of` reads a model's weights.
2. `Pass` walks them, cleanly (recording what the linear model holds constant) or linearly (with that put back).
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu
from transformers import PreTrainedModel

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


# ---- 2. the walk ----


class Pass:
    """One walk. Tensors are (row, pos, width); `one` is 1 in the row that carries constants."""

    def __init__(self, net: Network, tokens: Tensor, one: Tensor, kept: dict[str, Tensor] | None) -> None:
        self.net, self.tokens, self.one = net, tokens, one
        self.linear = kept is not None
        self.kept: dict[str, Tensor] = {} if kept is None else kept
        self.seen: dict[str, Tensor] = {}  # before the cut
        self.left: dict[str, Tensor] = {}  # behind it
        self.cut: Callable[[str, Tensor], Tensor] = lambda name, x: x

    def keep(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        if not self.linear:
            self.kept[name] = compute()[0]
        return self.kept[name]

    def point(self, name: str, x: Tensor) -> Tensor:
        self.seen[name] = x
        self.left[name] = self.cut(name, x)
        return self.left[name]

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
