"""The graph as data: its columns and edges, what it refuses, one file, networkx."""

import json
import struct
import sys
import zlib

import pytest
import torch
from graph_material import NAN, SITES, csr, random_graph
from safetensors.torch import load_file, save_file

from scope_lens.circuits import edges as edges_module
from scope_lens.circuits import graph_file
from scope_lens.circuits.graph import AttributionGraph, Edges, Kind


def assert_same(one: AttributionGraph, other: AttributionGraph) -> None:
    for name, value in vars(one).items():
        found = getattr(other, name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(value.nan_to_num(1e9), found.nan_to_num(1e9)), name
            assert value.dtype == found.dtype, name
        elif name == "edges":
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(value, found, strict=True))
        else:
            assert value == found, name


@pytest.mark.parametrize("shuffle", [False, True])
def test_dense_has_every_edge_in_its_place(shuffle):
    graph = random_graph(shuffle=shuffle)
    dense = graph.dense()
    expected = torch.zeros(graph.n_nodes, graph.n_nodes, dtype=torch.float64)
    for target in range(graph.n_nodes):
        for edge in range(int(graph.edges.row_start[target]), int(graph.edges.row_start[target + 1])):
            expected[target, int(graph.edges.source[edge])] = graph.edges.weight[edge]
    assert torch.equal(dense, expected)
    assert graph.is_target.sum() == 31
    assert graph.is_target[graph.targets].all()
    assert not dense[~graph.is_target].any()


def test_conservation_of_whole_rows_and_of_a_wrong_one():
    graph = random_graph()
    assert graph.conservation().max() < 1e-14
    wrong = graph.pre_activation.clone()
    target = int(graph.find(kind=Kind.LOGIT, index=51))
    wrong[target] += 0.5
    found = random_graph(pre_activation=wrong).conservation()
    size = graph.dense()[target].abs().sum() + graph.bias[target].abs()
    assert found.argmax() == graph.targets.tolist().index(target)
    torch.testing.assert_close(found.max(), 0.5 / size)


def test_a_target_that_nothing_enters_is_conserved():
    graph = random_graph(edges=csr(torch.zeros(50, 50, dtype=torch.float64)))
    zero = torch.where(graph.is_target, 0.0, NAN).double()
    empty = random_graph(edges=graph.edges, bias=zero, pre_activation=zero)
    assert torch.equal(empty.conservation(), torch.zeros(31, dtype=torch.float64))


@pytest.mark.parametrize(
    "asked",
    [
        {}, {"kind": Kind.ERROR}, {"kind": 2}, {"site": SITES[1]}, {"layer": -1}, {"pos": 2}, {"index": 8},
        {"kind": Kind.TOKEN, "pos": 0},
        {"kind": Kind.LATENT, "site": SITES[2], "layer": 1, "pos": 3, "index": 3}, {"kind": Kind.REST, "pos": 1},
    ],
)  # fmt: skip
def test_find_is_the_filter(asked):
    graph = random_graph(shuffle=True)
    columns = {name: getattr(graph, name) for name in ("kind", "layer", "pos", "index")}
    expected = [
        node
        for node in range(graph.n_nodes)
        if all((graph.site[node] if name == "site" else int(columns[name][node])) == v for name, v in asked.items())
    ]
    assert graph.find(**asked).tolist() == expected


def test_find_counts_negative_positions_from_the_end_and_refuses_what_is_not_there():
    graph = random_graph()
    assert torch.equal(graph.find(pos=-1), graph.find(pos=3))
    with pytest.raises(ValueError, match="No node of this graph is at 'blocks.7.hook_mlp_out'; its sites are .*hook_z"):
        graph.find(site="blocks.7.hook_mlp_out")
    with pytest.raises(ValueError, match="pos=4 is outside the prompt of 4 tokens"):
        graph.find(pos=4)


def test_a_site_whose_nodes_were_pruned_away_is_still_a_site():
    graph = random_graph()
    left = graph.subgraph(graph.find(kind=Kind.LOGIT))
    assert left.find(site=SITES[0]).tolist() == []


def test_nodes_in_words():
    graph = random_graph()
    words = {graph.describe(node) for node in range(graph.n_nodes)}
    assert {
        "latent 8 of blocks.0.hook_mlp_out at position 1",
        "error of blocks.0.attn.hook_z at position 0",
        "token 12 't2' at position 2",
        "logit 51 'y1' at position 3",
        "direction 'up - down' at position 2",
        "rest of blocks.1.hook_resid_post at position 2",
    } < words


def test_a_graph_shows_itself_in_one_line():
    shown = "AttributionGraph(toy, 4 tokens, 50 nodes (27 latent, 12 error, 4 token, 3 logit, 1 direction, 3 rest), "
    assert repr(random_graph()).startswith(shown)


def _edges(**changed):
    return random_graph().edges._replace(**changed)


def _with(column, node, value):
    changed = getattr(random_graph(), column).clone()
    changed[node] = value
    return {column: changed}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: {"site": SITES}, "Every column of nodes needs one entry a node; their lengths are .*'site': 3"),
        (lambda: {"token_strings": ["a"]}, "token_strings needs one string a token .* 4 tokens, 1 strings"),
        (lambda: {"sources": [""]}, "3 sites and 1 sources"),
        (lambda: _with("pos", 0, 4), "pos must be from 0 to 3; it goes from 0 to 4"),
        (lambda: _with("kind", 0, 6), "kind must be from 0 to 5"),
        (lambda: _with("bias", 0, NAN), "bias must be NaN exactly where pre_activation is"),
        (lambda: _with("dropped", 10, 0.0), "dropped must be NaN exactly where pre_activation is"),
        (lambda: _with("stage", 49, 0), r"An edge must run from a smaller to a larger stage; that from .* to node 49"),
        (lambda: {"edges": _edges(row_start=torch.zeros(51, dtype=torch.int64))}, "row_start must ascend from 0 to"),
        (lambda: {"edges": _edges(weight=torch.ones(3, dtype=torch.float64))}, "and 3 of weight"),
        (lambda: {"edges": _edges(source=random_graph().edges.source.long())}, "must be int32 and row_start int64"),
        (lambda: {"edges": _edges(source=random_graph().edges.source + 9)}, "must be node numbers from 0 to 49"),
        (lambda: {"edges": _edges(source=random_graph().edges.source.flip(0))}, "sources of each row .* must ascend"),
    ],
)
def test_what_is_no_graph_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        random_graph(**change())


def test_edges_into_a_node_without_pre_activation_are_refused():
    graph = random_graph()
    columns = {name: getattr(graph, name).clone() for name in ("bias", "pre_activation", "dropped")}
    for column in columns.values():
        column[49] = NAN
    with pytest.raises(ValueError, match=r"Node 49 \(direction 'up - down' at position 2\) has edges into it"):
        random_graph(**columns)


def test_every_block_of_rows_is_looked_at(monkeypatch):
    monkeypatch.setattr(edges_module, "_BLOCK", 7)
    graph = random_graph()
    assert graph.conservation().max() < 1e-14
    with pytest.raises(ValueError, match="that from node .* to node 49"):
        random_graph(**_with("stage", 49, 0))
    with pytest.raises(ValueError, match="must ascend"):
        random_graph(edges=_edges(source=graph.edges.source.flip(0)))


def test_a_graph_without_nodes_edges_or_targets():
    graph = random_graph()
    for nodes in ([], graph.find(kind=Kind.TOKEN)):
        small = graph.subgraph(nodes)
        assert small.n_nodes == len(nodes)
        assert small.dense().shape == (len(nodes), len(nodes))
        assert small.influence().tolist() == [0.0] * len(nodes)
        assert small.conservation().numel() == 0
        assert small.prune().n_nodes == len(nodes)
        assert small.merge_positions([(0, 2)]).n_nodes == (3 if len(nodes) else 0)
        assert all(value != value for value in small.scores())


@pytest.mark.parametrize("name", ["graph", "graph.safetensors", "new/folder/graph.v1.bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_file_of_any_name_gives_the_graph_back(tmp_path, name, dtype):
    graph = random_graph(dtype=dtype).prune()
    graph.save(tmp_path / name)
    assert [path.name for path in (tmp_path / name).parent.iterdir()] == [(tmp_path / name).name]
    assert_same(AttributionGraph.load(str(tmp_path / name)), graph)


def test_others_may_read_a_graph_as_any_other_file(tmp_path):
    (tmp_path / "file").touch()
    random_graph().save(tmp_path / "graph")
    assert (tmp_path / "graph").stat().st_mode == (tmp_path / "file").stat().st_mode


def test_an_empty_graph_is_saved_too(tmp_path):
    graph = random_graph().subgraph([])
    graph.save(str(tmp_path / "empty"))
    assert_same(AttributionGraph.load(tmp_path / "empty"), graph)


def test_everything_is_made_where_the_graph_is(tmp_path):
    """A graph elsewhere than the default device stands for one on a GPU: whatever forgets its device raises."""
    graph = random_graph()
    graph.save(tmp_path / "graph")
    with torch.device("meta"):
        pruned = AttributionGraph.load(tmp_path / "graph").prune(node_mass=0.95)
        pruned = pruned.subgraph([*range(pruned.n_nodes)]).merge_positions([(0, 2)])
        merged = pruned.merge({"ends": pruned.find(kind=Kind.LOGIT, site="ln_final.hook_out").tolist()})
        shown = merged.dense().sum(), merged.influence().sum(), merged.conservation().sum(), merged.to_networkx()
        scores = merged.scores()
    assert all(value.device == graph.kind.device for value in shown[:3])
    assert scores.replacement > 0


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="graph.st is no file; AttributionGraph.save writes"):
        AttributionGraph.load(tmp_path / "graph.st")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_a_cut_file_is_refused(tmp_path, share):
    random_graph().save(tmp_path / "graph")
    whole = (tmp_path / "graph").read_bytes()
    (tmp_path / "graph").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match="graph is no whole safetensors file .* copy it again or make the graph anew"):
        AttributionGraph.load(tmp_path / "graph")


def test_a_changed_byte_is_noticed_wherever_it_is(tmp_path):
    random_graph().save(tmp_path / "graph")
    whole = bytearray((tmp_path / "graph").read_bytes())
    for place in range(8, len(whole), 97):
        changed = whole.copy()
        changed[place] ^= 1
        (tmp_path / "graph").write_bytes(changed)
        with pytest.raises(
            ValueError,
            match="graph is (a damaged graph|no whole safetensors file|a safetensors file with|a graph of format)",
        ):
            AttributionGraph.load(tmp_path / "graph")


@pytest.mark.parametrize("text", [b"", b"{}", b"\x80\x04pickled", b"once upon a time" * 99])
def test_a_foreign_file_is_refused(tmp_path, text):
    (tmp_path / "graph").write_bytes(text)
    with pytest.raises(ValueError, match="graph is no whole safetensors file"):
        AttributionGraph.load(tmp_path / "graph")


def test_another_safetensors_file_is_refused(tmp_path):
    save_file({"W_dec": torch.zeros(2)}, tmp_path / "sae.safetensors")
    with pytest.raises(
        ValueError, match="sae.safetensors is a safetensors file without 'scope_lens_graph'.* so no graph"
    ):
        AttributionGraph.load(tmp_path / "sae.safetensors")


def _rewritten(path, **changed):
    tensors = load_file(path)
    size = struct.unpack("<Q", path.read_bytes()[:8])[0]
    header = json.loads(json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]["scope_lens_graph"])
    save_file(tensors, path, metadata={"scope_lens_graph": json.dumps(header | changed)})


def test_a_newer_format_says_so(tmp_path):
    random_graph().save(tmp_path / "graph")
    _rewritten(tmp_path / "graph", version=9)
    with pytest.raises(
        ValueError, match="graph of format 9; this scope_lens reads formats up to 1. Install a newer one"
    ):
        AttributionGraph.load(tmp_path / "graph")


@pytest.mark.parametrize("header", [{"version": "x"}, {"version": float("inf")}, {"graph": "{}"}, {"checksum": 0}])
def test_a_header_that_says_something_else_is_refused(tmp_path, header):
    random_graph().save(tmp_path / "graph")
    _rewritten(tmp_path / "graph", **header)
    with pytest.raises(ValueError, match="graph is a damaged graph"):
        AttributionGraph.load(tmp_path / "graph")


def test_a_whole_file_of_other_columns_is_refused(tmp_path):
    graph_file.write_graph(tmp_path / "graph", {"tokens": torch.arange(3)}, {"n_layers": 2})
    with pytest.raises(ValueError, match="graph is a damaged graph: KeyError: 'edges.row_start'"):
        AttributionGraph.load(tmp_path / "graph")


def test_a_failed_save_leaves_the_earlier_file(tmp_path, monkeypatch):
    graph = random_graph()
    graph.save(tmp_path / "graph")
    before = (tmp_path / "graph").read_bytes()

    def full(state, path, metadata):
        path.write_bytes(b"half")
        raise graph_file.SafetensorError("No space left on device")

    monkeypatch.setattr(graph_file, "save_file", full)
    with pytest.raises(OSError, match="graph could not be written .No space left on device.; make room"):
        graph.prune().save(tmp_path / "graph")
    assert (tmp_path / "graph").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["graph"]


def test_networkx_has_the_nodes_and_the_edges():
    graph = random_graph(shuffle=True)
    other = graph.to_networkx()
    dense = torch.zeros_like(graph.dense())
    for source, target, weight in other.edges(data="weight"):
        dense[target, source] = weight
    assert torch.equal(dense, graph.dense())
    logit = int(graph.find(kind=Kind.LOGIT, index=51))
    assert other.nodes[logit]["kind"] == "LOGIT"
    assert other.nodes[logit]["label"] == "y1"
    assert other.nodes[logit]["bias"] == float(graph.bias[logit])
    token = int(graph.find(kind=Kind.TOKEN, pos=1))
    assert {"bias", "activation", "cumulative"}.isdisjoint(other.nodes[token])
    assert other.nodes[token]["pos"] == 1


def test_networkx_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "networkx", None)
    with pytest.raises(ImportError, match=r"pip install 'scope-lens\[graph\]'"):
        random_graph().to_networkx()


def test_a_description_that_is_no_json_is_refused(tmp_path):
    graph_file.write_graph(tmp_path / "graph", {}, {})
    _rewritten(tmp_path / "graph", graph="{", checksum=zlib.crc32(b"{"))
    with pytest.raises(ValueError, match="graph is a damaged graph: its description cannot be read"):
        AttributionGraph.load(tmp_path / "graph")


def test_a_mask_is_no_list_of_nodes():
    graph = random_graph()
    mask = (graph.kind == Kind.TOKEN).tolist()
    for take in (graph.subgraph, lambda nodes: graph.merge({"tokens": nodes})):
        with pytest.raises(ValueError, match=r"found torch.bool. Of a mask, pass mask.nonzero\(\)\[:, 0\]"):
            take(mask)


def test_a_graph_is_not_changed_in_place():
    graph = random_graph()
    with pytest.raises(AttributeError):
        graph.tokens = torch.zeros(4, dtype=torch.int64)
    twin = random_graph()
    graph.prune().merge_positions([(0, 2)])
    graph.subgraph([1, 2])
    graph.influence()
    assert_same(graph, twin)
    assert isinstance(graph.edges, Edges)
