"""The embedded model and its dictionaries: a small trained Gemma 2 with a suite in Gemma Scope's layout.

The model has 4 layers of width 192 and writes simple stories. Each layer has a residual, an MLP and an attention SAE
and a transcoder, of 1,024 latents each. The residual stream after layer 2 has a ladder, three L0s at each of two
widths. All of it is in the installed package, so nothing is downloaded:

    model = scope_lens.demo.load_model()
    saes = scope_lens.demo.load_saes(sites="res")
    model.run_with_saes(scope_lens.demo.text()[0], saes=saes)

`NOTICE.md` says where the weights and the text come from. `tests/scripts/train_demo_model.py` trains the model,
`tests/scripts/build_demo_suite.py` the dictionaries; docs/benchmarks/demo_suite.md has what they measure.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scope_lens.model import ScopeModel
    from scope_lens.releases.release import Release
    from scope_lens.releases.sites import Site
    from scope_lens.sae import HookedSAE

MODEL_NAME = "scope-lens/tiny-gemma2-stories"
_LADDER_LAYER = 2
_SEPARATOR = "\n<|endoftext|>\n"


def path() -> Path:
    """Give the folder that holds `model/` (Hugging Face layout), `suite/` (Gemma Scope's layout) and `text.txt`."""
    return Path(__file__).parent


def load_model() -> "ScopeModel":
    """Load the embedded language model in float32; its weights are stored in bfloat16."""
    from scope_lens.model import ScopeModel

    return ScopeModel.from_pretrained(path() / "model")


def load_saes(
    sites: "Site | Sequence[Site] | None" = None, layers: int | Sequence[int] | None = None
) -> "list[HookedSAE]":
    """Load the embedded dictionaries, one for each site and layer.

    Where the suite has a ladder, this is the rung of the smallest width with the middle L0.

    Args:
        sites: One or several of "res", "mlp", "att" and "transcoder"; None takes all.
        layers: One or several layers; None takes all.

    Raises:
        KeyError: A site or layer that the suite does not have.
    """
    from scope_lens.releases import load

    by_place = _by_place()
    wanted_sites = _wanted("site", sites, [site for site, _ in by_place])
    wanted_layers = _wanted("layer", layers, [layer for _, layer in by_place])
    chosen: list[Release] = []
    for (site, layer), rungs in by_place.items():
        if site in wanted_sites and layer in wanted_layers:
            narrow = [release for release in rungs if release.width == rungs[0].width]
            chosen.append(narrow[len(narrow) // 2])
    return [load(release, local_dir=path() / "suite") for release in chosen]


def load_ladder() -> "list[HookedSAE]":
    """Load the residual SAEs of layer 2: 1,024 and 4,096 latents, at three L0s each, by width and L0."""
    from scope_lens.releases import load

    return [load(release, local_dir=path() / "suite") for release in _by_place()["res", _LADDER_LAYER]]


def text() -> list[str]:
    """Give the hold-out documents: 161 stories that neither the model nor the dictionaries were trained on."""
    return (path() / "text.txt").read_text(encoding="utf-8").split(_SEPARATOR)


def _by_place() -> "dict[tuple[Site, int | None], list[Release]]":
    """List what the suite has at each site and layer, by width and L0."""
    from scope_lens.releases import open_suite

    places: dict[tuple[Site, int | None], list[Release]] = {}
    for release in open_suite(path() / "suite", model=MODEL_NAME):
        places.setdefault((release.site, release.layer), []).append(release)
    return places


def _wanted(kind: str, asked: object, there: Sequence[object]) -> set[object]:
    if asked is None:
        return set(there)
    wanted: set[object] = set(asked) if isinstance(asked, Sequence) and not isinstance(asked, str) else {asked}
    if missing := wanted - set(there):
        raise KeyError(
            f"The embedded suite has no {kind} {sorted(map(str, missing))}; it has {sorted(map(str, set(there)))}."
        )
    return wanted
