"""What a node of an attribution graph is called, and what the mouse shows of it."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape

from scope_lens.circuits.graph import AttributionGraph, Kind
from scope_lens.figures.graph_edges import Edge

_MOST = 5  # edges listed each way
_SITES = {
    "hook_mlp_out": "MLP",
    "hook_z": "attention",
    "hook_resid_post": "residual",
    "hook_resid_pre": "residual before",
    "hook_embed": "embedding",
    "": "groups",
}


def site_name(site: str) -> str:
    """A site without its layer: "MLP", "attention", "residual", "embedding", or the hook's own name."""
    own = site.split(".", maxsplit=2)[-1] if site.startswith("blocks.") else site
    return _SITES.get(site.rsplit(".", maxsplit=1)[-1], own)


def visible(token: str) -> str:
    """A token as text: without the blanks around it, unless it has nothing else, and with line breaks visible."""
    shown = token.replace("\n", "↵").replace("\t", "→").replace("\r", "")
    return shown.strip(" ") or "·" * max(1, len(shown))


def html(text: str) -> str:
    """A token or name as a figure writes it, where "<bos>" would be taken for markup."""
    return escape(visible(text), quote=False)


def names(graph: AttributionGraph, labels: Mapping[tuple[str, int], str]) -> list[str]:
    """A short name for every node, HTML escaped."""
    columns = (graph.kind.tolist(), graph.layer.tolist(), graph.index.tolist(), graph.site, graph.label)
    found: list[str] = []
    for kind, layer, index, site, label in zip(*columns, strict=True):
        place = site_name(site) if layer < 0 else f"L{layer} {site_name(site)}"
        match Kind(kind):
            case Kind.TOKEN:
                name = f"token “{html(label)}”"
            case Kind.LOGIT:
                name = f"logit “{html(label)}”"
            case Kind.DIRECTION:
                name = html(label)
            case _ if label:
                name = html(label)
            case Kind.LATENT:
                text = labels.get((site, index))
                name = f"{place} #{index}" + (f" {html(text)}" if text else "")
            case other:
                name = f"{place} {other.name.lower()}"
        found.append(name)
    return found


def hover_texts(
    graph: AttributionGraph, called: Sequence[str], edges: Sequence[Edge], influence: Sequence[float]
) -> list[str]:
    """What the mouse shows at every node: its numbers, and its strongest edges each way.

    Args:
        graph: The graph.
        called: Name of every node, and of the bias nodes behind them.
        edges: All edges, those of the bias included.
        influence: Of every node.
    """
    into: defaultdict[int, list[Edge]] = defaultdict(list)
    out: defaultdict[int, list[Edge]] = defaultdict(list)
    for edge in edges:
        into[edge.target].append(edge)
        out[edge.source].append(edge)
    numbers = (graph.activation, graph.pre_activation, graph.cumulative, graph.dropped)
    texts: list[str] = []
    tokens = [html(token) for token in graph.token_strings]
    for node, (kind, pos) in enumerate(zip(graph.kind.tolist(), graph.pos.tolist(), strict=True)):
        activation, pre_activation, cumulative, dropped = (float(column[node]) for column in numbers)
        lines = [f"<b>{called[node]}</b>", f"at position {pos}, “{tokens[pos]}”"]
        if kind == Kind.LOGIT:
            lines.append(f"probability {activation:.1%}")
        elif kind == Kind.LATENT:
            lines.append(f"activation {activation:.3g}")
        share = "" if math.isnan(cumulative) else f" (with all above it {cumulative:.0%})"
        lines.append(f"influence {influence[node]:.3g}{share}")
        if not math.isnan(pre_activation):
            rest = f", of which {dropped:.3g} was pruned" if dropped else ""
            lines.append(f"pre-activation {pre_activation:.3g}{rest}")
        lines += _listed("from", into[node], [edge.source for edge in into[node]], called)
        lines += _listed("to", out[node], [edge.target for edge in out[node]], called)
        texts.append("<br>".join(lines))
    return texts


def bias_text(pos: int, edges: Sequence[Edge], called: Sequence[str]) -> str:
    """What the mouse shows at the bias of a position."""
    return "<br>".join([f"<b>bias of position {pos}</b>", *_listed("to", edges, [e.target for e in edges], called)])


def _listed(word: str, edges: Sequence[Edge], ends: Sequence[int], called: Sequence[str]) -> list[str]:
    """The strongest edges one way, each with its other end."""
    if not edges:
        return []
    ranked = sorted(zip(edges, ends, strict=True), key=lambda pair: -abs(pair[0].weight))
    more = [f"  and {len(ranked) - _MOST:,} more"] if len(ranked) > _MOST else []
    return [f"<i>{word}</i>", *(f"  {edge.weight:+.3g}  {called[end]}" for edge, end in ranked[:_MOST]), *more]
