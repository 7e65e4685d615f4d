"""Dictionaries on disk: mirrors of the hub's repositories, and suites of one's own in the same layout.

A mirror keeps the repository's paths, below a folder of its own or of the repository's name. A suite of another model
puts the site first: `res/layer_3/width_1k/average_l0_20/params.npz`.
"""

from pathlib import Path

from scope_lens.releases.index import from_path
from scope_lens.releases.npz import read_widths
from scope_lens.releases.release import FILE_NAME, Release, parse_path
from scope_lens.releases.sites import REPOS, SITES, Site, full_name

_LAYOUT = f"<site>/layer_<L>/width_<W>/average_l0_<N>/{FILE_NAME}"
_SITE_FOLDERS: dict[str, Site] = {**{site: site for site in SITES}, "transcoders": "transcoder"}


def locate(release: Release, folder: str | Path) -> Path:
    """Find the file of a release in a local folder.

    Looked at in order: a mirror of several repositories (`owner/name/...`, then `name/...`), a mirror of the one
    (`layer_.../...`), a folder that holds a single `params.npz`, and that file itself.

    Args:
        release: The dictionary wanted.
        folder: The mirror.

    Raises:
        FileNotFoundError: None of these places holds the file; the message lists them.
        ValueError: The file's own path says that it is another dictionary.
    """
    folder = Path(folder)
    if folder.is_file():
        return _agreeing(folder, release)
    if not folder.exists():
        raise FileNotFoundError(f"local_dir {folder} does not exist; it was to hold {release.file} of {release.repo}.")
    name = release.repo.rsplit("/", maxsplit=1)[-1]
    below = [folder / release.repo, folder / name] if release.repo else []
    places = [place / release.file for place in (*below, folder)] + [folder / FILE_NAME]
    for place in places:
        if place.is_file():
            return _agreeing(place, release)
    looked = "".join(f"\n  {place}" for place in places)
    there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    raise FileNotFoundError(
        f"{release} is not in {folder}, which holds {there}. Looked at:{looked}\n"
        f"Copy the file to one of these places, or leave local_dir out to download it."
    )


def _agreeing(file: Path, release: Release) -> Path:
    """Refuse a single file whose own path says that it is another dictionary; most say nothing."""
    owner, *inside = ("", "", "", "", *file.resolve().parent.parts)[-4:]
    own, wanted = parse_path("/".join(inside)), parse_path("/".join(release.path.split("/")[-3:]))
    if own is None or wanted is None:
        return file
    # A folder named "canonical" states no L0.
    states_l0 = own.l0 is not None and wanted.l0 is not None
    other_repo = bool(release.repo) and full_name(owner) in REPOS and full_name(owner) != release.repo
    if other_repo or own[:2] != wanted[:2] or (states_l0 and own.l0 != wanted.l0):
        raise ValueError(
            f"{file} is another dictionary by its own path than {release}, which was asked for. Give the folder that "
            "holds that one, or ask for this one."
        )
    return file


def open_suite(folder: str | Path, *, site: Site | None = None, model: str = "") -> list[Release]:
    """List the dictionaries in a folder of Gemma Scope's layout, by site, layer, width and L0.

    Each record is read with `load(release, local_dir=folder)`. The folder above `layer_...` names the site ("res") or
    the repository ("gemma-scope-2b-pt-res"); it may be `folder` itself. Widths come from the files' headers.

    Args:
        folder: The suite or mirror.
        site: Site of the dictionaries, where no folder names it.
        model: Hugging Face id of their language model; mirrors of Gemma Scope's repositories know theirs.

    Raises:
        FileNotFoundError: The folder is missing or holds no `params.npz`.
        ValueError: A file whose path does not follow the layout, or that is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; expected one of {_LAYOUT}.")
    files = sorted(folder.rglob(FILE_NAME))
    if not files:
        raise FileNotFoundError(f"{folder} holds no {FILE_NAME}; expected {_LAYOUT}.")
    releases = [_describe(file, folder, site=site, model=model) for file in files]
    return sorted(releases, key=lambda r: (SITES.index(r.site), -1 if r.layer is None else r.layer, r.width, r.l0))


def _describe(file: Path, folder: Path, *, site: Site | None, model: str) -> Release:
    path = file.parent.relative_to(folder)
    inside = "/".join(path.parts[-3:])
    parts = parse_path(inside)
    if parts is None or parts.l0 is None:
        raise ValueError(f"{file} does not follow {_LAYOUT}; read a single file with read_npz and its hooks.")
    above = path.parts[-4] if len(path.parts) > 3 else folder.resolve().name
    repo = full_name(above)
    if repo in REPOS:
        return from_path(repo, inside)
    named = _SITE_FOLDERS.get("embedding" if parts.layer is None else above) or site
    if named is None:
        raise ValueError(
            f"{file}: {above!r} is no site ({', '.join(SITES)}) and no repository of Gemma Scope; pass site=."
        )
    return Release(
        repo="",
        path=path.as_posix(),
        model=model,
        site=named,
        layer=parts.layer,
        width=read_widths(file).d_sae,
        l0=parts.l0,
        neuronpedia=None,
    )
