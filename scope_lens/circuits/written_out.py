"""The linear model of one prompt with its matrices written out, for Gemma 2, Gemma 3 and Llama.

Patterns and norm denominators are numbers here, so attention is three matrix products, and an MLP is a constant or a
dictionary's. `WrittenOut.run` goes through the layers forward. `WrittenOut.sweep` goes back, for all targets that are
read at one position together, since these see the same positions, their own and those before:

1. `gradient @ W_O` is the gradient at the heads' outputs z.
2. Each head's gradient spreads over the positions it attended to; query heads that share a value are summed.
3. `@ W_V` takes that to the residual stream, where it is added.

Where a dictionary sits, the gradient is handed out and then zero, because a cut site passes on nothing but what the
dictionary writes; the dictionary's own targets join there. Where it is not trained, the residual stream and the
embeddings pass, and what attention or the MLP adds is a constant.

Definition of the linear model: Ameisen et al. 2025, "Circuit Tracing", section "Attribution Graphs".
"""

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens import TransformerBridge

from scope_lens.circuits.layers import (
    ATTN_OUT,
    GAINED,
    MLP_OUT,
    POST,
    PRE,
    WRITABLE,
    Cut,
    Layer,
    Site,
    Z,
    cut_of,
    gain_of,
    layer_of,
    sites_of,
)
from scope_lens.circuits.linear import Absorb, Stream
from scope_lens.circuits.places import EMBED, FINAL, Place
from scope_lens.circuits.pull_back import PullBack

_ARCHITECTURES = ("Gemma2ForCausalLM", "Gemma3ForCausalLM", "LlamaForCausalLM")


def covers(bridge: TransformerBridge, places: Sequence[Place]) -> bool:
    """Whether `WrittenOut` has this model and these sites.

    Args:
        bridge: Gemma 2, Gemma 3 (text) and Llama are covered, as loaded: without biases or adapters, and not in
            TransformerLens' compatibility mode, on one device.
        places: Autoencoders at the embeddings, hook_z, attention outputs, MLP outputs and the residual stream are
            covered, and transcoders that read the pre-MLP norm and write the same layer's MLP output.
    """
    if str(bridge.cfg.architecture) not in _ARCHITECTURES or getattr(bridge, "compatibility_mode", False):
        return False
    if len({parameter.device for parameter in bridge.parameters()}) > 1:
        return False
    for block in bridge.blocks:
        linears: tuple[nn.Module, ...] = (block.attn.v.original_component, block.attn.o.original_component)
        if any(
            type(linear) is not nn.Linear or dict(linear.named_parameters()).keys() != {"weight"} for linear in linears
        ):
            return False
    sites, points = sites_of(bridge), bridge.hook_dict
    return all(_covered(sites.get(points[place.reads]), sites.get(points[place.writes])) for place in places)


def _covered(reads: Site | None, writes: Site | None) -> bool:
    if reads is None or writes is None:
        return False
    if reads == writes:
        return writes.hook in WRITABLE
    return reads.hook not in WRITABLE and writes == Site(reads.layer, MLP_OUT)


class WrittenOut:
    """The affine map of one prompt as matrices; see `linear.LinearModel` for what it does.

    Args:
        bridge: A model that `covers` is true of.
        seen: What flowed in one clean forward pass, by hook name: the frozen points, the embeddings, and what each
            dictionary reads and writes.
        places: The dictionaries, by stage.
        dtype: Of the map and of what it gives.
    """

    def __init__(
        self, bridge: TransformerBridge, seen: Mapping[str, Tensor], places: Sequence[Place], dtype: torch.dtype
    ) -> None:
        self.places = places
        points, sites = bridge.hook_dict, sites_of(bridge)
        flowed = {points[name]: tensor[0].to(dtype) for name, tensor in seen.items()}
        self._embed = flowed[points[EMBED]]
        self._layers = [layer_of(bridge, flowed, number, dtype) for number in range(bridge.cfg.n_layers)]
        scale = flowed[points[FINAL.replace("hook_out", "hook_scale")]]
        self._final = gain_of(bridge, bridge.ln_final, dtype) / scale
        self._cuts: dict[Site, Cut] = {}
        for place in places:
            reads, writes = points[place.reads], points[place.writes]
            self._cuts[sites[writes]] = cut_of(
                place, sites[writes], sites[reads], read=flowed[reads].flatten(1), flowing=flowed[writes].flatten(1)
            )

    # ---- forward ----

    def forward(self, *, sources: bool) -> Stream:
        """Run the linear model; see `linear.LinearModel.forward`."""
        written = [cut.source if sources else torch.zeros_like(cut.source) for cut in self._cuts.values()]
        return self.run(self._embed if sources else torch.zeros_like(self._embed), written)

    def run(self, embed: Float[Tensor, "pos d_model"], written: Sequence[Float[Tensor, "pos _"]]) -> Stream:
        """Run the linear model on any sources.

        Args:
            embed: What the tokens write.
            written: What latents and error write together, by stage; where not trained it is left out.
        """
        reads: dict[int, Tensor] = {}
        writes: dict[int, Tensor] = {}

        def through(site: Site, flowing: Tensor, read: Tensor | None = None) -> Tensor:
            """What leaves a site; `read` is what a transcoder reads."""
            cut = self._cuts.get(site)
            if cut is None:
                return flowing
            stage, trained = cut.place.stage, rearrange(cut.place.trained, "pos -> pos 1")
            reads[stage] = flowing if read is None else read
            leaves = written[stage] + cut.b_dec
            if cut.skip is not None:
                leaves = leaves + reads[stage] @ cut.skip
            writes[stage] = torch.where(trained, leaves, flowing if cut.held is None else cut.held)
            return writes[stage]

        stream = through(Site(-1, EMBED), embed)
        for number, layer in enumerate(self._layers):
            stream = through(Site(number, PRE), stream)
            groups = layer.spread.shape[0]
            values = rearrange(stream @ layer.value.T, "key (group d) -> key group d", group=groups)
            z = einsum(layer.spread, values, "group head query key, key group d -> query group head d")
            z = through(Site(number, Z), rearrange(z, "query group head d -> query (group head d)") * layer.scale_z)
            stream = stream + through(Site(number, ATTN_OUT), (z / layer.scale_z) @ layer.out.T)
            cut = self._cuts.get(Site(number, MLP_OUT))
            read = None if cut is None or cut.is_autoencoder else stream * _to_reader(cut, layer)
            stream = stream + through(Site(number, MLP_OUT), layer.mlp_out, read)
            stream = through(Site(number, POST), stream)
        stages = range(len(self.places))
        return Stream(
            embed, [reads[stage] for stage in stages], [writes[stage] for stage in stages], stream * self._final
        )

    # ---- back ----

    def sweep(self, pos: int, cotangents: Mapping[int, Float[Tensor, "_ _"]], absorb: Absorb) -> None:
        """Pull cotangents at one position back; see `linear.LinearModel.sweep`."""
        rows = PullBack(pos, cotangents, like=self._embed, to_first=self._to_first, absorb=absorb)
        rows.join(len(self.places), self._final[pos])
        for number, layer in reversed(list(enumerate(self._layers))):
            rows.cut_stream(self._cuts.get(Site(number, POST)))
            at_mlp = self._cuts.get(Site(number, MLP_OUT))
            if at_mlp is not None:
                rows.hand_out(at_mlp.place.stage)
                if at_mlp.is_autoencoder:
                    rows.join(at_mlp.place.stage)  # what it reads is a constant
                else:
                    scale = _to_reader(at_mlp, layer)
                    rows.add_skip(at_mlp, scale)
                    rows.join(at_mlp.place.stage, scale[pos])
            at_out, at_z = self._cuts.get(Site(number, ATTN_OUT)), self._cuts.get(Site(number, Z))
            rows.through_attention(number, layer, at_out=at_out, at_z=at_z)
            rows.cut_stream(self._cuts.get(Site(number, PRE)))
        rows.cut_stream(self._cuts.get(Site(-1, EMBED)))
        rows.finish()

    @cached_property
    def _to_first(self) -> list[Float[Tensor, "groups_d_head d_model"]] | None:
        """By layer, what takes the gradient at the first position's values to its token; see `pull_back`."""
        if any(bool(place.trained[0]) for place in self.places):
            return None
        to_token = torch.eye(self._embed.shape[1], dtype=self._embed.dtype, device=self._embed.device)
        found: list[Tensor] = []
        for number, layer in enumerate(self._layers):
            found.append(layer.value @ to_token)
            if Site(number, ATTN_OUT) in self._cuts or Site(number, Z) in self._cuts:
                continue  # a constant there
            groups, heads = layer.spread.shape[:2]
            out = rearrange(layer.out, "d_model (group head d) -> d_model group head d", group=groups, head=heads)
            to_values = einsum(out, layer.spread[:, :, 0, 0], "d_model group head d, group head -> d_model group d")
            to_token = to_token + rearrange(to_values, "d_model group d -> d_model (group d)") @ found[-1]
        return found


def _to_reader(cut: Cut, layer: Layer) -> Float[Tensor, "pos d_model"]:
    """What the residual stream is multiplied by before a transcoder reads it."""
    gain = layer.gain_mlp if cut.reads.hook in GAINED else torch.ones_like(layer.gain_mlp)
    return gain / layer.scale_mlp
