"""What Gemma Scope contains, and how one of its files becomes a `HookedSAE`.

    from scope_lens.releases import load, pick

    release = pick(model="google/gemma-2-2b", site="res", layer=20, width="16k")
    sae = load(release)

`find`, `pick`, `ladder`, `from_path` and `from_neuronpedia` read a packaged index and need neither network nor torch.
`load` reads a release from the hub or from a folder, `open_suite` lists a folder, `read_npz` reads a single file.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from scope_lens.releases.index import find, from_neuronpedia, from_path, ladder, pick, pinned_revision
from scope_lens.releases.references import loaders, release_of
from scope_lens.releases.release import Release, parse_width, width_name
from scope_lens.releases.sites import MODELS, REPOS, SITES, Hooks, Place, Site, activation_width, hooks_for, place_of

if TYPE_CHECKING:
    from scope_lens.releases.folders import locate, open_suite
    from scope_lens.releases.loading import load
    from scope_lens.releases.npz import read_npz

__all__ = [
    "MODELS",
    "REPOS",
    "SITES",
    "Hooks",
    "Place",
    "Release",
    "Site",
    "activation_width",
    "find",
    "from_neuronpedia",
    "from_path",
    "hooks_for",
    "ladder",
    "load",
    "loaders",
    "locate",
    "open_suite",
    "parse_width",
    "pick",
    "pinned_revision",
    "place_of",
    "read_npz",
    "release_of",
    "width_name",
]

# These import torch, which the index does not need.
_HOME = {
    "load": "scope_lens.releases.loading",
    "locate": "scope_lens.releases.folders",
    "open_suite": "scope_lens.releases.folders",
    "read_npz": "scope_lens.releases.npz",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'scope_lens.releases' has no attribute {name!r}; public names are {__all__}.")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
