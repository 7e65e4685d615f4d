"""From text to rows of token ids: documents one after the other, BOS in front of each document and of each row."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens import TransformerBridge

from scope_lens.model import ScopeModel
from scope_lens.special_tokens import SpecialTokens, special_token_ids


def pack(model: ScopeModel, texts: Sequence[str], *, context: int) -> Int[Tensor, "row context"]:
    """Cut documents into rows of `context` tokens with BOS in front.

    Each document gets a BOS in front, the documents follow each other, and where a document is cut its next row begins
    with a BOS as well. The last row is filled up with PAD (BOS or EOS where the model has no PAD), which is
    neither counted nor trained on. A model that was not trained with BOS gets EOS between documents instead.

    Args:
        model: Its tokenizer is used.
        texts: Documents of any length.
        context: Tokens in a row, BOS included.

    Raises:
        ValueError: No tokenizer, no text, no special token to fill up with, or a context the model does not have.
    """
    bridge = model.model
    special = special_token_ids(bridge)
    tokenizer = bridge.tokenizer
    if tokenizer is None:
        raise ValueError(
            "Text needs a tokenizer and this model has none; pass token ids (a tensor of shape (seq, pos))."
        )
    n_ctx = int(bridge.cfg.n_ctx)
    if not 2 <= context <= n_ctx:
        raise ValueError(f"context is {context}; a row needs at least 2 tokens and this model takes at most {n_ctx}.")
    first = special.bos[:1] if expects_bos(bridge, special) else ()
    between = first or special.eos[:1]
    fill = (special.pad or special.bos or special.eos)[:1]
    if not fill:
        raise ValueError("This model names no PAD, BOS or EOS to fill up the last row with; pass token ids instead.")

    rows: list[list[int]] = [[]]
    for text in texts:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        row = rows[-1]
        start = 0
        while start < len(ids):
            if len(row) >= context - 1:
                row = []
                rows.append(row)
            row.extend(between if row else first)
            taken = ids[start : start + context - len(row)]
            row.extend(taken)
            start += len(taken)
    if not rows[0]:
        raise ValueError(f"There is no text: {len(texts)} documents, all of them empty.")
    return torch.tensor([row + list(fill) * (context - len(row)) for row in rows])


def expects_bos(bridge: TransformerBridge, special: SpecialTokens) -> bool:
    """Whether the model was trained with a BOS in front of every sequence, as far as TransformerLens knows."""
    return bool(special.bos) and bool(getattr(bridge.cfg, "default_prepend_bos", True))
