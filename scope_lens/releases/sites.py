"""Where Gemma Scope's dictionaries attach: the table that no file carries.

A `params.npz` holds five arrays and no configuration, so the site follows from the repository's name. The hook of each
site (Gemma Scope, section 3.1 and Appendix B; the hook names are TransformerLens'):

- res: the residual stream after a layer, `blocks.L.hook_resid_post`.
- mlp: the MLP's output after its post-norm, `blocks.L.hook_mlp_out`. Not `mlp.hook_out`, which is before that norm.
- att: the heads' outputs before `W_O`, `blocks.L.attn.hook_z`, flattened to head * d_head + dim.
- transcoder: reads the RMS-normalised MLP input without the norm's gain, `blocks.L.ln2.hook_normalized`, and writes
  `blocks.L.hook_mlp_out`.
- embedding: the token embeddings, `hook_embed`. The dictionaries were trained on rows of the embedding matrix, while
  the hook carries those rows times sqrt(d_model); `scope_lens.releases.loading` folds that factor in.
"""

import re
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple, get_args

Site = Literal["res", "mlp", "att", "transcoder", "embedding"]
SITES: tuple[Site, ...] = get_args(Site)


class Hooks(NamedTuple):
    """The hook a dictionary reads and the hook it writes."""

    hook_in: str
    hook_out: str


class ModelShape(NamedTuple):
    """The sizes of a language model that its dictionaries have to fit.

    Attributes:
        n_layers: Number of layers.
        d_model: Width of the residual stream.
        d_heads: Number of query heads times their width.
    """

    n_layers: int
    d_model: int
    d_heads: int


class Repo(NamedTuple):
    """What one of the nine repositories holds: dictionaries of one model at one site (and at the embedding, in two)."""

    model: str
    site: Site
    embedding: bool = False


MODELS: Mapping[str, ModelShape] = MappingProxyType(
    {
        "google/gemma-2-2b": ModelShape(n_layers=26, d_model=2304, d_heads=2048),
        "google/gemma-2-9b": ModelShape(n_layers=42, d_model=3584, d_heads=4096),
        "google/gemma-2-9b-it": ModelShape(n_layers=42, d_model=3584, d_heads=4096),
        "google/gemma-2-27b": ModelShape(n_layers=46, d_model=4608, d_heads=4096),
    }
)

REPOS: Mapping[str, Repo] = MappingProxyType(
    {
        "google/gemma-scope-2b-pt-res": Repo("google/gemma-2-2b", "res", embedding=True),
        "google/gemma-scope-2b-pt-mlp": Repo("google/gemma-2-2b", "mlp"),
        "google/gemma-scope-2b-pt-att": Repo("google/gemma-2-2b", "att"),
        "google/gemma-scope-2b-pt-transcoders": Repo("google/gemma-2-2b", "transcoder"),
        "google/gemma-scope-9b-pt-res": Repo("google/gemma-2-9b", "res", embedding=True),
        "google/gemma-scope-9b-pt-mlp": Repo("google/gemma-2-9b", "mlp"),
        "google/gemma-scope-9b-pt-att": Repo("google/gemma-2-9b", "att"),
        "google/gemma-scope-27b-pt-res": Repo("google/gemma-2-27b", "res"),
        "google/gemma-scope-9b-it-res": Repo("google/gemma-2-9b-it", "res"),
    }
)


def hooks_for(site: str, layer: int | None) -> Hooks:
    """Name the hooks of a site, as a Gemma 2 or Gemma 3 bridge spells them.

    Args:
        site: One of `SITES`.
        layer: Number of the layer; None for the embedding.

    Raises:
        KeyError: An unknown site.
        ValueError: A layer missing, or given for the embedding.
    """
    if site in SITES and (layer is None) != (site == "embedding"):
        raise ValueError(
            f"Site {site!r} with layer={layer}: every site but 'embedding' has a layer, and that has none."
        )
    match site:
        case "res":
            return Hooks(f"blocks.{layer}.hook_resid_post", f"blocks.{layer}.hook_resid_post")
        case "mlp":
            return Hooks(f"blocks.{layer}.hook_mlp_out", f"blocks.{layer}.hook_mlp_out")
        case "att":
            return Hooks(f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.attn.hook_z")
        case "transcoder":
            return Hooks(f"blocks.{layer}.ln2.hook_normalized", f"blocks.{layer}.hook_mlp_out")
        case "embedding":
            return Hooks("hook_embed", "hook_embed")
        case _:
            raise KeyError(unknown("site", site, SITES))


class Place(NamedTuple):
    """A site and a layer; the embedding has no layer."""

    site: Site
    layer: int | None


def place_of(hooks: Hooks) -> Place | None:
    """Say which site and layer two hooks are, the inverse of `hooks_for`; None for hooks of no site."""
    found = re.match(r"blocks\.(\d+)\.", hooks.hook_out)
    layer = int(found.group(1)) if found else None
    for site in SITES:
        if (site == "embedding") == (layer is None) and hooks_for(site, layer) == hooks:
            return Place(site, layer)
    return None


def activation_width(model: str, site: Site) -> int | None:
    """Width of a site's activation in one of Gemma Scope's models; None for any other model."""
    shape = MODELS.get(model)
    if shape is None:
        return None
    return shape.d_heads if site == "att" else shape.d_model


def full_name(name: str) -> str:
    """Put the organisation before a Gemma name that lacks it: "gemma-2-2b" is "google/gemma-2-2b"."""
    return name if "/" in name else f"google/{name}"


def unknown(kind: str, found: object, known: Collection[object]) -> str:
    """Text of the error for a name that is not known: the nearest match and what there is."""
    import difflib  # only errors need it

    names = [str(name) for name in known]
    near = difflib.get_close_matches(str(found), names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"Gemma Scope has no {kind} {found!r}.{hint} Known: {', '.join(names)}."
