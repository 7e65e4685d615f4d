"""Everything that writes into the linear model of a prompt, as vectors: latents, errors, token embeddings.

1. `Written` encodes what one dictionary reads and keeps the active latents alone: `activation * W_dec[latent]` each,
   and at every position what the dictionary misses.
2. Its vectors stand position by position, the latents first and the error behind them, so that the edges from one
   position are one matrix product.
3. `Numbering` gives every source its node.
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

    def reads(self, latents: Int[Tensor, " row"]) -> Float[Tensor, "row d_in"]:
        """Encoder rows of some of the latents."""
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
    trained = place.trained.to(read.device)
    pre = sae.pre_activation(read)
    acts = sae.activate(pre) * trained[:, None]
    recons = sae.reconstruct(acts, read)
    errors = torch.where(trained[:, None], flowing - recons, 0)
    node = acts != 0
    for pos, latent in asked_for:
        node[pos, latent] = True
    pos, index = node.nonzero(as_tuple=True)

    counts = torch.bincount(pos, minlength=len(read))
    starts = torch.cat([counts.new_zeros(1), (counts + trained).cumsum(0)])
    vectors = read.new_empty(int(starts[-1]), flowing.shape[-1])
    # One error stands behind the latents of every trained position before a latent's own.
    before = (trained.cumsum(0) - trained.long())[pos]
    activation = acts[pos, index]
    vectors[torch.arange(len(pos), device=pos.device) + before] = activation[:, None] * sae.W_dec.detach()[index]
    vectors[starts[1:][trained] - 1] = errors[trained]
    return Written(
        place=place,
        pos=pos,
        index=index,
        activation=activation,
        pre_activation=pre[pos, index],
        bias=sae.pre_activation(read_of_nothing)[pos, index],
        vectors=vectors,
        starts=starts.tolist(),
    )


def in_dtype(sae: HookedSAE, dtype: torch.dtype) -> HookedSAE:
    """The dictionary itself, or a copy without hooks in another dtype."""
    if sae.dtype == dtype and (sae.threshold is None or sae.threshold.dtype == dtype):
        return sae
    state = {name: tensor.detach().to(dtype) for name, tensor in sae.state_dict().items()}
    return HookedSAE.from_tensors(sae.cfg, state, source=f"the dictionary of {sae.cfg.hook_out!r} in {dtype}")


class Numbering:
    """The node of every source: latents by stage, position and index, then errors by stage and position, then tokens.

    Args:
        parts: What the dictionaries write, by stage.
        n_pos: Length of the prompt.
    """

    def __init__(self, parts: Sequence[Written], n_pos: int) -> None:
        self.n_pos = n_pos
        self.latents = [0]  # where each stage's latents begin, and their number last
        for part in parts:
            self.latents.append(self.latents[-1] + len(part.pos))
        self.errors = self.latents[-1]
        self.tokens = self.errors + n_pos * len(parts)
        self.goals = self.tokens + n_pos
        self.vectors = [self._of_vectors(part) for part in parts]

    def _of_vectors(self, part: Written) -> Int[Tensor, " vector"]:
        """Node of every vector of one stage."""
        stage, device = part.place.stage, part.pos.device
        nodes = torch.empty(len(part.vectors), dtype=torch.long, device=device)
        is_error = torch.zeros_like(nodes, dtype=torch.bool)
        trained = part.place.trained.to(device)
        is_error[torch.tensor(part.starts[1:], device=device)[trained] - 1] = True
        nodes[~is_error] = self.latents[stage] + torch.arange(len(part.pos), device=device)
        nodes[is_error] = self.errors + stage * self.n_pos + trained.nonzero()[:, 0]
        return nodes
