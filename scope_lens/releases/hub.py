"""Fetch a file from the hub at a revision that stays the same.

The commits of Gemma Scope's repositories are not published as versions, so the revision is fixed as follows; the first
that applies holds:

1. the revision that the caller names,
2. the commit that the package pins (`pinned_revision`; a maintainer with a network fills it in),
3. the commit that this machine recorded when it first downloaded from the repository: a ref named `scope-lens` in
   huggingface_hub's cache, beside the files it speaks of, and deleted with them,
4. the present commit of `main`, which is resolved, downloaded by its hash, and recorded as in 3.

So two loads on one machine read the same commit even if the repository changes in between; two machines do as soon as
the package pins a commit or the caller names one. A file already in the cache at the fixed commit needs no network.

Downloads are huggingface_hub's own: its progress bar, its cache, its token, `HF_HUB_OFFLINE`, `HF_ENDPOINT`. It takes
up a dropped connection where it broke off, verifies the size, and renames the file into place when it is complete.
"""

import errno
import os
import re
import shutil
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import HfFileMetadata, repo_folder_name

from scope_lens.releases.index import ladder, pinned_revision
from scope_lens.releases.release import Release

_REF = "scope-lens"
_COMMIT = re.compile(r"[0-9a-f]{40}")
# The transport's base error. huggingface_hub 1 takes it from httpx and 2 from httpx2, and exports it from neither.
_TRANSPORT: type[Exception] = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


def download(release: Release, *, revision: str | None = None) -> Path:
    """Give the local path of a release's file, downloading it if it is not in the cache.

    Args:
        release: One of the nine repositories' dictionaries.
        revision: Commit, tag or branch; None fixes one as the module says.

    Raises:
        KeyError: The repository has no such file or revision.
        FileNotFoundError: The file is not in the cache and the hub cannot be reached, or may not be.
        ConnectionError: The download broke off and could not be taken up.
        OSError: The disk has no room for the file (errno ENOSPC).
    """
    fixed = revision or pinned_revision(release.repo) or recorded_revision(release.repo)
    wanted = fixed or "main"
    cached = try_to_load_from_cache(release.repo, release.file, revision=wanted)
    if isinstance(cached, str) and _COMMIT.fullmatch(wanted):
        return Path(cached)
    try:
        metadata = _metadata(release, wanted)
    except LocalEntryNotFoundError as error:
        if isinstance(cached, str):
            return Path(cached)
        raise FileNotFoundError(_unreachable(release, wanted, error)) from None
    _check_disk(release, metadata)
    commit = metadata.commit_hash or wanted
    try:
        path = Path(hf_hub_download(release.repo, release.file, revision=commit))
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(_unreachable(release, wanted, error)) from None
    except _TRANSPORT as error:
        raise ConnectionError(
            f"The download of {release} broke off ({type(error).__name__}: {_first_line(error)}). Nothing half-written "
            f"was kept; call load again, or fetch the file by other means and pass local_dir=."
        ) from error
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(errno.ENOSPC, _no_room(release, metadata.size)) from None
    if fixed is None:
        _record(release.repo, commit)
    return path


def recorded_revision(repo: str) -> str | None:
    """The commit this machine recorded for a repository when it first downloaded from it; None before that."""
    ref = _ref(repo)
    return ref.read_text().strip() if ref.is_file() else None


def _ref(repo: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model") / "refs" / _REF


def _record(repo: str, commit: str) -> None:
    """Record the commit once; what is recorded stays until the cache's folder is deleted."""
    ref = _ref(repo)
    if ref.is_file() or not _COMMIT.fullmatch(commit):
        return
    part = ref.with_name(f"{ref.name}.{os.getpid()}.part")
    try:
        ref.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(commit)
        os.replace(part, ref)  # noqa: PTH105
    except OSError as error:
        # A cache that this process may only read takes no record, and owes none: nothing was downloaded.
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise


def _metadata(release: Release, revision: str) -> HfFileMetadata:
    """Ask the hub for commit and size of a file; LocalEntryNotFoundError where it cannot be asked."""
    try:
        return get_hf_file_metadata(hf_hub_url(release.repo, release.file, revision=revision))
    except RevisionNotFoundError:
        raise KeyError(
            f"{release.repo} has no revision {revision!r}. Pass revision='main', or a commit that the repository has."
        ) from None
    except EntryNotFoundError:
        raise KeyError(
            f"{release.repo} has no file {release.file} at revision {revision!r}. {_listed(release)}"
        ) from None
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"The hub at {constants.ENDPOINT} gives no access to {release.repo} ({_first_line(error)}). Gemma Scope's "
            f"repositories are public: check HF_ENDPOINT and the token in HF_TOKEN."
        ) from None
    except (ConnectionError, _TRANSPORT) as error:
        raise LocalEntryNotFoundError(f"{type(error).__name__}: {_first_line(error)}") from None


def _listed(release: Release) -> str:
    try:
        rungs = ladder(model=release.model, site=release.site, layer=release.layer, width=release.width)
    except KeyError as error:
        return str(error.args[0])
    return f"The index lists the L0s {', '.join(str(rung.l0) for rung in rungs)} there."


def _unreachable(release: Release, revision: str, error: Exception) -> str:
    why = (
        "offline mode is on (HF_HUB_OFFLINE)"
        if constants.HF_HUB_OFFLINE
        else f"the hub cannot be reached ({_first_line(error)})"
    )
    return (
        f"{release.file} of {release.repo} at revision {revision!r} is not in the cache {constants.HF_HUB_CACHE}, and "
        f"{why}. Connect and load it once, or pass local_dir= with a folder that mirrors the repository."
    )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _check_disk(release: Release, metadata: HfFileMetadata) -> None:
    """Refuse before the download what the disk has no room for."""
    cache = Path(constants.HF_HUB_CACHE)
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    blob = _ref(release.repo).parents[1] / "blobs" / (metadata.etag or "")
    needed = 0 if metadata.size is None or blob.is_file() else metadata.size
    if shutil.disk_usage(existing).free < needed:
        raise OSError(errno.ENOSPC, _no_room(release, metadata.size))


def _no_room(release: Release, size: int | None) -> str:
    cache = Path(constants.HF_HUB_CACHE)
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    return (
        f"No room for {release}: the file has {(size or 0) / 1e6:,.0f} MB and {cache} has {free / 1e6:,.0f} MB free. "
        f"Nothing was written. Free some space, or point HF_HOME to a larger disk."
    )
