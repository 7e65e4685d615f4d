"""`scope-lens demo | evaluate`: what a model loses by dictionaries, as a table."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from scope_lens.cli.app import app
from scope_lens.cli.inputs import ModelDtype, SiteName, check_writable, documents, language_model
from scope_lens.cli.terminal import say, table

if TYPE_CHECKING:
    from scope_lens.evaluation.each import Named
    from scope_lens.sae import HookedSAE

# Four forward passes for each of 16 dictionaries over this much text take about half a minute on one core.
_DEMO_DOCUMENTS = 8


@app.command(name="demo")
def demo(*, html: Path | None = None, json: Path | None = None) -> None:
    """Splice each embedded dictionary into the embedded model and measure what it loses.

    Args:
        html: Write a figure of fidelity by site to this file.
        json: Write the results to this file.
    """
    check_writable(html, json)
    import torch

    from scope_lens import demo as embedded
    from scope_lens.evaluation.each import evaluate_each

    saes = {sae.cfg.path: sae for sae in embedded.load_saes()}
    model = embedded.load_model()
    text = embedded.text()[:_DEMO_DOCUMENTS]
    threads = torch.get_num_threads()
    # Threads wait for each other longer than this small model computes, above all on a machine that does other things.
    torch.set_num_threads(1)
    try:
        _report(evaluate_each(model, text, saes=saes, path=json), html=html, total=len(saes), kept=json)
    finally:
        torch.set_num_threads(threads)


@app.command(name="evaluate")
def evaluate(
    saes: Annotated[tuple[str, ...], tyro.conf.Positional],
    *,
    model: str,
    text: tuple[Path, ...],
    site: SiteName | None = None,
    layer: int | None = None,
    local_dir: Path | None = None,
    context: int = 1024,
    batch_size: int = 8,
    positions: Literal["trained", "all"] = "trained",
    ablation: Literal["zero", "mean"] = "mean",
    dtype: ModelDtype = "float32",
    device: str | None = None,
    json: Path | None = None,
    html: Path | None = None,
) -> None:
    """Splice dictionaries into a model, each by itself, and measure what it loses on a text.

    Args:
        saes: Dictionaries: repository and path, Neuronpedia id, a params.npz, a folder that HookedSAE.save wrote, or a
            folder of dictionaries in Gemma Scope's layout.
        model: Language model: a hub name, a folder in the Hugging Face layout, or "demo" for the embedded one.
        text: UTF-8 files; documents in a file are separated by a line <|endoftext|>.
        site: Where a params.npz attaches, if its path does not say.
        layer: Layer of a params.npz, if its path does not say.
        local_dir: Mirror of Gemma Scope's repositories; then they are not downloaded.
        context: Tokens in a row.
        batch_size: Rows in a forward pass.
        positions: Splice where the dictionaries were trained, or everywhere.
        ablation: What loss recovered compares with.
        dtype: Of the model and the dictionaries.
        device: E.g. cuda:1; a GPU where there is one.
        json: Results, written as each dictionary finishes; what the file has of the same weights is not computed again.
        html: Figure of fidelity by site.
    """
    check_writable(html, json)
    stories = documents(text)
    wanted = _named(saes, site=site, layer=layer, local_dir=local_dir)
    import torch

    from scope_lens.evaluation.each import evaluate_each

    loaded = language_model(model, device=device, dtype=dtype)
    place = next(iter(loaded.model.parameters())).device
    results = evaluate_each(
        loaded,
        stories,
        saes={name: partial(load, device=place, dtype=getattr(torch, dtype)) for name, load in wanted.items()},
        path=json,
        batch_size=batch_size,
        context=context,
        positions=positions,
        ablation=ablation,
    )
    _report(results, html=html, total=len(wanted), kept=json)


def _named(
    references: Sequence[str], *, site: SiteName | None, layer: int | None, local_dir: Path | None
) -> "dict[str, Callable[..., HookedSAE]]":
    """Resolve everything that was asked for before any model is loaded."""
    from scope_lens.releases import loaders

    groups = [(ref, loaders(ref, site=site, layer=layer, local_dir=local_dir)) for ref in references]
    times = Counter(name for _, found in groups for name in found)
    wanted: dict[str, Callable[..., HookedSAE]] = {}
    for reference, found in groups:
        for name, load in found.items():
            # Two suites may hold equal paths; then the folder, as it was given, tells them apart.
            of_suite = name != reference and Path(reference).expanduser().is_dir()
            unique = str(Path(reference) / name) if of_suite and times[name] > 1 else name
            if unique in wanted:
                raise ValueError(f"{unique} is named twice; name each dictionary once.")
            wanted[unique] = load
    if not wanted:
        raise ValueError("Name at least one dictionary: repository and path, Neuronpedia id, file or folder.")
    return wanted


def _report(results: "Iterable[Named]", *, html: Path | None, total: int, kept: Path | None) -> None:
    """Print the table of what was evaluated, also when it was not everything, and write the figure."""
    done: list[Named] = []
    try:
        for named in results:
            done.append(named)  # noqa: PERF402
    except KeyboardInterrupt:
        resume = f"; {kept} holds them and the same command goes on from there" if kept and done else ""
        raise KeyboardInterrupt(f"interrupted after {len(done)} of {total} dictionaries{resume}") from None
    finally:
        if done:
            _fidelity_table(done)
            if html is not None:
                from scope_lens import figures

                figures.write_html(figures.fidelity([named.result for named in done]), html)


def _fidelity_table(done: "Sequence[Named]") -> None:
    from scope_lens.releases import Hooks, place_of, width_name

    header = (
        "site",
        "layer",
        "width",
        "L0",
        "FVU",
        "delta loss",
        "std. error",
        "splice-out",
        "recovered",
        "dictionary",
    )
    rows: list[tuple[str, ...]] = []
    for name, result in done:
        sae = result.settings["saes"][0]
        place = place_of(Hooks(sae["hook_in"], sae["hook_out"]))
        rows.append(
            (
                place.site if place else sae["hook_out"],
                "-" if place is None or place.layer is None else str(place.layer),
                width_name(sae["d_sae"]),
                f"{_only(result.l0):.1f}",
                f"{_only(result.fvu):.3f}",
                f"{result.delta_loss:.4f}",
                "-" if math.isnan(result.delta_loss_se) else f"{result.delta_loss_se:.4f}",
                f"{result.delta_loss_out:.4f}",
                f"{result.loss_recovered:.1%}",
                name,
            )
        )
    table(header, rows, left=(0, len(header) - 1))
    first = done[0].result
    say(
        f"\n{first.n_tokens:,} predictions in {first.settings['n_sequences']} sequences; clean loss "
        f"{first.ce_clean:.4f}. Losses are in nats per token."
    )


def _only(by_site: dict[str, float]) -> float:
    return next(iter(by_site.values()))
