"""The text of a harvest: which tokens are run, which positions are kept, and in which order.

1. Documents are packed into sequences, or token rows are taken as they are; all of them lie in one flat array, and a
   *place* is an index into it.
2. BOS, EOS, padding (and the chat prefix, when asked) are left out (Gemma Scope, arXiv 2408.05147, sections 3.1, 4.5).
3. Every pass reads the sequences in an order of its own. It does not depend on how many of them a forward takes, so a
   harvest can be taken up with smaller forwards.
"""

import hashlib
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from scope_lens.model import ScopeModel
from scope_lens.packing import Tokens, leading_pad, pack_documents, token_rows
from scope_lens.sae_config import UNTRAINED, SpecialPosition
from scope_lens.special_tokens import special_token_ids, untrained_positions
from scope_lens.training.store.seeds import generator

_LONGEST_CONTEXT = 1_024  # Gemma Scope's, arXiv 2408.05147, section 3.1
_WINDOW = 1_024  # sequences among which those of one length are brought together, so that a forward can take several
_SHORTEST_PIECE = 16  # tokens; a shorter piece of a row may well stand in another text too


class SequenceBatch(NamedTuple):
    """Sequences of one length, for one forward.

    Attributes:
        tokens: Token ids.
        mask: 0 at leading padding; None where there is none. Padding behind the text cannot act on it.
        kept: Flat indices of the kept positions in `tokens`, ascending.
        places: Their places in the corpus.
        sequences: Sequences that are done when this one is, from the beginning of the pass.
    """

    tokens: Int[Tensor, "seq pos"]
    mask: Int[Tensor, "seq pos"] | None
    kept: Int[Tensor, " row"]
    places: Int[Tensor, " row"]
    sequences: int


class Origin(NamedTuple):
    """Where rows came from.

    Attributes:
        token_id: The token at the position.
        doc: Its document, or its row where the harvest was given token ids; -1 unknown.
        pos: Its number within that document, counted without the special tokens that packing puts in, or its position
            in that row.
    """

    token_id: Int[Tensor, " row"]
    doc: Int[Tensor, " row"]
    pos: Int[Tensor, " row"]


class Corpus:
    """Token sequences and what of them is kept.

    Args:
        model: The language model that will read them.
        text_or_tokens: Documents, or token ids.
        untrained: Kinds of positions that are left out.

    Raises:
        ValueError: Tokens that `token_rows` refuses, an unknown kind, or no position to keep.
    """

    def __init__(self, model: ScopeModel, text_or_tokens: Tokens, *, untrained: Collection[str]) -> None:
        unknown = sorted(set(untrained) - set(get_args(SpecialPosition)))
        if unknown:
            raise ValueError(f"untrained names {unknown}; the kinds are 'bos', 'eos', 'pad' and 'chat_prefix'.")
        groups, documents, positions = _sequences(model, text_or_tokens)
        special = special_token_ids(model.model, chat_prefix="chat_prefix" in untrained)
        padded = [leading_pad(group, special) for group in groups]
        dropped = [
            untrained_positions(group, special, untrained, attention_mask=(~pad).long() if pad.any() else None)
            for group, pad in zip(groups, padded, strict=True)
        ]
        self.tokens = _flat(groups, torch.int32)
        self.document = _flat(documents, torch.int32)
        self.position = _flat(positions, torch.int32)
        self.kept = ~_flat(dropped, torch.bool) & (self.document >= 0)
        self._padded = _flat(padded, torch.bool)
        self._length = torch.cat([torch.full((len(group),), group.shape[1]) for group in groups])
        self._start = self._length.cumsum(0) - self._length
        self.sequences = len(self._length)
        self.n_documents = int(self.document.max()) + 1
        self._ordinary = ~_flat([untrained_positions(group, special, UNTRAINED) for group in groups], torch.bool)
        self._count()
        if not self.rows:
            shapes = " ".join(str(tuple(group.shape)) for group in groups)
            raise ValueError(
                f"There is no activation to harvest: all of the {shapes} tokens are BOS, EOS or padding"
                f"{' or chat prefix' if 'chat_prefix' in untrained else ''}. Give the harvest text."
            )

    def sample(self, rows: int, *, seed: int) -> None:
        """Keep a random sample of the positions, `rows` of them at most."""
        if rows < self.rows:
            places = self.kept.nonzero().flatten()
            left = torch.randperm(len(places), generator=generator(seed))[rows:]
            self.kept[places[left]] = False
            self._count()

    def digest(self) -> str:
        """Hash the token ids, the lengths of the sequences and which positions are kept."""
        digest = hashlib.sha256()
        for tensor in (self.tokens, self._length, self.kept):
            digest.update(tensor.numpy().data)
        return f"sha256:{digest.hexdigest()}"

    def order(self, seed: int, number: int) -> Int[Tensor, " seq"]:
        """Give the sequences of one pass that have a position to keep, shuffled.

        Args:
            seed: Of all passes.
            number: Which pass.
        """
        order = self._used[torch.randperm(len(self._used), generator=generator(seed, number))]
        if bool((self._length == self._length[0]).all()):
            return order
        return torch.cat([part[self._length[part].argsort(stable=True)] for part in order.split(_WINDOW)])

    def batch(self, order: Int[Tensor, " seq"], first: int, *, size: int) -> SequenceBatch:
        """Give the sequences of `order` from `first` on: `size` of them, or as many as have the length of the first."""
        chosen = order[first : first + size]
        length = int(self._length[chosen[0]])
        other = (self._length[chosen] != length).nonzero()
        chosen = chosen[: int(other[0])] if len(other) else chosen
        places = self._start[chosen][:, None] + torch.arange(length)
        padded = self._padded[places]
        kept = self.kept[places].flatten().nonzero().flatten()
        return SequenceBatch(
            tokens=self.tokens[places].long(),
            mask=(~padded).long() if bool(padded.any()) else None,
            kept=kept,
            places=places.flatten()[kept],
            sequences=first + len(chosen),
        )

    def rows_before(self, order: Int[Tensor, " seq"], sequences: int) -> int:
        """Count the kept positions in the first `sequences` sequences of `order`."""
        return int(self.kept_in[order[:sequences]].sum())

    def origin(self, places: Int[Tensor, " row"]) -> Origin:
        """Say which tokens stand at these places."""
        return Origin(
            token_id=self.tokens[places].long(), doc=self.document[places].long(), pos=self.position[places].long()
        )

    def documents(self) -> list[tuple[str, ...]]:
        """Hash the contents of each document (or row), for a comparison with another text.

        Each has the hash of all its ordinary tokens and those of its longer pieces, one for each stretch of a sequence
        without a special token: so texts can be compared with rows into which they were packed, whole or cut alike.
        """
        places = (self._ordinary & (self.document >= 0)).nonzero().flatten()
        document = self.document[places]
        sequence = torch.repeat_interleave(torch.arange(self.sequences), self._length)[places]
        new_document = document.diff() != 0
        new_piece = new_document | (places.diff() != 1) | (sequence.diff() != 0)
        found: list[set[str]] = [set() for _ in range(self.n_documents)]
        for number, ids in _parts(self.tokens[places], document, new_document):
            found[number].add(_hash(ids))
        for number, ids in _parts(self.tokens[places], document, new_piece):
            if len(ids) >= _SHORTEST_PIECE:
                found[number].add(_hash(ids))
        return [tuple(sorted(hashes)) for hashes in found]

    def _count(self) -> None:
        per_place = torch.cat([torch.zeros(1, dtype=torch.long), self.kept.cumsum(0)])
        self.kept_in = per_place[self._start + self._length] - per_place[self._start]
        self.rows = int(per_place[-1])
        self._used = self.kept_in.nonzero().flatten()


def _sequences(model: ScopeModel, text_or_tokens: Tokens) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Token ids, document numbers and positions, one tensor for each run of sequences of one length."""
    if isinstance(text_or_tokens, Tensor):
        groups = token_rows(model, text_or_tokens, context=_LONGEST_CONTEXT, purpose="harvest")
    else:
        given: list[Any] = [text_or_tokens] if isinstance(text_or_tokens, str) else list(text_or_tokens)
        if given and all(isinstance(item, str) for item in given):
            packed = pack_documents(model, given, context=min(_LONGEST_CONTEXT, int(model.model.cfg.n_ctx)))
            groups = token_rows(model, packed.tokens, context=_LONGEST_CONTEXT, purpose="harvest")
            return groups, [packed.document], [packed.position]
        groups = token_rows(model, iter(given), context=_LONGEST_CONTEXT, purpose="harvest")
    numbers = torch.arange(sum(len(group) for group in groups)).split([len(group) for group in groups])
    documents = [number[:, None].expand_as(group) for number, group in zip(numbers, groups, strict=True)]
    return groups, documents, [torch.arange(group.shape[1]).expand_as(group) for group in groups]


def _flat(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([tensor.to(dtype).flatten() for tensor in tensors])


def _parts(ids: Tensor, document: Tensor, new: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Cut before each token that is `new`; give each part with its document."""
    starts = torch.cat([torch.zeros(1, dtype=torch.long), new.nonzero().flatten() + 1])
    lengths = torch.cat([starts, torch.tensor([len(ids)])]).diff()
    yield from zip(document[starts].tolist(), ids.split(lengths.tolist()), strict=True)


def _hash(ids: Tensor) -> str:
    return hashlib.sha256(ids.numpy().data).hexdigest()[:16]
