"""`scope-lens graph`: what a prompt's next token comes from, as tables, a file, a figure and a page for Neuronpedia."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from scope_lens.cli.app import app
from scope_lens.cli.inputs import EMBEDDED, ModelDtype, SiteName, check_writable, language_model
from scope_lens.cli.terminal import say, table

if TYPE_CHECKING:
    from scope_lens.circuits.graph import AttributionGraph
    from scope_lens.sae import HookedSAE

_LONGEST_SLUG = 40


@app.command(name="graph")
def graph(
    *,
    model: str,
    prompt: str,
    site: tuple[SiteName, ...] = (),
    layer: tuple[int, ...] = (),
    width: str = "16k",
    l0: int | Literal["canonical"] = "canonical",
    saes: tuple[str, ...] = (),
    local_dir: Path | None = None,
    target: tuple[str, ...] = (),
    max_latents: int | None = None,
    node_mass: float = 0.8,
    edge_mass: float = 0.98,
    top: int = 15,
    dtype: ModelDtype = "float32",
    device: str | None = None,
    out: Path | None = None,
    html: Path | None = None,
    neuronpedia: Path | None = None,
    slug: str | None = None,
) -> None:
    """Trace a prompt's next token back to latents and tokens, and check that everything adds up.

    Args:
        model: Language model: a hub name, a folder in the Hugging Face layout, or "demo" for the embedded one.
        prompt: Text; the tokenizer puts BOS in front.
        site: Kinds of site, each at every layer given; Gemma Scope's dictionaries, or the embedded ones.
        layer: Layers of these sites; all of them if none is given.
        width: Width of Gemma Scope's dictionaries.
        l0: Their average L0; the nearest is taken.
        saes: Further dictionaries: repository and path, Neuronpedia id, or folder.
        local_dir: Mirror of Gemma Scope's repositories; then they are not downloaded.
        target: Tokens to explain, one token each; the likeliest next ones if none is given.
        max_latents: Latents that are nodes of their own; the others are folded. All if not given.
        node_mass: Share of influence that the nodes in the figure and the page hold.
        edge_mass: The same of their edges.
        top: Latents listed.
        dtype: Of the model and the dictionaries.
        device: E.g. cuda:1; a GPU where there is one.
        out: Write the whole graph to this file; AttributionGraph.load reads it.
        html: Write a figure of the pruned graph to this file.
        neuronpedia: Write the pruned graph as JSON: a file that ends in .json, or a folder.
        slug: Name of the graph on Neuronpedia; made from the prompt if not given.
    """
    check_writable(out, html, None if neuronpedia is None or neuronpedia.is_dir() else neuronpedia)
    if top < 0:
        raise ValueError(f"--top is {top}; give the number of latents to list, 0 for none.")
    if slug and neuronpedia is None:
        raise ValueError("--slug needs --neuronpedia.")
    import torch

    from scope_lens.circuits import export
    from scope_lens.circuits.attribution import attribute
    from scope_lens.circuits.pruning import check_masses

    check_masses(node_mass=node_mass, edge_mass=edge_mass)
    if neuronpedia is not None:
        slug = slug or (None if neuronpedia.suffix == ".json" else _slug(prompt))
        export.file_of(neuronpedia, slug)
    wanted = _wanted(model, site=site, layer=layer, width=width, l0=l0, saes=saes, local_dir=local_dir)
    loaded = language_model(model, device=device, dtype=dtype)
    place = next(iter(loaded.model.parameters())).device
    dictionaries = [load(device=place, dtype=getattr(torch, dtype)) for load in wanted]
    found = attribute(loaded, prompt, saes=dictionaries, targets=target or None, max_latents=max_latents)
    if out is not None:
        found.save(out)
    pruned = found.prune(node_mass=node_mass, edge_mass=edge_mass)
    _report(found, pruned, top=top)
    if neuronpedia is not None:
        say(f"written to {export.neuronpedia(pruned, neuronpedia, slug=slug)}")
    if html is not None:
        from scope_lens import figures

        figures.write_html(figures.graph(pruned), html)


def _wanted(
    model: str,
    *,
    site: Sequence[SiteName],
    layer: Sequence[int],
    width: str,
    l0: int | Literal["canonical"],
    saes: Sequence[str],
    local_dir: Path | None,
) -> "list[Callable[..., HookedSAE]]":
    """Resolve everything that was asked for before any model is loaded."""
    from scope_lens.releases import loaders

    if not site and not saes:
        raise ValueError("Name the dictionaries: --site, e.g. transcoder, or --saes.")
    if layer and not site:
        raise ValueError("--layer needs --site.")
    wanted = [load for reference in saes for load in loaders(reference, local_dir=local_dir).values()]
    if not site:
        return wanted
    if model == EMBEDDED and not Path(model).exists():
        from scope_lens import demo

        # They are small, and loading them says which sites and layers there are.
        return wanted + [sae.to for sae in demo.load_saes(sites=site, layers=layer or None)]
    return wanted + _published(model, site, layer, width=width, l0=l0, local_dir=local_dir)


def _published(
    model: str,
    site: Sequence[SiteName],
    layer: Sequence[int],
    *,
    width: str,
    l0: int | Literal["canonical"],
    local_dir: Path | None,
) -> "list[Callable[..., HookedSAE]]":
    """Gemma Scope's dictionaries of some sites, one a layer."""
    from scope_lens.releases import find, load, pick

    places: list[tuple[str, int | None]] = []
    for name in site:
        there = {release.layer for release in find(model=model, site=name, width=width)}
        layers = [None] if name == "embedding" else layer or sorted(number for number in there if number is not None)
        places += [(name, number) for number in layers]
    chosen = [pick(model=model, site=name, layer=number, width=width, l0=l0) for name, number in places]
    if not chosen:
        raise ValueError(f"Gemma Scope has no dictionaries of {', '.join(site)} of width {width} for {model}.")
    return [partial(load, release, local_dir=local_dir) for release in chosen]


def _slug(prompt: str) -> str:
    """A file name from the first words of a prompt."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:_LONGEST_SLUG].strip("-") or "graph"


def _report(found: "AttributionGraph", pruned: "AttributionGraph", *, top: int) -> None:
    """Print what was explained, the strongest latents, the scores and the checks."""
    from scope_lens.circuits.graph import Kind

    ends = [*found.find(kind=Kind.LOGIT).tolist(), *found.find(kind=Kind.DIRECTION).tolist()]
    table(
        ("target", "probability", "logit above the mean", "of it bias"),
        [
            (
                repr(found.label[node]),
                f"{float(found.activation[node]):.1%}",
                f"{float(found.pre_activation[node]):.3f}",
                f"{float(found.bias[node]):.3f}",
            )
            for node in ends
        ],
        left=(0,),
    )
    influence = found.influence()
    latents = found.find(kind=Kind.LATENT)
    strongest: list[int] = latents[influence[latents].argsort(descending=True, stable=True)[:top]].tolist()
    say("")
    table(
        ("site", "latent", "position", "token", "activation", "influence"),
        [
            (
                found.site[node],
                str(int(found.index[node])),
                str(int(found.pos[node])),
                repr(found.token_strings[int(found.pos[node])]),
                f"{float(found.activation[node]):.2f}",
                f"{float(influence[node]):.4f}",
            )
            for node in strongest
        ],
        left=(0, 3),
    )
    say("")
    for what, one in (("whole", found), ("pruned", pruned)):
        scores = one.scores()
        say(
            f"{what}: {one.n_nodes:,} nodes and {len(one.edges.source):,} edges, replacement score "
            f"{scores.replacement:.3f}, completeness {scores.completeness:.3f}"
        )
    checks = found.checks
    say(
        f"checked: the logits are the model's to {checks.logits:.0e}; sources and bias add up to every target's "
        f"pre-activation to {checks.conservation:.0e}"
    )
