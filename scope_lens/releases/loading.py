"""From a release to a dictionary: find its file, on the hub or in a folder, and read it for its site.

The embedding dictionaries need one step more. They were trained on rows e of the embedding matrix, while `hook_embed`
carries h = s * e with s = sqrt(d_model). The dictionary wanted satisfies x_hat'(h) = s * x_hat(h / s), which is
Appendix A of the paper with s for the training norm:

    pre' = h @ W_enc + s * b_enc = s * pre        f' = s * f with the threshold s * threshold
    x_hat'(h) = f' @ W_dec + s * b_dec = s * x_hat(e)

so `b_enc`, `threshold` and `b_dec` are multiplied by s, and the rows of `W_dec` keep their unit norm. Dividing `W_enc`
and multiplying `W_dec` by s instead leaves the latents as the file has them, and is right only if `b_dec` is multiplied
as well.
"""

import math
from dataclasses import replace
from pathlib import Path

import torch

from scope_lens.releases.folders import locate
from scope_lens.releases.index import from_path
from scope_lens.releases.npz import read_npz
from scope_lens.releases.release import Release
from scope_lens.releases.sites import REPOS, activation_width, full_name, hooks_for, unknown
from scope_lens.sae import HookedSAE
from scope_lens.sae_config import UNTRAINED, SpecialPosition


def load(
    release: Release,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    local_dir: str | Path | None = None,
) -> HookedSAE:
    """Read a published dictionary into memory, from the hub or from a folder.

    Args:
        release: What `find`, `pick`, `from_path` or `open_suite` gave.
        device: Where the weights go.
        dtype: Dtype of the weights; `threshold` stays float32 for half-precision dtypes.
        revision: Commit, tag or branch of the repository; None takes the fixed one (`scope_lens.releases.hub`).
        local_dir: A mirror of the repository or of several, a folder with a single `params.npz`, or that file. No
            network is used then.

    Returns:
        The dictionary, with model, repository, path and untrained positions in its config.

    Raises:
        KeyError: A repository or path that Gemma Scope does not have.
        FileNotFoundError: The folder lacks the file; or it is not in the cache and the hub cannot be reached.
        ConnectionError: The download broke off.
        OSError: No room on the disk.
        ValueError: The file is not what its path says; its path says that it is of another release; both `revision`
            and `local_dir` are given; or what `read_npz` refuses.
    """
    release = _checked(release)
    if local_dir is None:
        if not release.repo:
            raise ValueError(
                f"{release.path} is of a local suite; pass local_dir= with the folder given to open_suite."
            )
        from scope_lens.releases.hub import download

        file = download(release, revision=revision)
    elif revision is not None:
        raise ValueError(f"revision={revision!r} has no meaning with local_dir={str(local_dir)!r}; leave one out.")
    else:
        file = locate(release, local_dir)
    hooks = hooks_for(release.site, release.layer)
    width = activation_width(release.model, release.site)
    return read_npz(
        file,
        hook_in=hooks.hook_in,
        hook_out=hooks.hook_out,
        model=release.model,
        release=release.repo,
        path=release.path,
        untrained=_untrained(release),
        width=width,
        scale=_embedding_scale(release, width),
        device=device,
        dtype=dtype,
    )


def _checked(release: Release) -> Release:
    """Complete the names of a record made by hand, and refuse one whose fields contradict its path."""
    if not release.repo:
        return release
    release = replace(release, repo=full_name(release.repo), model=full_name(release.model))
    if release.repo not in REPOS:
        raise KeyError(unknown("repository", release.repo, REPOS))
    path = from_path(release.repo, release.path)
    said, found = (release.model, release.site, release.layer), (path.model, path.site, path.layer)
    if said != found:
        raise ValueError(f"{release} is {found} by its path, but the record says {said}; use from_path(repo, path).")
    return release


def _untrained(release: Release) -> tuple[SpecialPosition, ...]:
    # Gemma Scope, section 4.5: the dictionaries of the instruction-tuned model never saw the user prefix.
    tuned = release.model == "google/gemma-2-9b-it"
    return (*UNTRAINED, "chat_prefix") if tuned else UNTRAINED


def _embedding_scale(release: Release, width: int | None) -> float:
    if release.site != "embedding":
        return 1.0
    if width is None:
        raise ValueError(
            f"{release}: the scale of an embedding dictionary is sqrt(d_model) of its model; use read_npz with scale=."
        )
    return math.sqrt(width)
