"""Attribution graphs for other viewers: the JSON that Neuronpedia and circuit-tracer's page read.

The file follows Neuronpedia's graph schema. Where circuit-tracer writes the same graph (transcoders alone), nodes,
links and influence are the same. What differs:

1. Ids. Latents of the MLP output are "<layer>_<latent>_<pos>", tokens "E_<token>_<pos>", logits
   "<n_layers + 1>_<token>_<pos>", as there. Latents of other sites carry a name, "3_att_42_5", and so do errors,
   "3_error_mlp_5": in circuit-tracer's files "0_3_5" is the error of layer 3 and also latent 3 of layer 0.
2. Types. The page has one source set for latents of type "cross layer transcoder" and one for attention, type "lorsa".
   Latents of a third kind of site are of type "unknown", so that the page does not show another latent's dashboard.
3. The bias is a node of type "bias" at every position that has targets. The links into a target add up to its
   `pre_activation` less `dropped`, which stand at the node.
"""

import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scope_lens.circuits.edges import targets_of
from scope_lens.circuits.graph import AttributionGraph, Kind
from scope_lens.releases import Release, release_of
from scope_lens.whole_file import whole_file

_MLP, _ATTENTION, _RESIDUAL, _EMBEDDING = "mlp", "att", "res", "embedding"
_NAMES = {  # with TransformerLens' other names of the same hooks
    **dict.fromkeys(("hook_mlp_out", "ln2_post.hook_out", "mlp.hook_out"), _MLP),
    **dict.fromkeys(("attn.hook_z", "attn.o.hook_in"), _ATTENTION),
    **dict.fromkeys(("hook_resid_post", "hook_out"), _RESIDUAL),
    **dict.fromkeys(("hook_embed", "embed.hook_out"), _EMBEDDING),
}
_NOTHING_CHOSEN = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}


def neuronpedia(
    graph: AttributionGraph,
    path: str | Path,
    *,
    slug: str | None = None,
    scan: str | None = None,
    labels: Mapping[tuple[str, int], str] | None = None,
    bias: bool = True,
    node_mass: float = 0.8,
    edge_mass: float = 0.98,
) -> Path:
    """Write a graph as one JSON file for Neuronpedia, whole or not at all.

    Args:
        graph: The graph. One that was never pruned is pruned first, as circuit-tracer does; one that was is written as
            it is.
        path: A file that ends in .json, or a folder (made if its parent exists), which gets a file of the slug's name.
        slug: Name of the graph; the file's name without its ending if that is given.
        scan: Model id on Neuronpedia; the last part of the graph's model, e.g. "gemma-2-2b".
        labels: Texts for latents, by site (as `graph.sites` spells it) and number.
        bias: Draw the bias. The page computes the two scores again and takes nodes that it does not know for logits, so
            without the bias its scores are those of `graph.scores(count_dropped=False)`.
        node_mass: Of the pruning, for a graph that was never pruned.
        edge_mass: Likewise.

    Returns:
        The file.

    Raises:
        ValueError: A folder without a slug, a slug that is no file name, or weights that are not finite.
        FileNotFoundError: The folder that would hold the file does not exist.
    """
    file, slug = file_of(Path(path), slug)
    file.parent.mkdir(exist_ok=True)
    if bool(graph.cumulative.isnan().all()):
        graph = graph.prune(node_mass=node_mass, edge_mass=edge_mass)
    nodes, biases = _nodes(graph, labels or {}), _bias_nodes(graph) if bias else {}
    links = _links(graph, [node["node_id"] for node in nodes], {pos: node["node_id"] for pos, node in biases.items()})
    scan = scan or graph.model.rstrip("/").rsplit("/", maxsplit=1)[-1]
    head = {"metadata": _metadata(graph, slug, scan), "qParams": _NOTHING_CHOSEN}
    every_node = ",\n".join(json.dumps(node, allow_nan=False) for node in (*nodes, *biases.values()))
    with whole_file(file) as part:
        part.write_text(
            f'{json.dumps(head, allow_nan=False)[:-1]},\n"nodes":[\n{every_node}\n],\n"links":[\n{links}\n]}}\n',
            encoding="utf-8",
        )
    return file


def file_of(path: Path, slug: str | None) -> tuple[Path, str]:
    """The file that `neuronpedia` writes and the name of the graph; it makes no folder yet.

    Raises:
        ValueError: A folder without a slug, or a slug that is no file name.
        FileNotFoundError: The folder that would hold the file does not exist.
    """
    if path.suffix == ".json":
        slug = path.stem if slug is None else slug
        folder, file = path.parent, path
    elif slug is None:
        raise ValueError(f"{path} is a folder, so the graph needs a name: pass slug=, or a path that ends in .json.")
    else:
        folder, file = path.parent, path / f"{slug}.json"
    if not slug or Path(slug).name != slug:
        raise ValueError(f"slug={slug!r} is no file name; leave out slashes.")
    if not folder.is_dir():
        raise FileNotFoundError(f"{file} cannot be written: there is no folder {folder}.")
    return file, slug


class _Family(NamedTuple):
    """What the page makes of one kind of site.

    Attributes:
        name: In ids: "mlp", "att", "res", "embedding", or the hook's name without its layer.
        latent: Type of its latents.
        error: Type of its errors and rests.
        is_first: Whether the page's first source set is its.
    """

    name: str
    latent: str
    error: str
    is_first: bool

    @property
    def has_pages(self) -> bool:
        """Whether the page looks its latents up."""
        return self.latent != "unknown"


_NO_FAMILY = _Family("", "unknown", "mlp reconstruction error", is_first=False)


def _families(sites: Sequence[str]) -> dict[str, _Family]:
    """The kind of every site."""
    names = {site: _name(site) for site in sites}
    # The first source set goes to the MLP where there is one, else to the residual stream.
    others = {*names.values()} - {_ATTENTION, _EMBEDDING}
    first = min(others, key=lambda name: (name != _MLP, name != _RESIDUAL, name), default=None)

    def family(name: str) -> _Family:
        if name == _ATTENTION:
            return _Family(name, "lorsa", "lorsa error", is_first=False)
        if name == first:
            return _Family(name, "cross layer transcoder", "mlp reconstruction error", is_first=True)
        return _NO_FAMILY._replace(name=name)

    return {site: family(name) for site, name in names.items()}


def _name(site: str) -> str:
    own = site.split(".", maxsplit=2)[-1] if site.startswith("blocks.") else site
    return _NAMES.get(own, own)


def _nodes(graph: AttributionGraph, labels: Mapping[tuple[str, int], str]) -> list[dict[str, Any]]:
    """One entry for every node, in the order of the graph."""
    families = _families(graph.sites)
    columns = (graph.kind, graph.layer, graph.pos, graph.index, graph.activation, graph.start, graph.cumulative)
    rows = zip(*(column.tolist() for column in columns), graph.site, graph.label, strict=True)
    likeliest = max(graph.find(kind=Kind.LOGIT).tolist(), key=lambda node: float(graph.start[node]), default=None)
    above, outside = str(graph.n_layers + 1), itertools.count(graph.d_vocab)
    nodes: list[dict[str, Any]] = []
    for number, (kind, layer, pos, index, activation, start, cumulative, site, label) in enumerate(rows):
        height = "E" if layer < 0 else str(layer)
        family = families.get(site, _NO_FAMILY)
        # The page tells the nodes of a layer and position apart by `feature`; where it has no page, any number will do.
        unpaged = -2 - number
        match Kind(kind):
            case Kind.TOKEN:
                node = _node(f"E_{index}_{pos}", pos, "E", pos, "embedding", f'Emb: "{label}"')
            case Kind.LOGIT | Kind.DIRECTION:
                # A direction takes a number behind the vocabulary. The page reads what follows "(p=" of every logit.
                word = index if index >= 0 else next(outside)
                node = _node(f"{above}_{word}_{pos}", word, above, pos, "logit", f'Output "{label}" (p={start:.3f})')
                node |= {"token_prob": start, "is_target_logit": number == likeliest}
            case other if label:  # a merged group
                kinds = "unknown" if other == Kind.LATENT else family.error
                node = _node(f"{height}_group_{number}_{pos}", unpaged, height, pos, kinds, label)
            case Kind.LATENT:
                name = f"{index}_{pos}" if family.name == _MLP else f"{family.name}_{index}_{pos}"
                feature = _paired(layer, index) if family.has_pages else unpaged
                text = labels.get((site, index)) or ("" if family.has_pages else f"latent {index} of {site}")
                node = _node(f"{height}_{name}", feature, height, pos, family.latent, text)
            case other:
                what = other.name.lower()
                feature = -1 if other == Kind.ERROR and family.is_first else unpaged
                name = f"{height}_{what}_{family.name}_{pos}"
                node = _node(name, feature, height, pos, family.error, f"{what} of {site}")
        is_end = kind in {Kind.LOGIT, Kind.DIRECTION}
        node["influence"] = None if is_end else _finite(cumulative)
        node["activation"] = _finite(activation) if kind == Kind.LATENT else None
        nodes.append(node)
    targets = graph.targets
    balance = zip(targets, graph.pre_activation[targets], graph.dropped[targets], strict=True)
    for number, pre_activation, dropped in (map(Tensor.item, row) for row in balance):
        nodes[int(number)] |= {"pre_activation": pre_activation, "dropped": dropped}
    return nodes


def _bias_nodes(graph: AttributionGraph) -> dict[int, dict[str, Any]]:
    """The bias, a node for every position that has targets, by position."""
    positions = graph.pos[graph.targets].unique().tolist()
    return {pos: _node(f"E_bias_{pos}", None, "E", pos, "bias", "Bias") for pos in positions}


def _node(node_id: str, feature: int | None, layer: str, pos: int, feature_type: str, text: str) -> dict[str, Any]:
    return {
        "node_id": node_id,
        "feature": feature,
        "layer": layer,
        "ctx_idx": pos,
        "feature_type": feature_type,
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": node_id,
        "clerp": text,
        "influence": None,
        "activation": None,
    }


def _paired(layer: int, index: int) -> int:
    """Cantor's pairing, from which the page reads layer and latent."""
    return (layer + index) * (layer + index + 1) // 2 + index


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _links(graph: AttributionGraph, names: Sequence[str], biases: Mapping[int, str]) -> str:
    """Every edge as JSON, and the bias of every target where it has a node.

    Graphs have tens of thousands of links, so each is put together from texts made once for its source and its target.
    """
    targets = graph.targets
    bias = graph.bias[targets]
    if not bool(graph.edges.weight.isfinite().all() and bias.isfinite().all()):
        raise ValueError(
            "The graph has edges or biases that are not finite, which JSON cannot hold. Attribute it again."
        )
    # Nine digits tell any two float32 numbers apart, and seventeen any two of float64.
    digits = 9 if graph.edges.weight.dtype == torch.float32 else 17
    begins = [f'{{"source":{json.dumps(name)},"target":' for name in names]
    goes_on = [f'{json.dumps(name)},"weight":' for name in names]
    of_edges = zip(
        graph.edges.source.tolist(), targets_of(graph.edges).tolist(), graph.edges.weight.tolist(), strict=True
    )
    links = [f"{begins[source]}{goes_on[target]}{weight:.{digits}g}}}" for source, target, weight in of_edges]
    for target, pos, weight in zip(targets.tolist(), graph.pos[targets].tolist(), bias.tolist(), strict=True):
        if pos in biases and weight:
            links.append(f'{{"source":{json.dumps(biases[pos])},"target":{goes_on[target]}{weight:.{digits}g}}}')
    return ",\n".join(links)


def _metadata(graph: AttributionGraph, slug: str, scan: str) -> dict[str, Any]:
    settings = {name: value for name, value in graph.settings.items() if value is not None}
    thresholds = {"node_threshold": settings.get("node_mass"), "edge_threshold": settings.get("edge_mass")}
    pruning = {name: value for name, value in thresholds.items() if value is not None}
    renamed = {"max_n_logits": "max_logits", "desired_logit_prob": "logit_mass", "max_feature_nodes": "max_latents"}
    checks = {f"check_{name}": value for name, value in graph.checks._asdict().items() if math.isfinite(value)}
    information = {
        "generator": {"name": "scope_lens", "version": version("scope-lens")},
        "source_urls": [url for source in graph.sources for url in _urls(source)],
        "create_time_ms": int(time.time() * 1000),
    }
    return {
        "slug": slug,
        "scan": scan,
        "transcoder_list": [source for source in graph.sources if source],
        "prompt_tokens": list(graph.token_strings),
        "prompt": "".join(graph.token_strings),
        **({"node_threshold": pruning["node_threshold"]} if "node_threshold" in pruning else {}),
        "schema_version": 1,  # latents' numbers are paired with their layers
        "feature_details": _source_sets(graph),
        "info": information,
        "generation_settings": {
            **settings,
            **{name: settings[own] for name, own in renamed.items() if own in settings},
            **checks,
        },
        "pruning_settings": pruning,
    }


def _source_sets(graph: AttributionGraph) -> dict[str, str]:
    """Names of the sets of dashboards, where all dictionaries of a kind that has pages are of one."""
    families = _families(graph.sites)
    found: dict[str, str] = {}
    for family in {*families.values()}:
        own = [source for site, source in zip(graph.sites, graph.sources, strict=True) if families[site] == family]
        ids = [None if release is None else release.neuronpedia for release in map(_release, own)]
        # "gemma-2-2b/20-gemmascope-transcoder-16k" is of the set named behind its layer.
        sets = {None if one is None else one.rsplit("/", maxsplit=1)[-1].split("-", maxsplit=1)[-1] for one in ids}
        only = sets.pop()
        if family.has_pages and not sets and only is not None:
            lorsa = family.name == _ATTENTION
            found["neuronpedia_lorsa_source_set" if lorsa else "neuronpedia_source_set"] = only
    return found


def _urls(source: str) -> list[str]:
    """Where a published dictionary can be looked at."""
    release = _release(source)
    if release is None:
        return []
    page = [] if release.neuronpedia is None else [f"https://www.neuronpedia.org/{release.neuronpedia}"]
    return [f"https://huggingface.co/{release.repo}/tree/main/{release.path}", *page]


def _release(source: str) -> Release | None:
    """The published dictionary behind "<release>/<path>", if it is one."""
    try:
        return release_of(source)
    except KeyError:
        return None
