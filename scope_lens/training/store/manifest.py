"""What an activation store holds and where it came from.

The manifest is the JSON file of a finished store. Its `source` hashes everything that determines the rows, so two
stores of one source hold the same rows, and a harvest can tell whether what lies in a folder is its own.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformer_lens import TransformerBridge

from scope_lens.whole_file import whole_file

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MANIFEST = "manifest.json"
_TUPLES = ("sites", "widths", "mean_square_norms", "untrained", "attached")


@dataclass(frozen=True, kw_only=True)
class StoreManifest:
    """What a store holds.

    Attributes:
        model: Name of the language model.
        model_fingerprint: Hash of its weights; empty where no model was harvested.
        tokenizer: Hash of its tokenizer; empty without one.
        sites: Hook names, in the order of the arrays.
        aliases: All names of each site's hook.
        widths: Width of each site.
        mean_square_norms: Mean of ||x||^2 over the rows of each site.
        rows: Number of rows.
        dtype: Dtype of the rows.
        untrained: Kinds of positions that were left out.
        attached: Dictionaries that were spliced in.
        documents: Number of documents, or of token rows, that were read.
        data: Hash of the token ids and of which positions were kept.
        seed: Of the sample and of the order.
        source: Hash of everything that determines the rows.
        versions: Of the packages that made it.
    """

    model: str
    sites: tuple[str, ...]
    widths: tuple[int, ...]
    mean_square_norms: tuple[float, ...]
    rows: int
    dtype: str
    source: str
    aliases: tuple[tuple[str, ...], ...] = ()
    model_fingerprint: str = ""
    tokenizer: str = ""
    untrained: tuple[str, ...] = ()
    attached: tuple[str, ...] = ()
    documents: int = 0
    data: str = ""
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that determines the rows; `source` is its hash."""
        return {
            "model_fingerprint": self.model_fingerprint,
            "tokenizer": self.tokenizer,
            "data": self.data,
            "attached": list(self.attached),
            "sites": sorted(min(names) for names in self.aliases),
            "rows": self.rows,
            "dtype": self.dtype,
            "untrained": list(self.untrained),
            "seed": self.seed,
        }

    def write(self, folder: Path) -> None:
        """Write the manifest of a store, whole or not at all."""
        write_json(folder / MANIFEST, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "StoreManifest":
        """Read the manifest of a finished store.

        Raises:
            FileNotFoundError: `folder` holds no finished store.
            ValueError: The manifest is damaged, or of the layout of version 0.1.
        """
        file = folder / MANIFEST
        if (folder / "site_0.npy").exists():
            raise ValueError(
                f"{folder} holds a store of the old layout (site_0.npy), which this version does not read. Remove it "
                "and harvest again."
            )
        if not file.is_file():
            part = folder.with_name(folder.name + ".part")
            hint = f"{part} is an unfinished one: run the same harvest again." if part.exists() else "Harvest one."
            raise FileNotFoundError(f"{folder} holds no activation store ({MANIFEST} is missing). {hint}")
        try:
            fields: dict[str, Any] = json.loads(file.read_text())
            lists: dict[str, Any] = {name: tuple(fields[name]) for name in _TUPLES}
            lists["aliases"] = tuple(tuple(names) for names in fields["aliases"])
            manifest = cls(**fields | lists)
            if manifest.dtype not in DTYPES or len(manifest.widths) != len(manifest.sites):
                raise ValueError(f"dtype {manifest.dtype!r}, {len(manifest.widths)} widths")  # noqa: TRY301
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{file} is damaged ({type(error).__name__}: {error}); harvest again.") from None
        return manifest


def source_of(identity: Mapping[str, Any]) -> str:
    """Hash what determines the rows of a store."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Name what tells two harvests apart, for an error message."""
    labels = {"model_fingerprint": "another model", "tokenizer": "another tokenizer", "data": "other data"}
    differing = [name for name in wanted if found.get(name) != wanted[name]]
    named = [labels[name] for name in labels if name in differing]
    settings = [f"{name}={found.get(name)!r} (here {wanted[name]!r})" for name in differing if name not in labels]
    return "; ".join(named + settings) or "other settings"


def tokenizer_hash(bridge: TransformerBridge) -> str:
    """Hash a model's vocabulary and special ids; empty without a tokenizer."""
    tokenizer: Any = bridge.tokenizer
    if tokenizer is None:
        return ""
    content = [sorted(tokenizer.get_vocab().items()), sorted(tokenizer.all_special_ids)]
    return f"sha256:{hashlib.sha256(json.dumps(content).encode()).hexdigest()}"


def versions() -> dict[str, str]:
    """Give the versions of the packages that act on a harvest."""
    return {name: version(name) for name in ("scope-lens", "torch", "transformers", "transformer-lens", "tensorstore")}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n")
