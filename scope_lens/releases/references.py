"""What a user writes to name dictionaries, and the dictionaries that it means.

A reference is one of

1. a file or folder on disk: a `params.npz`, a folder that `HookedSAE.save` wrote, or a suite in Gemma Scope's layout;
2. a Neuronpedia id: "gemma-2-2b/20-gemmascope-res-16k";
3. a repository and a path inside it: "google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71".

The organisation "google/" may be left out of a repository, and put before a Neuronpedia id.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from scope_lens.releases.index import from_neuronpedia, from_path
from scope_lens.releases.release import FILE_NAME, Release, parse_path
from scope_lens.releases.sites import REPOS, SITES, Site, full_name, hooks_for

if TYPE_CHECKING:
    from scope_lens.sae import HookedSAE


def release_of(reference: str) -> Release:
    """Find the published dictionary that a Neuronpedia id or a repository with a path means; no network.

    Raises:
        KeyError: Gemma Scope has no such dictionary; the message names the nearest.
    """
    if "-gemmascope-" in reference and reference.removeprefix("google/").count("/") == 1:
        return from_neuronpedia(reference)
    pieces = reference.split("/")
    owned = 1 if full_name(pieces[0]) in REPOS else 2
    repo, path = "/".join(pieces[:owned]), "/".join(pieces[owned:])
    if not path:
        raise KeyError(
            f"{reference!r} names no dictionary. Write repo/path, e.g. "
            "google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71, a Neuronpedia id, e.g. "
            "gemma-2-2b/20-gemmascope-res-16k, or a file or folder that exists."
        )
    return from_path(repo, path)


def loaders(
    reference: str,
    *,
    site: Site | None = None,
    layer: int | None = None,
    model: str = "",
    local_dir: Path | None = None,
) -> "dict[str, Callable[..., HookedSAE]]":
    """Name the dictionaries behind a reference, each with the function that loads it.

    Nothing is read but headers. The functions take `device` and `dtype`.

    Args:
        reference: See the module.
        site: Site of a local file or suite, where its path does not say.
        layer: Layer of a local file, likewise.
        model: Hugging Face id of the language model of a local suite, for the configs.
        local_dir: A mirror of the hub's repositories, for references to them.

    Raises:
        KeyError: Gemma Scope has no such dictionary.
        FileNotFoundError: There is no such file or folder.
        ValueError: A local file whose site and layer are not known, or that is damaged.
    """
    from scope_lens.releases.folders import open_suite  # these import torch, which release_of does not need
    from scope_lens.releases.loading import load
    from scope_lens.sae import HookedSAE

    path = Path(reference).expanduser()
    if not path.exists():
        if reference.startswith((".", "/", "~")):
            raise FileNotFoundError(f"There is no file or folder {path}.")
        release = release_of(reference)
        return {str(release): partial(load, release, local_dir=local_dir)}
    if (path / "sae.safetensors").is_file():
        return {reference: partial(HookedSAE.load, path)}
    if path.is_file() or (path / FILE_NAME).is_file():
        return {reference: _single(path, site, layer, model)}
    suite = open_suite(path, site=site, model=model)
    return {str(release): partial(load, release, local_dir=path) for release in suite}


def _single(path: Path, site: Site | None, layer: int | None, model: str) -> "Callable[..., HookedSAE]":
    """Load one file, whose site and layer are given, or follow from the folders above it."""
    from scope_lens.releases.loading import load
    from scope_lens.releases.npz import read_npz

    above = (path.parent if path.is_file() else path).resolve().parts[-4:]
    owner, inside = above[0], "/".join(above[1:])
    parts = parse_path(inside)
    if site is None and parts is not None and full_name(owner) in REPOS:
        return partial(load, from_path(owner, inside), local_dir=path)
    if site is None:
        site = next((known for known in SITES if known == owner), None)
    if layer is None and parts is not None:
        layer = parts.layer
    if site is None or (layer is None and site != "embedding"):
        raise ValueError(
            f"{path}: a params.npz does not say where it attaches, and the folders above it are no "
            "<site>/layer_<L>/width_<W>/average_l0_<N>. Give its site and layer."
        )
    hooks = hooks_for(site, layer)
    return partial(
        read_npz, path, hook_in=hooks.hook_in, hook_out=hooks.hook_out, model=model, path=inside if parts else str(path)
    )
