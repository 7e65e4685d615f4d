"""Influence, scores, pruning and merging, against dense float64, sums over paths, and the peer's stored results."""

from itertools import pairwise

import networkx as nx
import pytest
import torch
from graph_material import NAN, SITES, csr, random_graph, stored

from scope_lens.circuits import edges as edges_module
from scope_lens.circuits import merging
from scope_lens.circuits.graph import AttributionGraph, Kind
from scope_lens.circuits.pruning import cumulative, holds_mass

PROMPTS = ["len6", "len9"]


def normalised(dense: torch.Tensor) -> torch.Tensor:
    size = dense.double().abs()
    return size / size.sum(1, keepdim=True).clamp(min=1e-10)


def power_series(dense: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    matrix, flow = normalised(dense), start.double()
    total = torch.zeros_like(flow)
    for _ in range(len(dense)):
        flow = flow @ matrix
        total += flow
    return total


def top(scores: torch.Tensor, mass: float) -> torch.Tensor:
    """One score after the other, largest first, until the mass is reached; then those that tie with the last."""
    ordered, total, held = sorted(scores.flatten().tolist(), reverse=True), float(scores.sum()), 0.0
    for score in ordered:
        held += score
        if held >= mass * total:
            return (scores >= score) & (scores > 0)
    return scores > 0


def pruned_densely(graph: AttributionGraph, node_mass: float, edge_mass: float):
    dense, start = graph.dense().double(), graph.start
    ends = (graph.kind >= Kind.TOKEN) & (graph.kind <= Kind.DIRECTION) | (start > 0)
    fed = (graph.kind == Kind.LATENT) & (dense != 0).any(1) & ~ends
    nodes = top(power_series(dense, start), node_mass) | ends
    inner = dense * nodes * nodes[:, None]
    scores = normalised(inner) * (power_series(inner, start) + start)[:, None]
    edges = top(scores, edge_mass)
    for _ in range(graph.n_nodes):
        edges = edges & nodes & nodes[:, None]
        nodes = nodes & (ends | edges.any(0)) & (~fed | edges.any(1))
    return nodes, edges & nodes & nodes[:, None]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("block", [4_000_000, 5])
def test_influence_is_the_power_series(shuffle, block, monkeypatch):
    monkeypatch.setattr(edges_module, "_BLOCK", block)
    graph = random_graph(shuffle=shuffle)
    expected = power_series(graph.dense(), graph.start)
    assert expected[graph.kind == Kind.TOKEN].sum() > 0.1
    torch.testing.assert_close(graph.influence(), expected, rtol=1e-12, atol=1e-15)


def test_influence_is_the_sum_over_paths():
    graph = random_graph()
    few = [*graph.find(pos=3, site=SITES[0]), *graph.find(pos=3, site=SITES[1]), *graph.find(pos=2, kind=Kind.LATENT)]
    few += [*graph.find(kind=Kind.TOKEN), *graph.find(kind=Kind.LOGIT)]
    graph = graph.subgraph([int(node) for node in few])
    shares = normalised(graph.dense())
    drawn = graph.to_networkx()
    expected = torch.zeros(graph.n_nodes, dtype=torch.float64)
    for node in range(graph.n_nodes):
        for logit in graph.find(kind=Kind.LOGIT).tolist():
            for path in nx.all_simple_paths(drawn, node, logit) if node != logit else []:
                product = float(graph.start[logit])
                for source, target in pairwise(path):
                    product *= float(shares[target, source])
                expected[node] += product
    assert expected.max() > 0.1
    torch.testing.assert_close(graph.influence(), expected, rtol=1e-12, atol=1e-15)


def test_rows_too_small_to_divide_count_for_less():
    graph = random_graph()
    tiny = graph.dense()
    tiny[int(graph.find(kind=Kind.LOGIT, index=52))] *= 1e-11
    graph = random_graph(edges=csr(tiny), pre_activation=tiny.sum(1) + graph.bias)
    torch.testing.assert_close(graph.influence(), power_series(tiny, graph.start), rtol=1e-12, atol=1e-15)


def test_scores_count_rests_with_the_errors():
    graph = random_graph(shuffle=True)
    received, shares = power_series(graph.dense(), graph.start), normalised(graph.dense())
    missed = (graph.kind == Kind.ERROR) | (graph.kind == Kind.REST)
    tokens = received[graph.kind == Kind.TOKEN].sum()
    through = received + graph.start
    scores = graph.scores()
    assert scores.replacement == pytest.approx(float(tokens / (tokens + received[missed].sum())), rel=1e-12)
    expected = ((1 - shares[:, missed].sum(1)) * through).sum() / through.sum()
    assert scores.completeness == pytest.approx(float(expected), rel=1e-12)
    assert 0.05 < scores.replacement < 0.95


def test_what_was_pruned_is_missed():
    """As if every row had an error more, which writes what the row dropped."""
    whole = random_graph()
    graph = whole.prune(node_mass=0.6, edge_mass=0.7)
    n, targets = graph.n_nodes, graph.targets
    dense = torch.zeros(2 * n, 2 * n, dtype=torch.float64)
    dense[:n, :n] = graph.dense()
    dense[targets, n + targets] = graph.dropped[targets]
    start = torch.cat([graph.start, torch.zeros(n)])
    received, shares = power_series(dense, start), normalised(dense)
    missed = torch.ones(2 * n, dtype=torch.bool)
    missed[:n] = (graph.kind == Kind.ERROR) | (graph.kind == Kind.REST)
    tokens, through = received[:n][graph.kind == Kind.TOKEN].sum(), received + start
    scores = graph.scores()
    assert scores.replacement == pytest.approx(float(tokens / (tokens + received[missed].sum())), rel=1e-12)
    expected = ((1 - shares[:, missed].sum(1)) * through).sum() / through.sum()
    assert scores.completeness == pytest.approx(float(expected), rel=1e-12)
    assert scores.replacement < whole.scores().replacement
    left = random_graph().prune(node_mass=0.6, edge_mass=0.7).scores(count_dropped=False)
    assert scores.replacement < left.replacement
    assert whole.scores() == whole.scores(count_dropped=False)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_peers_influence_and_scores(shared_data, prompt):
    graph, tensors, meta = stored(shared_data / "graph-crosscheck/nano/expected" / prompt)
    torch.testing.assert_close(graph.influence(), tensors["node_influence"], rtol=1e-5, atol=1e-7)
    scores = graph.scores()
    assert scores.replacement == pytest.approx(meta["replacement_score"], abs=1e-6)
    assert scores.completeness == pytest.approx(meta["completeness_score"], abs=1e-6)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_peers_masks_and_cumulative_influence(shared_data, prompt):
    graph, tensors, meta = stored(shared_data / "graph-crosscheck/nano/expected" / prompt)
    pruned = graph.prune(node_mass=0.8, edge_mass=0.98)
    assert pruned.n_nodes == meta["kept_nodes"]
    assert len(pruned.edges.source) == meta["kept_edges"]
    stays = tensors["node_mask"]
    for name in ("kind", "layer", "pos", "index"):
        assert torch.equal(getattr(pruned, name), getattr(graph, name)[stays])
    expected = torch.where(tensors["edge_mask"], tensors["adjacency"], 0)[stays][:, stays]
    assert torch.equal(pruned.dense(), expected)
    torch.testing.assert_close(pruned.cumulative, tensors["cumulative"][stays], rtol=0, atol=1e-6)
    lost = torch.where(tensors["edge_mask"], 0, tensors["adjacency"])[stays].sum(1)
    torch.testing.assert_close(pruned.dropped[pruned.is_target], lost[pruned.is_target], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("masses", [(0.8, 0.98), (0.5, 0.5), (0.95, 0.7), (0.0, 0.0), (0.999, 0.999)])
def test_pruning_is_the_dense_definition(seed, masses):
    graph = random_graph(seed=seed, shuffle=seed % 2 == 1)
    if seed == 3:  # a latent that was asked for
        start = graph.start.clone()
        start[graph.find(kind=Kind.LATENT, site=SITES[1])[-1]] = 1.0
        graph = random_graph(seed=seed, shuffle=True, start=start)
    nodes, edges = pruned_densely(graph, *masses)
    pruned = graph.prune(node_mass=masses[0], edge_mass=masses[1])
    assert pruned.index.tolist() == graph.index[nodes].tolist()
    assert pruned.kind.tolist() == graph.kind[nodes].tolist()
    assert pruned.site == [site for site, stays in zip(graph.site, nodes, strict=True) if stays]
    assert torch.equal(pruned.dense(), (graph.dense() * edges)[nodes][:, nodes])
    assert pruned.conservation().max() < 1e-14
    assert torch.equal(pruned.pre_activation.nan_to_num(), graph.pre_activation[nodes].nan_to_num())
    assert pruned.settings["node_mass"] == masses[0]
    assert pruned.settings["edge_mass"] == masses[1]


def test_a_latent_that_bias_alone_feeds_stays_where_it_leads_somewhere():
    graph = random_graph()
    alone = int(graph.find(site=SITES[1], index=8))
    assert graph.is_target[alone]
    assert not graph.dense()[alone].any()
    assert len(graph.prune(node_mass=0.9).find(site=SITES[1], index=8)) == 1


def test_a_mass_of_one_keeps_every_node_and_edge_that_leads_somewhere():
    graph = random_graph()
    pruned = graph.prune(node_mass=1, edge_mass=1.0)
    dense = graph.dense()
    idle = (dense != 0).any(0).logical_not() & ~graph.is_target & (graph.kind != Kind.TOKEN)
    assert pruned.n_nodes >= graph.n_nodes - int(idle.sum()) - 1
    assert torch.equal(pruned.dropped.nan_to_num(), torch.zeros_like(pruned.dropped))
    # An edge whose target has no influence is kept, too.
    aside = random_graph(start=torch.where(graph.kind == Kind.DIRECTION, graph.start, 0))
    assert len(aside.prune(node_mass=1, edge_mass=1).edges.source) == len(pruned.edges.source)


def test_pruning_again_starts_from_what_is_left():
    once = random_graph().prune(node_mass=0.9)
    twice = once.prune(node_mass=0.5)
    assert twice.n_nodes < once.n_nodes
    assert twice.conservation().max() < 1e-14
    assert float(twice.cumulative.min()) > 0


def test_cumulative_influence_is_of_the_graph_that_was_pruned():
    graph = random_graph()
    received = power_series(graph.dense(), graph.start)
    expected = torch.stack([received[received >= score].sum() for score in received]) / received.sum()
    pruned = graph.prune()
    for node in range(pruned.n_nodes):
        where = {name: int(getattr(pruned, name)[node]) for name in ("kind", "pos", "index")}
        number = graph.find(site=pruned.site[node], **where)
        torch.testing.assert_close(pruned.cumulative[node], expected[number[0]])
    assert graph.cumulative.isnan().all()
    found = cumulative(torch.tensor([1.0, 4.0, 0.0, 3.0]))
    assert found.tolist() == [1.0, 0.5, 1.0, 0.875]


@pytest.mark.parametrize("mass", [-0.1, 1.5, NAN])
def test_a_mass_that_is_no_share_is_refused(mass):
    with pytest.raises(ValueError, match="node_mass is a share of all influence, from 0 to 1; it is"):
        random_graph().prune(node_mass=mass)
    with pytest.raises(ValueError, match="edge_mass is a share of all influence, from 0 to 1; it is"):
        random_graph().prune(edge_mass=mass)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [1e-7, 1.0, 12.0])
@pytest.mark.parametrize("mass", [0.0, 0.3, 0.8, 0.98, 0.9999])
def test_the_largest_scores_that_hold_a_mass(dtype, spread, mass):
    scores = (spread * torch.randn(3000, dtype=torch.float64)).exp().to(dtype)
    scores[::3] = 0
    scores[1::5] = scores[4]  # ties
    found, expected = holds_mass(scores, mass), top(scores.double(), mass)
    assert torch.equal(found, expected)
    assert found.any()
    assert not found[scores == 0].any()


def test_ties_stay_together_and_zeros_never_do():
    scores = torch.tensor([0.0, 2.0, 1.0, 1.0, 1.0, 0.0])
    assert holds_mass(scores, 0.5).tolist() == [False, True, True, True, True, False]
    assert holds_mass(scores, 0.4).tolist() == [False, True, False, False, False, False]
    assert not holds_mass(torch.zeros(3), 0.9).any()
    assert holds_mass(scores, 1.0).all()


def test_a_subgraph_books_what_it_leaves_out():
    graph = random_graph(shuffle=True)
    chosen = torch.randperm(graph.n_nodes)[:30]
    part = graph.subgraph(chosen)
    kept = chosen.sort().values
    assert torch.equal(part.dense(), graph.dense()[kept][:, kept])
    gone = [node for node in range(graph.n_nodes) if node not in kept.tolist()]
    lost = graph.dense()[kept][:, gone].sum(1)
    torch.testing.assert_close(part.dropped[part.is_target], lost[part.is_target], rtol=1e-12, atol=1e-14)
    assert part.conservation().max() < 1e-14
    assert torch.equal(graph.subgraph(chosen.tolist() * 2).dense(), part.dense())


@pytest.mark.parametrize("nodes", [[-1], [3, 50]])
def test_a_subgraph_of_nodes_that_are_not_there(nodes):
    with pytest.raises(ValueError, match=r"Node (-1|50) is not in this graph; its nodes are numbered 0 to 49"):
        random_graph().subgraph(nodes)


def sums_of(graph: AttributionGraph, merged: AttributionGraph, members: list[list[int]]) -> None:
    """A merged graph has the sums of rows, columns and quantities; what was inside is dropped."""
    belongs = torch.zeros(len(members), graph.n_nodes, dtype=torch.float64)
    for group, nodes in enumerate(members):
        belongs[group, nodes] = 1
    dense = belongs @ graph.dense() @ belongs.T
    inside = dense.diagonal().clone()
    dense.fill_diagonal_(0)
    torch.testing.assert_close(merged.dense(), dense, rtol=1e-12, atol=1e-14)
    for name in ("bias", "pre_activation", "dropped", "activation", "start"):
        column = getattr(graph, name)
        expected = belongs @ column.nan_to_num() + (inside if name == "dropped" else 0)
        expected[torch.tensor([bool(column[nodes].isnan().all()) for nodes in members])] = NAN
        torch.testing.assert_close(getattr(merged, name), expected, rtol=1e-12, atol=1e-14, equal_nan=True)
    assert merged.conservation().max() < 1e-13
    torch.testing.assert_close(merged.influence(), power_series(dense, merged.start), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("places", [4_000_000, 100])
@pytest.mark.parametrize("shuffle", [False, True])
def test_merged_latents_are_their_sum(shuffle, places, monkeypatch):
    monkeypatch.setattr(merging, "_PLACES", places)
    graph = random_graph(shuffle=shuffle)
    texas = graph.find(site=SITES[1], kind=Kind.LATENT)[2:6].tolist()
    missed = graph.find(site=SITES[0], kind=Kind.ERROR)[1:].tolist()
    merged = graph.merge({"Texas": texas, "missed": missed})
    others = [[node] for node in range(graph.n_nodes) if node not in {*texas, *missed}]
    members = sorted([texas, missed, *others], key=min)
    assert merged.n_nodes == len(members)
    sums_of(graph, merged, members)
    group = int(merged.is_target.logical_and(torch.tensor([label == "Texas" for label in merged.label])).nonzero())
    assert (merged.site[group], int(merged.index[group]), int(merged.kind[group])) == (SITES[1], -1, Kind.LATENT)
    assert int(merged.pos[group]) == int(graph.pos[texas].max())
    assert merged.describe(group).startswith("latent 'Texas' of blocks.0.hook_mlp_out at position")


def test_a_group_over_several_sites_puts_what_it_feeds_behind_it():
    graph = random_graph()
    between = [node for node in range(graph.n_nodes) if graph.stage[node] == 1 and graph.kind[node] == Kind.LATENT]
    graph = graph.subgraph([node for node in range(graph.n_nodes) if node not in between])
    first, last = int(graph.find(site=SITES[0], pos=3, index=3)), int(graph.find(site=SITES[2], pos=3, index=3))
    merged = graph.merge({"both": [last, first]})
    sums_of(
        graph, merged, [[first, last] if node == first else [node] for node in range(graph.n_nodes) if node != last]
    )
    assert merged.site[first] == ""
    assert int(merged.layer[first]) == 1


def test_a_group_that_a_path_leaves_and_enters_again_is_refused():
    graph = random_graph()
    both = [node for site in (SITES[0], SITES[2]) for node in graph.find(site=site, kind=Kind.LATENT, pos=3).tolist()]
    with pytest.raises(ValueError, match=r"Merging \['round'\] would make a circle.*order"):
        graph.merge({"round": both, "fine": graph.find(site=SITES[1], kind=Kind.ERROR).tolist()})


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"a": []}, "Group 'a' has no nodes"),
        ({"a": [50]}, "Node 50 is not in this graph; its nodes are numbered 0 to 49"),
        ({"a": [1, 2], "b": [2, 3]}, "Node 2 is in the groups 'a' and 'b'"),
        ({"a": [0, 10]}, r"Group 'a' has nodes of the kinds \['ERROR', 'LATENT'\]"),
    ],
)
def test_groups_that_are_none(groups, message):
    with pytest.raises(ValueError, match=message):
        random_graph().merge(groups)


@pytest.mark.parametrize("shuffle", [False, True])
def test_merged_positions(shuffle):
    graph = random_graph(shuffle=shuffle)
    index = torch.where(graph.kind == Kind.LATENT, graph.index - graph.pos, graph.index)  # the same latents everywhere
    graph = random_graph(shuffle=shuffle, index=index)
    merged = graph.merge_positions([(1, 3)])
    by_key: dict[tuple, list[int]] = {}
    for node in range(graph.n_nodes):
        pos = 2 if 1 <= int(graph.pos[node]) < 3 else int(graph.pos[node])
        what = None if graph.kind[node] == Kind.TOKEN else (int(graph.index[node]), graph.label[node])
        by_key.setdefault((int(graph.kind[node]), graph.site[node], pos, what), []).append(node)
    assert merged.n_nodes == len(by_key) == graph.n_nodes - 3 * 3 - 3 - 1
    sums_of(graph, merged, [*by_key.values()])
    token = int(merged.find(kind=Kind.TOKEN, pos=2))
    assert merged.label[token] == ("t1t2" if not shuffle else merged.label[token])
    assert int(merged.index[token]) == -1
    assert merged.find(pos=1).tolist() == []
    assert torch.equal(merged.stage, graph.stage[[nodes[0] for nodes in by_key.values()]])


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(2, 2)], r"Span \(2, 2\) must hold a position of the prompt: 0 <= first < end <= 4"),
        ([(2, 5)], r"Span \(2, 5\) must hold"),
        ([(-1, 2)], r"Span \(-1, 2\) must hold"),
        ([(0, 2), (1, 3)], r"Span \(1, 3\) overlaps another one"),
    ],
)
def test_spans_that_are_none(spans, message):
    with pytest.raises(ValueError, match=message):
        random_graph().merge_positions(spans)


def test_merging_a_pruned_graph_keeps_what_was_dropped():
    pruned = random_graph().prune(node_mass=0.9)
    merged = pruned.merge_positions([(0, 4)])
    assert merged.conservation().max() < 1e-13
    assert {*merged.pos.tolist()} == {3}
    assert float(merged.cumulative.max()) <= 1 + 1e-12
