"""What a run leaves on disk: killed, interrupted, on a full disk, damaged."""

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scope_lens.training import ActivationStore, TrainConfig, Trainer, checkpoint, checkpoints, read_log

pytestmark = pytest.mark.usefixtures("one_thread")

A = "blocks.0.hook_resid_post"
CFG = TrainConfig(
    hook_in=A, hook_out=A, width=32, sparsity=0.01, steps=25, batch_size=16, learning_rate=3e-3, lr_warmup=5,
    lr_decay=5, sparsity_warmup=10, bandwidth=0.1, threshold_init=0.02, threshold="direct", dead_after=100,
)  # fmt: skip


@pytest.fixture
def store():
    return ActivationStore.from_rows({A: 3 * torch.randn(100, 8)})


def finish(trainer, store):
    return list(trainer.run(store, progress=False))


def same(one, other):
    ours, theirs = one.result()[0].state_dict(), other.result()[0].state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- kill -9 ----

KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path

import torch

from scope_lens.training import ActivationStore, TrainConfig, Trainer, checkpoint, checkpoints

torch.set_num_threads(1)
torch.manual_seed(0)
A = "blocks.0.hook_resid_post"
folder, whole = Path(sys.argv[1]) / "run", Path(sys.argv[1]) / "whole"
cfg = TrainConfig(
    hook_in=A, hook_out=A, width=1024, sparsity=0.01, steps=80, batch_size=16, learning_rate=3e-3, lr_warmup=5,
    sparsity_warmup=10, bandwidth=0.1, threshold_init=0.02, threshold="direct",
)
store = ActivationStore.from_rows({A: torch.randn(500, 64)})


def train(started=lambda: None):
    begun = checkpoints(folder)
    trainer = Trainer.resume(folder) if begun else Trainer(cfg, folder=folder, checkpoint_every=2)
    for _ in trainer.run(store, progress=False):
        started()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def child(prepare):
    # The pipe says when it has made an update.
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            prepare()
            # The pause keeps a fast machine from being through before the last kill.
            train(lambda: (os.write(writing, b"."), time.sleep(0.005)))
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writing)
    return pid, reading


save_file, unlink, replace = checkpoint.save_file, Path.unlink, Path.replace


def half_written():
    def save(state, part, metadata):
        save_file(state, part, metadata=metadata)
        if len(checkpoints(folder)) > 1:
            os.truncate(part, part.stat().st_size // 2)
            die()
    checkpoint.save_file = save


def not_yet_named():
    Path.replace = lambda self, target: die() if len(checkpoints(folder)) > 1 else replace(self, target)


def not_yet_pruned():
    Path.unlink = lambda self, missing_ok=False: die() if self.suffix == ".safetensors" else unlink(self, missing_ok)


report = {"killed": 0, "steps": [], "parts": 0}
rng = random.Random(0)
for number, prepare in enumerate([lambda: None] * 12 + [half_written, not_yet_named, not_yet_pruned]):
    pid, reading = child(prepare)
    if prepare.__name__ == "<lambda>":
        if number % 3:
            os.read(reading, 1)
        time.sleep(rng.uniform(0.0, 0.05))
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(reading)
    report["killed"] += os.WIFSIGNALED(status)
    report["parts"] += len(list(folder.glob("*.part")))
    if checkpoints(folder):
        report["steps"].append(Trainer.resume(folder).step)
train()
for _ in Trainer(cfg, folder=whole).run(store, progress=False):
    pass
ours, theirs = (checkpoint.read_checkpoint(f).tensors for f in (folder, whole))
report["equal"] = ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
report["left"] = sorted(p.name for p in folder.iterdir())
report["imported"] = [name for name in ("wandb", "tensorboard", "plotly") if name in sys.modules]
print(json.dumps(report))
"""


def test_a_run_killed_at_any_moment_resumes(tmp_path):
    """Twelve kills at random moments, and three in the middle of a write, before and after the file has its name."""
    run = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["killed"] >= 4  # on a fast machine the run may be over before all of them
    assert report["parts"] >= 2
    assert report["steps"] == sorted(report["steps"])
    assert report["equal"]
    assert report["left"] == [f"checkpoint_{step:09d}.safetensors" for step in (76, 78, 80)] + ["log.jsonl"]
    assert report["imported"] == []  # nobody asked for them
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("run", "whole")]
    ours, theirs = ([dataclasses.replace(r, tokens_per_second=0.0) for r in log] for log in logs)
    assert ours == theirs


# ---- SIGINT and SIGTERM ----


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
@pytest.mark.parametrize("place", ["update", "caller", "save", "first save"])
def test_a_signal_saves_and_stops(store, tmp_path, monkeypatch, number, error, place):
    """In the middle of an update the step is finished first; in the caller's code the state is whole already."""
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    whole, broken = Trainer(CFG), Trainer(CFG, folder=tmp_path, checkpoint_every=8)
    results = finish(whole, store)

    def hit(step):
        """The original function, with the signal in front of it at one step."""
        return lambda original: (
            lambda *args, **kwargs: (
                os.kill(os.getpid(), number) if broken.step == step else None,
                original(*args, **kwargs),
            )[1]
        )

    with pytest.raises(error) as raised:
        if place == "first save":
            monkeypatch.setattr(checkpoint, "save_file", hit(0)(checkpoint.save_file))
        for result in broken.run(store, progress=False):
            if result.step == 8 and place == "update":
                learner = broken._learners[0]
                learner.update = hit(9)(learner.update)
            if result.step == 10 and place == "caller":
                os.kill(os.getpid(), number)
            if result.step == 10 and place == "save":
                monkeypatch.setattr(checkpoint, "save_file", hit(16)(checkpoint.save_file))
    monkeypatch.undo()
    stopped = {"update": 10, "caller": 10, "save": 16, "first save": 0}[place]
    if number == signal.SIGTERM:
        assert raised.value.code == 143
    else:
        assert str(raised.value) == (
            f"interrupted after step {stopped}; Trainer.resume({str(tmp_path)!r}) goes on from there"
        )
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    resumed = Trainer.resume(tmp_path)
    assert resumed.step == stopped
    finish(resumed, store)
    assert same(resumed, whole)
    assert [r.loss for r in read_log(tmp_path / "log.jsonl")] == [r.loss for r in results]


def test_a_second_signal_does_not_wait(store, tmp_path):
    trainer = Trainer(CFG, folder=tmp_path, checkpoint_every=5)
    with pytest.raises(KeyboardInterrupt):
        for result in trainer.run(store, progress=False):
            if result.step == 7:
                learner = trainer._learners[0]
                update = learner.update

                def twice(x, y, update=update):
                    os.kill(os.getpid(), signal.SIGINT)
                    os.kill(os.getpid(), signal.SIGINT)
                    return update(x, y)

                learner.update = twice
    assert max(checkpoints(tmp_path)) == 5


def test_a_signal_that_is_ignored_stays_ignored(store, tmp_path):
    earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for _ in Trainer(CFG, folder=tmp_path).run(store, progress=False):
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, earlier)
    assert max(checkpoints(tmp_path)) == 25


# ---- files ----


@pytest.mark.parametrize(("keep", "there"), [(1, [25]), (3, [18, 24, 25]), (9, [0, 6, 12, 18, 24, 25])])
def test_the_last_checkpoints_stay(store, tmp_path, keep, there):
    finish(Trainer(CFG, folder=tmp_path, checkpoint_every=6, keep=keep), store)
    assert sorted(checkpoints(tmp_path)) == there
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *(f"checkpoint_{step:09d}.safetensors" for step in there), "log.jsonl",
    ]  # fmt: skip


def test_a_full_disk_leaves_the_earlier_checkpoints(store, tmp_path):
    """A limit on the size of files stands in for the disk."""
    cfg = dataclasses.replace(CFG, width=512)
    whole = Trainer(cfg)
    finish(whole, store)
    trainer = Trainer(cfg, folder=tmp_path, checkpoint_every=4, keep=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(
            OSError, match=r"checkpoint_000000012\.safetensors could not be written .*too large"
        ) as error:
            for result in trainer.run(store, progress=False):
                if result.step == 9:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        assert "whole: checkpoint_000000004.safetensors, checkpoint_000000008.safetensors. Make room" in str(
            error.value
        )
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            "checkpoint_000000004.safetensors", "checkpoint_000000008.safetensors", "log.jsonl",
        ]  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Trainer.resume(tmp_path).step == 8
    # In memory nothing is lost either.
    finish(trainer, store)
    assert sorted(checkpoints(tmp_path)) == [24, 25]
    assert same(trainer, whole)


def test_a_disk_too_full_for_the_log(store, tmp_path):
    trainer = Trainer(CFG, folder=tmp_path, checkpoint_every=4)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(
            OSError, match=r"log\.jsonl could not be written .*no space left, 10 of .*The last checkpoint is whole"
        ):
            for result in trainer.run(store, progress=False):
                if result.step == 9:
                    size = (tmp_path / "log.jsonl").stat().st_size
                    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    resumed = Trainer.resume(tmp_path)
    assert resumed.step == 8
    assert [r.step for r in finish(resumed, store)] == list(range(9, 26))
    assert [r.step for r in read_log(tmp_path / "log.jsonl")] == list(range(1, 26))


def damage(kind, file):
    content = bytearray(file.read_bytes())
    if kind == "flipped":
        content[-9] ^= 4  # one bit of one number
    elif kind == "foreign":
        content[:4] = b"PK\x03\x04"
    file.write_bytes({"cut": content[: len(content) // 2], "empty": b""}.get(kind, content))


@pytest.mark.parametrize("kind", ["cut", "foreign", "empty", "flipped"])
def test_a_damaged_checkpoint_is_refused_and_the_whole_ones_are_named(store, tmp_path, kind):
    whole = Trainer(CFG)
    finish(whole, store)
    finish(Trainer(CFG, folder=tmp_path, checkpoint_every=8), store)
    there = checkpoints(tmp_path)
    damage(kind, there[25])
    damage(kind, there[16])
    found = r"checkpoint_000000025\.safetensors is no whole checkpoint .*Those of the steps \[24\] are whole.*step=24\)"
    for call in (lambda: Trainer.resume(tmp_path), lambda: Trainer(CFG, folder=tmp_path)):
        with pytest.raises(ValueError, match=found):
            call()
    assert sorted(checkpoints(tmp_path)) == [16, 24, 25]  # nothing is removed by looking
    resumed = Trainer.resume(tmp_path, step=24)
    finish(resumed, store)
    assert same(resumed, whole)
    assert Trainer.resume(tmp_path).step == 25
    damage(kind, there[24])
    damage(kind, there[25])
    with pytest.raises(ValueError, match="The folder holds no other that is whole; train anew"):
        Trainer.resume(tmp_path)


def test_a_checkpoint_of_another_version_is_told_from_a_damaged_one(store, tmp_path):
    finish(Trainer(CFG, folder=tmp_path), store)
    newest = checkpoints(tmp_path)[25]
    path, header, tensors = checkpoint.read_checkpoint(tmp_path)
    assert path == newest
    header["configs"][0]["of_tomorrow"] = 1
    checkpoint.write_checkpoint(tmp_path, header, tensors, step=25, keep=3)
    with pytest.raises(
        ValueError, match="is whole but is no state of a run that this version can take up.*of_tomorrow"
    ):
        Trainer.resume(tmp_path)


def test_other_files_in_the_folder_are_left_alone(store, tmp_path):
    mine = [tmp_path / name for name in ("checkpoint_notes.part", "checkpoint_best.safetensors", "readme.txt")]
    for file in mine:
        file.write_text("mine")
    finish(Trainer(CFG, folder=tmp_path, checkpoint_every=2, keep=1), store)
    assert all(file.read_text() == "mine" for file in mine)
    assert list(checkpoints(tmp_path)) == [25]
    assert checkpoints(Path(tmp_path / "none")) == {}
