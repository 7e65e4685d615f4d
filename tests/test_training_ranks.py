"""Several processes against one: the same numbers, the same files, and nobody left waiting.

The groups of processes are forked in one run of ranks_worker.py, which writes down what each rank found.
"""

import fcntl
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks_worker import KINDS, OF_FOUR, ON_KERNELS, SHAPES, WRITTEN, A

from scope_lens.training import TrainConfig, read_log
from scope_lens.training.learner import check_divides
from scope_lens.training.ranks import ALONE, Ranks, latent_axis

CLOSE = 1e-6  # relative, after 20 updates


@pytest.fixture(scope="module")
def found(tmp_path_factory, worker_id):
    """The report; of several pytest workers one has it made, and the others wait for it."""
    root = tmp_path_factory.getbasetemp()
    root = root if worker_id == "master" else root.parent
    folder = root / "ranks"
    with (root / "ranks.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "report.pt").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            command = [sys.executable, Path(__file__).with_name("ranks_worker.py"), folder]
            run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=400)
            assert run.returncode == 0, run.stderr
    return torch.load(folder / "report.pt", weights_only=False) | {"folder": folder}


def apart(ours, theirs):
    """Largest distance of two sets of tensors, each as a fraction of the tensor's norm."""
    assert ours.keys() == theirs.keys()
    return max(
        float((ours[name].double() - theirs[name].double()).norm() / theirs[name].double().norm().clamp(min=1e-30))
        for name in theirs
    )


def close(ours, theirs):
    return math.isclose(ours, theirs, rel_tol=CLOSE)


# ---- the same numbers ----


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(kind, shape) for shape in SHAPES for kind in (OF_FOUR if shape == (2, 2) else [*KINDS, *ON_KERNELS])],
)
def test_every_kind_trains_as_in_one_process(found, kind, shape):
    """Losses and the whole state after 20 updates: weights, thresholds, Adam, the dead, a BatchTopK's cutoff."""
    alone = found["alone"][kind]
    assert not torch.equal(alone["losses"][0], alone["losses"][-1])
    for rank in found[shape]:
        ours = rank["learners"][kind]
        assert ((ours["losses"] - alone["losses"]).abs() <= CLOSE * alone["losses"].abs()).all()
        assert apart(ours["state"], alone["state"]) < CLOSE
        # A gated dictionary's threshold is the difference of two biases, and loses a digit.
        assert apart(ours["result"], alone["result"]) < (1e-5 if kind == "gated" else CLOSE)
        assert ours["dead"] == alone["dead"]


@pytest.mark.parametrize("kind", ON_KERNELS)
def test_the_twins_of_the_kernels_train_as_the_step_on_the_cpu(found, kind):
    """So that the comparison of ranks above stands on something else than itself."""
    ours, theirs = found["alone"][kind], found["alone"][ON_KERNELS[kind][0]]
    assert ((ours["losses"] - theirs["losses"]).abs() <= CLOSE * theirs["losses"].abs()).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_halted_updates_of_two_dictionaries_are_made_again_together(found, shape):
    alone = found["made again"]
    assert min(alone["launches"]) > 12  # some updates twice
    for rank in found[shape]:
        ours = rank["made again"]
        assert torch.tensor(ours["losses"]).allclose(torch.tensor(alone["losses"]), rtol=CLOSE, atol=0)
        assert max(apart(*states) for states in zip(ours["states"], alone["states"], strict=True)) < CLOSE


def test_latents_die_on_one_shard_alone(found):
    """The material has dead latents, so that what is said about them is not empty."""
    alone = found["alone"]["topk, few revived"]["state"]
    dead = 20 * 16 - alone["last_fired"] >= 50
    halves = dead.reshape(2, -1).any(1).tolist()
    assert sorted(halves) == [False, True]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_rank_holds_its_share_of_latents_and_of_adam(found, shape):
    own = 32 // shape[1]
    held = found[shape][0]["learners"]["skip transcoder, sparse"]["own"]
    shapes = {"W_enc": (8, own), "b_enc": (own,), "W_dec": (own, 5), "b_dec": (5,), "theta": (own,), "W_skip": (8, 5)}
    expected = shapes | {"last_fired": (own,), "step": ()}
    for name, size in shapes.items():
        expected |= {f"adam.{name}.exp_avg": size, f"adam.{name}.exp_avg_sq": size, f"adam.{name}.step": ()}
    assert held == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_a_run_on_ranks_equals_one_in_a_single_process(found, shape):
    alone = found["run alone"]
    for rank in found[shape]:
        ours = rank["run"]
        assert all(apart(sae, other) < CLOSE for sae, other in zip(ours["saes"], alone["saes"], strict=True))
        for result, other in zip(ours["results"], alone["results"], strict=True):
            assert (result.index, result.name, result.step) == (other.index, other.name, other.step)
            assert close(result.loss, other.loss)
            assert close(result.fvu, other.fvu)
            assert close(result.l0, other.l0)
            assert result.dead == other.dead
            assert result.evaluation == other.evaluation
    evaluated = [(r.index, r.step) for r in alone["results"] if r.evaluation == WRITTEN]
    assert evaluated == [(0, 9), (1, 9), (2, 9), (2, 12), (0, 18), (1, 18), (0, 20), (1, 20)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_first_rank_alone_logs_evaluates_and_shows_its_progress(found, shape):
    first, *others = (rank["run"] for rank in found[shape])
    name = "x".join(map(str, shape))
    assert first["asked"] == found["run alone"]["asked"] == [(8, 32)] * 8  # whole dictionaries
    assert first["logged"] == len(first["results"]) == 52
    assert first["bar"]
    assert [(other["asked"], other["logged"], other["bar"]) for other in others] == [([], 0, False)] * len(others)
    assert first["files"] == [*(f"checkpoint_0000000{step}" for step in (12, 18, 20)), "log.jsonl"]
    logged = read_log(found["folder"] / name / "log.jsonl")
    assert [result.loss for result in logged] == [result.loss for result in first["results"]]


def test_one_process_writes_single_files(found):
    assert found["run alone"]["files"] == [
        *(f"checkpoint_0000000{step}.safetensors" for step in (12, 18, 20)), "log.jsonl",
    ]  # fmt: skip


# ---- resuming on another number of ranks ----


@pytest.mark.parametrize("name", ["hops", "hops_on_kernels"])
def test_a_run_goes_on_on_any_number_of_ranks(found, name):
    """1 -> 1x2 -> 2x1 -> 1 -> 2x2 -> 1x2 -> 1."""
    hops, alone = found[name], found["run alone"]
    assert hops["steps"] == [(0, 3), (3, 7), (7, 11), (11, 13), (13, 16), (16, 17), (17, 20)]
    assert all(apart(sae, other) < CLOSE for sae, other in zip(hops["saes"], alone["saes"], strict=True))
    logged = read_log(found["folder"] / name / "log.jsonl")
    for result, other in zip(logged, alone["results"], strict=True):
        assert (result.index, result.step) == (other.index, other.step)
        assert close(result.loss, other.loss)
        assert close(result.fvu, other.fvu)


# ---- what is refused ----

BY_ALL = {
    "configs": "ValueError: Rank 1 was given other configs than rank 0: number 1: sparsity 0.01, there 0.02; seed 0, "
    "there 4. Start every rank with the same call.",
    "settings": "ValueError: Rank 1 was given other settings than rank 0: seed 0, there 1. Start",
    "folder": "ValueError: Rank 1 was given other folder than rank 0: '",
    "width": "ValueError: 33 latents cannot be divided equally among 2 ranks; choose a width that is a multiple of 2, "
    "or another mesh.",
    "batch": "ValueError: a batch of 15 rows cannot be divided equally among 2 ranks; choose a batch_size that",
    "k": "ValueError: k=17 is more than the 16 latents of each of 2 latent shards; choose fewer shards.",
    "names": "ValueError: A mesh for training has the dimensions ('data', 'latent'), or one of them; found ('dp',).",
    "device": "ValueError: device='cuda:1' on a mesh of 'cpu' devices, whose sums are made there; leave device out.",
    "store": "ValueError: Rank 1 was given other store than rank 0: source '",
    "stream": "ValueError: ActivationStore.stream makes its rows while they are read, so several ranks would train on",
    "rows": f"ValueError: The activations at '{A}' are not finite in the batch of step 3.",
}


@pytest.mark.parametrize("what", BY_ALL)
def test_what_does_not_fit_is_refused_by_every_rank(found, what):
    assert [said[what][: len(BY_ALL[what])] for said in found["refused"]] == [BY_ALL[what]] * 2


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("site", r"The store has no site 'blocks.1.hook_mlp_out'; it holds \['blocks.0.hook_resid_post'\]"),
        ("state", r"adam\.W_enc\.exp_avg_sq of 0_res_layer_0_width_32 is not finite after step 3; lower the learning"),
    ],
)
def test_what_one_rank_finds_stops_all(found, what, said):
    others, own = (rank[what] for rank in found["refused"])
    assert re.match(rf"(KeyError: \"|ValueError: ){said}", own)
    assert re.match(
        rf"ValueError: Rank 1 failed, and so the others stop too\. (KeyError: \"|ValueError: ){said}", others
    )
    assert [rank["kept"] for rank in found["refused"]] == [[0]] * 2


def test_a_mesh_over_some_of_the_processes(found):
    said = "ValueError: The mesh has 2 ranks and the run 4 processes; every process trains. Make the mesh over all of "
    assert [text[: len(said)] for text in found["refused, 4"]] == [said] * 4


# ---- signals, kills, full disks, damage ----


def assert_goes_on(found, resumed, step):
    """A single process went on from `step`, and came to the end of an unbroken run; nothing half written is left."""
    begun, sae, files = resumed
    assert begun == step
    assert apart(sae, found["run alone"]["saes"][0]) < CLOSE
    assert not [name for name in files if "part" in name or "stale" in name]


@pytest.mark.parametrize(
    ("what", "said", "step"),
    [
        ("SIGTERM to one", "SystemExit: 143", 8),
        ("SIGINT to one", "KeyboardInterrupt: interrupted after step 8; Trainer.resume('", 8),
        ("SIGINT to both", "KeyboardInterrupt: interrupted after step 8; Trainer.resume('", 8),
        ("all fail", "OSError: the caller's own", 7),
    ],
)
def test_all_ranks_break_off_at_one_step_and_save_it(found, what, said, step):
    """At step 7; a signal is heeded by all of them where the next step ends."""
    ranks, resumed = found["signals"][what]
    assert [(text[: len(said)], at) for text, at in ranks] == [(said, step)] * 2
    assert_goes_on(found, resumed, step)


@pytest.mark.parametrize("what", ["one fails", "SIGKILL"])
def test_a_rank_that_is_gone_ends_the_others(found, what):
    """The others cannot finish their step, and say so; the checkpoint of step 6 stays."""
    (left, gone), resumed = found["signals"][what]
    assert left[0].startswith("RuntimeError: ")
    assert gone == (("OSError: the caller's own", 7) if what == "one fails" else ("died", -9))
    assert_goes_on(found, resumed, 6)


@pytest.mark.parametrize(
    ("what", "dead", "left", "step"),
    [
        ("parts_written", 1, ["checkpoint_000000004", "log.jsonl"], 4),
        ("not_yet_named", 0, ["checkpoint.part", "checkpoint_000000004", "log.jsonl"], 4),
        ("half_removed", 0, ["checkpoint.stale", "checkpoint_000000004", "log.jsonl"], 4),
    ],
)
def test_a_kill_while_a_checkpoint_is_written_leaves_whole_ones(found, what, dead, left, step):
    ranks, files, resumed = found["kills"][what]
    assert ranks[dead] == ("died", -9)
    assert ranks[1 - dead].startswith("RuntimeError: ")
    assert files == left
    assert_goes_on(found, resumed, step)


def test_ranks_that_see_different_folders(found):
    """The first checkpoint, before any update, finds it; so does a run that is taken up."""
    first, other = found["kills"]["own_folders"]
    said = r"\['__1_0\.distcp'\] were written by other ranks and are not here\. The folder of a run has to be one that"
    assert re.match(rf"OSError: .*checkpoint_000000000 could not be written \({said}.* whole: none\.", first)
    assert re.match(rf"ValueError: Rank 0 failed, and so the others stop too\. FileNotFoundError: {said}", other)
    said = "ValueError: Rank 1 was given other checkpoints than rank 0: [12, 18, 20], there []. The folder of "
    assert [text[: len(said)] for text in found["kills"]["own_folders, resumed"]] == [said] * 2


def test_a_full_disk_of_one_rank_stops_all(found):
    ranks, files, resumed = found["kills"]["full_disk"]
    assert ranks[0] == ranks[1]
    assert re.match(
        r"OSError: .*checkpoint_000000008 could not be written \(rank 1: OSError: .*too large\)\. Earlier checkpoints "
        r"are whole: checkpoint_000000004\. Make room, then go on with Trainer\.resume",
        ranks[0],
    )
    assert files == ["checkpoint_000000004", "log.jsonl"]
    assert_goes_on(found, resumed, 4)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("cut", r"__1_0\.distcp has \d+ bytes, not \d+"),
        ("flipped", r"the checksum of __1_0\.distcp is not the one it was written with"),
        ("missing", r"__1_0\.distcp is missing"),
        ("no header", r"No such file or directory: '.*run\.json'"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_the_whole_ones_are_named(found, what, said):
    for text in found["damage"][what]:
        assert re.match(
            rf"ValueError: .*checkpoint_000000020 is no whole checkpoint \(.*{said}\)\. Those of the steps \[8, 16\] "
            r"are whole: go on from one with Trainer\.resume\('.*', step=16\)",
            text,
        )


# ---- the command ----


def test_the_command_trains_on_the_processes_that_torchrun_started(found):
    (code, shown, err), (other_code, other_shown, other_err) = found["command"]["ranks"]
    assert (code, other_code) == (0, 0)
    assert "20/20" in err
    assert re.search(r"0_res_layer_0_width_32 .*average_l0_\d+\n", shown)
    assert (other_shown, other_err) == ("", "")
    # A single process finds the run finished, and says the same.
    ((again, said, _),) = found["command"]["again"]
    assert (again, said) == (0, shown)
    run = found["folder"] / "command_run"
    assert sorted(p.name for p in run.iterdir()) == [
        "checkpoint_000000000", "checkpoint_000000015", "checkpoint_000000020", "log.jsonl", "saes",
    ]  # fmt: skip


def test_the_command_names_the_processes_that_it_needs(found):
    ((code, _, said),) = found["command"]["unstarted"]
    assert code == 1
    assert said == (
        "scope-lens: --data-parallel 2 and --latent-parallel 1 are the work of 2 processes, and 1 was started. Start "
        "them with: torchrun --nproc-per-node 2 -m scope_lens.cli train ...\n"
    )
    for code, _, said in found["command"]["mistaken"]:
        assert code == 1
        assert "are the work of 3 processes, and 2 were started" in said


# ---- a single process ----


@pytest.mark.parametrize(
    ("name", "n_axes", "axis"),
    [
        ("W_enc", 2, 1), ("learner.3.adam.W_enc.exp_avg_sq", 2, 1), ("adam.W_enc.last", 1, 0), ("W_dec", 2, 0),
        ("adam.W_dec.step", 0, None), ("learner.0.theta", 1, 0), ("last_fired", 1, 0), ("b_dec", 1, None),
        ("adam.b_dec.exp_avg", 1, None), ("W_skip", 2, None), ("cutoff", 1, None), ("step", 0, None),
        ("reader.16.batches", 0, None),
    ],
)  # fmt: skip
def test_which_axis_counts_latents(name, n_axes, axis):
    assert latent_axis(name, n_axes) == axis


def test_alone_gives_back_what_it_is_given():
    x = torch.randn(3, 4, requires_grad=True)
    for method in (ALONE.join, ALONE.share, ALONE.join_rows, ALONE.part, ALONE.gather_latents):
        assert method(x) is x
    for method in (ALONE.sum_over_latents_, ALONE.sum_over_rows_, ALONE.any_over_rows):
        flags = torch.ones(3, dtype=torch.bool)
        assert method(flags) is flags
    assert ALONE.whole("W_enc", x) is ALONE.shard("W_enc", x) is x
    assert (ALONE.rows(7), ALONE.latents(9), ALONE.alone, ALONE.first) == (slice(0, 7), slice(0, 9), True, True)
    with ALONE.agreement.together():
        assert ALONE.agreement.from_first(5) == ALONE.agreement.largest(5) == 5
    assert ALONE.agreement.all_reach(3)
    assert Ranks().device("cpu") == torch.device("cpu")
    check_divides(TrainConfig(hook_in=A, hook_out=A, width=33, sparsity=0.1, steps=1, batch_size=15), ALONE)
