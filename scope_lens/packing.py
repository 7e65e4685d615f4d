"""From what a user hands over, text or token ids, to rows of token ids.

1. Text is packed: documents one after the other, BOS in front of each document and of each row.
2. Token tensors are taken as they are, after a check for what would make the numbers wrong without a sound.
3. Neighbours of one width are joined, so that a caller can cut them into batches of its own.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens import TransformerBridge

from scope_lens.model import ScopeModel
from scope_lens.special_tokens import SpecialTokens, special_token_ids

# The tensors of an iterable are (seq, pos) too, each with sizes of its own; a name would ask for the same ones.
Tokens = Int[Tensor, "seq pos"] | Iterable[Int[Tensor, "_ _"]] | Sequence[str]


def token_rows(
    model: ScopeModel, tokens: Tokens, *, context: int, purpose: Literal["evaluate", "harvest"] = "evaluate"
) -> list[Int[Tensor, "_ _"]]:
    """Check and collect rows of token ids, on the CPU; consecutive tensors of one width are joined.

    Args:
        model: Its context length, vocabulary and special ids are checked against.
        tokens: One tensor, several (a generator too), or documents.
        context: Row length for text, at most; a shorter context of the model is kept to.
        purpose: What they are for; the errors say it.

    Raises:
        ValueError: No tokens, a wrong shape or dtype, rows longer than the model's context, ids outside the vocabulary,
            or rows without BOS on a model that expects it.
    """
    if isinstance(tokens, str):
        tokens = [tokens]
    given: list[Tensor | str] = [tokens] if isinstance(tokens, Tensor) else list(tokens)
    texts = [item for item in given if isinstance(item, str)]
    tensors = [item for item in given if isinstance(item, Tensor)]
    if len(texts) == len(given) > 0:
        tensors = [pack(model, texts, context=min(context, int(model.model.cfg.n_ctx)))]
    elif len(tensors) < len(given):
        kinds = sorted({type(item).__name__ for item in given})
        raise ValueError(
            f"tokens holds {kinds}; expected token tensors of shape (seq, pos), or documents, not a mixture."
        )

    special = special_token_ids(model.model)
    joined: list[list[Tensor]] = []
    for index, tensor in enumerate(tensors):
        rows = _checked(model.model, tensor, special, index)
        if not rows.numel():
            continue
        if joined and joined[-1][0].shape[1] == rows.shape[1]:
            joined[-1].append(rows)
        else:
            joined.append([rows])
    if not joined:
        raise ValueError(f"There are no tokens to {purpose}: nothing was given, or only empty tensors.")
    return [torch.cat(rows) for rows in joined]


class Packed(NamedTuple):
    """Packed documents, and where each token stood.

    Attributes:
        tokens: Token ids, special tokens included.
        document: Which document a token is of; -1 at the special tokens that packing put in.
        position: Number of the token within its document; -1 likewise.
    """

    tokens: Int[Tensor, "row context"]
    document: Int[Tensor, "row context"]
    position: Int[Tensor, "row context"]


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
    return pack_documents(model, texts, context=context).tokens


def pack_documents(model: ScopeModel, texts: Sequence[str], *, context: int) -> Packed:
    """Pack as `pack` does, and say of each token which document it is of.

    Raises:
        ValueError: As `pack`.
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

    # Ids, documents and positions; a row is a tensor once it is full, which takes a tenth of a list's memory.
    rows: list[Int[Tensor, "3 context"]] = []
    row = _OpenRow()
    for number, text in enumerate(texts):
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        start = 0
        while start < len(ids):
            if len(row.ids) >= context - 1:
                rows.append(row.closed(context, fill))
                row = _OpenRow()
            row.add(between if row.ids else first, -1, range(-1, 0))
            taken = ids[start : start + context - len(row.ids)]
            row.add(taken, number, range(start, start + len(taken)))
            start += len(taken)
    if not row.ids:
        raise ValueError(f"There is no text: {len(texts)} documents, all of them empty.")
    rows.append(row.closed(context, fill))
    return Packed(*torch.stack(rows, dim=1))


class _OpenRow:
    """A row that is being packed."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._documents: list[int] = []
        self._positions: list[int] = []

    def add(self, ids: Sequence[int], document: int, positions: Sequence[int]) -> None:
        self.ids.extend(ids)
        self._documents.extend([document] * len(ids))
        self._positions.extend(positions[: len(ids)])

    def closed(self, context: int, fill: Sequence[int]) -> Int[Tensor, "3 context"]:
        left = context - len(self.ids)
        return torch.tensor(
            [self.ids + list(fill) * left, self._documents + [-1] * left, self._positions + [-1] * left]
        )


def expects_bos(bridge: TransformerBridge, special: SpecialTokens) -> bool:
    """Whether the model was trained with a BOS in front of every sequence, as far as TransformerLens knows."""
    return bool(special.bos) and bool(getattr(bridge.cfg, "default_prepend_bos", True))


def leading_pad(tokens: Int[Tensor, "seq pos"], special: SpecialTokens) -> Bool[Tensor, "seq pos"]:
    """Mark the PAD ids in front of each row's first real token; a BOS that is also the PAD counts as real."""
    pad = [i for i in special.pad if i not in special.bos]
    return torch.isin(tokens, torch.tensor(pad, dtype=tokens.dtype, device=tokens.device)).cumprod(1).bool()


def _checked(bridge: TransformerBridge, tensor: Tensor, special: SpecialTokens, index: int) -> Tensor:
    where = f"tokens (tensor {index})"
    if tensor.ndim != 2 or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(
            f"{where}: expected integer ids of shape (seq, pos), found {tensor.dtype} of shape {tuple(tensor.shape)}. "
            "Add the sequence axis with tokens[None]."
        )
    rows = tensor.detach().to("cpu", torch.long)
    if not rows.numel():
        return rows
    n_ctx, vocabulary = int(bridge.cfg.n_ctx), int(bridge.cfg.d_vocab)
    if rows.shape[1] > n_ctx:
        raise ValueError(
            f"{where}: rows of {rows.shape[1]} tokens, but the model's context is {n_ctx}. Cut them into shorter rows, "
            "each with a BOS in front; scope_lens.evaluation.pack does it for text."
        )
    low, high = (int(bound) for bound in rows.aminmax())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"{where}: ids from {low} to {high}, but the model's vocabulary has the ids 0 to {vocabulary - 1}. Were "
            "they made by another model's tokenizer?"
        )
    if expects_bos(bridge, special):
        real = ~leading_pad(rows, special)
        first = rows.gather(1, real.long().argmax(1, keepdim=True))[:, 0]
        missing = real.any(1) & ~torch.isin(first, torch.tensor(special.bos))
        if missing.any():
            row = int(missing.nonzero()[0])
            raise ValueError(
                f"{where}: {int(missing.sum())} of {len(rows)} rows do not begin with BOS (id {special.bos[0]}); row "
                f"{row} begins with {int(first[row])}. The model was trained with it and needs it. "
                "Put BOS in front of every row: scope_lens.evaluation.pack and model.to_tokens do."
            )
    return rows
