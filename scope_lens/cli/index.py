"""`scope-lens list | info`: what Gemma Scope contains; needs no network."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from scope_lens.cli.app import app
from scope_lens.cli.inputs import SiteName
from scope_lens.cli.terminal import say, table

if TYPE_CHECKING:
    from scope_lens.releases import Release


@app.command(name="list")
def list_releases(
    *,
    model: str | None = None,
    site: SiteName | None = None,
    layer: int | None = None,
    width: str | None = None,
    l0: int | Literal["canonical"] | None = None,
    repo: str | None = None,
) -> None:
    """List the dictionaries that Gemma Scope contains; needs no network.

    Args:
        model: Language model, e.g. google/gemma-2-2b.
        site: Where the dictionaries attach.
        layer: Number of the layer.
        width: Number of latents, e.g. 16k.
        l0: Average number of active latents, or "canonical" for the published choice (nearest to 100).
        repo: Repository, e.g. google/gemma-scope-2b-pt-res.
    """
    from scope_lens.releases import find, width_name

    found = find(model=model, site=site, layer=layer, width=width, l0=l0, repo=repo)
    if not found:
        raise ValueError("No dictionary fits all of these filters. Leave one out.")
    table(
        ("dictionary", "site", "layer", "width", "L0", "Neuronpedia"),
        [
            (
                str(r),
                r.site,
                "-" if r.layer is None else str(r.layer),
                width_name(r.width),
                str(r.l0),
                r.neuronpedia or "-",
            )
            for r in found
        ],
        left=(0, 1, 5),
    )
    say(f"\n{len(found)} {'dictionary' if len(found) == 1 else 'dictionaries'}")


@app.command(name="info")
def info(reference: Annotated[str, tyro.conf.Positional]) -> None:
    """Say what one published dictionary is, where it attaches and how large its file is; needs no network.

    Args:
        reference: Repository and path, e.g. google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71, or
            Neuronpedia id, e.g. gemma-2-2b/20-gemmascope-res-16k.
    """
    from scope_lens.releases import release_of

    for name, value in list(_facts(release_of(reference))):
        say(f"{name:<13}{value}")


def _facts(release: "Release") -> Iterable[tuple[str, str]]:
    from scope_lens.releases import activation_width, find, hooks_for, width_name

    hooks = hooks_for(release.site, release.layer)
    yield "dictionary", str(release)
    yield "model", release.model
    yield "site", release.site
    yield "layer", "-" if release.layer is None else str(release.layer)
    yield "reads", hooks.hook_in
    yield "writes", hooks.hook_out
    yield "L0", str(release.l0)
    yield "latents", f"{release.width} ({width_name(release.width)})"
    width = activation_width(release.model, release.site)
    if width is not None:
        yield "W_enc", f"({width}, {release.width})"
        yield "W_dec", f"({release.width}, {width})"
        numbers = 2 * width * release.width + 2 * release.width + width
        yield "file", f"{release.file}, {4 * numbers / 1e6:,.1f} MB of float32"
    yield "canonical", "yes" if release in find(repo=release.repo, l0="canonical") else "no"
    yield "Neuronpedia", release.neuronpedia or "-"
    if release.neuronpedia:
        yield "", f"https://www.neuronpedia.org/{release.neuronpedia}"
