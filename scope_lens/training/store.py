"""Activations of several sites, harvested in one pass and read back as shuffled rows.

Row i of every site comes from the same token, so that a transcoder can read one site and be scored at another. Every
pass over the store shuffles all of its rows. BOS, EOS and padding never enter (Gemma Scope, arXiv 2408.05147, section
3.1).

A store lives in memory or in a folder:

    manifest.json        sites, widths, dtype, number of rows, mean squared norms, where the rows came from
    site_0.npy ...       one array of (rows, width) a site; bfloat16 as its 16 bits, because NumPy has no such dtype

A folder under construction is called `<name>.part` and renamed when complete, so a store that opens is whole.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from scope_lens.model import ScopeModel
from scope_lens.packing import Tokens
from scope_lens.training.harvest import HarvestPlan, fill
from scope_lens.whole_file import whole_file

Batch = tuple[Float[Tensor, "batch d"], ...]

_NUMPY_DTYPES = {torch.bfloat16: np.int16, torch.float16: np.float16, torch.float32: np.float32}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _NUMPY_DTYPES}
_MANIFEST = "manifest.json"
_PROGRESS = "progress.json"
_SECONDS_BETWEEN_NOTES = 5.0


@dataclass(frozen=True, kw_only=True)
class StoreManifest:
    """What a store holds.

    Attributes:
        model: Name of the language model.
        sites: Hook names, in the order of the arrays.
        widths: Width of each site.
        mean_square_norms: Mean of ||x||^2 over the rows of each site.
        rows: Number of rows.
        dtype: Dtype of the arrays.
        source: Hash of the tokens, the settings and the model of the harvest.
    """

    model: str
    sites: tuple[str, ...]
    widths: tuple[int, ...]
    mean_square_norms: tuple[float, ...]
    rows: int
    dtype: str
    source: str


class ActivationStore:
    """Rows of activations, the same tokens at every site.

    Made by `ActivationStore.harvest` or `ActivationStore.open`.

    Args:
        manifest: What the arrays are.
        arrays: One of shape (rows, width) for each site.
    """

    def __init__(self, manifest: StoreManifest, arrays: Mapping[str, Tensor]) -> None:
        self.manifest = manifest
        self._arrays = dict(arrays)

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
            sites: Hook names, or one.
            path: Folder; None keeps the rows in memory.
            rows: Most rows to keep; fewer where the data has fewer.
            dtype: Dtype of the stored rows: bfloat16, float16 or float32.
            resume: Whether an earlier harvest in `path` is taken up; otherwise one that is under way is begun anew.
            seed: Of the sample.
            batch_size: Sequences of a forward.
            progress: Whether a progress bar is shown.

        Raises:
            KeyError: The model has no such hook.
            FileExistsError: `path` holds a finished store and `resume` is off.
            ValueError: Tokens that `evaluate` refuses too, no row to keep, a setting outside its range, an unknown
                dtype, or `path` holds another harvest.
        """
        if dtype not in _NUMPY_DTYPES:
            raise ValueError(f"A store keeps rows as {sorted(_DTYPES)}; found dtype={dtype}.")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected 1 sequence or more.")
        plan = HarvestPlan.make(model, text_or_tokens, sites=sites, rows=rows, seed=seed)
        name = str(dtype).removeprefix("torch.")
        source = hashlib.sha256(f"{plan.fingerprint} {name}".encode()).hexdigest()[:16]
        if path is None:
            arrays = {site: torch.empty(plan.rows, width, dtype=dtype) for site, width in plan.widths.items()}
            for _ in fill(plan, arrays, batch_size=batch_size, progress=progress):
                pass
            return cls(_describe(plan, arrays, name, source), arrays)

        path = Path(path)
        if path.exists():
            if not resume:
                raise FileExistsError(f"{path} exists and resume is off; remove it or choose another path.")
            return _opened_again(path, source)
        part = path.with_name(path.name + ".part")
        first = _first_sequence(part, source, resume=resume)
        mode = "r+" if first else "w+"
        arrays: dict[str, Tensor] = {}
        maps: list[np.memmap[Any, Any]] = []
        part.mkdir(parents=True, exist_ok=True)
        # Before the arrays: one that is begun anew must not find the note of the one that it overwrites.
        _write_json(part / _PROGRESS, {"source": source, "sequences": first})
        for i, (site, width) in enumerate(plan.widths.items()):
            maps.append(
                np.lib.format.open_memmap(
                    part / f"site_{i}.npy", mode=mode, dtype=_NUMPY_DTYPES[dtype], shape=(plan.rows, width)
                )
            )
            arrays[site] = torch.from_numpy(maps[-1]).view(dtype)
        done, noted = first, time.monotonic()
        try:
            for done in fill(plan, arrays, batch_size=batch_size, first=first, progress=progress):
                if time.monotonic() - noted >= _SECONDS_BETWEEN_NOTES:
                    _note(part, maps, source, done)
                    noted = time.monotonic()
        finally:
            _note(part, maps, source, done)
        _write_json(part / _MANIFEST, asdict(_describe(plan, arrays, name, source)))
        (part / _PROGRESS).unlink(missing_ok=True)
        part.rename(path)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> "ActivationStore":
        """Open a finished store; the arrays stay on disk and are read as they are needed.

        Raises:
            FileNotFoundError: `path` holds no finished store.
            ValueError: A file is damaged.
        """
        path = Path(path)
        file = path / _MANIFEST
        if not file.is_file():
            part = path.with_name(path.name + ".part")
            hint = f"{part} is an unfinished one: run the same harvest again." if part.exists() else "Harvest one."
            raise FileNotFoundError(f"{path} holds no activation store ({_MANIFEST} is missing). {hint}")
        try:
            fields: dict[str, Any] = json.loads(file.read_text())
            lists: dict[str, Any] = {name: tuple(fields[name]) for name in ("sites", "widths", "mean_square_norms")}
            manifest = StoreManifest(**fields | lists)
            dtype = _DTYPES[manifest.dtype]
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{file} is damaged ({type(error).__name__}: {error}); harvest again.") from None
        arrays: dict[str, Tensor] = {}
        for i, (site, width) in enumerate(zip(manifest.sites, manifest.widths, strict=True)):
            array = path / f"site_{i}.npy"
            shape = (manifest.rows, width)
            try:
                rows = np.lib.format.open_memmap(array, mode="c")
            except (OSError, ValueError) as error:
                raise ValueError(f"{array} cannot be read ({error}); harvest again.") from None
            if rows.shape != shape or rows.dtype != _NUMPY_DTYPES[dtype]:
                raise ValueError(
                    f"{array} holds {rows.dtype} of shape {rows.shape}; {_MANIFEST} says {manifest.dtype} of {shape}."
                )
            arrays[site] = torch.from_numpy(rows).view(dtype)
        return cls(manifest, arrays)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.manifest.rows

    @property
    def sites(self) -> tuple[str, ...]:
        """Hook names, as the harvest spelt them."""
        return self.manifest.sites

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
        if size < 1:
            raise ValueError(f"A batch needs at least one row; found size={size}.")
        names = (site,) if isinstance(site, str) else site
        for name in names:
            self._index(name)
        return (self.take(names, rows) for rows in self.order(seed).split(size))

    def order(self, seed: int) -> Int[Tensor, " rows"]:
        """Give the row numbers of one pass, shuffled."""
        return torch.randperm(self.rows, generator=torch.Generator().manual_seed(seed))

    def take(self, sites: Sequence[str], rows: Int[Tensor, " batch"]) -> Batch:
        """Give these rows of some sites, in float32.

        Raises:
            KeyError: The store has no such site.
        """
        return tuple(self._arrays[self.sites[self._index(site)]][rows].float() for site in sites)

    def _index(self, site: str) -> int:
        try:
            return self.sites.index(site)
        except ValueError:
            raise KeyError(
                f"The store has no site {site!r}; it holds {list(self.sites)}. Name it in harvest(sites=...)."
            ) from None


def _describe(plan: HarvestPlan, arrays: Mapping[str, Tensor], dtype: str, source: str) -> StoreManifest:
    norms: list[float] = []
    for rows in arrays.values():
        total = sum(float(block.double().pow(2).sum()) for block in rows.split(16_384))
        if not np.isfinite(total):
            raise ValueError("The harvested activations are not finite; run the model in float32 or bfloat16.")
        norms.append(total / plan.rows)
    return StoreManifest(
        model=plan.model_name,
        sites=tuple(plan.widths),
        widths=tuple(plan.widths.values()),
        mean_square_norms=tuple(norms),
        rows=plan.rows,
        dtype=dtype,
        source=source,
    )


def _opened_again(path: Path, source: str) -> ActivationStore:
    store = ActivationStore.open(path)
    if store.manifest.source != source:
        raise ValueError(f"{path} holds the store of another harvest (other data or settings); choose another path.")
    return store


def _first_sequence(part: Path, source: str, *, resume: bool) -> int:
    """Say at which sequence a harvest into `part` begins."""
    file = part / _PROGRESS
    if not resume or not file.is_file():
        return 0
    progress: dict[str, Any] = json.loads(file.read_text())
    if progress["source"] != source:
        raise ValueError(
            f"{part} is an unfinished harvest of other data or settings; remove it, pass resume=False, or choose "
            "another path."
        )
    return int(progress["sequences"])


def _note(part: Path, maps: Sequence["np.memmap[Any, Any]"], source: str, done: int) -> None:
    """Note how many sequences are done, once their rows are on disk."""
    for array in maps:
        array.flush()
    _write_json(part / _PROGRESS, {"source": source, "sequences": done})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with whole_file(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n")
