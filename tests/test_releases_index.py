"""The packaged index against the listing it was made from, and the names that lead into it and out of it."""

import json
import runpy
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from scope_lens import releases
from scope_lens.releases import find, from_neuronpedia, from_path, hooks_for, ladder, parse_width, pick, width_name

TRANSCODERS = "google/gemma-scope-2b-pt-transcoders"
# Ids in the listing that name another layer, width or L0 than the file they stand beside.
WRONG_IDS = {"gemma-2-9b/20-gemmascope-res-131k__l0-10", "gemma-2-9b/20-gemmascope-res-131k__l0-12"}


@pytest.fixture(scope="module")
def listing(shared_data) -> list[dict]:
    return json.loads((shared_data / "gemma_scope_index.json").read_text())["entries"]


def test_every_listed_file_is_found_with_its_fields(listing):
    indexed = {(release.repo, release.path): release for release in find()}
    listed = {(entry["repo_id"], entry["path"]) for entry in listing}
    assert len(listed) == 2430
    assert len(indexed) == 2482
    assert listed < set(indexed)
    for entry in listing:
        release = indexed[entry["repo_id"], entry["path"]]
        tuned = entry["repo_id"] == "google/gemma-scope-9b-it-res"
        assert release.model == ("google/gemma-2-9b-it" if tuned else f"google/{entry['model']}")
        assert (release.site, release.layer, release.width, release.l0) == (
            entry["site"], entry["layer"], entry["width"], entry["l0"],
        )  # fmt: skip
        assert release.file == entry["file"]
        assert from_path(release.repo, entry["file"]) == release


def test_the_further_transcoders_are_two_denser_rungs_of_every_layer(listing):
    listed = {(entry["repo_id"], entry["path"]) for entry in listing}
    further = [release for release in find() if (release.repo, release.path) not in listed]
    assert len(further) == 52
    assert {release.repo for release in further} == {TRANSCODERS}
    rungs = [[r.l0 for r in ladder(model="gemma-2-2b", site="transcoder", layer=layer)] for layer in range(26)]
    assert rungs[0] == [76, 115, 165]
    assert rungs[11] == [5, 10, 17]
    assert rungs[25] == [41, 68, 110]
    assert all(len(rung) == 3 and rung == sorted(rung) for rung in rungs)


def test_the_canonical_choice_is_the_stored_one_even_in_a_tie(listing):
    stored = {(e["repo_id"], e["path"]) for e in listing if e["canonical"]}
    assert len(stored) == 429
    assert {(r.repo, r.path) for r in find(l0="canonical")} == stored
    for repo, path in stored:
        release = from_path(repo, path)
        chosen = pick(model=release.model, site=release.site, layer=release.layer, width=release.width)
        assert chosen == release
        assert from_path(repo, path.rsplit("/", 1)[0] + "/canonical") == release
    # Both cells hold 64 or 66 and 136 or 134, equally far from 100; upstream froze one low and one high.
    assert pick(model="gemma-2-9b", site="att", layer=23, width="131k").l0 == 66
    assert pick(model="gemma-2-9b", site="att", layer=27, width="16k").l0 == 136


def test_where_upstream_froze_no_choice_the_rule_decides():
    assert pick(model="gemma-2-2b", site="res", layer=12, width="131k").l0 == 129
    assert pick(model="gemma-2-9b", site="res", layer=20, width="262k").l0 == 50
    assert pick(model="gemma-2-2b", site="transcoder", layer=0).l0 == 115
    assert pick(model="gemma-2-2b", site="embedding", width="4k").l0 == 111


def test_pick_takes_the_nearest_l0_and_the_lower_of_a_tie():
    chosen = pick(model="google/gemma-2-2b", site="res", layer=20, width="16k", l0=60)
    assert chosen.l0 == 71
    assert pick(model="gemma-2-9b", site="att", layer=27, width=16384, l0=100).l0 == 64
    assert pick(model="gemma-2-2b", site="res", layer=20, l0=10**6).l0 == 294


def test_the_splitting_suite_is_matched_by_rank_from_the_end():
    def l0s(width: str) -> list[int]:
        return [release.l0 for release in ladder(model="gemma-2-2b", site="res", layer=12, width=width)]

    assert l0s("16k") == [22, 41, 82, 176, 445]
    assert [rungs[-2] for rungs in map(l0s, ("16k", "32k", "65k", "131k", "262k"))] == [176, 155, 141, 129, 121]


def test_neuronpedia_ids_lead_there_and_back(listing):
    ids = defaultdict(set)
    for entry in listing:
        if entry["neuronpedia"]:
            ids[entry["neuronpedia"]].add((entry["repo_id"], entry["path"]))
    for source, files in ids.items():
        if source in WRONG_IDS:
            continue
        release = from_neuronpedia(source)
        assert files == {(release.repo, release.path)}
        assert release.neuronpedia is not None
        assert source in (release.neuronpedia, f"{release.neuronpedia}__l0-{release.l0}")
    for release in find():
        assert release.neuronpedia is None or from_neuronpedia(release.neuronpedia) == release
    assert from_neuronpedia("gemma-2-2b/20-gemmascope-res-16k").path == "layer_20/width_16k/average_l0_71"
    assert from_neuronpedia("gemma-2-2b/5-gemmascope-transcoder-16k").l0 == 87
    assert sum(release.neuronpedia is not None for release in find()) == 656


def test_the_packaged_index_is_what_its_script_makes(shared_data, tmp_path, capsys, monkeypatch):
    script = Path(__file__).parent / "scripts" / "build_release_index.py"
    packaged = Path(releases.__file__).parent / "index.json"
    (tmp_path / "index.json").write_text(packaged.read_text())
    namespace = runpy.run_path(str(script))
    main = namespace["main"]
    monkeypatch.setitem(main.__globals__, "INDEX", tmp_path / "index.json")
    monkeypatch.setattr(sys, "argv", [str(script), str(shared_data / "gemma_scope_index.json")])
    main()
    assert (tmp_path / "index.json").read_text() == packaged.read_text()
    output = capsys.readouterr().out
    assert all(f"dropped: {source} contradicts" in output for source in WRONG_IDS)
    assert output.splitlines()[-1].startswith("2482 files")


def test_ids_that_contradict_their_file_are_left_out():
    for source in WRONG_IDS:
        with pytest.raises(KeyError, match="Neuronpedia id"):
            from_neuronpedia(source)


def test_names_may_have_the_organisation_or_leave_it_out():
    wanted = from_path("google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71")
    assert from_neuronpedia("google/gemma-2-2b/20-gemmascope-res-16k") == wanted
    for reference in ("gemma-2-2b/20-gemmascope-res-16k", str(wanted), f"{wanted}/params.npz"):
        for name in (reference, reference.removeprefix("google/"), f"google/{reference.removeprefix('google/')}"):
            assert releases.release_of(name) == wanted


@pytest.mark.parametrize("call", ["find(l0='canon')", "pick(model='gemma-2-2b', site='res', layer=20, l0='71')"])
def test_an_l0_that_is_neither_a_number_nor_canonical_is_refused(call):
    """In a process of its own, where nothing checks the types before the function does."""
    script = f"from scope_lens.releases import find, pick\n{call}"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "is no choice of L0; give a number, e.g. 71, or 'canonical'." in ended.stderr.splitlines()[-1]
    assert ended.stderr.splitlines()[-1].startswith("KeyError")


def test_an_unlisted_path_of_the_nine_repositories_is_a_release():
    release = from_path("google/gemma-scope-2b-pt-res", "/layer_3/width_16k/average_l0_999/params.npz")
    assert (release.layer, release.width, release.l0, release.neuronpedia) == (3, 16384, 999, None)
    assert from_path("gemma-scope-9b-pt-res", "embedding/width_4k/average_l0_5").site == "embedding"
    assert from_path("gemma-scope-27b-pt-res", "layer_45/width_1m/average_l0_5").width == 2**20


def test_filters_combine():
    assert {release.repo for release in find(model="gemma-2-9b-it")} == {"google/gemma-scope-9b-it-res"}
    assert len(find(repo="gemma-scope-2b-pt-res", layer=12, width="32k")) == 6
    assert [r.l0 for r in find(model="gemma-2-2b", site="res", layer=20, width=16384)] == [22, 38, 71, 139, 294]
    assert find(model="gemma-2-27b", site="mlp") == []
    assert len(find(site="embedding")) == 8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: find(model="gemma-2-2b-it"), r"no model 'google/gemma-2-2b-it'\. Did you mean 'google/gemma-2-9b-it'"),
        (lambda: find(site="resid"), r"no site 'resid'\. Did you mean 'res'\? Known: res, mlp, att"),
        (lambda: find(layer=99), "no layer 99"),
        (lambda: find(width=12345), r"no width 12345\..*Known: 4k, 16k"),
        (lambda: find(width="17k"), "'17k' names no width"),
        (lambda: find(repo="google/gemma-scope-2b-pt-resid"), "Did you mean 'google/gemma-scope-2b-pt-res'"),
        (lambda: pick(model="gpt2", site="res", layer=1), "no model 'google/gpt2'"),
        (lambda: pick(model="gemma-2-2b", site="res", layer=26), "at layer 26; it has layers 0-25"),
        (lambda: pick(model="gemma-2-27b", site="res", layer=1), "at layer 1; it has layers 10, 22, 34"),
        (lambda: pick(model="gemma-2-27b", site="mlp", layer=10), "'mlp' dictionaries .*; its sites are res"),
        (lambda: pick(model="gemma-2-2b", site="mlp", layer=3, width="1m"), "width '1m' .* it has 16k, 65k"),
        (lambda: pick(model="gemma-2-2b", site="embedding", layer=3), "it has no layers: leave layer out"),
        (lambda: ladder(model="gemma-2-2b", site="res"), "at layer None; it has layers 0-25"),
        (lambda: from_path("google/gemma-scope", "layer_1/width_16k/average_l0_5"), "no repository .*Known: google"),
        (lambda: from_path("gemma-scope-2b-pt-res", "layer_26/width_16k/average_l0_5"), "has the layers 0 to 25"),
        (lambda: from_path("gemma-scope-2b-pt-res", "layer_20/width_16k/l0_71"), "average_l0_71"),
        (lambda: from_path("gemma-scope-2b-pt-res", "../layer_20/width_16k/average_l0_71"), "no file"),
        (lambda: from_path("gemma-scope-2b-pt-res", "layer_20/width_16/average_l0_71"), "no file"),
        (lambda: from_path("gemma-scope-2b-pt-mlp", "embedding/width_4k/average_l0_6"), "no file"),
        (lambda: from_path("gemma-scope-2b-pt-mlp", "layer_1/width_1m/canonical"), "no file"),
        (lambda: from_neuronpedia("gemma-2-2b/20-gemmascope-res-131k"), "gemma-2-2b/20-gemmascope-res-16k"),
        (lambda: from_neuronpedia("google/gemma-2-2b/20-gemmascope-res-131k"), "gemma-2-2b/20-gemmascope-res-16k"),
        (lambda: hooks_for("resid", 1), "no site 'resid'"),
    ],
)  # fmt: skip
def test_an_unknown_name_is_refused_with_what_there_is(call, message):
    with pytest.raises(KeyError, match=message):
        call()


@pytest.mark.parametrize(("site", "layer"), [("res", None), ("embedding", 3)])
def test_a_layer_that_a_site_cannot_have_is_refused(site, layer):
    with pytest.raises(ValueError, match="every site but 'embedding' has a layer"):
        hooks_for(site, layer)


def test_the_hooks_of_every_site():
    assert hooks_for("res", 20) == ("blocks.20.hook_resid_post", "blocks.20.hook_resid_post")
    assert hooks_for("mlp", 3) == ("blocks.3.hook_mlp_out", "blocks.3.hook_mlp_out")
    assert hooks_for("att", 0) == ("blocks.0.attn.hook_z", "blocks.0.attn.hook_z")
    assert hooks_for("transcoder", 7) == ("blocks.7.ln2.hook_normalized", "blocks.7.hook_mlp_out")
    assert hooks_for("embedding", None) == ("hook_embed", "hook_embed")


def test_widths_are_powers_of_two_with_a_decimal_name():
    names = {"1k": 1024, "4k": 4096, "16k": 16384, "32k": 32768, "65k": 65536, "131k": 131072, "262k": 262144,
             "524k": 524288, "1m": 1048576}  # fmt: skip
    for name, width in names.items():
        assert parse_width(name) == parse_width(name.upper()) == parse_width(str(width)) == parse_width(width) == width
        assert width_name(width) == name
    assert width_name(1000) == "1000"


def test_the_index_loads_in_a_cold_process_without_torch():
    script = """
import dataclasses, functools, importlib.resources, json, re, sys, time
start = time.process_time()
from scope_lens import releases
releases.pick(model="gemma-2-2b", site="res", layer=20)
print(1e3 * (time.process_time() - start))
print([name for name in ("torch", "numpy", "huggingface_hub", "transformer_lens") if name in sys.modules])
"""
    runs = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True) for _ in range(3)
    ]
    times, heavy = zip(*(run.stdout.splitlines() for run in runs), strict=True)
    assert set(heavy) == {"[]"}
    assert min(map(float, times)) < 20


def test_public_names_exist():
    assert all(hasattr(releases, name) for name in releases.__all__)
    with pytest.raises(AttributeError, match="no attribute 'pikc'"):
        releases.pikc  # noqa: B018
