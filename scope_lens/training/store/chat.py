"""Documents in a chat template, as Gemma Scope's instruction-tuned dictionaries were trained.

Pretraining documents are wrapped in the user prefix and the model prefix, and every position is trained on but those of
the user prefix, whose activations are very large (Gemma Scope, arXiv 2408.05147, section 4.5). Each row is

    user prefix   a document, or a piece of one   end of the user's turn and model prefix   padding

and a harvest of it leaves out `untrained=("bos", "eos", "pad", "chat_prefix")`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from scope_lens.model import ScopeModel
from scope_lens.special_tokens import special_token_ids

_TEXT = "scope-lens-user-text"


def wrap_in_chat(model: ScopeModel, documents: Sequence[str], *, context: int = 1_024) -> Int[Tensor, "row context"]:
    """Put each document, cut where it is too long, between the user prefix and the model prefix of a row of its own.

    Args:
        model: Its tokenizer and the tokenizer's chat template are used.
        documents: Texts of any length; empty ones are left out.
        context: Tokens of a row at most; rows are no longer than the longest needs. A shorter context of the model is
            kept to.

    Raises:
        ValueError: No tokenizer, no chat template or one that cannot render a user's turn, no text, no special token to
            fill rows up with, or a context that leaves no room for a document.
    """
    special = special_token_ids(model.model, chat_prefix=True)
    prefix, suffix = list(special.chat_prefix), _suffix(model.model.tokenizer)
    context = min(context, int(model.model.cfg.n_ctx))
    room = context - len(prefix) - len(suffix)
    if room < 1:
        raise ValueError(
            f"context is {context}; the chat template takes {len(prefix)} tokens before the text and {len(suffix)} "
            "after it, and at least one of the text must fit."
        )
    fill = (special.pad or special.eos)[:1]
    if not fill:
        raise ValueError("This model names no PAD or EOS to fill up rows with.")
    rows: list[list[int]] = []
    for text in documents:
        ids: list[int] = model.model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        rows += [prefix + ids[start : start + room] + suffix for start in range(0, len(ids), room)]
    if not rows:
        raise ValueError(f"There is no text: {len(documents)} documents, all of them empty.")
    longest = max(len(row) for row in rows)
    return torch.tensor([row + list(fill) * (longest - len(row)) for row in rows])


def _suffix(tokenizer: Any) -> list[int]:
    """Ids from the end of the user's text to the beginning of the model's."""
    if tokenizer is None or getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "Wrapping documents in a chat needs a tokenizer with a chat template, and this model has none. Load the "
            "instruction-tuned model with its tokenizer, or harvest the documents as they are."
        )
    message = [{"role": "user", "content": _TEXT}]
    rendered: str = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return tokenizer(rendered.partition(_TEXT)[2], add_special_tokens=False)["input_ids"]
