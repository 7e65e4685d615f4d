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
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from scope_lens.circuits.edges import Edges, check, row_sums, targets_of


class Kind(IntEnum):
    """What a node is."""

    LATENT = 0
    ERROR = 1  # what a dictionary misses at one position
    TOKEN = 2
    LOGIT = 3
    DIRECTION = 4  # read at the final norm's output
    REST = 5  # the latents of one site and position that are no nodes of their own, folded; a source only


class GraphScores(NamedTuple):
    """How much of the graph's influence runs through latents.

    Attributes:
        replacement: Influence of the tokens over that of tokens, errors and rests.
        completeness: Share of the inputs of all nodes, weighted by their influence, that is no error and no rest.
    """

    replacement: float
    completeness: float


class GraphChecks(NamedTuple):
    """What attribution found when it checked itself.

    Attributes:
        logits: Largest deviation of the linear model's logits from the model's own, over the largest logit.
        conservation: Largest residual of `AttributionGraph.conservation`.
        forward_only: Whether every edge runs to a later stage.
    """

    logits: float
    conservation: float
    forward_only: bool


@dataclass(frozen=True, kw_only=True, eq=False)
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
        edges: The direct effects.
        token_strings: The prompt as strings, one a position.
        n_layers: Layers of the model.
        d_vocab: Size of its vocabulary.
        model: Its id.
        sites: `hook_out` of the dictionaries, in the order of the graph.
        sources: Where each of them came from, "<release>/<path>", or "".
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
        """|sum of the row + bias + dropped - pre_activation| / (sum of |row| + |bias| + |dropped|), by target.

        Zero where nothing enters a target at all. The order is that of `targets`.
        """
        targets = self.targets
        bias, dropped = self.bias[targets].double(), self.dropped[targets].double()
        row = row_sums(self.edges, self.edges.weight)[targets]
        residual = (row + bias + dropped - self.pre_activation[targets].double()).abs()
        size = row_sums(self.edges, self.edges.weight.abs())[targets] + bias.abs() + dropped.abs()
        return torch.where(residual == 0, 0, residual / size)

    def find(
        self,
        *,
        kind: Kind | None = None,
        site: str | None = None,
        layer: int | None = None,
        pos: int | None = None,
        index: int | None = None,
    ) -> Int[Tensor, " found"]:
        """Numbers of the nodes that fit all that is given, ascending; empty where there is none.

        Args:
            kind: What they are.
            site: Their `site`, as spelt there.
            layer: Their layer.
            pos: Their position; negative counts from the end of the prompt.
            index: Their latent, token id or vocabulary id.

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

    def _check_columns(self) -> None:
        lengths = {
            name: len(getattr(self, name))
            for name in (
                "kind", "layer", "pos", "index", "stage", "site", "label", "activation", "start", "bias",
                "pre_activation", "dropped", "cumulative",
            )
        }  # fmt: skip
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
        for name in ("bias", "dropped"):
            if not torch.equal(getattr(self, name).isnan(), self.pre_activation.isnan()):
                raise ValueError(f"{name} must be NaN exactly where pre_activation is, at nodes that are no targets.")
