"""The linear model of one prompt with its matrices written out, for Gemma 2, Gemma 3 and Llama.

Patterns and norm denominators are numbers here, so a layer is three matrix products. In reverse, for the gradient G
at the residual stream, (position, row, d_model) with one row for each target:

1. `G @ out` is the gradient at the heads' outputs z. The gain of the norm behind the attention is in `out`.
2. Each head's gradient is spread over the positions it attended to, and query heads that share keys and values are
   summed. Every norm denominator of the attention is in `spread`, with the pattern.
3. `@ value` takes that back to the residual stream, where it is added. The gain of the norm before is in `value`.

Where a dictionary sits, the gradient is handed out and then zero, because a cut site passes on nothing but what the
dictionary writes; its targets join there. Where it is untrained, the residual stream and the embeddings pass, and what
attention or the MLP adds is a constant, as in the layers without a dictionary at the MLP. One sweep takes the targets
of one position, since those see the same positions: itself and the earlier ones.

Definition of the linear model: Ameisen et al. 2025, "Circuit Tracing", section "Attribution Graphs".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens import TransformerBridge
from transformer_lens.hook_points import HookPoint

from scope_lens.circuits.linear import TOKENS, Absorb, Stream
from scope_lens.circuits.places import Place

_ARCHITECTURES = ("Gemma2ForCausalLM", "Gemma3ForCausalLM", "LlamaForCausalLM")
_WRITABLE = ("hook_resid_pre", "attn.hook_z", "hook_attn_out", "hook_mlp_out", "hook_resid_post")
_RESIDUAL = ("hook_embed", "hook_resid_pre", "hook_resid_post")
_NORMALISED, _GAINED = "ln2.hook_normalized", ("ln2.hook_out", "mlp.hook_in")


class _Site(NamedTuple):
    """A hook point by the part of the model it belongs to: `hook` as `_WRITABLE`, `_NORMALISED` or `_GAINED` spell it."""

    layer: int
    hook: str


@dataclass(frozen=True, kw_only=True, eq=False)
class _Layer:
    """One layer's constants, in the sweep's dtype.

    Attributes:
        out: W_O with the gain of the norm behind it.
        value: W_V with the gain of the norm before it.
        spread: Pattern over both norms' denominators, by key-value head and query head in it.
        scale_z: What z is divided by in `spread`: the denominator of the norm behind the attention.
        scale_mlp: Denominator of the norm before the MLP.
        gain_mlp: Gain of that norm.
        mlp_out: What the MLP added.
    """

    out: Float[Tensor, "d_model heads_d_head"]
    value: Float[Tensor, "groups_d_head d_model"]
    spread: Float[Tensor, "group head query key"]
    scale_z: Float[Tensor, "query 1"]
    scale_mlp: Float[Tensor, "pos 1"]
    gain_mlp: Float[Tensor, " d_model"]
    mlp_out: Float[Tensor, "pos d_model"]


def covers(bridge: TransformerBridge, places: Sequence[Place]) -> bool:
    """Whether `WrittenOut` has this model and these sites.

    Args:
        bridge: Gemma 2, Gemma 3 (text) and Llama are covered, as loaded: without biases, adapters or folded weights.
        places: Autoencoders at the embeddings, hook_z, attention outputs, MLP outputs and the residual stream are
            covered, and transcoders that read the pre-MLP norm and write the same layer's MLP output.
    """
    if str(bridge.cfg.architecture) not in _ARCHITECTURES or getattr(bridge, "compatibility_mode", False):
        return False
    for block in bridge.blocks:
        for linear in (block.attn.v, block.attn.o):
            if type(linear.original_component) is not nn.Linear or linear.original_component.bias is not None:
                return False
    sites = _sites(bridge)
    return all(_covered(sites, bridge.hook_dict, place) for place in places)


def _sites(bridge: TransformerBridge) -> dict[HookPoint, _Site]:
    points = bridge.hook_dict
    sites = {points["hook_embed"]: _Site(-1, "hook_embed")}
    for layer in range(bridge.cfg.n_layers):
        for hook in (*_WRITABLE, _NORMALISED, *_GAINED):
            sites[points[f"blocks.{layer}.{hook}"]] = _Site(layer, hook)
    return sites


def _covered(sites: Mapping[HookPoint, _Site], points: Mapping[str, HookPoint], place: Place) -> bool:
    reads, writes = sites.get(points[place.reads]), sites.get(points[place.writes])
    if reads is None or writes is None:
        return False
    if reads == writes:
        return writes.hook in ("hook_embed", *_WRITABLE)
    transcoder = reads.hook in (_NORMALISED, *_GAINED) and writes.hook == "hook_mlp_out"
    return transcoder and reads.layer == writes.layer


class WrittenOut:
    """The affine map of one prompt as matrices; see `linear.LinearModel` for what it does.

    Args:
        bridge: A model that `covers` is true of.
        seen: What flowed in one clean forward pass, by hook name: the frozen points, `hook_embed`, and what each
            dictionary reads and writes.
        places: The dictionaries, by stage.
        dtype: Of the sweep.
    """

    def __init__(
        self, bridge: TransformerBridge, seen: Mapping[str, Tensor], places: Sequence[Place], dtype: torch.dtype
    ) -> None:
        points = bridge.hook_dict
        flowed = {points[name]: tensor[0].to(dtype) for name, tensor in seen.items()}
        sites = _sites(bridge)
        self.places = places
        self.dtype = dtype
        self._layers = [_layer(bridge, flowed, layer, dtype) for layer in range(bridge.cfg.n_layers)]
        self._by_site = {sites[points[place.writes]]: place for place in places}
        self._reads_gained = [sites[points[place.reads]].hook in _GAINED for place in places]
        self._final_gain = _gain(bridge, bridge.ln_final, dtype)
        self._final_scale = flowed[points["ln_final.hook_scale"]]
        self._b_dec = [place.sae.b_dec.detach().to(dtype) for place in places]
        self._skip = [None if place.sae.W_skip is None else place.sae.W_skip.detach().to(dtype) for place in places]
        self._embed = flowed[points["hook_embed"]]
        # What attention or an MLP adds is a constant where its dictionary is untrained; the residual stream passes.
        self._held = {
            site: flowed[points[place.writes]].flatten(1)
            for site, place in self._by_site.items()
            if site.hook not in _RESIDUAL
        }
        self._writes = [
            self._source(place, flowed[points[place.reads]].flatten(1), flowed[points[place.writes]].flatten(1))
            for place in places
        ]

    def _source(self, place: Place, reads: Tensor, writes: Tensor) -> Tensor:
        """Latents and error together: what flowed less what is there without them."""
        source = writes - self._b_dec[place.stage]
        skip = self._skip[place.stage]
        if skip is not None:
            source = source - reads @ skip
        return source.masked_fill(~place.trained.unsqueeze(-1), 0)

    # ---- forward ----

    def forward(self, *, sources: bool) -> Stream:
        """Run the linear model; see `linear.LinearModel.forward`."""
        if sources:
            return self.run(self._embed, self._writes)
        return self.run(torch.zeros_like(self._embed), [torch.zeros_like(written) for written in self._writes])

    def run(self, embed: Float[Tensor, "pos d_model"], written: Sequence[Float[Tensor, "pos _"]]) -> Stream:
        """Run the linear model on any sources.

        Args:
            embed: What the tokens write.
            written: What latents and error write together, by stage; nothing is written where untrained.
        """
        reads = [torch.empty(0)] * len(self.places)
        writes = [torch.empty(0)] * len(self.places)

        def cut(site: _Site, flowing: Tensor, read: Tensor | None = None) -> Tensor:
            place = self._by_site.get(site)
            if place is None:
                return flowing
            stage = place.stage
            reads[stage] = flowing if read is None else read
            leaves = written[stage] + self._b_dec[stage]
            skip = self._skip[stage]
            if skip is not None:
                leaves = leaves + reads[stage] @ skip
            writes[stage] = torch.where(place.trained.unsqueeze(-1), leaves, self._held.get(site, flowing))
            return writes[stage]

        stream = cut(_Site(-1, "hook_embed"), embed)
        for number, layer in enumerate(self._layers):
            stream = cut(_Site(number, "hook_resid_pre"), stream)
            values = rearrange(stream @ layer.value.T, "key (group d) -> key group d", group=layer.spread.shape[0])
            z = einsum(layer.spread, values, "group head query key, key group d -> query group head d")
            z = cut(
                _Site(number, "attn.hook_z"), rearrange(z, "query group head d -> query (group head d)") * layer.scale_z
            )
            attn_out = cut(_Site(number, "hook_attn_out"), (z / layer.scale_z) @ layer.out.T)
            stream = stream + attn_out
            read = self._read_of_mlp(number, stream)
            stream = stream + cut(_Site(number, "hook_mlp_out"), layer.mlp_out, read)
            stream = cut(_Site(number, "hook_resid_post"), stream)
        return Stream(embed, reads, writes, stream / self._final_scale * self._final_gain)

    def _read_of_mlp(self, number: int, stream: Tensor) -> Tensor | None:
        """What the transcoder of a layer reads, if there is one."""
        place = self._by_site.get(_Site(number, "hook_mlp_out"))
        if place is None or place.reads == place.writes:
            return None
        layer = self._layers[number]
        normalised = stream / layer.scale_mlp
        return normalised * layer.gain_mlp if self._reads_gained[place.stage] else normalised

    # ---- reverse ----

    def sweep(self, pos: int, cotangents: Mapping[int, Float[Tensor, "_ _"]], absorb: Absorb) -> None:
        """Pull cotangents at one position back; see `linear.LinearModel.sweep`."""
        sweep = _Sweep(self, pos, cotangents, absorb)
        stream = torch.zeros(pos + 1, sweep.n_rows, self._embed.shape[1], dtype=self.dtype, device=self._embed.device)
        sweep.join(stream, len(self.places), self._final_gain / self._final_scale[pos])
        for number in reversed(range(len(self._layers))):
            layer = self._layers[number]
            sweep.cut(stream, _Site(number, "hook_resid_post"))
            self._back_through_mlp(sweep, stream, number)
            if sweep.rows or sweep.waits_for(_Site(number, "attn.hook_z"), _Site(number, "hook_attn_out")):
                self._back_through_attention(sweep, stream, number, layer)
            sweep.cut(stream, _Site(number, "hook_resid_pre"))
        sweep.cut(stream, _Site(-1, "hook_embed"))
        absorb(TOKENS, sweep.rows, stream[:, : sweep.rows])

    def _back_through_mlp(self, sweep: "_Sweep", stream: Tensor, number: int) -> None:
        """The gradient at the residual stream before the MLP: what the MLP itself adds is constant."""
        place = self._by_site.get(_Site(number, "hook_mlp_out"))
        if place is None:
            return
        sweep.absorb(place.stage, stream)
        if place.reads == place.writes:
            sweep.open(place.stage)  # its targets read a constant
            return
        layer = self._layers[number]
        gain = layer.gain_mlp if self._reads_gained[place.stage] else torch.ones_like(layer.gain_mlp)
        skip = self._skip[place.stage]
        if skip is not None and sweep.rows:
            trained = place.trained[: len(stream)]
            read = (
                stream[trained, : sweep.rows] @ skip.T * (gain / layer.scale_mlp[: len(stream)][trained].unsqueeze(1))
            )
            stream[trained, : sweep.rows] += read
        sweep.join(stream, place.stage, gain / layer.scale_mlp[sweep.pos])

    def _back_through_attention(self, sweep: "_Sweep", stream: Tensor, number: int, layer: _Layer) -> None:
        branch = stream
        if _Site(number, "hook_attn_out") in self._by_site:
            branch = stream.clone()
            sweep.cut(branch, _Site(number, "hook_attn_out"))
        at_z = branch @ layer.out
        if _Site(number, "attn.hook_z") in self._by_site:
            # `spread` holds the division by scale_z, which dictionaries at z must see.
            at_z /= layer.scale_z[: len(stream)].unsqueeze(1)
            sweep.cut(at_z, _Site(number, "attn.hook_z"))
            at_z *= layer.scale_z[: len(stream)].unsqueeze(1)
        groups, heads = layer.spread.shape[:2]
        at_values = einsum(
            layer.spread[:, :, : len(stream), : len(stream)],
            rearrange(at_z, "query row (group head d) -> query row group head d", group=groups, head=heads),
            "group head query key, query row group head d -> key row group d",
        )
        stream += rearrange(at_values, "key row group d -> key row (group d)") @ layer.value


class _Sweep:
    """The rows of one sweep: which of them have joined, and what is done to them at a dictionary."""

    def __init__(self, model: WrittenOut, pos: int, cotangents: Mapping[int, Tensor], absorb: Absorb) -> None:
        self.pos = pos
        self.rows = 0
        self._model = model
        self._absorb = absorb
        self._cotangents = cotangents
        self._slices: dict[int, slice] = {}
        self.n_rows = 0
        for stage in sorted(cotangents, reverse=True):
            self._slices[stage] = slice(self.n_rows, self.n_rows + len(cotangents[stage]))
            self.n_rows = self._slices[stage].stop

    def absorb(self, stage: int, gradient: Tensor) -> None:
        if self.rows:
            self._absorb(stage, self.rows, gradient[:, : self.rows])

    def waits_for(self, *sites: _Site) -> bool:
        """Whether the targets of one of these sites have yet to join."""
        places = [self._model._by_site.get(site) for site in sites]
        return any(place is not None and place.stage in self._slices for place in places)

    def open(self, stage: int) -> None:
        """Count the rows of a stage's targets as joined."""
        if stage in self._slices:
            self.rows = self._slices[stage].stop

    def join(self, gradient: Tensor, stage: int, scale: Tensor | float) -> None:
        """Let a stage's targets in: `scale` takes their cotangents to where `gradient` is."""
        if stage in self._slices:
            gradient[self.pos, self._slices[stage]] += self._cotangents[stage] * scale
            self.open(stage)

    def cut(self, gradient: Tensor, site: _Site) -> None:
        """Hand out the gradient at a site with a dictionary, then keep what an autoencoder there lets through."""
        place = self._model._by_site.get(site)
        if place is None:
            return
        self.absorb(place.stage, gradient)
        trained = place.trained[: len(gradient)]
        skip = self._model._skip[place.stage]
        passed = 0 if skip is None else gradient[trained] @ skip.T
        if site.hook in _RESIDUAL:
            gradient[trained] = passed
        else:
            gradient.zero_()
            gradient[trained] = passed
        self.join(gradient, place.stage, 1.0)


def _layer(bridge: TransformerBridge, flowed: Mapping[HookPoint, Tensor], number: int, dtype: torch.dtype) -> _Layer:
    block: Any = bridge.blocks[number]
    points = bridge.hook_dict
    at = lambda hook: flowed[points[f"blocks.{number}.{hook}"]]
    out = block.attn.o.original_component.weight.detach().to(dtype)
    value = block.attn.v.original_component.weight.detach().to(dtype)
    scale_z = torch.ones_like(at("ln1.hook_scale"))
    if f"blocks.{number}.ln1_post.hook_scale" in points:
        scale_z = at("ln1_post.hook_scale")
        out = out * _gain(bridge, block.ln1_post, dtype).unsqueeze(1)
    pattern = at("attn.hook_pattern") / scale_z / at("ln1.hook_scale").T
    return _Layer(
        out=out,
        value=value * _gain(bridge, block.ln1, dtype),
        spread=rearrange(
            pattern, "(group head) query key -> group head query key", group=value.shape[0] // bridge.cfg.d_head
        ),
        scale_z=scale_z,
        scale_mlp=at("ln2.hook_scale"),
        gain_mlp=_gain(bridge, block.ln2, dtype),
        mlp_out=at("hook_mlp_out"),
    )


def _gain(bridge: TransformerBridge, norm: Any, dtype: torch.dtype) -> Tensor:
    """What a norm multiplies by; Gemma stores it less one."""
    weight = norm.original_component.weight.detach().to(dtype)
    return weight + 1 if bridge.cfg.rmsnorm_uses_offset else weight
