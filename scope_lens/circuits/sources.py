"""Everything that writes into the linear model of a prompt, as vectors: latents, errors, token embeddings.

1. `written` encodes what one dictionary reads and keeps the active latents alone: `activation * W_dec[latent]` each,
   and at every position what the dictionary misses.
2. Its vectors stand position by position, the latents first and the error behind them, so that the edges from one
   position are one matrix product.
3. `Sources` numbers the nodes: latents by stage, position and index, then errors by stage and position, then tokens.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scope_lens.circuits.places import Place
from scope_lens.sae import HookedSAE


@dataclass(frozen=True, kw_only=True, eq=False)
class Written:
    """What one dictionary writes, latents ordered by position and index.

    Attributes:
        place: Where the dictionary sits.
        pos: Position of each latent.
        index: Number of each latent.
        activation: Its activation; zero where it is here as a target only.
        pre_activation: What its encoder row reads, its bias included.
        bias: The part of it that no source carries.
        vectors: By position, latents' `activation * W_dec` rows and then the error; nothing at untrained positions.
        starts: Where each position's vectors begin, and their number last.
    """

    place: Place
    pos: Int[Tensor, " latent"]
    index: Int[Tensor, " latent"]
    activation: Float[Tensor, " latent"]
    pre_activation: Float[Tensor, " latent"]
    bias: Float[Tensor, " latent"]
    vectors: Float[Tensor, "vector d_out"]
    starts: Sequence[int]

    def encoder_rows(self, latents: Int[Tensor, " row"]) -> Float[Tensor, "row d_in"]:
        """What some of the latents read."""
        return self.place.sae.W_enc.detach().index_select(1, self.index[latents]).T.to(self.vectors.dtype)


def written(
    place: Place,
    *,
    read: Float[Tensor, "pos d_in"],
    read_of_nothing: Float[Tensor, "pos d_in"],
    flowing: Float[Tensor, "pos d_out"],
    asked_for: Collection[tuple[int, int]] = (),
) -> Written:
    """Encode what a dictionary reads.

    Args:
        place: Where it sits.
        read: What its encoder reads.
        read_of_nothing: The same in the linear model that nothing is written into: the bias.
        flowing: What flows at `hook_out`.
        asked_for: (position, latent) of latents that are nodes even where they are silent.
    """
    sae = in_dtype(place.sae, read.dtype)
    trained = place.trained
    # Together, because on a CPU the time goes into reading W_enc.
    pre, bias = sae.pre_activation(torch.stack([read, read_of_nothing]))
    acts = sae.activate(pre) * trained[:, None]
    errors = torch.where(trained[:, None], flowing - sae.reconstruct(acts, read), 0)
    node = acts != 0
    for at, latent in asked_for:
        node[at, latent] = True
    pos, index = node.nonzero(as_tuple=True)

    counts = torch.bincount(pos, minlength=len(read)) + trained
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    # In front of a latent's vector stand the latents before it and one error for each trained position before its own.
    errors_before = trained.cumsum(0) - trained.long()
    activation = acts[pos, index]
    vectors = read.new_empty(int(starts[-1]), flowing.shape[-1])
    vectors[torch.arange(len(pos), device=pos.device) + errors_before[pos]] = (
        activation[:, None] * sae.W_dec.detach()[index]
    )
    vectors[starts[1:][trained] - 1] = errors[trained]
    return Written(
        place=place,
        pos=pos,
        index=index,
        activation=activation,
        pre_activation=pre[pos, index],
        bias=bias[pos, index],
        vectors=vectors,
        starts=starts.tolist(),
    )


def in_dtype(sae: HookedSAE, dtype: torch.dtype) -> HookedSAE:
    """The dictionary itself, or a copy without hooks in another dtype."""
    if sae.dtype == dtype and (sae.threshold is None or sae.threshold.dtype == dtype):
        return sae
    state = {name: tensor.detach().to(dtype) for name, tensor in sae.state_dict().items()}
    return HookedSAE.from_tensors(sae.cfg, state, source=f"the dictionary of {sae.cfg.hook_out!r} in {dtype}")


class Sources:
    """All that writes, and its node numbers.

    Args:
        parts: What the dictionaries write, by stage.
        embed: What the tokens write.
    """

    def __init__(self, parts: Sequence[Written], embed: Float[Tensor, "pos d_model"]) -> None:
        self.parts = parts
        self.embed = embed
        self.first_latent = [0]  # by stage; the number of latents last
        for part in parts:
            self.first_latent.append(self.first_latent[-1] + len(part.pos))
        self.n_latents = self.first_latent[-1]
        self.first_token = self.n_latents + len(parts) * self.n_pos
        self.n_nodes = self.first_token + self.n_pos
        self.nodes = [self._nodes_of(part) for part in parts]  # of the vectors of each stage

    @property
    def n_pos(self) -> int:
        """Length of the prompt."""
        return len(self.embed)

    def latent(self, stage: int, pos: int, index: int) -> int:
        """Node of one latent that has one."""
        part = self.parts[stage]
        return self.first_latent[stage] + int(((part.pos == pos) & (part.index == index)).nonzero()[0, 0])

    def _nodes_of(self, part: Written) -> Int[Tensor, " vector"]:
        stage, trained = part.place.stage, part.place.trained
        nodes = torch.empty(len(part.vectors), dtype=torch.long, device=trained.device)
        is_error = torch.zeros_like(nodes, dtype=torch.bool)
        is_error[torch.tensor(part.starts[1:], device=trained.device)[trained] - 1] = True
        nodes[is_error] = self.n_latents + stage * self.n_pos + trained.nonzero()[:, 0]
        nodes[~is_error] = self.first_latent[stage] + torch.arange(len(part.pos), device=trained.device)
        return nodes
