"""Attribution graphs as data: nodes as columns, direct effects as sparse rows. Nothing here knows a model.

A graph is the linear model of one prompt (`scope_lens.circuits.attribution`), after Ameisen et al. 2025, "Circuit
Tracing". An edge is the direct effect of a source on the pre-activation of a target; what no source carries is the
target's bias, and what pruning took away from its row is `dropped`, so that for every target

    dense().sum(1) + bias + dropped == pre_activation

1. Nodes are matched by (kind, site, layer, pos, index), never by their order; `find` looks them up.
2. `influence`, `scores` and `prune` follow the paths from the start targets back (`influence`, `pruning`).
3. `subgraph`, `merge` and `merge_positions` make smaller graphs that keep the equation (`merging`).
4. `save` and `load` keep it in one file (`graph_file`); `to_networkx` hands it on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from scope_lens.circuits import influence, merging, pruning
from scope_lens.circuits.edges import Edges, Part, check, part, row_sums, targets_of
from scope_lens.circuits.graph_file import damaged, read_graph, write_graph
from scope_lens.circuits.graph_records import GraphChecks, GraphScores, Kind
from scope_lens.circuits.networkx_graph import networkx_graph

if TYPE_CHECKING:
    from scope_lens.circuits.networkx_graph import DiGraph

_COLUMNS = (
    "kind", "layer", "pos", "index", "stage", "activation", "start", "bias", "pre_activation", "dropped", "cumulative",
)  # fmt: skip
_DESCRIBED = ("site", "label", "token_strings", "n_layers", "d_vocab", "model", "sites", "sources", "settings")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AttributionGraph:
    """The direct effects of a prompt's tokens, latents and errors on its latents and on chosen targets.

    Attributes:
        tokens: The prompt, (pos,).
        kind: `Kind` of every node, (node,), int64.
        layer: Layer of every node; tokens -1, logits and directions `n_layers`.
        pos: Position of every node.
        index: Number of the latent, token id, vocabulary id of the logit; -1 for errors, rests and directions.
        stage: Place in the order of the graph: an edge runs to a larger one. In a fresh graph the number of the
            dictionary in `sites`; tokens -1, logits and directions `len(sites)`.
        site: The dictionary's `hook_out` for latents, errors and rests; "hook_embed"; "ln_final.hook_out".
        label: The string of a token or logit, the name of a direction or of a merged group, else empty.
        activation: Of latents; the probability of logits, 1 for directions, NaN elsewhere.
        start: Where influence begins: the probability of logits, 1 for directions and latents asked for, else 0.
        bias: What no source carries, of targets; NaN elsewhere.
        pre_activation: What the target's row, bias and `dropped` add up to; NaN elsewhere.
        dropped: What pruning, `subgraph` and merging took out of the target's row; NaN elsewhere.
        cumulative: Share of all influence held by the nodes up to this one, most influential first, in the graph that
            was pruned; NaN before.
        directions: What each DIRECTION node reads at the final norm's output, in the order of these nodes.
        edges: The direct effects.
        token_strings: The prompt as strings, one a position.
        n_layers: Layers of the model.
        d_vocab: Size of its vocabulary.
        model: Its id.
        sites: `hook_out` of the dictionaries, in the order of the graph.
        sources: Where each of them came from, release and path with a "/" between, or "".
        checks: What attribution found when it checked itself.
        settings: How the graph was made.

    Raises:
        ValueError: Columns of different lengths, a node outside the prompt, or edges that are no compressed rows or run
            backwards.
    """

    tokens: Int[Tensor, " pos"]
    kind: Int[Tensor, " node"]
    layer: Int[Tensor, " node"]
    pos: Int[Tensor, " node"]
    index: Int[Tensor, " node"]
    stage: Int[Tensor, " node"]
    site: Sequence[str]
    label: Sequence[str]
    activation: Float[Tensor, " node"]
    start: Float[Tensor, " node"]
    bias: Float[Tensor, " node"]
    pre_activation: Float[Tensor, " node"]
    dropped: Float[Tensor, " node"]
    cumulative: Float[Tensor, " node"]
    directions: Float[Tensor, "direction d_model"]
    edges: Edges
    token_strings: Sequence[str]
    n_layers: int
    d_vocab: int
    model: str
    sites: Sequence[str]
    sources: Sequence[str]
    checks: GraphChecks
    settings: Mapping[str, str | int | float | bool | None]

    def __post_init__(self) -> None:
        self._check_columns()
        check(self.edges, self.stage)
        idle = ~self.is_target & (self.edges.row_lengths > 0)
        if bool(idle.any()):
            node = int(idle.nonzero()[0])
            raise ValueError(f"Node {node} ({self.describe(node)}) has edges into it but no pre_activation.")

    def __repr__(self) -> str:
        counts = {kind.name.lower(): int((self.kind == kind).sum()) for kind in Kind}
        nodes = ", ".join(f"{number} {name}" for name, number in counts.items() if number)
        return (
            f"AttributionGraph({self.model}, {len(self.tokens)} tokens, {self.n_nodes} nodes ({nodes}), "
            f"{len(self.edges.source)} edges)"
        )

    @property
    def n_nodes(self) -> int:
        """Number of nodes."""
        return len(self.kind)

    @property
    def is_target(self) -> Bool[Tensor, " node"]:
        """Which nodes have a row: those with a pre-activation. The row is empty where all of it is bias."""
        return ~self.pre_activation.isnan()

    @property
    def targets(self) -> Int[Tensor, " target"]:
        """Numbers of the nodes that are targets."""
        return self.is_target.nonzero()[:, 0]

    def dense(self) -> Float[Tensor, "target source"]:
        """A[t, s] = direct effect of node s on the pre-activation of node t; zero rows for nodes that are no targets.

        Both axes are all nodes. Memory grows with their square.
        """
        dense = self.edges.weight.new_zeros(self.n_nodes, self.n_nodes)
        dense[targets_of(self.edges), self.edges.source] = self.edges.weight
        return dense

    def conservation(self) -> Float[Tensor, " target"]:
        """|sum of row + bias + dropped - pre_activation| / (sum of |row| + |bias| + |dropped|), one for each target."""
        targets = self.targets
        bias, dropped = self.bias[targets].double(), self.dropped[targets].double()
        row = row_sums(self.edges, self.edges.weight)[targets]
        residual = (row + bias + dropped - self.pre_activation[targets].double()).abs()
        size = row_sums(self.edges, self.edges.weight.abs())[targets] + bias.abs() + dropped.abs()
        return torch.where(residual == 0, 0, residual / size)

    def find(
        self,
        *,
        kind: Kind | int | None = None,
        site: str | None = None,
        layer: int | None = None,
        pos: int | None = None,
        index: int | None = None,
    ) -> Int[Tensor, " found"]:
        """Numbers of the nodes that fit all that is given, ascending; empty where there is none.

        Args:
            kind: Their kind.
            site: Their site, as spelt there.
            layer: Their layer.
            pos: Their position; negative counts from the end.
            index: Number of the latent, token id or vocabulary id.

        Raises:
            ValueError: A site that no node of this graph has, or a position outside the prompt.
        """
        fits = torch.ones_like(self.kind, dtype=torch.bool)
        if pos is not None:
            if not -len(self.tokens) <= pos < len(self.tokens):
                raise ValueError(f"pos={pos} is outside the prompt of {len(self.tokens)} tokens.")
            pos %= len(self.tokens)
        for column, value in ((self.kind, kind), (self.layer, layer), (self.pos, pos), (self.index, index)):
            if value is not None:
                fits &= column == int(value)
        if site is not None:
            there = torch.tensor([name == site for name in self.site], dtype=torch.bool, device=fits.device)
            if not bool(there.any()) and site not in self.sites:
                raise ValueError(f"No node of this graph is at {site!r}; its sites are {sorted({*self.site})}.")
            fits &= there
        return fits.nonzero()[:, 0]

    def describe(self, node: int) -> str:
        """Name a node in words, as in "latent 49 of blocks.0.hook_mlp_out at position 5"."""
        kind, index, pos = Kind(int(self.kind[node])), int(self.index[node]), int(self.pos[node])
        what = kind.name.lower()
        number = "" if index < 0 else f" {index}"
        label = f" {self.label[node]!r}" if self.label[node] else ""
        place = "" if kind in {Kind.TOKEN, Kind.LOGIT, Kind.DIRECTION} else f" of {self.site[node]}"
        return f"{what}{number}{label}{place} at position {pos}"

    def influence(self) -> Float[Tensor, " node"]:
        """I = w M + w M^2 + ..., M the absolute weights over their sum by row, w the start weights; not cumulative."""
        return influence.influence(self.edges, self.stage, self.start).to(self.edges.weight.dtype)

    def scores(self, *, count_dropped: bool = True) -> GraphScores:
        """How much of the influence runs through latents: replacement and completeness score.

        Args:
            count_dropped: Count what pruning took out of a row as missed, like a rest. Without it the scores are of
                what is left, as viewers show them, and rise the more is pruned. A fresh graph has dropped nothing.
        """
        return influence.scores(
            self.edges,
            self.stage,
            self.start,
            token=self.kind == Kind.TOKEN,
            missed=(self.kind == Kind.ERROR) | (self.kind == Kind.REST),
            beside=self.dropped.nan_to_num().abs() * count_dropped,
        )

    def prune(self, *, node_mass: float = 0.8, edge_mass: float = 0.98) -> "AttributionGraph":
        """Keep the nodes, and between them the edges, that hold most of the influence (see `pruning`).

        Tokens, logits, directions and all start targets stay. Latents that nothing but bias ever fed count as sources.
        What the rows of the nodes that stay lose goes to `dropped`.

        Args:
            node_mass: Share of all influence that the kept nodes reach, from 0 to 1; 1 keeps all.
            edge_mass: The same of edges.

        Raises:
            ValueError: A mass that is no share.
        """
        ends = (self.kind == Kind.TOKEN) | (self.kind == Kind.LOGIT) | (self.kind == Kind.DIRECTION) | (self.start > 0)
        pruned = pruning.prune(
            self.edges,
            self.stage,
            self.start,
            always=ends,
            fed=(self.kind == Kind.LATENT) & (self.edges.row_lengths > 0),
            node_mass=node_mass,
            edge_mass=edge_mass,
        )
        masses = {"node_mass": node_mass, "edge_mass": edge_mass}
        cumulative = pruned.cumulative[pruned.nodes].to(self.cumulative.dtype)
        return self._part(pruned.nodes, pruned.part, cumulative=cumulative, settings={**self.settings, **masses})

    def subgraph(self, nodes: Sequence[int] | Int[Tensor, " kept"]) -> "AttributionGraph":
        """Keep some nodes and the edges between them; what the others gave to their rows goes to `dropped`.

        Args:
            nodes: Their numbers, in any order; the graph's order stays.

        Raises:
            ValueError: A number that is no node, or a mask in place of numbers.
        """
        numbers = self.kind.new_tensor(merging.node_numbers(self.n_nodes, nodes)).unique()
        return self._part(numbers, part(self.edges, numbers))

    def merge(self, groups: Mapping[str, Sequence[int] | Int[Tensor, " member"]]) -> "AttributionGraph":
        """Make one node of each group: rows and columns are summed, edges inside it go to `dropped` (see `merging`).

        The group takes the place of its first member and the group's name as label. It keeps what its members share of
        site ("" otherwise) and index (-1 otherwise); layer and position are the largest of theirs, activation and start
        weight the sum.

        Args:
            groups: Node numbers by the group's name.

        Raises:
            ValueError: An empty group, a number that is no node, nodes of different kinds in one group, a node in two,
                or groups such that a path leaves one and comes back.
        """
        numbers = {name: merging.node_numbers(self.n_nodes, members) for name, members in groups.items()}
        firsts = merging.firsts_of_groups(self.n_nodes, numbers)
        labels = [*self.label]
        for name, members in numbers.items():
            kinds = {Kind(kind).name for kind in self.kind[members].tolist()}
            if len(kinds) > 1:
                raise ValueError(f"Group {name!r} has nodes of the kinds {sorted(kinds)}; group each kind by itself.")
            labels[min(members)] = name
        return self._merged(firsts.to(self.kind.device), labels, self.pos)

    def merge_positions(self, spans: Sequence[tuple[int, int]]) -> "AttributionGraph":
        """Make one position of each span: there the same latents, a site's errors, and the tokens become one node each.

        They stand at the span's last position. Sites keep their order, so that this never makes a circle.

        Args:
            spans: First position and the one after the last, of each span.

        Raises:
            ValueError: A span that is empty or outside the prompt, or two that overlap.
        """
        pos = merging.span_ends(len(self.tokens), spans).to(self.pos.device)[self.pos]
        labels, seen = [*self.label], dict[tuple[object, ...], int]()
        firsts: list[int] = []
        columns = (self.kind, self.layer, pos, self.index, self.stage)
        for node, (kind, *place) in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
            token = kind == Kind.TOKEN
            what = (kind, place[1]) if token else (kind, *place, self.site[node], self.label[node])
            first = seen.setdefault(what, node)
            firsts.append(first)
            if token and first != node:
                labels[first] += self.label[node]
        return self._merged(self.kind.new_tensor(firsts), labels, pos)

    def save(self, path: str | Path) -> None:
        """Write the graph into one file, whole or not at all: safetensors, with all else as JSON in its header.

        Args:
            path: The file, of any name; its folder is created if missing.

        Raises:
            OSError: The disk is full or cannot be written; an earlier file stays as it was.
        """
        tensors = {name: getattr(self, name) for name in ("tokens", "directions", *_COLUMNS)}
        tensors |= {f"edges.{name}": tensor for name, tensor in self.edges._asdict().items()}
        described = {name: getattr(self, name) for name in _DESCRIBED} | {"checks": self.checks._asdict()}
        write_graph(Path(path), tensors, described)

    @classmethod
    def load(cls, path: str | Path) -> "AttributionGraph":
        """Read what `save` wrote into the file `path`.

        Raises:
            FileNotFoundError: No such file.
            ValueError: No graph, a damaged one, or one of a newer version.
        """
        tensors, described = read_graph(Path(path))
        try:
            edges = Edges(**{name: tensors.pop(f"edges.{name}") for name in Edges._fields})
            checks = GraphChecks(**described.pop("checks"))
            return cls(**tensors, **described, edges=edges, checks=checks)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise damaged(Path(path), f"{type(error).__name__}: {error}".rstrip(".")) from None

    def to_networkx(self) -> "DiGraph[int]":
        """Give the graph to networkx: nodes by their number with their columns as attributes, edges with `weight`.

        `kind` is its name. An attribute is missing where the column is NaN.

        Raises:
            ImportError: networkx is not installed.
        """
        columns = {name: getattr(self, name).tolist() for name in _COLUMNS}
        columns |= {"kind": [Kind(kind).name for kind in columns["kind"]], "site": self.site, "label": self.label}
        return networkx_graph(columns, self.edges)

    def _part(self, nodes: Int[Tensor, " kept"], left: Part, **changed: Any) -> "AttributionGraph":
        """Keep nodes, ascending, and what is left of their edges."""
        columns: dict[str, Any] = {name: getattr(self, name)[nodes] for name in _COLUMNS}
        columns["dropped"] = (columns["dropped"].double() + left.lost).to(self.dropped.dtype)
        columns |= {name: [getattr(self, name)[node] for node in nodes.tolist()] for name in ("site", "label")}
        stays = torch.isin((self.kind == Kind.DIRECTION).nonzero()[:, 0], nodes)
        return replace(self, **columns | changed, directions=self.directions[stays], edges=left.edges)

    def _merged(
        self, firsts: Int[Tensor, " node"], labels: Sequence[str], pos: Int[Tensor, " node"]
    ) -> "AttributionGraph":
        """Make one node of all that share a first one, and take its label."""
        groups = merging.groups_of(firsts)
        edges, inside = merging.merged_edges(self.edges, groups)
        leaders: list[int] = groups.leaders.tolist()
        spelt = sorted({*self.site})
        site = groups.shared(self.kind.new_tensor([spelt.index(name) for name in self.site]))
        sums = {name: groups.total(getattr(self, name)) for name in ("activation", "start", "bias", "pre_activation")}
        sums["dropped"] = groups.total(self.dropped) + inside
        sizes: list[int] = groups.of.bincount().tolist()
        led, row = groups.of[self.kind == Kind.DIRECTION].unique(return_inverse=True)
        directions = self.directions.new_zeros(len(led), self.directions.shape[1]).index_add_(0, row, self.directions)
        names = [labels[node] if size > 1 else "" for node, size in zip(leaders, sizes, strict=True)]
        return replace(
            self,
            kind=self.kind[groups.leaders],
            layer=groups.largest(self.layer),
            pos=groups.largest(pos),
            index=groups.shared(self.index),
            stage=merging.stages_along(edges, groups.smallest(self.stage), names),
            site=["" if number < 0 else spelt[number] for number in site.tolist()],
            label=[labels[node] for node in leaders],
            **{name: value.to(getattr(self, name).dtype) for name, value in sums.items()},
            cumulative=groups.smallest(self.cumulative),
            directions=directions,
            edges=edges,
            settings={**self.settings, "merged": True},  # `verify` can take single nodes away, no groups
        )

    def _check_columns(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in (*_COLUMNS, "site", "label")}
        if len({*lengths.values()}) > 1:
            raise ValueError(f"Every column of nodes needs one entry a node; their lengths are {lengths}.")
        n_pos = len(self.tokens)
        if len(self.token_strings) != n_pos or len(self.sources) != len(self.sites):
            raise ValueError(
                f"token_strings needs one string a token and sources one a site; there are {n_pos} tokens, "
                f"{len(self.token_strings)} strings, {len(self.sites)} sites and {len(self.sources)} sources."
            )
        for name, limit in (("pos", n_pos), ("kind", len(Kind))):
            column = getattr(self, name)
            if bool(((column < 0) | (column >= limit)).any()):
                raise ValueError(
                    f"{name} must be from 0 to {limit - 1}; it goes from {int(column.min())} to {int(column.max())}."
                )
        n_directions = int((self.kind == Kind.DIRECTION).sum())
        if len(self.directions) != n_directions:
            raise ValueError(
                f"directions needs a vector for each of {n_directions} nodes; it has {len(self.directions)}."
            )
        for name in ("bias", "dropped"):
            if not torch.equal(getattr(self, name).isnan(), self.pre_activation.isnan()):
                raise ValueError(f"{name} must be NaN exactly where pre_activation is, at nodes that are no targets.")
