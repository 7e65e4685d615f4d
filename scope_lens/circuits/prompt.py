"""A prompt as token ids, and tokens as strings."""

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens import TransformerBridge

from scope_lens.special_tokens import special_token_ids, untrained_positions


def token_ids(bridge: TransformerBridge, tokens: Int[Tensor, " pos"] | str) -> Int[Tensor, "1 pos"]:
    """One prompt as a batch of one, on the model's device.

    Args:
        bridge: The model.
        tokens: Token ids as they are, or text, which the tokenizer puts BOS in front of.

    Raises:
        ValueError: An empty prompt, special tokens alone, more than one prompt, more tokens than the model has position
            embeddings for, an id that the vocabulary does not have, or text without a tokenizer.
    """
    if isinstance(tokens, str):
        if bridge.tokenizer is None:
            raise ValueError("The prompt is text, and the model has no tokenizer. Pass token ids.")
        if not tokens:
            raise ValueError("The prompt is empty; a graph needs at least one token besides BOS.")
        tokens = bridge.to_tokens(tokens)[0]
    tokens = torch.as_tensor(tokens)
    if tokens.ndim != 1 or tokens.is_floating_point():
        raise ValueError(
            f"A graph is of one prompt, token ids of shape (pos,); found {tokens.dtype} of shape "
            f"{tuple(tokens.shape)}. Pass one row of a batch."
        )
    ids = tokens.to(next(iter(bridge.parameters())).device, torch.long)[None]
    if ids.numel() == 0:
        raise ValueError("The prompt is empty; a graph needs at least one token besides BOS.")
    size = int(bridge.cfg.d_vocab)
    if int(ids.min()) < 0 or int(ids.max()) >= size:
        raise ValueError(
            f"The prompt has token ids from {int(ids.min())} to {int(ids.max())}; the model's vocabulary goes from 0 "
            f"to {size - 1}. Was it made by another tokenizer?"
        )
    longest = int(bridge.cfg.n_ctx)
    if ids.shape[1] > longest and getattr(bridge.cfg, "positional_embedding_type", None) == "standard":
        raise ValueError(f"The prompt has {ids.shape[1]} tokens; the model has embeddings for {longest} positions.")
    if bool(untrained_positions(ids, special_token_ids(bridge), ("bos", "eos", "pad")).all()):
        raise ValueError(
            f"The prompt is special tokens alone, {ids[0].tolist()}; a graph needs at least one token besides BOS."
        )
    return ids


def token_string(bridge: TransformerBridge, token: int) -> str:
    """A token as text; its number where there is no tokenizer."""
    return str(token) if bridge.tokenizer is None else str(bridge.tokenizer.decode([token]))
