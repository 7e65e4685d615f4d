"""Stores on disk: the layout, a harvest that is killed at any moment, a full disk, damaged files."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from store_material import BOS, RES, Z, bridged, one_pass, shrink, token_ids
from store_material import harvest as harvest_sites

from scope_lens.training import ActivationStore
from scope_lens.training.store import harvest_folder, site_rows, zarr_rows

SITES = (RES, Z)


def harvest(model, tokens, **settings):
    return harvest_sites(model, tokens, **{"sites": SITES} | settings)


@pytest.fixture(scope="module")
def model():
    return bridged()


@pytest.fixture
def tokens():
    return token_ids(30)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    shrink(monkeypatch)


def files(folder):
    """Every file of a folder by its relative path."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def die_at(monkeypatch, call, error=KeyboardInterrupt):
    """Let the forward number `call` raise; the one that measures widths is the first. Give the calls so far."""
    calls, caught = [], site_rows.SiteRows._caught

    def dying(self, batch):
        calls.append(len(batch.tokens))
        if len(calls) == call:
            raise error
        return caught(self, batch)

    monkeypatch.setattr(site_rows.SiteRows, "_caught", dying)
    return calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_folder_gives_what_memory_gives(model, tokens, tmp_path, dtype):
    kept = harvest(model, tokens, dtype=dtype)
    made = harvest(model, tokens, dtype=dtype, path=tmp_path / "store")
    opened = ActivationStore.open(tmp_path / "store")
    assert kept.manifest == made.manifest == opened.manifest
    assert kept.rows > 2 * 128
    readers = [store.reader(SITES, size=37, seed=3) for store in (kept, made, opened)]
    for _ in range(12):
        expected, *found = [reader.next() for reader in readers]
        assert all(torch.equal(batch[site], expected[site]) for batch in found for site in SITES)
        origin, *others = [reader.origin() for reader in readers]
        assert all(torch.equal(a, b) for other in others for a, b in zip(origin, other, strict=True))
        assert torch.equal(origin.token_id, tokens[origin.doc, origin.pos])
    assert kept.mixing(size=50) == opened.mixing(size=50)
    assert opened.saw(model, torch.cat([token_ids(40)[35:], tokens[7:9]])) == [5, 6]
    assert [entry.name for entry in tmp_path.iterdir()] == ["store"]


def test_rows_are_shuffled_in_buckets_before_they_are_written(model, tokens, tmp_path):
    """Rows of a bucket come from all over it, not in the order of the forwards."""
    store = harvest(model, tokens, sites=[RES], path=tmp_path / "store")
    doc = torch.from_numpy(np.frombuffer(files(tmp_path / "store")["doc/c/0"][: 64 * 4], np.int32).copy())
    assert len(doc.unique()) >= 9  # one file of 64 rows; in the order of the forwards, rows of six documents
    assert store.manifest.documents == 30


def test_zarr_v3_can_read_it(model, tokens, tmp_path):
    """By the specification alone: JSON metadata, and the bytes of an uncompressed chunk inside its shard."""
    store = harvest(model, tokens, sites=[RES, Z], dtype=torch.bfloat16, path=tmp_path / "store")
    found = files(tmp_path / "store")
    group = {"zarr_format": 3, "node_type": "group", "attributes": {}}
    assert json.loads(found["zarr.json"]) == json.loads(found["acts/zarr.json"]) == group
    for name, shape, dtype in (
        (f"acts/{RES}", [store.rows, 48], "bfloat16"),
        (f"acts/{Z}", [store.rows, 80], "bfloat16"),
        ("token_id", [store.rows], "int32"),
        ("doc", [store.rows], "int32"),
        ("pos", [store.rows], "int32"),
    ):
        metadata = json.loads(found[f"{name}/zarr.json"])
        (codec,) = metadata["codecs"]
        assert metadata["node_type"] == "array"
        assert (metadata["zarr_format"], metadata["shape"], metadata["data_type"]) == (3, shape, dtype)
        assert metadata["chunk_grid"]["configuration"]["chunk_shape"] == [64, *shape[1:]]
        assert codec["name"] == "sharding_indexed"
        assert codec["configuration"]["chunk_shape"] == [16, *shape[1:]]
        assert codec["configuration"]["codecs"] == [{"name": "bytes", "configuration": {"endian": "little"}}]
    # Row 72 is row 8 of the first chunk of the second shard.
    shard = found[f"acts/{RES}/c/1/0"]
    index = np.frombuffer(shard[-(4 * 16 + 4) : -4], "<u8").reshape(4, 2)
    chunk = shard[index[0, 0] : index[0, 0] + index[0, 1]]
    row = torch.frombuffer(bytearray(chunk), dtype=torch.bfloat16).view(16, 48)[8]
    origin = [np.frombuffer(found[f"{name}/c/1"][8 * 4 : 9 * 4], np.int32)[0] for name in ("doc", "pos")]
    where, rows = one_pass(store, RES)
    at = ((where.doc == int(origin[0])) & (where.pos == int(origin[1]))).nonzero()
    assert torch.equal(rows[int(at)], row.float())


def test_the_manifest_says_where_it_came_from(model, tokens, tmp_path):
    harvest(model, tokens, sites=[RES], path=tmp_path / "store", seed=3)
    fields = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert fields["model"] == "Gemma2ForCausalLM"
    assert fields["sites"] == [RES]
    assert fields["aliases"] == [["blocks.0.hook_out", RES]]
    assert fields["untrained"] == ["bos", "eos", "pad"]
    assert (fields["documents"], fields["seed"], fields["dtype"]) == (30, 3, "float32")
    assert set(fields["versions"]) == {"scope-lens", "torch", "transformers", "transformer-lens", "tensorstore"}
    assert all(fields[name].startswith("sha256:") for name in ("model_fingerprint", "data"))
    assert len((tmp_path / "store" / "documents.txt").read_text().split()) == 30


# Broken off


@pytest.mark.parametrize("call", [2, 6, 11])
def test_a_harvest_that_is_broken_off_goes_on_in_the_middle_of_a_bucket(model, tokens, tmp_path, monkeypatch, call):
    harvest(model, tokens, path=tmp_path / "whole")
    with monkeypatch.context() as patch:
        die_at(patch, call)
        with pytest.raises(KeyboardInterrupt):
            harvest(model, tokens, path=tmp_path / "store")
    with pytest.raises(FileNotFoundError, match="unfinished"):
        ActivationStore.open(tmp_path / "store")
    with pytest.raises(ValueError, match=r"unfinished harvest of other data or settings \(seed=0 \(here 7\)\)"):
        harvest(model, tokens, path=tmp_path / "store", seed=7)
    calls = die_at(monkeypatch, 0)
    harvest(model, tokens, path=tmp_path / "store")
    assert calls == [1] + [3] * (10 - (call - 2))
    assert files(tmp_path / "store") == files(tmp_path / "whole")


def test_the_progress_bar_begins_where_the_harvest_stopped(model, tokens, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        die_at(patch, 8)
        with pytest.raises(KeyboardInterrupt):
            harvest(model, tokens, path=tmp_path / "store")
    capsys.readouterr()
    harvest(model, tokens, path=tmp_path / "store", progress=True)
    assert "harvest, resumed:  60%" in capsys.readouterr().err


def test_a_harvest_can_go_on_with_smaller_forwards(model, tokens, tmp_path, monkeypatch):
    whole = harvest(model, tokens, path=tmp_path / "whole")
    with monkeypatch.context() as patch:
        die_at(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            harvest(model, tokens, path=tmp_path / "store")
    resumed = harvest(model, tokens, path=tmp_path / "store", batch_size=1)
    for a, b in zip(one_pass(whole, *SITES)[1:], one_pass(resumed, *SITES)[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_harvest_begun_anew_forgets_the_old_one(model, tokens, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        die_at(patch, 8)
        with pytest.raises(KeyboardInterrupt):
            harvest(model, tokens, path=tmp_path / "store", seed=1)
    calls = die_at(monkeypatch, 0)
    harvest(model, tokens, path=tmp_path / "store", resume=False)
    assert len(calls) == 11
    harvest(model, tokens, path=tmp_path / "whole")
    assert files(tmp_path / "store") == files(tmp_path / "whole")


KILLED_AGAIN_AND_AGAIN = """
import os, signal, sys, time
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from store_material import RES, bridged, harvest, shrink, token_ids
from scope_lens.training.store import harvest_folder
shrink()
harvest_folder._SECONDS_BETWEEN_NOTES = 0.0
note = harvest_folder._Folder._note

def slow_note(folder):  # 48 notes take longer than the first child lives, on a fast machine too
    note(folder)
    time.sleep(0.03)

harvest_folder._Folder._note = slow_note
model, path, kills = bridged(), Path({path!r}), 0
while not path.exists():
    child = os.fork()
    if not child:
        harvest(model, token_ids(48), sites=[RES], batch_size=1, path=path)
        os._exit(0)
    time.sleep(0.5 * (kills + 1))
    if os.waitpid(child, os.WNOHANG) == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
print(kills)
"""


def test_kill_minus_9_at_any_moment(model, tmp_path):
    """A process is killed again and again, each time a little later, until a harvest is through."""
    code = KILLED_AGAIN_AND_AGAIN.format(tests=str(Path(__file__).parent), path=str(tmp_path / "store"))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) >= 1
    harvest(model, token_ids(48), sites=[RES], batch_size=1, path=tmp_path / "store")
    harvest(model, token_ids(48), sites=[RES], batch_size=1, path=tmp_path / "whole")
    assert files(tmp_path / "store") == files(tmp_path / "whole")


class Killed(BaseException):
    """Nothing catches it but a handler of everything, and what that does is undone."""


@pytest.mark.parametrize("step", [1, 2, 5, 9, 14, 20, 26, 27, 28])
def test_a_kill_between_any_two_writes(model, tokens, tmp_path, monkeypatch, step):
    """The process dies before the write number `step` of a note, a shard or a rename, and writes nothing after it."""
    harvest(model, tokens, path=tmp_path / "whole")
    writes = []

    def mortal(function):
        def call(*args, **kwargs):
            writes.append(function.__qualname__)
            if len(writes) >= step:
                raise Killed
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(harvest_folder, "_SECONDS_BETWEEN_NOTES", 0.0)
        patch.setattr(harvest_folder, "write_json", mortal(harvest_folder.write_json))
        patch.setattr(zarr_rows.ZarrRows, "write", mortal(zarr_rows.ZarrRows.write))
        patch.setattr(Path, "rename", mortal(Path.rename))
        with pytest.raises(Killed):
            harvest(model, tokens, path=tmp_path / "store")
    harvest(model, tokens, path=tmp_path / "store")
    assert files(tmp_path / "store") == files(tmp_path / "whole")


# Bad input


def test_a_finished_folder_is_opened_again_or_refused(model, tokens, tmp_path):
    store = harvest(model, tokens, path=tmp_path / "store")
    assert harvest(model, tokens, path=tmp_path / "store").manifest == store.manifest
    alias = harvest(model, tokens, path=tmp_path / "store", sites=["blocks.0.hook_out", *SITES[1:]])
    assert alias.manifest == store.manifest
    with pytest.raises(ValueError, match=r"store of another harvest \(seed=0 \(here 3\)\); choose another path"):
        harvest(model, tokens, path=tmp_path / "store", seed=3)
    with pytest.raises(ValueError, match=r"another harvest \(other data\)"):
        harvest(model, tokens.roll(1, 0), path=tmp_path / "store")
    with pytest.raises(ValueError, match="dtype='float32' .here 'bfloat16'."):
        harvest(model, tokens, path=tmp_path / "store", dtype=torch.bfloat16)
    other = bridged()
    with torch.no_grad():
        next(iter(other.parameters())).mul_(1.01)
    with pytest.raises(ValueError, match=r"another harvest \(another model\)"):
        harvest(other, tokens, path=tmp_path / "store")
    with pytest.raises(FileExistsError, match="resume is off"):
        harvest(model, tokens, path=tmp_path / "store", resume=False)


def test_a_harvest_is_taken_up_under_the_names_it_was_begun_with(model, tokens, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        die_at(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            harvest(model, tokens, path=tmp_path / "store", sites=[RES])
    with pytest.raises(ValueError, match=rf"begun with the sites \['{RES}'\]"):
        harvest(model, tokens, path=tmp_path / "store", sites=["blocks.0.hook_out"])


def test_what_was_harvested_before_bad_numbers_stays(tokens, tmp_path, monkeypatch):
    model = bridged()
    with torch.no_grad():
        model.model.original_model.model.embed_tokens.weight[150] = 1e6
    bad = tokens.clamp(max=149)
    bad[11, 7] = 150
    with pytest.raises(ValueError, match="not finite as float16 in document 11, position 7.*before it stays"):
        harvest(model, bad, path=tmp_path / "store", dtype=torch.float16, batch_size=1)
    note = json.loads((tmp_path / "store.part" / "progress.json").read_text())
    assert note["sequences"] > 0
    with pytest.raises(ValueError, match="not finite as float16 in document 11, position 7"):
        harvest(model, bad, path=tmp_path / "store", dtype=torch.float16, batch_size=1)


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_said_and_what_was_noted_stays(model, tokens, tmp_path, monkeypatch):
    harvest(model, tokens, path=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(harvest_folder, "reserve", full)
        with pytest.raises(
            OSError, match=r"disk of .* is full \(\d.*make room and run the same harvest again"
        ) as caught:
            harvest(model, tokens, path=tmp_path / "store")
        assert caught.value.errno == errno.ENOSPC
    with monkeypatch.context() as patch:  # as TensorStore reports it, at the third shard
        write, calls = zarr_rows.ZarrRows.write, []

        def filling(self, first, rows):
            calls.append(first)
            if first == 128:
                raise ValueError("RESOURCE_EXHAUSTED: Error writing local file [os_error_code='28'] [source]")
            write(self, first, rows)

        patch.setattr(zarr_rows.ZarrRows, "write", filling)
        with pytest.raises(OSError, match="is full"):
            harvest(model, tokens, path=tmp_path / "store")
    assert json.loads((tmp_path / "store.part" / "progress.json").read_text())["bucket"] == 1
    calls = die_at(monkeypatch, 0)
    harvest(model, tokens, path=tmp_path / "store")
    assert len(calls) < 11
    assert files(tmp_path / "store") == files(tmp_path / "whole")


def test_a_disk_that_is_too_small_is_said_before_the_first_forward(model, tokens, tmp_path, monkeypatch):
    usage = harvest_folder.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(harvest_folder.shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    calls = die_at(monkeypatch, 0)
    with pytest.raises(OSError, match=r"0\.0 GB are free\)\. The harvest needs 0\.\d GB more") as caught:
        harvest(model, tokens, path=tmp_path / "store")
    assert caught.value.errno == errno.ENOSPC
    assert calls == [1]


def test_damaged_files_are_refused(model, tokens, tmp_path):
    harvest(model, tokens, sites=[RES], path=tmp_path / "store")
    store = tmp_path / "store"

    def spoiled(file, change, match):
        content = (store / file).read_bytes()
        (store / file).unlink()
        if change is not None:
            (store / file).write_bytes(change(content))
        with pytest.raises(ValueError, match=match):
            ActivationStore.open(store).reader([RES], size=300).next()
        (store / file).write_bytes(content)

    spoiled(f"acts/{RES}/c/1/0", lambda content: content[: len(content) // 2], r"c/1/0 has \d+ bytes instead of \d+")
    spoiled(f"acts/{RES}/c/2/0", None, "c/2/0 is missing; the store is damaged")
    spoiled("pos/c/0", lambda content: content + b"0", "pos/c/0 has")
    spoiled(f"acts/{RES}/c/0/0", lambda content: content[:-9] + b"123456789", "is damaged .*harvest again")
    spoiled(f"acts/{RES}/zarr.json", lambda content: content[:50], "cannot be read .*harvest again")
    spoiled("doc/zarr.json", None, "doc cannot be read .*harvest again")
    spoiled("documents.txt", None, "documents.txt is missing")
    spoiled("manifest.json", lambda content: b"{", r"manifest\.json is damaged \(JSONDecodeError")
    spoiled("manifest.json", lambda content: content.replace(b'"rows": 3', b'"rows": 4'), "the manifest says float32")
    spoiled("manifest.json", lambda content: content.replace(b'"float32"', b'"float8"'), "is damaged .*float8")
    spoiled("manifest.json", lambda content: content.replace(b'"source"', b'"sauce"'), "is damaged")
    ActivationStore.open(store)


def test_a_store_of_the_old_layout_is_refused_by_name(model, tokens, tmp_path):
    for folder in ("store", "unfinished.part"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "site_0.npy").touch()
        (tmp_path / folder / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"old layout \(site_0\.npy\).*harvest again"):
        ActivationStore.open(tmp_path / "store")
    with pytest.raises(ValueError, match=r"old layout \(site_0\.npy\)"):
        harvest(model, tokens, path=tmp_path / "unfinished")
    (tmp_path / "foreign.part").mkdir()
    (tmp_path / "foreign.part" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="no unfinished harvest"):
        harvest(model, tokens, path=tmp_path / "foreign")
    assert (tmp_path / "foreign.part" / "thesis.tex").exists()
    (tmp_path / "bad.part").mkdir()
    (tmp_path / "bad.part" / "progress.json").write_text('{"sequences": 3}')
    with pytest.raises(ValueError, match=r"progress\.json is damaged .*resume=False"):
        harvest(model, torch.full((3, 4), 5).index_fill(1, torch.tensor(0), BOS), path=tmp_path / "bad")
