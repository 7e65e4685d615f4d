"""`scope-lens graph`: what it prints and writes, and what it refuses before any work."""

import json

import pytest
import torch
from test_cli import run  # noqa: F401  a fixture

from scope_lens import demo
from scope_lens.circuits import AttributionGraph, Kind, attribute

PROMPT = "Lily went to the"


def words_of(table: str) -> list[list[str]]:
    return [line.split() for line in table.splitlines()]


def test_it_prints_and_writes_the_graph_of_the_embedded_model(run, tmp_path):  # noqa: F811
    files = {name: tmp_path / name for name in ("g.safetensors", "g.html", "pages")}
    code, out, errors = run(
        "graph", "--model", "demo", "--prompt", PROMPT, "--site", "transcoder", "--top", 3, "--out",
        files["g.safetensors"], "--html", files["g.html"], "--neuronpedia", files["pages"],
    )  # fmt: skip
    assert (code, errors) == (0, [])
    graph = attribute(demo.load_model(), PROMPT, saes=demo.load_saes("transcoder"), progress=False)
    targets, latents, counts, *_ = out.split("\n\n")
    header, *rows = words_of(targets)
    assert " ".join(header) == "target probability logit above the mean of it bias"
    logits = graph.find(kind=Kind.LOGIT).tolist()
    assert [float(row[-3].rstrip("%")) for row in rows] == pytest.approx(
        [100 * float(graph.activation[node]) for node in logits], abs=0.051
    )
    header, *rows = words_of(latents)
    assert header == ["site", "latent", "position", "token", "activation", "influence"]
    influence = graph.influence()[graph.find(kind=Kind.LATENT)]
    node = int(graph.find(kind=Kind.LATENT)[influence.argmax()])
    assert rows[0][:3] == [graph.site[node], str(int(graph.index[node])), str(int(graph.pos[node]))]
    assert float(rows[0][-1]) == pytest.approx(float(influence.max()), abs=1e-4)
    assert len(rows) == 3
    pruned = graph.prune()
    for what, one in (("whole", graph), ("pruned", pruned)):
        scores = one.scores()
        size = f"{one.n_nodes:,} nodes and {len(one.edges.source):,} edges"
        parts = f"replacement score {scores.replacement:.3f}, completeness {scores.completeness:.3f}"
        assert f"{what}: {size}, {parts}" in counts
    assert "add up to every target's pre-activation to" in counts

    kept = AttributionGraph.load(files["g.safetensors"])
    assert torch.equal(kept.edges.weight, graph.edges.weight)
    page = json.loads((files["pages"] / "lily-went-to-the.json").read_text())
    assert len([n for n in page["nodes"] if n["feature_type"] != "bias"]) == pruned.n_nodes
    assert page["metadata"]["slug"] == "lily-went-to-the"
    assert page["metadata"]["scan"] == "tiny-gemma2-stories"
    assert f"{pruned.n_nodes:,} nodes, {len(pruned.edges.source):,} edges, " in files["g.html"].read_text()


def test_layers_targets_and_folded_latents(run, tmp_path):  # noqa: F811
    code, out, _ = run(
        "graph", "--model", "demo", "--prompt", PROMPT, "--site", "res", "att", "--layer", 1, 2, "--target", " park",
        " shop", "--max-latents", 20, "--top", 40, "--neuronpedia", tmp_path / "named.json",
    )  # fmt: skip
    assert code == 0
    targets, latents, *_ = out.split("\n\n")
    assert [line.partition("  ")[0] for line in targets.splitlines()[1:]] == ["' park'", "' shop'"]
    rows = words_of(latents)[1:]
    assert len(rows) == 20
    assert {row[0] for row in rows} <= {
        f"blocks.{layer}.{hook}" for layer in (1, 2) for hook in ("hook_resid_post", "attn.hook_z")
    }
    assert json.loads((tmp_path / "named.json").read_text())["metadata"]["slug"] == "named"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ((), "Name the dictionaries: --site, e.g. transcoder, or --saes."),
        (("--layer", 1, "--saes", "x/y"), "--layer needs --site."),
        (("--site", "transcoder", "--layer", 9), "The embedded suite has no layer ['9']"),
        (("--site", "embedding"), "The embedded suite has no site ['embedding']"),
        (("--saes", "gemma-2-2b/20-gemmascope-res-17k"), "Did you mean 'gemma-2-2b/20-gemmascope-res-16k'?"),
        (("--site", "res", "--html", "no/where.html"), "no/where.html cannot be written"),
        (("--site", "res", "--neuronpedia", "no/where.json"), "no/where.json cannot be written"),
        (("--site", "res", "--neuronpedia", "no/where"), "no/where cannot be written"),
        (("--site", "res", "--target", "two words"), "two words"),
        (("--site", "res", "--slug", "a/b", "--neuronpedia", "."), "slug='a/b' is no file name"),
        (("--site", "res", "--slug", "a"), "--slug needs --neuronpedia."),
        (("--site", "res", "--top", "-1"), "--top is -1"),
        (("--site", "res", "--edge-mass", "2"), "edge_mass is a share of all influence, from 0 to 1; it is 2.0"),
    ],
)
def test_what_is_wrong_is_one_line(run, words, error):  # noqa: F811
    code, out, errors = run("graph", "--model", "demo", "--prompt", PROMPT, *words)
    assert (code, out, len(errors)) == (1, "", 1)
    assert error in errors[0]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--model", "gemma-2-3b", "--site", "res"), "Gemma Scope has no model 'google/gemma-2-3b'"),
        (("--model", "gemma-2-27b", "--site", "att"), "Gemma Scope has no dictionaries of att of width 16k"),
        (("--model", "gemma-2-2b", "--site", "res", "--layer", 40), "at layer 40"),
    ],
)
def test_gemma_scope_is_asked_before_a_model_is_loaded(run, words, error):  # noqa: F811
    code, out, errors = run("graph", "--prompt", PROMPT, *words)
    assert (code, out, len(errors)) == (1, "", 1)
    assert error in errors[0]


def test_a_suite_of_ones_own(run, tmp_path, random_sae):  # noqa: F811
    sae = random_sae("blocks.1.hook_resid_post", d_in=192, d_sae=64)
    sae.save(tmp_path / "own")
    code, out, errors = run("graph", "--model", "demo", "--prompt", PROMPT, "--saes", tmp_path / "own", "--top", 1)
    assert (code, errors) == (0, [])
    assert "\nblocks.1.hook_resid_post " in out
