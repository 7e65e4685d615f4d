"""Activations of several sites, harvested in one pass over the text and read back as shuffled rows.

Row i of every site comes from the same token, so that a transcoder can read one site and be scored at another. BOS, EOS
and padding never enter (Gemma Scope, arXiv 2408.05147, section 3.1).

    ActivationStore.harvest(model, text, sites=...)              rows in memory, for what fits
    ActivationStore.harvest(model, text, sites=..., path=...)    rows in a folder, for what is read more than once
    ActivationStore.stream(model, text, sites=...)               a reservoir that is refilled while it is read
    ActivationStore.from_rows({"site": rows})                    rows that are there already

All of them are read alike: `store.reader(sites, size=4096)` gives batch after batch, `store.batches` one pass.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from scope_lens.fingerprints import model_fingerprint
from scope_lens.model import ScopeModel
from scope_lens.packing import Tokens
from scope_lens.sae_config import UNTRAINED
from scope_lens.training.store.corpus import Corpus, Origin
from scope_lens.training.store.harvest import Harvest, harvest_memory, square_sum
from scope_lens.training.store.harvest_folder import harvest_folder, read_documents
from scope_lens.training.store.manifest import DTYPES, StoreManifest, source_of, tokenizer_hash
from scope_lens.training.store.mixing import Mixing, measure_mixing
from scope_lens.training.store.reader import Finished, RowReader, Source
from scope_lens.training.store.stream import Stream
from scope_lens.training.store.windows import DiskRows, MemoryRows, Rows
from scope_lens.training.store.zarr_rows import arrays_of, check_whole

Batch = tuple[Float[Tensor, "batch d"], ...]


class ActivationStore:
    """Rows of activations, the same tokens at every site.

    Made by `ActivationStore.harvest`, `ActivationStore.open`, `ActivationStore.stream` or `ActivationStore.from_rows`.

    Args:
        manifest: What the rows are.
        source: Where they are read from.
        documents: Hashes of the documents that were read.
    """

    def __init__(self, manifest: StoreManifest, source: Source, *, documents: frozenset[str]) -> None:
        self.manifest = manifest
        self._source, self._documents = source, documents

    @classmethod
    def harvest(
        cls,
        model: ScopeModel,
        text_or_tokens: Tokens,
        *,
        sites: str | Sequence[str],
        path: Path | None = None,
        rows: int = 1_000_000,
        dtype: torch.dtype = torch.bfloat16,
        resume: bool = True,
        seed: int = 0,
        batch_size: int = 16,
        untrained: Sequence[str] = UNTRAINED,
        progress: bool = True,
    ) -> "ActivationStore":
        """Run the model over the data and keep a random sample of rows of each site.

        The forward stops after the last layer that is needed. hook_z is flattened over heads. A killed harvest into a
        folder goes on where it stopped, and its progress bar begins there; the same call on a finished folder opens it.

        Args:
            model: The language model; dictionaries attached to it act.
            text_or_tokens: Documents, or token ids with their special tokens, one tensor or several. Documents are
                packed into sequences of the model's context length (1,024 tokens at most), each sequence and each
                document beginning with BOS.
            sites: Hook names, or one; several names of one hook count once.
            path: Folder; None keeps the rows in memory, on the model's device.
            rows: Most rows to keep; fewer where the data has fewer.
            dtype: Dtype of the stored rows: bfloat16, float16 or float32.
            resume: Whether an earlier harvest in `path` is taken up; otherwise one that is under way is begun anew.
            seed: Of the sample and of the order of the rows.
            batch_size: Sequences of a forward.
            untrained: Kinds of positions to leave out: "bos", "eos", "pad", "chat_prefix".
            progress: Whether a progress bar is shown.

        Raises:
            KeyError: The model has no such hook.
            FileExistsError: `path` holds a finished store and `resume` is off.
            ValueError: Tokens that `evaluate` refuses too, no row to keep, a setting outside its range, an unknown
                dtype, a site that changes its width or is not finite, or `path` holds another harvest.
            OSError: The disk is full; what was noted stays.
        """
        plan = Harvest.plan(model, text_or_tokens, sites=sites, rows=rows, dtype=dtype, seed=seed, untrained=untrained)
        if path is not None:
            harvest_folder(plan, Path(path), resume=resume, batch_size=batch_size, progress=progress)
            return cls.open(Path(path))
        manifest, arrays, origin = harvest_memory(plan, batch_size=batch_size, progress=progress)
        return cls(manifest, _finished(manifest, MemoryRows(arrays, origin)), documents=plan.documents())

    @classmethod
    def open(cls, path: Path) -> "ActivationStore":
        """Open a finished store; the rows stay on disk and are read as they are needed.

        Raises:
            FileNotFoundError: `path` holds no finished store.
            ValueError: A file is damaged.
        """
        path = Path(path)
        manifest = StoreManifest.read(path)
        widths = dict(zip(manifest.sites, manifest.widths, strict=True))
        arrays = arrays_of(path, widths, rows=manifest.rows, dtype=DTYPES[manifest.dtype], create=False)
        for array in arrays.values():
            check_whole(array.path)
        return cls(manifest, _finished(manifest, DiskRows(arrays)), documents=read_documents(path))

    @classmethod
    def stream(
        cls,
        model: ScopeModel,
        text_or_tokens: Tokens,
        *,
        sites: str | Sequence[str],
        rows: int = 1_000_000,
        dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
        batch_size: int = 16,
        untrained: Sequence[str] = UNTRAINED,
        progress: bool = True,
    ) -> "ActivationStore":
        """Harvest while the rows are read: a reservoir on the model's device, refilled in place, pass after pass.

        The reservoir is full when this returns. It is read by readers of one batch size and seed. Each pass over the
        text serves every position once, in an order of its own.

        Args:
            model: The language model; dictionaries attached to it act.
            text_or_tokens: As `harvest` takes them.
            sites: Hook names, or one; several names of one hook count once.
            rows: Rows of the reservoir; fewer where the text has fewer.
            dtype: Dtype of its rows: bfloat16, float16 or float32.
            seed: Of the order of the sequences.
            batch_size: Sequences of a forward.
            untrained: Kinds of positions to leave out: "bos", "eos", "pad", "chat_prefix".
            progress: Whether a progress bar is shown while the reservoir is filled.

        Raises:
            KeyError: The model has no such hook.
            ValueError: As `harvest`.
        """
        plan = Harvest.plan(model, text_or_tokens, sites=sites, rows=None, dtype=dtype, seed=seed, untrained=untrained)
        # What a reader is given depends on these two as well.
        plan = replace(plan, identity={**plan.identity, "reservoir": rows, "batch_size": batch_size})
        source = Stream(plan, rows=rows, batch_size=batch_size, progress=progress)
        return cls(source.describe(), source, documents=plan.documents())

    @classmethod
    def from_rows(cls, rows: Mapping[str, Float[Tensor, "_ _"]], *, model: str = "") -> "ActivationStore":
        """Make a store around rows at hand, which are neither copied nor changed.

        Args:
            rows: Each site's, as many at every site, all of one dtype.
            model: Name of the language model they come from.

        Raises:
            ValueError: No site, no row, different numbers of rows or dtypes, a dtype that stores do not keep, or rows
                that are not finite.
        """
        shapes = {site: (len(x), x.dtype) for site, x in rows.items()}
        if len(set(shapes.values())) != 1 or not all(n and dtype in DTYPES.values() for n, dtype in shapes.values()):
            raise ValueError(f"from_rows takes as many rows of one dtype at every site; found {shapes}.")
        sums = {site: square_sum(x) for site, x in rows.items()}
        for site, total in sums.items():
            if not torch.isfinite(torch.tensor(total, dtype=torch.float64)):
                raise ValueError(f"The rows at {site!r} are not finite.")
        n, dtype = next(iter(shapes.values()))
        manifest = StoreManifest(
            model=model,
            sites=tuple(rows),
            aliases=tuple((site,) for site in rows),
            widths=tuple(x.shape[1] for x in rows.values()),
            mean_square_norms=tuple(total / n for total in sums.values()),
            rows=n,
            dtype=str(dtype).removeprefix("torch."),
            source=source_of({"rows": n, "square_sums": sums}),
        )
        unknown = torch.full((n,), -1)
        origin = Origin(unknown, unknown, unknown)
        return cls(manifest, _finished(manifest, MemoryRows(rows, origin)), documents=frozenset())

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.manifest.rows

    @property
    def sites(self) -> tuple[str, ...]:
        """Hook names, as the harvest spelt them."""
        return self.manifest.sites

    @property
    def streams(self) -> bool:
        """Whether the rows are made while they are read (`ActivationStore.stream`)."""
        return isinstance(self._source, Stream)

    def width(self, site: str) -> int:
        """Give the width of a site's rows.

        Raises:
            KeyError: The store has no such site.
        """
        return self.manifest.widths[self._index(site)]

    def scale(self, site: str) -> float:
        """Give sqrt(mean ||x||^2) of a site: divided by it, rows have unit mean squared norm.

        Raises:
            KeyError: The store has no such site.
        """
        return self.manifest.mean_square_norms[self._index(site)] ** 0.5

    def reader(self, sites: Sequence[str], *, size: int, seed: int = 0) -> RowReader:
        """Read the store in shuffled batches without end.

        Args:
            sites: Hook names, any name of a site's hook; the batches are keyed by the names given here.
            size: Rows of a batch.
            seed: Of the order.

        Raises:
            KeyError: The store has no such site.
            ValueError: `size` is not positive, or the store has fewer rows.
        """
        names = self._names(sites, size)
        if self.rows < size:
            raise ValueError(
                f"The store has {self.rows} rows, fewer than a batch of {size}; harvest more, or set a smaller "
                "batch_size."
            )
        return self._source.reader(names, size=size, seed=seed)

    def batches(self, site: str | tuple[str, str], *, size: int, seed: int = 0) -> Iterator[Batch]:
        """Pass once over the store in a random order.

        Args:
            site: A hook name, or a pair of names (encoder's, decoder's).
            size: Rows of a batch; the last one may have fewer.
            seed: Of the order.

        Yields:
            `(x,)`, or `(x, y)` for a pair, in float32.

        Raises:
            KeyError: The store has no such site.
            ValueError: `size` is not positive.
        """
        asked = (site,) if isinstance(site, str) else site
        names = self._names(asked, size)
        one_pass = self._source.one_pass(names, size=size, seed=seed)
        return (tuple(rows[name] for name in asked) for rows in one_pass)

    def mixing(self, *, size: int = 4_096, batches: int = 8, seed: int = 0) -> Mixing:
        """Draw batches at random and measure how well they are mixed; a stream serves these rows to nobody else.

        Args:
            size: Rows of a batch.
            batches: How many are drawn.
            seed: Of the order.

        Raises:
            ValueError: As `reader`; or it is not known where the rows came from.
        """
        if not self.manifest.documents:
            raise ValueError(
                "Where rows at hand (from_rows) came from is not known, so their mixing cannot be measured."
            )
        reader = self.reader(self.sites[:1], size=size, seed=seed)
        drawn: list[Origin] = []
        for _ in range(batches):
            reader.next()
            drawn.append(reader.origin())
        return measure_mixing(self._source.population(), drawn)

    def saw(self, model: ScopeModel, documents: Tokens) -> list[int]:
        """Say which of these documents the harvest read.

        Documents are compared by the ids of their tokens without special ones: a text with a text, or with a row into
        which it was packed. One that was cut in two is recognised only where it was cut alike.

        Args:
            model: Its tokenizer is used.
            documents: Documents, or token ids.

        Returns:
            Numbers of the documents, or of the token rows, ascending.

        Raises:
            ValueError: Tokens that `evaluate` refuses too.
        """
        asked = Corpus(model, documents, untrained=()).documents()
        return [number for number, names in enumerate(asked) if self._documents.intersection(names)]

    def check_model(self, model: ScopeModel) -> None:
        """Refuse a model or tokenizer that did not make this store; a store of rows at hand fits any.

        Raises:
            ValueError: The weights or the vocabulary differ.
        """
        bridge = model.model
        for kind, made_by, found in (
            ("model", self.manifest.model_fingerprint, model_fingerprint(bridge)),
            ("tokenizer", self.manifest.tokenizer, tokenizer_hash(bridge)),
        ):
            if made_by and made_by != found:
                raise ValueError(
                    f"The store was made by another {kind}: {self.manifest.model!r} with {made_by}; found "
                    f"{bridge.cfg.model_name!r} with {found}. Harvest again with this one, or load the other."
                )

    def _names(self, sites: Sequence[str], size: int) -> dict[str, str]:
        if size < 1:
            raise ValueError(f"A batch needs at least one row; found size={size}.")
        return {site: self.sites[self._index(site)] for site in sites}

    def _index(self, site: str) -> int:
        for index, names in enumerate(self.manifest.aliases):
            if site in names:
                return index
        raise KeyError(f"The store has no site {site!r}; it holds {list(self.sites)}. Name it in harvest(sites=...).")


def _finished(manifest: StoreManifest, rows: Rows) -> Finished:
    row_bytes = sum(manifest.widths) * DTYPES[manifest.dtype].itemsize
    return Finished(rows, total=manifest.rows, row_bytes=row_bytes)
