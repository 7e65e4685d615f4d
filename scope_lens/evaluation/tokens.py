"""The rows of token ids that `evaluate` reads (`scope_lens.packing`) and their hash, which no batch size changes."""

import hashlib
from collections.abc import Iterable

from jaxtyping import Int
from torch import Tensor

from scope_lens.packing import Tokens, leading_pad, token_rows

__all__ = ["Tokens", "leading_pad", "rows_hash", "token_rows"]


def rows_hash(rows: Iterable[Int[Tensor, "_ _"]]) -> str:
    """SHA-256 over the length and the ids of each row, in order."""
    digest = hashlib.sha256()
    for tensor in rows:
        for row in tensor.cpu().numpy().astype("<i8"):
            digest.update(len(row).to_bytes(8, "little"))
            digest.update(row.tobytes())
    return f"sha256:{digest.hexdigest()}"
