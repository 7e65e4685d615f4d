"""The linear model of one prompt: what the two ways of computing it have in common.

Frozen (see `frozen`), the model is an affine map from what is written into it (token embeddings, latents, errors) to
what is read from it (encoder inputs, the final norm's output). `WrittenOut` has that map as matrices, for Gemma and
Llama; `ThroughAutograd` takes it from the bridge, for every architecture.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from scope_lens.circuits.places import Place

TOKENS = -1  # the stage of the token embeddings, before the first dictionary


class Stream(NamedTuple):
    """What one forward pass of the linear model shows, in the sweep's dtype.

    Attributes:
        embed: What the tokens write, (pos, d_model).
        reads: What each dictionary's encoder reads, by stage, (pos, d_in).
        writes: What flows at each dictionary's `hook_out`, by stage, (pos, d_out).
        final: What the final norm gives, its gain (and bias) included, (pos, d_model).
    """

    embed: Float[Tensor, "pos d_model"]
    reads: list[Float[Tensor, "pos d_in"]]
    writes: list[Float[Tensor, "pos d_out"]]
    final: Float[Tensor, "pos d_model"]


@runtime_checkable
class Absorb(Protocol):
    """Takes what a sweep finds at one stage."""

    def __call__(self, stage: int, rows: int, gradient: Float[Tensor, "pos row d_out"], *, first: int = 0) -> None:
        """Take the gradient at what `stage` writes.

        Args:
            stage: Who writes.
            rows: The cotangents that it is the gradient of are the first so many of the sweep.
            gradient: At positions from `first` on. It is zero at the positions behind it, and nothing but a token
                writes at those before it.
            first: Position that the gradient begins at.
        """
        ...


@runtime_checkable
class LinearModel(Protocol):
    """The affine map of one prompt."""

    places: Sequence[Place]

    def forward(self, *, sources: bool) -> Stream:
        """Run the linear model.

        Args:
            sources: True writes what the model wrote, so that the result is the model's own. False writes nothing
                (tokens, latents and errors are zero): what is read then is the bias, from `b_dec`, MLP outputs that
                nothing replaces, and the model's own biases.
        """
        ...

    def sweep(self, pos: int, cotangents: Mapping[int, Float[Tensor, "row d"]], absorb: Absorb) -> None:
        """Pull cotangents at one position back to everything that writes.

        Args:
            pos: Position that all of them read at.
            cotangents: By the stage of the reader, (row, d_in); `len(places)` is the final norm's output. Rows are
                numbered highest stage first, each stage's in the order given.
            absorb: Called once for each stage that writes before a reader, and for TOKENS last.
        """
        ...
