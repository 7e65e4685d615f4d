"""From what a user hands to `evaluate` to rows of token ids.

1. Text is packed (`scope_lens.packing`).
2. Token tensors are taken as they are, after a check for what would make the numbers wrong without a sound.
3. Rows of one length become batches. The hash is of the rows, so that it does not depend on the batch size.
"""

import hashlib
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens import TransformerBridge

from scope_lens.model import ScopeModel
from scope_lens.packing import expects_bos, pack
from scope_lens.special_tokens import SpecialTokens, special_token_ids

# The tensors of an iterable are (seq, pos) too, each with sizes of its own; a name would ask for the same ones.
Tokens = Int[Tensor, "seq pos"] | Iterable[Int[Tensor, "_ _"]] | Sequence[str]


def leading_pad(tokens: Int[Tensor, "seq pos"], special: SpecialTokens) -> Bool[Tensor, "seq pos"]:
    """Mark the PAD ids in front of each row's first real token; a BOS that is also the PAD counts as real."""
    pad = [i for i in special.pad if i not in special.bos]
    return torch.isin(tokens, torch.tensor(pad, dtype=tokens.dtype, device=tokens.device)).cumprod(1).bool()


def token_rows(model: ScopeModel, tokens: Tokens, *, context: int) -> list[Int[Tensor, "_ _"]]:
    """Check and collect what is to be evaluated, on the CPU; consecutive tensors of one width are joined.

    Args:
        model: Its context length, vocabulary and special ids are checked against.
        tokens: One tensor, several (a generator too), or documents.
        context: Row length for text, at most; a shorter context of the model is kept to.

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
        raise ValueError("There are no tokens to evaluate: nothing was given, or only empty tensors.")
    return [torch.cat(rows) for rows in joined]


def rows_hash(rows: Iterable[Int[Tensor, "_ _"]]) -> str:
    """SHA-256 over the length and the ids of each row, in order."""
    digest = hashlib.sha256()
    for tensor in rows:
        for row in tensor.cpu().numpy().astype("<i8"):
            digest.update(len(row).to_bytes(8, "little"))
            digest.update(row.tobytes())
    return f"sha256:{digest.hexdigest()}"


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
