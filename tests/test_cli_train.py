"""`scope-lens harvest` and `scope-lens train`: what they write, how they go on, how they end."""

import dataclasses
import json
import os
import re
import signal
import sys

import pytest
import torch

from scope_lens import HookedSAE, cli, demo
from scope_lens.releases import load, open_suite
from scope_lens.training import ActivationStore, HeldOut, TrainConfig, Trainer, checkpoints, measure_l0, read_log

HARVEST = ("--model", "demo", "--site", "res", "transcoder", "--layer", 1, "--rows", 2000)
TRAIN = ("--site", "res", "--layer", 1, "--width", 64, "--sparsity", 1e-3, 4e-3, "--steps", 20, "--batch-size", 128)


@pytest.fixture
def run(capsys):
    """Run the command line; returns the exit code, standard output and standard error."""

    def words(*argv):
        capsys.readouterr()
        code = cli.main([str(word) for word in argv])
        return code, *capsys.readouterr()

    return words


def complaints(err):
    return [line for line in err.splitlines() if line.startswith("scope-lens: ")]


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """Text to harvest from."""
    file = tmp_path_factory.mktemp("text") / "stories.txt"
    file.write_text("\n<|endoftext|>\n".join(demo.text()[:20]))
    return file


@pytest.fixture(scope="module")
def harvested(tmp_path_factory, stories):
    """A store of the embedded model; it is only read."""
    store = tmp_path_factory.mktemp("store") / "store"
    assert cli.main([str(word) for word in ("harvest", *HARVEST, "--text", stories, "--out", store)]) == 0
    return store


def test_harvest_writes_a_store_that_opens(run, stories, tmp_path, monkeypatch):
    words = ("harvest", *HARVEST, "--text", stories, "--out", tmp_path / "store", "--dtype", "float32")
    code, out, err = run(*words, "--hook", "blocks.0.hook_mlp_out")
    assert (code, complaints(err)) == (0, [])
    store = ActivationStore.open(tmp_path / "store")
    assert (store.rows, store.manifest.dtype) == (2000, "float32")
    sites = [
        "blocks.1.hook_resid_post",
        "blocks.1.ln2.hook_normalized",
        "blocks.1.hook_mlp_out",
        "blocks.0.hook_mlp_out",
    ]
    assert [line.split()[0] for line in out.splitlines()[1:5]] == list(store.sites)
    assert all(store.width(site) == store.width(store.sites[0]) for site in sites)
    assert f"2,000 rows in {tmp_path / 'store'}" in out
    code, out, _ = run(*words, "--hook", "blocks.0.hook_mlp_out")  # finished: opened
    assert code == 0
    assert "2,000 rows" in out
    code, _, err = run(*words)
    assert code == 1
    assert len(complaints(err)) == 1
    assert str(tmp_path / "store") in complaints(err)[0]


def test_train_trains_every_combination_and_saves(run, harvested, tmp_path):
    out = tmp_path / "run"
    words = ("train", "--store", harvested, "--out", out, *TRAIN, "--site", "res", "transcoder", "--seed", 3)
    code, shown, err = run(*words)
    assert (code, complaints(err)) == (0, [])
    bar = err.split("\r")[-1]
    assert re.search(r"train: 100%.* 20/20 .*loss [\d.e-]+ to [\d.e-]+, L0 .*, FVU .*, tokens/s [\d,]+\]", bar)
    rows = [line.split() for line in shown.partition("\n\n")[0].splitlines()[1:]]
    assert [row[0] for row in rows] == [
        "0_res_layer_1_width_64", "1_res_layer_1_width_64", "2_transcoder_layer_1_width_64",
        "3_transcoder_layer_1_width_64",
    ]  # fmt: skip
    expected = Trainer(
        [
            dataclasses.replace(
                TrainConfig.short_run(site=site, layer=1, width=64, sparsity=sparsity, steps=20, seed=3), batch_size=128
            )
            for site in ("res", "transcoder")
            for sparsity in (1e-3, 4e-3)
        ]
    )
    list(expected.run(ActivationStore.open(harvested), progress=False))
    saved = [HookedSAE.load(row[-1]) for row in rows]
    for sae, direct in zip(saved, expected.result(), strict=True):
        assert all(torch.equal(sae.state_dict()[name], p) for name, p in direct.state_dict().items())
    found = open_suite(out / "saes")
    assert [release.site for release in found] == ["res", "res", "transcoder", "transcoder"]
    x = torch.randn(3, saved[0].cfg.d_in)
    assert {tuple(load(r, local_dir=out / "saes").encode(x).flatten().tolist()) for r in found} == {
        tuple(sae.encode(x).flatten().tolist()) for sae in saved
    }
    # The same command again finds the run finished, and says the same.
    again = run(*words)
    assert (again[0], again[1]) == (0, shown)
    assert "train, resumed: 100%" in again[2]


def test_ctrl_c_leaves_a_folder_that_the_same_command_goes_on_with(run, harvested, tmp_path, monkeypatch):
    words = ("train", "--store", harvested, *TRAIN)
    assert run(*words, "--out", tmp_path / "whole")[0] == 0
    from scope_lens.training.learner import Learner

    update = Learner.update

    def interrupted(self, x, y):
        if self.step == 7 and self.cfg.sparsity == 1e-3:
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, x, y)

    monkeypatch.setattr(Learner, "update", interrupted)
    code, out, err = run(*words, "--out", tmp_path / "run")
    monkeypatch.undo()
    assert (code, out) == (130, "")
    assert complaints(err) == [
        "scope-lens: interrupted after step 8 of 20; the same command goes on from there"
    ]  # fmt: skip
    assert max(checkpoints(tmp_path / "run")) == 8
    code, _, err = run(*words, "--out", tmp_path / "run")
    assert code == 0
    assert "train, resumed:" in err
    logs = [
        [dataclasses.replace(r, tokens_per_second=0.0) for r in read_log(tmp_path / name / "log.jsonl")]
        for name in ("run", "whole")
    ]
    assert logs[0] == logs[1]


def test_held_out_text_is_evaluated(run, harvested, stories, tmp_path):
    held_out = tmp_path / "held_out.txt"
    held_out.write_text(demo.text()[-1])
    words = ("train", "--store", harvested, *TRAIN[:6], "--sparsity", 2e-3, "--steps", 6, "--batch-size", 64)
    words = (*words, "--model", "demo", "--tensorboard", "--evaluate-every", 4)
    code, shown, _ = run(*words, "--out", tmp_path / "run", "--held-out", held_out)
    assert code == 0
    assert [r.step for r in read_log(tmp_path / "run" / "log.jsonl") if r.evaluation] == [4, 6]
    last = read_log(tmp_path / "run" / "log.jsonl")[-1].evaluation
    assert shown.splitlines()[1].split()[4] == f"{last.delta_loss:.4f}"
    assert "L0 is of held-out text" in shown
    (native,) = (tmp_path / "run" / "saes").rglob("sae.safetensors")
    fresh = measure_l0(HookedSAE.load(native.parent), on=HeldOut(model=demo.load_model(), text=[demo.text()[-1]]))
    measured = json.loads((native.parent / "measured.json").read_text())
    assert (measured["average_l0"], measured["measured_on"]) == fresh
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert b"held_out/delta_loss" in events.read_bytes()
    code, _, err = run(*words, "--out", tmp_path / "other", "--held-out", stories)
    assert code == 1
    assert "20 of the held-out documents" in complaints(err)[0]


def test_dictionaries_without_params_npz_are_told(run, harvested, tmp_path):
    words = ("--site", "res", "--layer", 1, "--width", 64, "--activation", "topk", "--k", 4, "--steps", 4)
    code, shown, _ = run("train", "--store", harvested, "--out", tmp_path / "run", *words)
    assert code == 0
    assert "has no params.npz, which has no place for activation='topk'." in shown
    assert HookedSAE.load(next((tmp_path / "run" / "saes").rglob("config.json")).parent).cfg.k == 4


def test_the_embedded_stories_are_parted(run, tmp_path):
    from scope_lens.cli.inputs import documents

    first, last = documents(["demo"], embedded="first"), documents(["demo"])
    assert first + last == demo.text()
    assert len(last) == 40


def test_bad_input_is_one_line(run, harvested, stories, tmp_path):
    harvest = ("harvest", "--model", "demo", "--text", stories, "--out", tmp_path / "store")
    train = ("train", "--store", harvested, "--out", tmp_path / "run")
    small = ("--site", "res", "--layer", 1, "--width", 64)
    assert run(*train, *TRAIN, "--no-resume")[0] == 0
    for words, error in [
        (harvest, "Name --site with --layer, or --hook."),
        ((*harvest, "--site", "res"), "Name --site with --layer, or --hook."),
        ((*harvest, "--layer", 1), "Name --site with --layer, or --hook."),
        ((*harvest, "--hook", "blocks.9.hook_mlp_out"), "blocks.9.hook_mlp_out"),
        ((*harvest, "--hook", "blocks.0.hook_mlp_out", "--device", "cuda:99"), "device='cuda:99' cannot be used here"),
        (("harvest", *HARVEST, "--text", tmp_path / "none.txt", "--out", tmp_path / "s"), "There is no text file"),
        (("train", "--store", tmp_path, "--out", tmp_path / "run2", *TRAIN), "holds no activation store"),
        ((*train, *TRAIN, "--steps", 30), "other configs: config 0: steps 20, now 30"),
        ((*train, *TRAIN, "--no-resume"), "holds a run of these configs already"),
        ((*train[:4], tmp_path / "run3", *small, "--width", "13k"), "names no width"),
        ((*train[:4], tmp_path / "run3", *small, "--layer", 2), "no site 'blocks.2.hook_resid_post'"),
        ((*train[:4], tmp_path / "run3", *small, "--preset", "gemma_scope"), "--preset gemma_scope needs --sparsity."),
        ((*train[:4], tmp_path / "run3", *small, "--preset", "gemma_scope_2"), "needs --target-l0."),
        (
            (*train[:4], tmp_path / "run3", *small, "--preset", "gemma_scope", "--sparsity", 1, "--k", 4),
            "trains JumpReLU dictionaries; leave out --activation and --k.",
        ),
        ((*train[:4], tmp_path / "run3", *small, "--held-out", stories), "--held-out needs --model"),
        ((*train[:4], tmp_path / "run3", *small, "--batch-size", 4096), "2000 rows, fewer than a batch of 4096"),
    ]:
        code, out, err = run(*words)
        assert (code, out) == (1, ""), words
        assert len(complaints(err)) == 1
        assert error in complaints(err)[0]
    assert not checkpoints(tmp_path / "run3")


def test_a_log_that_is_not_installed_is_one_line(run, harvested, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, _, err = run("train", "--store", harvested, "--out", tmp_path / "run", *TRAIN, "--wandb", "project")
    assert code == 1
    assert complaints(err) == [
        "scope-lens: WandbLog needs wandb, which is not installed: pip install 'scope-lens[train]'."
    ]


def test_the_published_recipes_run(run, harvested, tmp_path):
    words = ("train", "--store", harvested, *TRAIN[:6], "--steps", 2, "--batch-size", 64)
    with pytest.warns(UserWarning, match="change log.threshold. by"):
        assert run(*words, "--out", tmp_path / "a", "--preset", "gemma_scope", "--sparsity", 1e-3)[0] == 0
    with pytest.warns(UserWarning, match="change log.threshold. by"):
        assert run(*words, "--out", tmp_path / "b", "--preset", "gemma_scope_2", "--target-l0", 20, 60)[0] == 0
    assert len(read_log(tmp_path / "b" / "log.jsonl")) == 4
