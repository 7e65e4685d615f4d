"""`scope-lens <verb>`: the package's public functions from a shell.

    scope-lens demo                                            the embedded model and its dictionaries
    scope-lens list --model gemma-2-2b --layer 20              what Gemma Scope contains
    scope-lens info gemma-2-2b/20-gemmascope-res-16k           one dictionary
    scope-lens evaluate google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71 \
        --model google/gemma-2-2b --text stories.txt --json results.json --html fidelity.html

Tables go to standard output, progress bars and errors to standard error. What a user can get wrong ends with one line
and exit code 1 (2 for the command line itself), Ctrl-C with 130. Nothing heavy is imported before a verb needs it.
"""

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from scope_lens.evaluation.each import Named
    from scope_lens.releases import Release
    from scope_lens.sae import HookedSAE

SiteName = Literal["res", "mlp", "att", "transcoder", "embedding"]
_DOCUMENTS = "\n<|endoftext|>\n"
# Four forward passes for each of 16 dictionaries over this much text take about half a minute on one core.
_DEMO_DOCUMENTS = 8
_INTERRUPTED = 130

_app = tyro.extras.SubcommandApp()


@_app.command(name="demo")
def demo(*, html: Path | None = None, json: Path | None = None) -> None:
    """Splice each embedded dictionary into the embedded model and measure what it loses.

    Args:
        html: Write a figure of fidelity by site to this file.
        json: Write the results to this file.
    """
    _check_writable(html, json)
    from scope_lens import demo as embedded
    from scope_lens.releases import loaders

    saes = loaders(str(embedded.path() / "suite"), model=embedded.MODEL_NAME)
    import torch

    from scope_lens.evaluation.each import evaluate_each

    model = embedded.load_model()
    text = embedded.text()[:_DEMO_DOCUMENTS]
    threads = torch.get_num_threads()
    # Threads wait for each other longer than this small model computes, above all on a machine that does other things.
    torch.set_num_threads(1)
    try:
        _report(evaluate_each(model, text, saes=saes, path=json), html=html, total=len(saes), kept=json)
    finally:
        torch.set_num_threads(threads)


@_app.command(name="list")
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
    _table(
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
    _say(f"\n{len(found)} {'dictionary' if len(found) == 1 else 'dictionaries'}")


@_app.command(name="info")
def info(reference: Annotated[str, tyro.conf.Positional]) -> None:
    """Say what one published dictionary is, where it attaches and how large its file is; needs no network.

    Args:
        reference: Repository and path, e.g. google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71, or
            Neuronpedia id, e.g. gemma-2-2b/20-gemmascope-res-16k.
    """
    from scope_lens.releases import release_of

    for name, value in list(_facts(release_of(reference))):
        _say(f"{name:<13}{value}")


@_app.command(name="evaluate")
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
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str | None = None,
    json: Path | None = None,
    html: Path | None = None,
) -> None:
    """Splice dictionaries into a model, each by itself, and measure what it loses on a text.

    Args:
        saes: Dictionaries: repository and path, Neuronpedia id, a params.npz, a folder that HookedSAE.save wrote, or a
            folder of dictionaries in Gemma Scope's layout.
        model: Language model: a hub name, or a folder in the Hugging Face layout.
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
    _check_writable(html, json)
    documents = [document for path in text for document in _documents(path)]
    wanted = _named(saes, site=site, layer=layer, local_dir=local_dir)
    import torch

    from scope_lens.evaluation.each import evaluate_each
    from scope_lens.model import ScopeModel
    from scope_lens.releases.placement import check_device

    if device is not None:
        check_device(device)

    kind = torch.float32 if dtype == "float32" else torch.bfloat16
    language_model = ScopeModel.from_pretrained(model, device=device, dtype=kind)
    place = next(iter(language_model.model.parameters())).device
    results = evaluate_each(
        language_model,
        documents,
        saes={name: partial(load, device=place, dtype=kind) for name, load in wanted.items()},
        path=json,
        batch_size=batch_size,
        context=context,
        positions=positions,
        ablation=ablation,
    )
    _report(results, html=html, total=len(wanted), kept=json)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: Words of the command line; None takes the process's.

    Returns:
        Exit code: 0, 1 for an error that the message explains, 130 after Ctrl-C.
    """
    try:
        _app.cli(
            prog="scope-lens",
            description="Gemma Scope's dictionaries on TransformerLens 4: what there is, what a model loses by them.",
            args=None if argv is None else list(argv),
        )
    except KeyboardInterrupt as interrupt:
        _complain(str(interrupt) or "interrupted")
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of the table, `head` say, has seen enough; Python would complain again when it flushes.
        sys.stdout = None
        return 0
    except (ValueError, KeyError, IndexError, OSError) as error:
        # str() of a KeyError puts its message into quotes.
        _complain(str(error.args[0]) if isinstance(error, KeyError) else str(error))
        return 1
    return 0


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
    _table(header, rows, left=(0, len(header) - 1))
    first = done[0].result
    _say(
        f"\n{first.n_tokens:,} predictions in {first.settings['n_sequences']} sequences; clean loss "
        f"{first.ce_clean:.4f}. Losses are in nats per token."
    )


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


def _documents(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no text file {path}.")
    try:
        return path.read_text(encoding="utf-8").split(_DOCUMENTS)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}).") from None


def _check_writable(*paths: Path | None) -> None:
    """Refuse before any work what could not be written after it."""
    for path in paths:
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise FileNotFoundError(f"{path} cannot be written: it is a folder, or its folder does not exist.")


def _only(by_site: dict[str, float]) -> float:
    return next(iter(by_site.values()))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int]) -> None:
    """Print rows in columns, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = (
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        _say("  ".join(cells).rstrip())


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


def _complain(message: str) -> None:
    sys.stderr.write(f"scope-lens: {' '.join(message.split())}\n")
