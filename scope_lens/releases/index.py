"""What Gemma Scope contains, without a network: find, pick, ladder, and the names that others use.

The packaged `index.json` lists 2,482 files, one row for each cell (repository, layer, width): the L0s, the canonical
one, and which have dashboards on Neuronpedia. `tests/scripts/build_release_index.py` makes it.

Canonical means "average L0 nearest to 100", as frozen upstream in October 2024 for the cells that existed in that list.
The choice is stored, because the rule has ties. Where upstream froze none (every transcoder and embedding dictionary,
layer 12 width 131k of 2b-pt-res, layer 20 width 262k of 9b-pt-res) `pick` applies the same rule, the lower L0 of a tie;
the record it returns carries the L0 chosen, which can be far from 100.

Widths of one layer are comparable at equal rank, not at equal L0: the feature-splitting suite (layer 12 of 2b, layer 20
of 9b) was trained with the same sparsity penalties at every width, so `ladder(...)[-1]` of two widths go together.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, Literal, NamedTuple

from scope_lens.releases.release import Release, parse_path, parse_width, width_name
from scope_lens.releases.sites import MODELS, REPOS, SITES, Site, full_name, unknown

_TARGET_L0 = 100


class _Cell(NamedTuple):
    """One row of the index: the dictionaries of one layer and width, which differ in their L0."""

    repo: str
    model: str
    site: Site
    layer: int | None
    width: int
    l0s: list[int]
    canonical: int | None
    plain: int | None
    own: list[int]

    def release(self, l0: int) -> Release:
        folder = "embedding" if self.layer is None else f"layer_{self.layer}"
        return Release(
            repo=self.repo,
            path=f"{folder}/width_{width_name(self.width)}/average_l0_{l0}",
            model=self.model,
            site=self.site,
            layer=self.layer,
            width=self.width,
            l0=l0,
            neuronpedia=self._neuronpedia(l0),
        )

    def nearest(self, l0: int) -> int:
        return min(self.l0s, key=lambda listed: (abs(listed - l0), listed))

    @property
    def source(self) -> str:
        """The plain Neuronpedia id of the cell."""
        return f"{self.model.removeprefix('google/')}/{self.layer}-gemmascope-{self.site}-{width_name(self.width)}"

    def _neuronpedia(self, l0: int) -> str | None:
        if l0 == self.plain:
            return self.source
        return f"{self.source}__l0-{l0}" if l0 in self.own else None


def find(
    *,
    model: str | None = None,
    site: str | None = None,
    layer: int | None = None,
    width: int | str | None = None,
    l0: int | Literal["canonical"] | None = None,
    repo: str | None = None,
) -> list[Release]:
    """List the published dictionaries that fit every filter given, by repository, layer, width and L0.

    Args:
        model: Hugging Face id, with or without "google/".
        site: "res", "mlp", "att", "transcoder" or "embedding".
        layer: Number of the layer.
        width: Number of latents, as an int or as "16k".
        l0: Average L0 as the path states it, or "canonical" for the choices frozen upstream.
        repo: Repository, with or without "google/".

    Raises:
        KeyError: A model, site, layer, width or repository that no dictionary has, or an L0 that is neither a number
            nor "canonical". Known values that do not occur together give an empty list.
    """
    model = None if model is None else full_name(model)
    repo = None if repo is None else full_name(repo)
    wanted = None if width is None else parse_width(width)
    _check("model", model, [*MODELS])
    _check("site", site, SITES)
    _check("repository", repo, [*REPOS])
    _check_l0(l0)
    _check("layer", layer, sorted({cell.layer for cell in _cells() if cell.layer is not None}))
    if wanted is not None and all(cell.width != wanted for cell in _cells()):
        raise KeyError(unknown("width", width, [width_name(w) for w in sorted({cell.width for cell in _cells()})]))
    return [
        cell.release(listed)
        for cell in _cells()
        if (model is None or cell.model == model)
        and (site is None or cell.site == site)
        and (repo is None or cell.repo == repo)
        and (layer is None or cell.layer == layer)
        and (wanted is None or cell.width == wanted)
        for listed in cell.l0s
        if l0 is None or listed == (cell.canonical if l0 == "canonical" else l0)
    ]


def pick(
    *,
    model: str,
    site: str,
    layer: int | None = None,
    width: int | str = "16k",
    l0: int | Literal["canonical"] = "canonical",
) -> Release:
    """Choose one published dictionary: the canonical one, or the one whose L0 is nearest.

    Args:
        model: Hugging Face id, with or without "google/".
        site: "res", "mlp", "att", "transcoder" or "embedding".
        layer: Number of the layer; None for the embedding.
        width: Number of latents, as an int or as "16k".
        l0: Wanted average L0; of two equally near, the lower is taken. "canonical" is the choice stored in the index,
            and the L0 nearest to 100 where upstream froze none.

    Raises:
        KeyError: There is no such model, site, layer or width; the message lists what there is. Or the L0 is neither
            a number nor "canonical".
    """
    _check_l0(l0)
    cell = _cell(model, site, layer, width)
    if l0 != "canonical":
        return cell.release(cell.nearest(l0))
    return cell.release(_canonical(cell))


def ladder(*, model: str, site: str, layer: int | None = None, width: int | str = "16k") -> list[Release]:
    """List the dictionaries of one layer and width from the sparsest to the densest.

    Of two widths compare equal ranks from the end, `ladder(...)[-1]` with `ladder(...)[-1]`: they share the sparsity
    penalty, not the L0.

    Args:
        model: Hugging Face id, with or without "google/".
        site: "res", "mlp", "att", "transcoder" or "embedding".
        layer: Number of the layer; None for the embedding.
        width: Number of latents, as an int or as "16k".

    Raises:
        KeyError: There is no such model, site, layer or width; the message lists what there is.
    """
    cell = _cell(model, site, layer, width)
    return [cell.release(l0) for l0 in cell.l0s]


def from_path(repo: str, path: str) -> Release:
    """Describe a file by its repository and path, listed or not.

    Args:
        repo: One of the nine repositories, with or without "google/".
        path: "layer_20/width_16k/average_l0_71", with or without "/params.npz"; "layer_20/width_16k/canonical" is
            resolved by the index.

    Raises:
        KeyError: An unknown repository, a path that does not follow the grammar, or a layer or width that cannot be.
    """
    repo = full_name(repo)
    if repo not in REPOS:
        raise KeyError(unknown("repository", repo, REPOS))
    entry = REPOS[repo]
    parts = parse_path(path)
    if parts is None or parts.width.isdecimal() or (parts.layer is None and not entry.embedding):
        raise KeyError(_no_path(repo, path))
    n_layers = MODELS[entry.model].n_layers
    if parts.layer is not None and parts.layer >= n_layers:
        raise KeyError(f"{repo}/{path}: {entry.model} has the layers 0 to {n_layers - 1}. {_no_path(repo, path)}")
    site = "embedding" if parts.layer is None else entry.site
    width = parse_width(parts.width)
    row = next((c for c in _cells() if (c.repo, c.layer, c.width) == (repo, parts.layer, width)), None)
    if parts.l0 is None:
        if row is None:
            raise KeyError(_no_path(repo, path))
        return row.release(_canonical(row))
    unlisted = _Cell(repo, entry.model, site, parts.layer, width, [], None, None, [])
    return (row or unlisted).release(parts.l0)


def from_neuronpedia(source: str) -> Release:
    """Find the dictionary behind a Neuronpedia id, e.g. "gemma-2-2b/20-gemmascope-res-16k", also with "google/".

    Ids of one dictionary with a suffix, "...__l0-38", are known where upstream lists dashboards for it; the canonical
    dictionary answers to its plain id and, where it has one, to its suffixed id. `Release.neuronpedia` is the way back.

    Raises:
        KeyError: No dictionary has this id; the message names the nearest.
    """
    known = _by_neuronpedia()
    source = source.removeprefix("google/")
    if source not in known:
        raise KeyError(unknown("dictionary with the Neuronpedia id", source, _near_ids(source, known)))
    cell, l0 = known[source]
    return cell.release(l0)


def pinned_revision(repo: str) -> str | None:
    """The commit that the package pins for a repository; None where it knows none."""
    return _index()["revisions"].get(repo) or None


@cache
def _index() -> dict[str, Any]:
    return json.loads((files("scope_lens.releases") / "index.json").read_bytes())


@cache
def _cells() -> tuple[_Cell, ...]:
    return tuple(_rows())


def _rows() -> Iterator[_Cell]:
    listed = _index()["cells"]
    for repo, entry in REPOS.items():
        for layer, widths in listed[repo].items():
            number = None if layer == "embedding" else int(layer)
            site: Site = "embedding" if number is None else entry.site
            for width, row in widths.items():
                yield _Cell(repo, entry.model, site, number, parse_width(width), *row)


def _cell(model: str, site: str, layer: int | None, width: int | str) -> _Cell:
    """The one cell of these four, or an error that says which of them is wrong and what there is."""
    model, wanted = full_name(model), parse_width(width)
    _check("model", model, [*MODELS])
    _check("site", site, SITES)
    of_site = [cell for cell in _cells() if (cell.model, cell.site) == (model, site)]
    if not of_site:
        sites = sorted({cell.site for cell in _cells() if cell.model == model})
        raise KeyError(f"Gemma Scope has no {site!r} dictionaries for {model}; its sites are {', '.join(sites)}.")
    of_layer = [cell for cell in of_site if cell.layer == layer]
    if not of_layer:
        layers = sorted({cell.layer for cell in of_site if cell.layer is not None})
        there = f"layers {_ranges(layers)}" if layers else "no layers: leave layer out"
        raise KeyError(f"Gemma Scope has no {site!r} dictionary for {model} at layer {layer}; it has {there}.")
    for cell in of_layer:
        if cell.width == wanted:
            return cell
    widths = ", ".join(width_name(cell.width) for cell in of_layer)
    raise KeyError(
        f"Gemma Scope has no {site!r} dictionary of width {width!r} for {model} at layer {layer}; it has {widths}."
    )


def _canonical(cell: _Cell) -> int:
    return cell.nearest(_TARGET_L0) if cell.canonical is None else cell.canonical


@cache
def _by_neuronpedia() -> dict[str, tuple[_Cell, int]]:
    ids: dict[str, tuple[_Cell, int]] = {}
    for cell in _cells():
        if cell.plain is None:
            continue
        ids[cell.source] = (cell, cell.plain)
        ids |= {f"{cell.source}__l0-{l0}": (cell, l0) for l0 in cell.own}
    return ids


def _near_ids(source: str, known: dict[str, tuple[_Cell, int]]) -> list[str]:
    """The ids that begin alike, few enough for a message."""
    stem = source.partition("-gemmascope")[0]
    return [name for name in known if name.startswith(f"{stem}-")][:8] or [*known][:8]


def _no_path(repo: str, path: str) -> str:
    listed = [release.path for release in find(repo=repo)]
    return unknown("file", f"{repo}/{path}", _nearest_paths(path, listed))


def _nearest_paths(path: str, listed: list[str]) -> list[str]:
    """Up to six listed paths, those that share the longest beginning with the path asked for."""

    def shared(other: str) -> int:
        return next(
            (i for i, (a, b) in enumerate(zip(path, other, strict=False)) if a != b), min(len(path), len(other))
        )

    return sorted(listed, key=shared, reverse=True)[:6]


def _check(kind: str, value: object, known: Sequence[object]) -> None:
    if value is not None and value not in known:
        raise KeyError(unknown(kind, value, known))


def _check_l0(l0: int | str | None) -> None:
    if isinstance(l0, str) and l0 != "canonical":
        raise KeyError(f"l0={l0!r} is no choice of L0; give a number, e.g. 71, or 'canonical'.")


def _ranges(numbers: Sequence[int]) -> str:
    """Write a full run as "0-25" and anything else as its numbers."""
    full = list(range(numbers[0], numbers[-1] + 1))
    if len(numbers) > 2 and list(numbers) == full:
        return f"{numbers[0]}-{numbers[-1]}"
    return ", ".join(map(str, numbers))
