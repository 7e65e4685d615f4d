"""Groups of processes on gloo, forked from one that has imported everything; run by test_training_ranks.py.

python ranks_worker.py <folder>        writes folder/report.pt: what every rank of every group found
"""

import contextlib
import dataclasses
import io
import itertools
import os
import resource
import shutil
import signal
import sys
import traceback
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from conftest import make_hf
from jaxtyping import install_import_hook
from torch.distributed.device_mesh import init_device_mesh

# Shapes are checked where ranks make a difference.
CHECKED = [
    f"scope_lens.training.{name}" for name in ("ranks", "agreement", "baselines", "prefixes", "losses", "learner")
]
with install_import_hook(CHECKED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"):
    from scope_lens import cli
    from scope_lens.evaluation import EvalResult
    from scope_lens.model import ScopeModel
    from scope_lens.training import (
        ActivationStore,
        HeldOut,
        TrainConfig,
        Trainer,
        agreement,
        checkpoint,
        checkpoints,
        dispatch,
        jumprelu_step,
        learner,
        sharded_checkpoint,
        trainer,
    )
    from scope_lens.training.fused_step import FusedStep
    from scope_lens.training.kernels.kernel_set import eager_kernels
    from scope_lens.training.learner import Learner
    from scope_lens.training.ranks import ALONE, Ranks
    from scope_lens.training.readings import Readings
    from scope_lens.training.shared_rows import Batch

FOLDER = Path(sys.argv[1]) if __name__ == "__main__" else Path()
SHAPES = ((2, 1), (1, 2), (2, 2))
A, B = "blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"
CFG = TrainConfig(
    hook_in=A, hook_out=A, width=32, sparsity=0.01, steps=20, batch_size=16, learning_rate=3e-3, lr_warmup=5,
    lr_decay=5, sparsity_warmup=10, bandwidth=0.1, threshold_init=0.02, threshold="direct", dead_after=100,
)  # fmt: skip
WITH_K = {"k": 4, "sparsity": 0.0, "sparsity_warmup": 0, "aux_k": 8, "dead_after": 50}
TRANSCODER = dataclasses.replace(CFG, hook_out=B, seed=1, skip=True, target_l0=3.0)
KINDS = {
    "jumprelu": CFG,
    "log threshold, target, frequency": dataclasses.replace(
        CFG, threshold="log", target_l0=3.0, frequency_penalty=0.1, betas=(0.9, 0.99)
    ),
    "skip transcoder": TRANSCODER,
    "matryoshka": dataclasses.replace(CFG, matryoshka=(8, 13), frequency_penalty=0.01),
    "topk": dataclasses.replace(CFG, activation="topk", **WITH_K),
    "topk, few revived": dataclasses.replace(CFG, activation="topk", seed=5, **WITH_K | {"k": 2, "aux_k": 1}),
    "topk, matryoshka": dataclasses.replace(CFG, activation="topk", matryoshka=(8, 13), **WITH_K),
    "batchtopk": dataclasses.replace(CFG, activation="batchtopk", **WITH_K),
    "relu": dataclasses.replace(CFG, activation="relu"),
    "gated": dataclasses.replace(CFG, activation="gated", threshold="log"),
}
# The twins of the kernels, dense and as sparse as can be.
ON_KERNELS = {
    f"{kind}, {way}": (kind, share)
    for kind in ("jumprelu", "log threshold, target, frequency", "skip transcoder")
    for way, share in (("dense", 1e-9), ("sparse", 10.0))
}
# Four processes take their time on two cores, and put together what two of them show.
OF_FOUR = ("log threshold, target, frequency", "matryoshka", "batchtopk", "skip transcoder, sparse")
RUN = [CFG, TRANSCODER, dataclasses.replace(KINDS["batchtopk"], batch_size=24, steps=12)]
WRITTEN = EvalResult(
    ce_clean=1.0, ce_spliced=2.0, ce_spliced_out=3.0, ce_ablated=4.0, delta_loss=1.0, delta_loss_se=0.1,
    delta_loss_out=2.0, loss_recovered=0.5, kl=0.2, fvu={A: 0.1}, l0={A: 3.0}, dead={A: 0.0}, n_tokens=9, n_masked=1,
    tokens_hash="h", settings={},
)  # fmt: skip


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # Several chunks of a few rows, of which some are taken sparsely and others densely; ranks that differ wait briefly.
    jumprelu_step._CHUNK_ROWS, jumprelu_step._CHUNK_ENTRIES = 5, 1
    agreement._AT_ONCE = agreement.timedelta(seconds=1)
    report = {"alone": learners(ALONE), "made again": made_again(ALONE), "run alone": run(None, FOLDER / "alone")}
    for shape in SHAPES:
        report[shape] = group(shape, several)
    report |= {
        "hops": hops(FOLDER / "hops"),
        "hops_on_kernels": hops_on_kernels(),
        "refused": group((2, 1), refused),
        "refused, 4": group((2, 2), refused_of_four),
    }
    report |= {"signals": signals(), "kills": kills(), "damage": damage(), "command": command()}
    torch.save(report, FOLDER / "report.pt")


# ---- groups ----

_numbers = itertools.count()


def group(shape, work, *args):
    """Run `work(mesh, *args)` on every rank of a group; what each gave, or "died" and by what signal, code or error."""
    size, path = shape[0] * shape[1], FOLDER / f"group_{next(_numbers)}"

    def rank_of(rank):
        dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "latent"))
        dist.barrier()  # one that is refused at once must not leave while another still connects to it
        return work(mesh, *args)

    return forked([partial(rank_of, rank) for rank in range(size)])


def forked(works):
    """Run each in a process of its own, all at once."""
    path, pids = FOLDER / f"forked_{next(_numbers)}", []
    for number, work in enumerate(works):
        pids.append(os.fork())
        if not pids[-1]:
            signal.alarm(120)  # one that hangs ends
            code = 1
            try:
                torch.save(work(), f"{path}.{number}")
                code = 0
            except BaseException:  # noqa: BLE001
                torch.save(("died", traceback.format_exc()), f"{path}.{number}")
                code = 0
            finally:
                os._exit(code)
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    return [
        torch.load(f"{path}.{number}", weights_only=False)
        if not status
        else ("died", os.waitstatus_to_exitcode(status))
        for number, status in enumerate(statuses)
    ]


def raised(work, *args, **settings):
    try:
        return work(*args, **settings)
    except BaseException as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"


# ---- the same numbers ----


def learners(ranks):
    eager = eager_kernels()
    four = ranks.n_data * ranks.n_latent == 4
    found = {name: learnt(cfg, ranks) for name, cfg in KINDS.items() if not four or name in OF_FOUR}
    for name, (kind, share) in ON_KERNELS.items():
        if not four or name in OF_FOUR:
            settings = {"kernels": eager, "operands": torch.float32, "break_even": share}
            found[name] = learnt(KINDS[kind], ranks, **settings)
    return found


def learnt(cfg, ranks, **kernels):
    """Losses of 20 updates, and the state and the dictionary after them."""
    wide = 8 if cfg.hook_in == cfg.hook_out else 5
    learner = Learner(cfg, d_in=8, d_out=wide, scale=2.0, model="m", ranks=ranks, **kernels)
    generator = torch.Generator().manual_seed(3)
    losses, own = [], ranks.rows(16)
    for _ in range(20):
        x = 2 * torch.randn(16, 8, generator=generator)
        y = torch.randn(16, 5, generator=generator) + x.sum(1, keepdim=True)
        rows = x[own]
        parts = learner.update(rows, rows if wide == 8 else y[own])
        learner.settle()
        losses.append(ranks.sum_over_rows_(torch.stack([parts.loss, parts.squared_error, parts.l0])))
    return {
        "losses": torch.stack(losses),
        "state": {name: ranks.whole(name, t) for name, t in learner.state().items() if not name.startswith("fused")},
        "own": {name: tuple(t.shape) for name, t in learner.state().items() if not name.startswith("fused")},
        "result": learner.result().state_dict(),
        "dead": learner.dead(),
    }


def made_again(ranks):
    """Losses of two dictionaries whose updates are halted, and made again when a report is due; launches of each."""
    eager, launches = eager_kernels(), []

    def counting(index, encode):
        def counted(*args, **settings):
            launches[index] += 1
            return encode(*args, **settings)

        return counted

    two, readings, own = [], Readings(("narrow", "wide"), ranks=ranks), ranks.rows(16)
    for index, width in enumerate((32, 64)):
        launches.append(0)
        cfg = dataclasses.replace(CFG, width=width, threshold_init=0.8)
        kernels = eager._replace(**{n: counting(index, getattr(eager, n)) for n in ("encode", "encode_dense")})
        settings = {"kernels": kernels, "operands": torch.float32, "break_even": 10.0}
        two.append(Learner(cfg, d_in=8, d_out=8, scale=2.0, model="m", ranks=ranks, **settings))
    generator = torch.Generator().manual_seed(4)
    losses = []
    with mock.patch.object(dispatch, "_LEAST", 2):
        for step in range(12):
            x = (12 if step in (6, 7) else 1) * torch.randn(16, 8, generator=generator)[own]
            for index, learner in enumerate(two):
                readings.note(index, learner, learner.update(x, x), Batch({A: x}, ranks=ranks))
            if step % 4 == 3:
                losses.append([reading.loss for reading in readings.read(remedy="").values()])
    states = [{name: ranks.whole(name, t) for name, t in one.state().items() if "fused" not in name} for one in two]
    return {"losses": losses, "states": states, "launches": launches}


def several(mesh):
    name = "x".join(map(str, mesh.shape))
    ranks = Ranks(mesh)
    return {"learners": learners(ranks), "made again": made_again(ranks), "run": run(mesh, FOLDER / name)}


def rows(seed=0, n=100):
    x = 3 * torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))
    return {A: x, B: x @ torch.ones(8, 5) + x[:, :5]}


def store_of(**sites):
    return ActivationStore.from_rows({**rows(), **sites}, model="some/model")


class Measured(HeldOut):
    """Stands in for held-out text: notes what it is asked for."""

    def __init__(self):
        self.asked = []

    @property
    def identity(self):
        return {"tokens_hash": "h", "ablation": "mean"}

    def check(self, store):
        pass

    def evaluate(self, sae):
        self.asked.append(tuple(sae.W_enc.shape))
        return WRITTEN


def run(mesh, folder):
    first = mesh is None or dist.get_rank() == 0
    held_out, logged = Measured(), []
    trainer = Trainer(
        RUN, folder=folder, mesh=mesh, checkpoint_every=6, evaluate_every=9, held_out=held_out if first else None,
        log=[logged.append],
    )  # fmt: skip
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown):
        results = list(trainer.run(store_of()))
    return {
        "results": results,
        "saes": [sae.state_dict() for sae in trainer.result()],
        "asked": held_out.asked,
        "logged": len(logged),
        "bar": "20/20" in shown.getvalue(),
        "files": sorted(p.name for p in folder.iterdir()),
    }


def go_on(mesh, folder, last):
    """Take a run up, and break it off after update `last`."""
    trainer = Trainer.resume(folder, mesh=mesh) if checkpoints(folder) else Trainer(RUN, folder=folder, mesh=mesh)
    begun = trainer.step
    for result in trainer.run(store_of(), progress=False):
        if result.step == last < 20:
            break
    return begun, trainer.step, [sae.state_dict() for sae in trainer.result()]


def hops(folder):
    """One process, ranks that share latents, ranks that share rows, and so on: each goes on where another stopped."""
    found = []
    for shape, last in ((None, 3), ((1, 2), 7), ((2, 1), 11), (None, 13), ((2, 2), 16), ((1, 2), 17), (None, 20)):
        found.append(go_on(None, folder, last) if shape is None else group(shape, go_on, folder, last)[0])
    return {"steps": [(begun, end) for begun, end, _ in found], "saes": found[-1][2]}


def hops_on_kernels():
    """The same with the kernels' twins, which begin densely and go on sparsely."""

    class Exact(FusedStep):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings | {"operands": torch.float32, "break_even": 0.4})

    patched = ((trainer, "kernels_for", lambda *args: eager_kernels()), (learner, "FusedStep", Exact))
    before = [getattr(module, name) for module, name, _ in patched]
    for module, name, value in patched:
        setattr(module, name, value)
    found = hops(FOLDER / "hops_on_kernels")
    for (module, name, _), value in zip(patched, before, strict=True):
        setattr(module, name, value)
    return found


# ---- what is refused ----


def refused(mesh):
    rank = dist.get_rank()
    first_columns = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "latent"))
    other = (dataclasses.replace(CFG, sparsity=0.02, seed=4), CFG)[rank == 0]
    found = {
        "configs": raised(Trainer, [TRANSCODER, other], mesh=mesh),
        "settings": raised(Trainer, CFG, seed=rank, mesh=mesh),
        "folder": raised(Trainer, CFG, folder=FOLDER / f"of_{rank}", mesh=mesh),
        "width": raised(Trainer, dataclasses.replace(CFG, width=33), mesh=first_columns),
        "batch": raised(Trainer, dataclasses.replace(CFG, batch_size=15), mesh=mesh),
        "k": raised(Trainer, dataclasses.replace(KINDS["topk"], k=17), mesh=first_columns),
        "names": raised(Trainer, CFG, mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))),
        "device": raised(Trainer, CFG, mesh=mesh, device="cuda:1"),
        "store": raised(finish, Trainer(CFG, mesh=mesh), store_of(**{A: rows(seed=rank)[A]})),
        "site": raised(
            finish, Trainer(TRANSCODER, mesh=mesh), (ActivationStore.from_rows({A: rows()[A]}), store_of())[rank == 0]
        ),
        "stream": raised(finish, Trainer(CFG, mesh=mesh), Streaming(store_of())),
    }
    # Rows of the second rank alone are not finite, and so is a number of its optimiser.
    bad = rows()[A]
    store = store_of(**{A: bad})
    reader = store.reader([A], size=16)
    third = [reader.next()[A] for _ in range(3)][-1]
    bad[(bad == third[12]).all(1)] = torch.nan
    found["rows"] = raised(finish, Trainer(CFG, mesh=mesh), store)
    folder = FOLDER / "not_finite"
    trainer = Trainer(CFG, folder=folder, checkpoint_every=3, mesh=first_columns)
    steps = trainer.run(store_of(), progress=False)
    next(steps), next(steps)
    if rank == 1:
        trainer._learners[0].adam.state[trainer._learners[0].sae.W_enc]["exp_avg_sq"].fill_(torch.inf)
    found["state"] = raised(next, steps)
    found["kept"] = sorted(checkpoints(folder))
    return found


def refused_of_four(mesh):
    return raised(Trainer, CFG, mesh=mesh["latent"])


class Streaming(ActivationStore):
    """A store that says of itself that its rows are made while they are read."""

    streams = True

    def __init__(self, store):
        self.__dict__.update(store.__dict__)


def finish(trainer, store):
    return list(trainer.run(store, progress=False))


# ---- signals, kills, full disks, damage ----


def broken_off(mesh, folder, what, who):
    """At step 7 something happens to the ranks `who`; what each raises."""
    trainer = Trainer(CFG, folder=folder, checkpoint_every=2, mesh=mesh)

    def loop():
        for result in trainer.run(store_of(), progress=False):
            if result.step == 7 and dist.get_rank() in who:
                what()

    return raised(loop), trainer.step


def send(number):
    return lambda: os.kill(os.getpid(), number)


def fail():
    raise OSError("the caller's own")


def resumed(folder):
    """The step that a single process goes on from, the dictionary at the end, and the files that are left."""
    alone = Trainer.resume(folder)
    step = alone.step
    finish(alone, store_of())
    return step, alone.result()[0].state_dict(), sorted(p.name for p in folder.iterdir())


def signals():
    found = {}
    for name, what, who in (
        ("SIGTERM to one", send(signal.SIGTERM), (1,)),
        ("SIGINT to one", send(signal.SIGINT), (0,)),
        ("SIGINT to both", send(signal.SIGINT), (0, 1)),
        ("all fail", fail, (0, 1)),
        ("one fails", fail, (1,)),
        ("SIGKILL", send(signal.SIGKILL), (1,)),
    ):
        folder = FOLDER / name.replace(" ", "_")
        found[name] = group((2, 1), broken_off, folder, what, who), resumed(folder)
    return found


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def killed_writing(mesh, folder, prepare):
    prepare(dist.get_rank(), folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    said = raised(finish, Trainer(CFG, folder=folder, checkpoint_every=4, keep=1, mesh=mesh), store_of())
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return said


def parts_written(rank, folder):
    """The second rank dies when the parts of the checkpoint of step 8 are written."""
    read = sharded_checkpoint._check_of

    def check(path):
        return die() if rank == 1 and "000000008" in str(path) else read(path)

    sharded_checkpoint._check_of = check


def not_yet_named(rank, folder):
    """The first rank dies when the checkpoint of step 8 is whole but has no name yet."""
    replace = Path.replace

    def named(self, target):
        return die() if self.name == "checkpoint_000000008" and rank == 0 else replace(self, target)

    Path.replace = named


def half_removed(rank, folder):
    """The first rank dies while it removes the checkpoint of step 4."""
    remove = shutil.rmtree

    def removed(path, ignore_errors=False):
        if Path(path).name == "checkpoint.stale" and Path(path).exists() and len(checkpoints(folder)) == 1:
            next(Path(path).iterdir()).unlink()
            die()
        remove(path, ignore_errors=ignore_errors)

    checkpoint.shutil.rmtree = removed


def full_disk(rank, folder):
    """The second rank cannot write more than a few bytes once there is a checkpoint of step 4."""
    write = checkpoint.write_shards

    def limited(path, header, tensors, *, ranks):
        if rank == 1 and 4 in checkpoints(folder):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        write(path, header, tensors, ranks=ranks)

    checkpoint.write_shards = limited


def own_folders(rank, folder):
    """Each rank sees a folder of its own, as on machines that share none."""
    write = checkpoint.write_shards
    checkpoint.write_shards = lambda path, header, tensors, *, ranks: write(
        path.with_name(f"{path.name}_of_{rank}"), header, tensors, ranks=ranks
    )


def taken_up_elsewhere(mesh):
    """One rank sees a run of which the other sees nothing."""
    return raised(Trainer.resume, FOLDER / ("alone", "nowhere")[dist.get_rank()], mesh=mesh)


def kills():
    found = {"own_folders": group((1, 2), killed_writing, FOLDER / "own_folders", own_folders)}
    found["own_folders, resumed"] = group((1, 2), taken_up_elsewhere)
    for prepare in (parts_written, not_yet_named, half_removed, full_disk):
        folder = FOLDER / prepare.__name__
        ranks = group((1, 2), killed_writing, folder, prepare)
        found[prepare.__name__] = ranks, sorted(p.name for p in folder.iterdir()), resumed(folder)
    return found


def taken_up(mesh, folder):
    return raised(Trainer.resume, folder, mesh=mesh)


def damage():
    """Checkpoints of two ranks that were damaged later, as one process and as two ranks see them."""
    whole = FOLDER / "whole"
    group((1, 2), lambda mesh: finish(Trainer(CFG, folder=whole, checkpoint_every=8, mesh=mesh), store_of()) and None)
    found = {}
    for name in ("cut", "flipped", "missing", "no header"):
        folder = FOLDER / name.replace(" ", "_")
        shutil.copytree(whole, folder)
        part = folder / "checkpoint_000000020" / ("run.json" if name == "no header" else "__1_0.distcp")
        content = bytearray(part.read_bytes())
        content[len(content) // 2] ^= 4
        part.unlink()
        if name in ("cut", "flipped"):
            part.write_bytes(content[:-9] if name == "cut" else content)
        found[name] = [
            raised(Trainer.resume, folder),
            *group((1, 2), taken_up, folder),
        ]
    return found


# ---- the command ----


def command():
    """`scope-lens train` as torchrun starts it: one process a rank, with the environment that it sets."""
    store = FOLDER / "store"
    forked([lambda: harvested(store)])
    words = ["train", "--store", str(store), "--site", "res", "--layer", "0", "--width", "32", "--steps", "20"]
    words += ["--batch-size", "16", "--sparsity", "1e-3", "--out", str(FOLDER / "command_run")]
    found = {}
    for name, ranks, sizes in (
        ("unstarted", 1, ["--data-parallel", "2"]),
        ("mistaken", 2, ["--data-parallel", "3"]),
        ("ranks", 2, ["--latent-parallel", "2", "--checkpoint-every", "15"]),
        ("again", 1, []),
    ):
        found[name] = forked([partial(as_started, rank, ranks, [*words, *sizes]) for rank in range(ranks)])
    return found


def as_started(rank, ranks, words):
    init = dist.init_process_group
    address = f"file://{FOLDER / 'command'}"
    dist.init_process_group = lambda backend: init(backend, init_method=address, rank=rank, world_size=ranks)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = cli.main(words)
    return code, output.getvalue(), errors.getvalue()


def harvested(path):
    """A finished store in a folder, from a tiny random model."""
    tokens = torch.randint(3, 199, (16, 14))
    tokens[:, 0] = 2
    model = ScopeModel.from_hf(make_hf("gemma2"))
    ActivationStore.harvest(model, tokens, sites=[A], path=path, dtype=torch.float32, progress=False)


if __name__ == "__main__":
    main()
