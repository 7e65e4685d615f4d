"""One run of the model over the text, into tensors in memory.

1. Everything is settled before the first forward (`Harvest.plan`): the text, the sample, the sites, and the number that
   each row will have.
2. The model runs batch by batch, each forward as far as the last site.
3. Rows are cast, checked and put in their places; the mean squared norm of each site is summed as they are stored.

`harvest_folder` does the same into a folder, and takes up where a killed harvest stopped.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from scope_lens.fingerprints import model_fingerprint
from scope_lens.model import ScopeModel
from scope_lens.packing import Tokens
from scope_lens.training.store.corpus import Corpus, Origin, SequenceBatch
from scope_lens.training.store.manifest import DTYPES, StoreManifest, source_of, tokenizer_hash, versions
from scope_lens.training.store.placement import Placement
from scope_lens.training.store.site_rows import SiteRows
from scope_lens.training.store.transfer import put_rows
from scope_lens.training.store.zarr_rows import SHARD_ROWS


class Harvested(NamedTuple):
    """What one forward gave.

    Attributes:
        first_row: Number of its first row in the harvest.
        batch: What was run.
        rows: Each site's rows.
    """

    first_row: int
    batch: SequenceBatch
    rows: dict[str, Float[Tensor, "row _"]]


@dataclass(frozen=True, kw_only=True)
class Harvest:
    """What a harvest will do, settled before the first forward.

    Attributes:
        corpus: The text, and which positions are kept.
        site_rows: The forward.
        dtype: Of the rows.
        placement: The number of each row.
        identity: Everything that determines the rows.
        model_name: Name of the language model.
        seed: Of the sample and of the order.
    """

    corpus: Corpus
    site_rows: SiteRows
    dtype: torch.dtype
    placement: Placement
    identity: Mapping[str, Any]
    model_name: str
    seed: int

    @classmethod
    def plan(
        cls,
        model: ScopeModel,
        text_or_tokens: Tokens,
        *,
        sites: str | Sequence[str],
        rows: int | None,
        dtype: torch.dtype,
        seed: int,
        untrained: Sequence[str],
    ) -> "Harvest":
        """Tokenise, resolve the sites, measure their widths, and draw the sample.

        Args:
            model: The language model; dictionaries attached to it act.
            text_or_tokens: Documents, or token ids.
            sites: Hook names.
            rows: Most rows to keep; None keeps every position.
            dtype: Of the rows.
            seed: Of the sample and of the order.
            untrained: Kinds of positions to leave out.

        Raises:
            KeyError: The model has no such hook.
            ValueError: See `ActivationStore.harvest`.
        """
        if dtype not in DTYPES.values():
            raise ValueError(f"A store keeps rows as {sorted(DTYPES)}; found dtype={dtype}.")
        if rows is not None and rows < 1:
            raise ValueError(f"rows is {rows}; expected 1 row or more.")
        corpus = Corpus(model, text_or_tokens, untrained=untrained)
        if rows is not None:
            corpus.sample(rows, seed=seed)
        site_rows = SiteRows(model, sites, corpus=corpus, dtype=dtype)
        bridge = model.model
        identity = {
            "model_fingerprint": model_fingerprint(bridge),
            "tokenizer": tokenizer_hash(bridge),
            "data": corpus.digest(),
            "attached": [str(name) for name in model.attached],
            "sites": sorted(min(names) for names in site_rows.aliases),
            "rows": corpus.rows,
            "dtype": str(dtype).removeprefix("torch."),
            "untrained": sorted(untrained),
            "seed": seed,
        }
        return cls(
            corpus=corpus,
            site_rows=site_rows,
            dtype=dtype,
            placement=Placement(corpus.rows, seed=seed),
            identity=identity,
            model_name=str(bridge.cfg.model_name),
            seed=seed,
        )

    @property
    def source(self) -> str:
        """Hash of everything that determines the rows."""
        return source_of(self.identity)

    def documents(self) -> frozenset[str]:
        """Hash the documents; see `Corpus.documents`."""
        return frozenset(name for names in self.corpus.documents() for name in names)

    def forwards(self, *, batch_size: int, first: int = 0, progress: bool) -> Iterator[Harvested]:
        """Run the model from sequence number `first` of the harvest on.

        Args:
            batch_size: Sequences of a forward.
            first: Sequences that are done.
            progress: Whether a progress bar is shown.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected 1 sequence or more.")
        order = self.corpus.order(self.seed, 0)
        row = self.corpus.rows_before(order, first)
        done, label = first, "harvest, resumed" if first else "harvest"
        with tqdm(total=len(order), initial=first, desc=label, unit="sequence", disable=not progress) as bar:
            while done < len(order):
                batch = self.corpus.batch(order, done, size=batch_size)
                yield Harvested(row, batch, self.site_rows(batch))
                row += len(batch.kept)
                bar.update(batch.sequences - done)
                done = batch.sequences

    def describe(
        self, square_sums: Mapping[str, float], *, summed: int | None = None, rows: int | None = None
    ) -> StoreManifest:
        """Write down what the rows are.

        Args:
            square_sums: Sum of ||x||^2 over rows of each site.
            summed: How many rows those are; None means all of the harvest.
            rows: Rows of the store; None means all of the harvest.
        """
        summed = self.corpus.rows if summed is None else summed
        return StoreManifest(
            model=self.model_name,
            model_fingerprint=self.identity["model_fingerprint"],
            tokenizer=self.identity["tokenizer"],
            sites=self.site_rows.sites,
            aliases=self.site_rows.aliases,
            widths=tuple(self.site_rows.widths.values()),
            mean_square_norms=tuple(square_sums[site] / summed for site in self.site_rows.sites),
            rows=self.corpus.rows if rows is None else rows,
            dtype=self.identity["dtype"],
            untrained=tuple(self.identity["untrained"]),
            attached=tuple(self.identity["attached"]),
            documents=self.corpus.n_documents,
            data=self.identity["data"],
            seed=self.seed,
            source=self.source,
            versions=versions(),
        )


def harvest_memory(
    harvest: Harvest, *, batch_size: int, progress: bool
) -> tuple[StoreManifest, dict[str, Float[Tensor, "rows _"]], Origin]:
    """Fill tensors on the model's device; give the manifest, the rows of each site and where they came from."""
    total, sites = harvest.corpus.rows, harvest.site_rows
    arrays = {
        site: torch.empty(total, width, dtype=harvest.dtype, device=sites.device)
        for site, width in sites.widths.items()
    }
    places = torch.empty(total, dtype=torch.long)
    sums = dict.fromkeys(sites.sites, 0.0)
    for part in harvest.forwards(batch_size=batch_size, progress=progress):
        for piece in harvest.placement.pieces(part.first_row, len(part.batch.kept)):
            begin, end = harvest.placement.span(piece.bucket)
            numbers = begin + piece.slots
            places[numbers] = part.batch.places[piece.rows]
            for site, rows in part.rows.items():
                put_rows(arrays[site], numbers, rows[piece.rows])
                for block in arrays[site][begin:end].split(SHARD_ROWS) if piece.ends else ():
                    sums[site] += square_sum(block)
    return harvest.describe(sums), arrays, harvest.corpus.origin(places)


def square_sum(rows: Float[Tensor, "row d"]) -> float:
    """Sum ||x||^2 over rows, in float64."""
    return sum(float(block.double().pow(2).sum()) for block in rows.split(16_384))
