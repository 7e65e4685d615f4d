"""The export: a file under Neuronpedia's schema, the same graph as circuit-tracer's file of it, no two equal ids."""

import gzip
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import torch
from safetensors.torch import load_file

from scope_lens.circuits import attribute
from scope_lens.circuits.export import neuronpedia
from scope_lens.circuits.graph import AttributionGraph, Edges, GraphChecks, Kind
from scope_lens.model import ScopeModel
from scope_lens.releases.npz import read_npz

NAN = float("nan")
MLP = "blocks.{}.hook_mlp_out"


def graph_of(nodes, weights, *, tokens, strings, n_layers, sites, bias=0.25, **fields) -> AttributionGraph:
    """A graph from rows (kind, layer, pos, index, site, label, activation, start, cumulative) and {(t, s): weight}.

    Targets are latents, logits and directions; pre-activations are what conservation makes them.
    """
    kind, layer, pos, index, site, label, activation, start, cumulative = zip(*nodes, strict=True)
    order = {name: number for number, name in enumerate(sites)}
    stage = [
        -1 if k == Kind.TOKEN else len(sites) if k in (Kind.LOGIT, Kind.DIRECTION) else order[s]
        for k, s in zip(kind, site, strict=True)
    ]
    kinds = torch.tensor(kind)
    target = (kinds == Kind.LATENT) | (kinds == Kind.LOGIT) | (kinds == Kind.DIRECTION)
    edges = sorted(weights)
    counts = torch.bincount(torch.tensor([t for t, _ in edges], dtype=torch.int64), minlength=len(nodes))
    rows = torch.zeros(len(nodes), dtype=torch.float64)
    for (t, _), weight in weights.items():
        rows[t] += weight
    column = torch.full((len(nodes),), NAN)
    return AttributionGraph(
        tokens=torch.tensor(tokens), kind=kinds, layer=torch.tensor(layer), pos=torch.tensor(pos),
        index=torch.tensor(index), stage=torch.tensor(stage), site=site, label=label,
        activation=torch.tensor(activation), start=torch.tensor(start),
        bias=column.masked_fill(target, bias), dropped=column.masked_fill(target, 0.0),
        pre_activation=torch.where(target, rows.float() + bias, NAN), cumulative=torch.tensor(cumulative),
        directions=torch.zeros(kind.count(Kind.DIRECTION), 3),
        edges=Edges(
            torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
            torch.tensor([s for _, s in edges], dtype=torch.int32),
            torch.tensor([weights[edge] for edge in edges], dtype=torch.float32),
        ),
        token_strings=strings, n_layers=n_layers, d_vocab=fields.pop("d_vocab", 256_000),
        model=fields.pop("model", "google/gemma-2-2b"), sites=sites,
        sources=fields.pop("sources", ("",) * len(sites)),
        checks=GraphChecks(logits=1e-7, conservation=2e-7, forward_only=True),
        settings={"logit_mass": 0.95, "max_logits": 10, "max_latents": None, "dtype": "float32", **fields},
    )  # fmt: skip


def read_page(file: Path) -> dict:
    return json.loads(gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes())


def graph_of_page(file: Path, n_layers: int = 26) -> AttributionGraph:
    """circuit-tracer's JSON of a transcoder graph as an `AttributionGraph`."""
    page = read_page(file)
    sites = [MLP.format(layer) for layer in range(n_layers)]
    strings = page["metadata"]["prompt_tokens"]
    tokens, nodes, number = [0] * len(strings), [], {}
    for node in page["nodes"]:
        number[node["node_id"]] = len(nodes)
        a, b, _ = node["node_id"].split("_")
        pos, cumulative = node["ctx_idx"], NAN if node["influence"] is None else node["influence"]
        match node["feature_type"]:
            case "cross layer transcoder":
                row = (Kind.LATENT, int(a), pos, int(b), sites[int(a)], "", node["activation"], 0.0)
            case "mlp reconstruction error":
                row = (Kind.ERROR, int(b), pos, -1, sites[int(b)], "", NAN, 0.0)
            case "embedding":
                tokens[pos] = int(b)
                row = (Kind.TOKEN, -1, pos, int(b), "hook_embed", strings[pos], NAN, 0.0)
            case "logit":
                word, probability = node["clerp"].split('"')[1], node["token_prob"]
                row = (Kind.LOGIT, n_layers, pos, int(b), "ln_final.hook_out", word, probability, probability)
        nodes.append((*row, cumulative))
    weights = {(number[link["target"]], number[link["source"]]): link["weight"] for link in page["links"]}
    return graph_of(
        nodes, weights, tokens=tokens, strings=strings, n_layers=n_layers, sites=sites, node_mass=0.7, edge_mass=0.9
    )


def stored_graph(folder: Path) -> tuple[AttributionGraph, dict]:
    """A stored adjacency of nano with nothing pruned, and circuit-tracer's page of it."""
    stored = load_file(folder / "graph.safetensors")
    page = json.loads(next(folder.glob("nano-*.json")).read_text())
    strings, tokens = page["metadata"]["prompt_tokens"], stored["tokens"].tolist()
    sites = [MLP.format(0), MLP.format(1)]
    nodes = [
        (Kind.LATENT, layer, pos, index, sites[layer], "", activation, 0.0, NAN)
        for (layer, pos, index), activation in zip(
            stored["active_features"].tolist(), stored["activation_values"].tolist(), strict=True
        )
    ]
    nodes += [
        (Kind.ERROR, layer, pos, -1, sites[layer], "", NAN, 0.0, NAN) for layer in (0, 1) for pos in range(len(tokens))
    ]
    nodes += [
        (Kind.TOKEN, -1, pos, token, "hook_embed", strings[pos], NAN, 0.0, NAN) for pos, token in enumerate(tokens)
    ]
    nodes += [
        (Kind.LOGIT, 2, len(tokens) - 1, word, "ln_final.hook_out", f"w{word}", probability, probability, NAN)
        for word, probability in zip(stored["logit_tokens"].tolist(), stored["logit_probs"].tolist(), strict=True)
    ]
    adjacency = stored["adjacency"]
    weights = {(t, s): float(adjacency[t, s]) for t, s in adjacency.nonzero().tolist()}
    graph = graph_of(
        nodes, weights, tokens=tokens, strings=strings, n_layers=2, sites=sites, model="x/crosscheck-nano", d_vocab=64
    )
    return graph, page


def every_site(*, layers=2, pos=4, **fields) -> AttributionGraph:
    """Every kind of node at every kind of site, several with equal numbers at one layer and position."""
    hooks = ("attn.hook_z", "hook_mlp_out", "hook_resid_post", "mlp.hook_odd")
    sites = ["hook_embed", *(f"blocks.{layer}.{hook}" for layer in range(layers) for hook in hooks)]
    nodes = []
    for site in sites:
        layer = -1 if site == "hook_embed" else int(site.split(".")[1])
        for p in range(1, pos):
            nodes += [
                (Kind.LATENT, layer, p, index, site, "", 1.5 + index, 0.0, 0.5) for index in (0, 1, p)[: 2 + (p > 1)]
            ]
            nodes += [
                (Kind.ERROR, layer, p, -1, site, "", NAN, 0.0, 0.6),
                (Kind.REST, layer, p, -1, site, "", NAN, 0.0, 0.7),
            ]
    nodes += [(Kind.TOKEN, -1, p, 7, "hook_embed", " a", NAN, 0.0, 0.8) for p in range(pos)]
    final = (layers, pos - 1)
    nodes += [
        (Kind.LOGIT, *final, word, "ln_final.hook_out", label, prob, prob, NAN)
        for word, label, prob in ((3, " b", 0.3), (5, '"', 0.6))
    ]
    nodes += [
        (Kind.DIRECTION, *final, -1, "ln_final.hook_out", label, 1.0, 1.0, NAN) for label in ("b minus c", "c minus d")
    ]
    stages = [sites.index(row[4]) if row[0] not in (Kind.TOKEN, Kind.LOGIT, Kind.DIRECTION) else None for row in nodes]
    stages = [
        -1 if row[0] == Kind.TOKEN else len(sites) if s is None else s for row, s in zip(nodes, stages, strict=True)
    ]
    weights = {
        (t, s): (-1) ** (t + s) * (1 + (7 * t + 3 * s) % 11) / 4
        for t, row in enumerate(nodes)
        if row[0] in (Kind.LATENT, Kind.LOGIT, Kind.DIRECTION)
        for s, source in enumerate(nodes)
        if stages[s] < stages[t] and source[2] <= row[2] and source[0] not in (Kind.LOGIT, Kind.DIRECTION)
    }
    return graph_of(nodes, weights, tokens=[7] * pos, strings=[" a"] * pos, n_layers=layers, sites=sites, **fields)


@pytest.fixture
def schema(shared_data):
    return json.loads((shared_data / "graph-crosscheck/schema/neuronpedia-graph-schema.json").read_text())


def written(graph, path, **settings) -> dict:
    return json.loads(neuronpedia(graph, path, **settings).read_text())


def links_of(page) -> dict[tuple[str, str], float]:
    links = {(link["source"], link["target"]): link["weight"] for link in page["links"]}
    assert len(links) == len(page["links"])
    return links


# ---- the same graph as the peer's ----


def attributed(folder: Path, tokens: torch.Tensor) -> AttributionGraph:
    """Our own graph of a prompt of nano."""
    saes = [
        read_npz(folder / f"transcoders/layer_{layer}", hook_in=f"blocks.{layer}.ln2.hook_normalized", hook_out=site)
        for layer, site in enumerate(map(MLP.format, range(2)))
    ]
    model = ScopeModel.from_pretrained(str(folder / "hf_model"))
    return attribute(model, tokens, saes=saes, max_logits=10, progress=False)


@pytest.mark.parametrize(("prompt", "made"), [("len6", "stored"), ("len9", "stored"), ("len9", "by us")])
def test_nano_is_circuit_tracers_page_with_ids_that_do_not_collide(shared_data, schema, tmp_path, prompt, made):
    folder = shared_data / "graph-crosscheck/nano"
    graph, peer = stored_graph(folder / "expected" / prompt)
    if made == "by us":
        graph = attributed(folder, graph.tokens)
    page = written(graph, tmp_path, slug="nano", scan="crosscheck-nano")
    jsonschema.validate(page, schema)
    # An error "0_L_P" has another id here.
    renamed = {
        node["node_id"]: f"{node['layer']}_error_mlp_{node['ctx_idx']}"
        for node in peer["nodes"]
        if node["feature_type"] == "mlp reconstruction error"
    }
    theirs = {renamed.get(node["node_id"], node["node_id"]): node for node in peer["nodes"]}
    ours = {node["node_id"]: node for node in page["nodes"] if node["feature_type"] != "bias"}
    assert ours.keys() == theirs.keys()
    for name, node in ours.items():
        same = ("feature", "layer", "ctx_idx", "feature_type", "is_target_logit", "run_idx", "reverse_ctx_idx")
        assert [node[field] for field in same] == [theirs[name][field] for field in same]
        numbers = [[one[field] for field in ("influence", "activation", "token_prob")] for one in (node, theirs[name])]
        assert [n is None for n in numbers[0]] == [n is None for n in numbers[1]]
        assert [n or 0 for n in numbers[0]] == pytest.approx([n or 0 for n in numbers[1]], rel=1e-4)
    assert {n["clerp"] for n in ours.values() if n["feature_type"] == "logit"} >= {
        n["clerp"] for n in peer["nodes"] if n["clerp"].startswith('Output "w')
    }
    links = {ends: weight for ends, weight in links_of(page).items() if "bias" not in ends[0]}
    expected = {(renamed.get(link["source"], link["source"]), link["target"]): link["weight"] for link in peer["links"]}
    assert links.keys() == expected.keys()
    ours, theirs = torch.tensor([*links.values()]), torch.tensor([expected[ends] for ends in links])
    if made == "stored":
        assert torch.equal(ours, theirs)  # float32 to the last bit
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert page["metadata"]["node_threshold"] == peer["metadata"]["node_threshold"] == 0.8
    assert page["metadata"]["scan"] == peer["metadata"]["scan"]
    assert page["metadata"]["prompt_tokens"] == peer["metadata"]["prompt_tokens"]


def test_a_real_page_comes_back_as_it_was(shared_data, schema, tmp_path):
    """Gemma 2 2B, 558 nodes and 22,789 links."""
    graph = graph_of_page(shared_data / "attribution-graphs/3plus5-plt.json.gz")
    page = written(graph, tmp_path / "again.json", bias=False)
    jsonschema.validate(page | {"links": page["links"][:500]}, schema)
    peer = read_page(shared_data / "attribution-graphs/3plus5-plt.json.gz")
    assert [node["ctx_idx"] for node in page["nodes"]] == [node["ctx_idx"] for node in peer["nodes"]]
    assert sorted(links_of(page).values()) == pytest.approx(sorted(link["weight"] for link in peer["links"]), rel=1e-7)
    assert page["metadata"]["slug"] == "again"
    assert page["metadata"]["pruning_settings"] == {"node_threshold": 0.7, "edge_threshold": 0.9}


# ---- ids and types ----


def test_no_two_nodes_share_an_id_and_every_link_finds_its_ends(schema, tmp_path):
    page = written(every_site(), tmp_path, slug="all")
    jsonschema.validate(page, schema)
    ids = Counter(node["node_id"] for node in page["nodes"])
    assert set(ids.values()) == {1}
    assert {end for link in links_of(page) for end in link} <= set(ids)
    assert {node["jsNodeId"] for node in page["nodes"]} == set(ids)
    # Neuronpedia's page tells latents apart by this under the mouse; attention has a type of its own there.
    seen = Counter(
        (node["layer"], node["feature"], node["ctx_idx"], node["feature_type"])
        for node in page["nodes"]
        if node["feature_type"] != "bias"
    )
    assert set(seen.values()) == {1}


def test_a_hook_by_its_other_name_is_the_same_kind_of_site(tmp_path):
    others = {"hook_mlp_out": "ln2_post.hook_out", "attn.hook_z": "attn.o.hook_in", "hook_resid_post": "hook_out"}
    graph = every_site()
    # Layers are single digits, so a name begins behind "blocks.L.".
    alias = {site: site[:9] + others[site[9:]] for site in graph.sites if site[9:] in others}
    sites = [alias.get(site, site) for site in graph.sites]
    renamed = replace(graph, site=[alias.get(site, site) for site in graph.site], sites=sites)
    page, other = written(graph, tmp_path, slug="one"), written(renamed, tmp_path, slug="other")
    assert len(alias) == 6
    for name in ("node_id", "feature_type"):
        assert [node[name] for node in other["nodes"]] == [node[name] for node in page["nodes"]]


def test_each_site_has_the_type_whose_pages_fit(tmp_path):
    page = written(every_site(), tmp_path, slug="all")
    types = {node["node_id"]: node["feature_type"] for node in page["nodes"]}
    assert types["1_1_3"] == "cross layer transcoder"
    assert types["1_att_1_3"] == "lorsa"
    assert types["1_res_1_3"] == types["E_embedding_1_3"] == types["1_mlp.hook_odd_1_3"] == "unknown"
    assert types["1_error_mlp_3"] == types["1_rest_mlp_3"] == types["1_error_res_3"] == "mlp reconstruction error"
    assert types["1_error_att_3"] == types["0_rest_att_2"] == "lorsa error"
    assert types["E_7_0"] == "embedding"
    assert [name for name, kind in types.items() if kind == "logit"] == ["3_3_3", "3_5_3", "3_256000_3", "3_256001_3"]
    targets = [node for node in page["nodes"] if node["feature_type"] == "logit"]
    assert [node["is_target_logit"] for node in targets] == [False, True, False, False]
    # The page takes what stands between "(p=" and ")" for a number.
    assert [float(node["clerp"].split("(p=")[1].split(")")[0]) for node in targets] == [0.3, 0.6, 1.0, 1.0]


def test_merged_groups_have_ids_of_their_own(schema, tmp_path):
    graph = every_site()
    site = "blocks.1.hook_mlp_out"
    groups = {f"group {pos}": graph.find(kind=Kind.LATENT, site=site, pos=pos)[:2].tolist() for pos in (2, 3)} | {
        "errors": graph.find(kind=Kind.ERROR, site=site)[1:].tolist()
    }
    merged = graph.merge(groups).merge_positions([(0, 2)])
    page = written(merged, tmp_path, slug="merged", node_mass=1.0, edge_mass=1.0)
    jsonschema.validate(page, schema)
    assert max(Counter(node["node_id"] for node in page["nodes"]).values()) == 1
    by_text = {node["clerp"]: node for node in page["nodes"]}
    assert by_text["group 2"]["feature_type"] == "unknown"
    assert by_text["errors"]["feature_type"] == "mlp reconstruction error"
    assert by_text["group 2"]["node_id"].startswith("1_group_")
    assert by_text['Emb: " a a"']["ctx_idx"] == 1


def test_a_graph_of_residual_latents_alone_is_looked_up(tmp_path):
    site = "blocks.1.hook_resid_post"
    nodes = [
        (Kind.LATENT, 1, 1, 4, site, "", 2.0, 0.0, 0.5),
        (Kind.TOKEN, -1, 1, 9, "hook_embed", "x", NAN, 0.0, 0.5),
        (Kind.LOGIT, 2, 1, 8, "ln_final.hook_out", "y", 1.0, 1.0, NAN),
    ]
    graph = graph_of(
        nodes, {(0, 1): 1.0, (2, 0): 2.0}, tokens=[2, 9], strings=["<bos>", "x"], n_layers=2, sites=[site],
        sources=["google/gemma-scope-2b-pt-res/layer_1/width_16k/average_l0_102"],
    )  # fmt: skip
    page = written(graph, tmp_path, slug="res", labels={(site, 4): "says y"})
    (latent, *_) = page["nodes"]
    assert (latent["node_id"], latent["feature_type"], latent["clerp"]) == (
        "1_res_4_1",
        "cross layer transcoder",
        "says y",
    )
    assert latent["feature"] == (1 + 4) * (1 + 4 + 1) // 2 + 4
    assert page["metadata"]["feature_details"] == {"neuronpedia_source_set": "gemmascope-res-16k"}


# ---- the bias, and what was dropped ----


def test_what_enters_a_target_adds_up(tmp_path):
    graph = every_site().prune(node_mass=0.7, edge_mass=0.8)
    page = written(graph, tmp_path, slug="all")
    sums = Counter()
    for (_, target), weight in links_of(page).items():
        sums[target] += weight
    targets = [node for node in page["nodes"] if "pre_activation" in node]
    assert len(targets) == len(graph.targets)
    assert any(node["dropped"] for node in targets)
    for node in targets:
        assert sums[node["node_id"]] + node["dropped"] == pytest.approx(node["pre_activation"], abs=1e-4)
    biases = {node["node_id"]: node["ctx_idx"] for node in page["nodes"] if node["feature_type"] == "bias"}
    assert biases == {f"E_bias_{pos}": pos for pos in graph.pos[graph.targets].unique().tolist()}


def scores_of_the_page(page) -> tuple[float, float]:
    """The two scores as the page computes them from nodes and links: dense powers of |A|, rows normalised."""
    nodes = {node["node_id"]: (number, node) for number, node in enumerate(page["nodes"])}
    matrix = torch.zeros(len(nodes), len(nodes), dtype=torch.float64)
    for (source, target), weight in links_of(page).items():
        matrix[nodes[target][0], nodes[source][0]] = abs(weight)
    matrix /= matrix.sum(1, keepdim=True).clamp(min=1e-10)
    ordered = [node for _, node in nodes.values()]
    start = torch.tensor(
        [n["token_prob"] if n["feature_type"] == "logit" else 0.0 for n in ordered], dtype=torch.float64
    )
    influence = start @ (torch.linalg.inv(torch.eye(len(nodes), dtype=torch.float64) - matrix) @ matrix)
    error = torch.tensor(["error" in n["feature_type"] for n in ordered])
    token = torch.tensor([n["feature_type"] == "embedding" for n in ordered])
    through = influence + start
    replacement = influence[token].sum() / influence[token | error].sum()
    return float(replacement), float(((1 - matrix[:, error].sum(1)) * through).sum() / through.sum())


def test_without_the_bias_the_page_computes_our_scores(tmp_path):
    graph = every_site().prune(node_mass=0.7, edge_mass=0.8)
    page = written(graph, tmp_path, slug="all", bias=False)
    assert not any(node["feature_type"] == "bias" for node in page["nodes"])
    assert scores_of_the_page(page) == pytest.approx(tuple(graph.scores(count_dropped=False)), rel=1e-6)


# ---- metadata ----


def test_metadata_says_where_the_graph_comes_from(schema, tmp_path):
    sites = ["blocks.3.attn.hook_z", "blocks.3.hook_mlp_out"]
    repos = ("google/gemma-scope-2b-pt-att/layer_3/width_16k", "google/gemma-scope-2b-pt-transcoders/layer_3/width_16k")
    nodes = [
        *((Kind.LATENT, 3, 1, 4, site, "", 2.0, 0.0, 0.5) for site in sites),
        (Kind.TOKEN, -1, 1, 9, "hook_embed", "x", NAN, 0.0, 0.5),
        (Kind.LOGIT, 26, 1, 8, "ln_final.hook_out", "y", 1.0, 1.0, NAN),
    ]
    graph = graph_of(
        nodes, {(0, 2): 1.0, (1, 2): 1.0, (3, 0): 2.0, (3, 1): 0.5}, tokens=[2, 9], strings=["<bos>", "x"], n_layers=26,
        sites=sites, sources=[f"{repos[0]}/average_l0_117", f"{repos[1]}/average_l0_54"], node_mass=0.8, edge_mass=0.98,
    )  # fmt: skip
    page = written(graph, tmp_path, slug="both")
    jsonschema.validate(page, schema)
    metadata = page["metadata"]
    assert (metadata["slug"], metadata["scan"], metadata["prompt"]) == ("both", "gemma-2-2b", "<bos>x")
    assert metadata["feature_details"] == {
        "neuronpedia_source_set": "gemmascope-transcoder-16k",
        "neuronpedia_lorsa_source_set": "gemmascope-att-16k",
    }
    assert metadata["info"]["generator"]["name"] == "scope_lens"
    assert "https://www.neuronpedia.org/gemma-2-2b/3-gemmascope-transcoder-16k" in metadata["info"]["source_urls"]
    assert metadata["pruning_settings"] == {"node_threshold": 0.8, "edge_threshold": 0.98}
    settings = metadata["generation_settings"]
    assert settings["max_n_logits"] == settings["max_logits"] == 10
    assert settings["desired_logit_prob"] == 0.95
    assert "max_feature_nodes" not in settings  # None: all
    assert settings["check_conservation"] == 2e-7
    assert page["qParams"]["linkType"] == "both"


def test_dictionaries_without_dashboards_claim_none(tmp_path):
    """A set is named only if every dictionary of the kind is of it: another one's pages would be shown otherwise."""
    sites = [MLP.format(0), MLP.format(1)]
    nodes = [
        (Kind.LATENT, 0, 1, 4, sites[0], "", 2.0, 0.0, 0.5),
        (Kind.TOKEN, -1, 1, 9, "hook_embed", "x", NAN, 0.0, 0.5),
        (Kind.LOGIT, 26, 1, 8, "ln_final.hook_out", "y", 1.0, 1.0, NAN),
    ]
    repo = "google/gemma-scope-2b-pt-transcoders"
    sources = [f"{repo}/layer_0/width_16k/average_l0_76", f"{repo}/layer_1/width_16k/average_l0_8"]
    graph = graph_of(
        nodes, {(0, 1): 1.0, (2, 0): 2.0}, tokens=[2, 9], strings=["<bos>", "x"], n_layers=26, sites=sites,
        sources=sources,
    )  # fmt: skip
    assert written(graph, tmp_path, slug="a")["metadata"]["feature_details"] == {}


# ---- files ----


def test_a_file_is_named_by_the_slug_or_names_the_graph(tmp_path):
    graph = every_site()
    assert neuronpedia(graph, tmp_path / "new", slug="one") == tmp_path / "new" / "one.json"
    assert neuronpedia(graph, str(tmp_path / "two.json")) == tmp_path / "two.json"
    assert json.loads((tmp_path / "two.json").read_text())["metadata"]["slug"] == "two"
    assert written(graph, tmp_path / "three.json", slug="other")["metadata"]["slug"] == "other"


@pytest.mark.parametrize(
    ("path", "slug", "error", "text"),
    [
        ("", None, ValueError, "is a folder, so the graph needs a name: pass slug="),
        ("", "a/b", ValueError, "slug='a/b' is no file name"),
        ("", "", ValueError, "slug='' is no file name"),
        ("no/where.json", None, FileNotFoundError, "there is no folder"),
        ("no/where", "a", FileNotFoundError, "there is no folder"),
    ],
)
def test_a_place_that_cannot_hold_the_file_is_refused(tmp_path, path, slug, error, text):
    with pytest.raises(error, match=text):
        neuronpedia(every_site(), tmp_path / path, slug=slug)
    assert not list(tmp_path.iterdir())


def test_a_file_is_whole_or_not_there(tmp_path):
    graph = every_site()
    neuronpedia(graph, tmp_path / "g.json")
    before = (tmp_path / "g.json").read_text()
    graph.edges.weight[0] = NAN
    with pytest.raises(ValueError, match="edges or biases that are not finite, which JSON cannot hold"):
        neuronpedia(graph, tmp_path / "g.json")
    assert (tmp_path / "g.json").read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["g.json"]
