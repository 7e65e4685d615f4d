"""The constants of Gemma's and Llama's layers with everything frozen, and of the dictionaries that cut them.

With its pattern and norm denominators held, attention is linear:

    z[query] = sum over key of pattern[query, key] * (stream[key] / scale_before[key] * gain_before) @ W_V
    added    = (z @ W_O)[query] / scale_behind[query] * gain_behind          (Llama has no norm behind)

`Layer` folds the gains into W_V and W_O and the denominators into the pattern, so that three products are left.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from transformer_lens import TransformerBridge
from transformer_lens.hook_points import HookPoint

from scope_lens.circuits.places import EMBED, Place

PRE, Z, ATTN_OUT, MLP_OUT, POST = "hook_resid_pre", "attn.hook_z", "hook_attn_out", "hook_mlp_out", "hook_resid_post"
WRITABLE = (EMBED, PRE, Z, ATTN_OUT, MLP_OUT, POST)
NORMALISED, GAINED = "ln2.hook_normalized", ("ln2.hook_out", "mlp.hook_in")


class Site(NamedTuple):
    """What a HookPoint is, whatever it is called: a layer (-1 for the embeddings) and one of the names above."""

    layer: int
    hook: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """One layer's constants.

    Attributes:
        value: W_V with the gain of the norm before it.
        spread: Pattern over both norms' denominators; a group is the query heads that share keys and values.
        out: W_O with the gain of the norm behind it.
        scale_z: What z is divided by in `spread`: the denominator of the norm behind.
        scale_mlp: Denominator of the norm before the MLP.
        gain_mlp: Gain of that norm.
        mlp_out: What the MLP added.
    """

    value: Float[Tensor, "groups_d_head d_model"]
    spread: Float[Tensor, "group head query key"]
    out: Float[Tensor, "d_model heads_d_head"]
    scale_z: Float[Tensor, "query 1"]
    scale_mlp: Float[Tensor, "pos 1"]
    gain_mlp: Float[Tensor, " d_model"]
    mlp_out: Float[Tensor, "pos d_model"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Cut:
    """A dictionary at its site.

    Attributes:
        place: The dictionary.
        site: Where it writes.
        reads: What it reads: `site` for an autoencoder.
        b_dec: Its decoder's bias.
        skip: Its skip term, if it has one.
        held: What flows where it is not trained; None where the site passes there.
        source: What latents and error write together in the prompt, zero where not trained.
    """

    place: Place
    site: Site
    reads: Site
    b_dec: Float[Tensor, " d_out"]
    skip: Float[Tensor, "d_in d_out"] | None
    held: Float[Tensor, "pos d_out"] | None
    source: Float[Tensor, "pos d_out"]

    @property
    def is_autoencoder(self) -> bool:
        """Whether it reads where it writes."""
        return self.reads == self.site


def sites_of(bridge: TransformerBridge) -> dict[HookPoint, Site]:
    """Every site that a dictionary of the written-out model may read or write.

    Args:
        bridge: Gemma 2, Gemma 3 or Llama.
    """
    points = bridge.hook_dict
    sites = {points[EMBED]: Site(-1, EMBED)}
    for layer in range(bridge.cfg.n_layers):
        for hook in (PRE, Z, ATTN_OUT, NORMALISED, *GAINED, MLP_OUT, POST):
            sites[points[f"blocks.{layer}.{hook}"]] = Site(layer, hook)
    return sites


def layer_of(bridge: TransformerBridge, seen: Mapping[HookPoint, Tensor], number: int, dtype: torch.dtype) -> Layer:
    """Collect the constants of one layer.

    Args:
        bridge: The model.
        seen: What flowed at the frozen points, without the batch axis.
        number: The layer.
        dtype: Of the constants.
    """
    block: Any = bridge.blocks[number]
    points = bridge.hook_dict

    def at(hook: str) -> Tensor:
        return seen[points[f"blocks.{number}.{hook}"]]

    out = block.attn.o.original_component.weight.detach().to(dtype)
    value = block.attn.v.original_component.weight.detach().to(dtype)
    scale_before, scale_z = at("ln1.hook_scale"), torch.ones_like(at("ln1.hook_scale"))
    if f"blocks.{number}.ln1_post.hook_scale" in points:
        scale_z = at("ln1_post.hook_scale")
        out = out * gain_of(bridge, block.ln1_post, dtype).unsqueeze(1)
    spread = at("attn.hook_pattern") / scale_z / rearrange(scale_before, "key 1 -> 1 key")
    groups = value.shape[0] // bridge.cfg.d_head
    return Layer(
        value=value * gain_of(bridge, block.ln1, dtype),
        spread=rearrange(spread, "(group head) query key -> group head query key", group=groups),
        out=out,
        scale_z=scale_z,
        scale_mlp=at("ln2.hook_scale"),
        gain_mlp=gain_of(bridge, block.ln2, dtype),
        mlp_out=at(MLP_OUT),
    )


def cut_of(place: Place, site: Site, reads: Site, *, read: Tensor, flowing: Tensor) -> Cut:
    """Collect the constants of one dictionary.

    Args:
        place: The dictionary.
        site: Where it writes.
        reads: Where it reads.
        read: What flowed where it reads, (pos, d_in), in the dtype wanted.
        flowing: What flowed where it writes, (pos, d_out).
    """
    b_dec = place.sae.b_dec.detach().to(flowing)
    skip = None if place.sae.W_skip is None else place.sae.W_skip.detach().to(flowing)
    source = flowing - b_dec if skip is None else flowing - b_dec - read @ skip
    return Cut(
        place=place,
        site=site,
        reads=reads,
        b_dec=b_dec,
        skip=skip,
        held=None if place.passes else flowing,
        source=source.masked_fill(~rearrange(place.trained, "pos -> pos 1"), 0),
    )


def gain_of(bridge: TransformerBridge, norm: Any, dtype: torch.dtype) -> Float[Tensor, " d_model"]:
    """What a norm multiplies by; Gemma stores it less one.

    Args:
        bridge: The model.
        norm: One of its norms.
        dtype: Of the result.
    """
    weight: Tensor = norm.original_component.weight.detach().to(dtype)
    return weight + 1 if bridge.cfg.rmsnorm_uses_offset else weight
