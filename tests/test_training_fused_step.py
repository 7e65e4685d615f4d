"""Updates on the twins of the kernels against the learner without: losses, weights, moments; dense and sparse."""

import dataclasses

import pytest
import torch

from scope_lens.training import ActivationStore, TrainConfig, Trainer, checkpoints, read_log
from scope_lens.training.fused_step import kernels_for
from scope_lens.training.fused_update import launch
from scope_lens.training.kernels.kernel_set import eager_kernels
from scope_lens.training.learner import Learner
from scope_lens.training.readings import Readings
from scope_lens.training.shared_rows import Batch

SITE = "blocks.1.hook_resid_post"
D, WIDTH, ROWS = 12, 96, 64
PAPER = TrainConfig(
    hook_in=SITE, hook_out=SITE, width=WIDTH, sparsity=0.02, steps=400, batch_size=ROWS, learning_rate=3e-3,
    lr_warmup=10, sparsity_warmup=40, bandwidth=0.1, threshold_init=0.1, dead_after=20 * ROWS,
)  # fmt: skip
TRANSCODER = dataclasses.replace(PAPER, hook_in="blocks.1.ln2.hook_normalized", hook_out="blocks.1.hook_mlp_out")
KINDS = {
    "as published": PAPER,
    "direct thresholds, momentum": dataclasses.replace(PAPER, threshold="direct", betas=(0.9, 0.98)),
    "target L0, frequency penalty": dataclasses.replace(
        PAPER, target_l0=6.0, sparsity=0.01, frequency_penalty=0.02, frequency_limit=0.2
    ),
    "transcoder": TRANSCODER,
    "skip transcoder": dataclasses.replace(TRANSCODER, skip=True, target_l0=8.0),
    "topk": dataclasses.replace(PAPER, activation="topk", k=7, sparsity=0.0),
}
ALWAYS = 1.0  # a break-even at which every batch is sparse once one has been measured


def learner(cfg, *, kernels=None, **settings):
    widths = {"d_in": D, "d_out": D, "scale": 2.5, "model": "m"}
    return Learner(cfg, **widths, kernels=kernels, **settings)


def fused(cfg, *, operands=torch.float32, break_even=ALWAYS, **settings):
    return learner(cfg, kernels=eager_kernels(), operands=operands, break_even=break_even, **settings)


def batches(cfg, number, *, seed=0):
    """Rows made of a few of 40 directions each, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(40, D, generator=generator)
    for _ in range(number):
        on = (torch.rand(ROWS, 40, generator=generator) < 0.08) * torch.rand(ROWS, 40, generator=generator)
        x = on @ directions + 0.05 * torch.randn(ROWS, D, generator=generator)
        yield (x, x) if cfg.hook_in == cfg.hook_out else (x, x.roll(1, 1).relu())


class Counted:
    """The twins, and how often each way was taken."""

    def __init__(self):
        self.sparse = self.dense = 0
        twins = eager_kernels()

        def encode(*args, **kwargs):
            self.sparse += 1
            return twins.encode(*args, **kwargs)

        def encode_dense(*args, **kwargs):
            self.dense += 1
            return twins.encode_dense(*args, **kwargs)

        self.kernels = twins._replace(encode=encode, encode_dense=encode_dense)


def compare_states(found, expected, cfg, *, rtol, atol):
    for name, tensor in expected.items():
        if name == "cutoff" or (name.endswith("exp_avg") and cfg.betas[0] == 0):
            continue  # BatchTopK's alone; and without momentum the last gradient, which nothing reads
        message = f"{name}: {{}}"
        torch.testing.assert_close(
            found[name].to(tensor.dtype), tensor, rtol=rtol, atol=atol, msg=lambda m, text=message: text.format(m)
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("break_even", [0.0, ALWAYS], ids=["dense", "sparse"])
def test_updates_equal_those_of_the_learner_without_kernels(kind, break_even):
    cfg = KINDS[kind]
    plain, ours = learner(cfg), fused(cfg, break_even=break_even)
    for x, y in batches(cfg, 12):
        expected, found = plain.update(x, y), ours.update(x, y)
        ours.settle()
        torch.testing.assert_close(found.loss, expected.loss, rtol=2e-5, atol=0)
        torch.testing.assert_close(found.squared_error, expected.squared_error, rtol=2e-5, atol=0)
        assert found.l0 == expected.l0
        assert torch.equal(found.fired, expected.fired)
    assert torch.equal(ours.last_fired, plain.last_fired)
    compare_states(ours.state(), plain.state(), cfg, rtol=2e-4, atol=2e-6)


# Rounding the operands moves a loss by 0.7 % at most here and by 0.1 % at 64 -> 512 with 256 rows: it averages out.
@pytest.mark.parametrize(("operands", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("kind", ["as published", "transcoder"])
def test_a_run_of_200_updates_follows_the_run_without_kernels(kind, operands, bound):
    cfg, counted = KINDS[kind], Counted()
    plain, ours = learner(cfg), learner(cfg, kernels=counted.kernels, operands=operands, break_even=0.3)
    expected, found = [], []
    for x, y in batches(cfg, 200):
        expected.append(plain.update(x, y))
        found.append(ours.update(x, y))
    ours.settle()
    assert counted.dense >= 3
    assert counted.sparse > 40
    losses, others = (torch.tensor([parts.loss for parts in run]) for run in (found, expected))
    torch.testing.assert_close(losses, others, rtol=bound, atol=0)
    assert (losses / others - 1).abs().mean() < 2e-3
    l0, other = (torch.tensor([parts.l0 for parts in run]) for run in (found, expected))
    torch.testing.assert_close(l0, other, rtol=1e-2, atol=0)


def crowded(cfg, number):
    """Batches whose rows suddenly have many more active latents, twice."""
    for index, (x, y) in enumerate(batches(cfg, number)):
        yield (x * 6, y * 6) if index in (9, 10, 17) else (x, y)


@pytest.mark.parametrize("kind", ["as published", "target L0, frequency penalty", "topk"])
def test_a_batch_without_room_is_made_again_and_none_is_lost(kind, monkeypatch):
    monkeypatch.setattr("scope_lens.training.dispatch._LEAST", 4)
    cfg, counted = KINDS[kind], Counted()
    cfg = dataclasses.replace(cfg, threshold_init=0.6)
    plain, ours = learner(cfg), learner(cfg, kernels=counted.kernels, operands=torch.float32, break_even=ALWAYS)
    expected, found = [], []
    for x, y in crowded(cfg, 24):
        expected.append(plain.update(x, y))
        found.append(ours.update(x, y))
    ours.settle()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.loss, other.loss, rtol=1e-4, atol=0)
        assert one.l0 == other.l0
        assert torch.equal(one.fired, other.fired)
    assert torch.equal(ours.last_fired, plain.last_fired)
    compare_states(ours.state(), plain.state(), cfg, rtol=1e-3, atol=1e-5)
    if cfg.activation == "jumprelu":
        assert counted.sparse + counted.dense > 24, "no update was made again"


def test_a_run_that_is_broken_off_takes_the_same_ways_and_ends_the_same():
    cfg = KINDS["as published"]
    whole, broken = fused(cfg, break_even=0.4), fused(cfg, break_even=0.4)
    for index, (x, y) in enumerate(crowded(cfg, 40)):
        whole.update(x, y)
        broken.update(x, y)
        if index % 3 == 2:
            whole.state()  # a checkpoint, which brings Adam's rows up to date
            state = {name: tensor.clone() for name, tensor in broken.state().items()}
            broken = fused(cfg, break_even=0.4)
            broken.load_state(state)
    for name, tensor in whole.state().items():
        assert torch.equal(broken.state()[name], tensor), name


@pytest.mark.parametrize("first_with_kernels", [True, False])
def test_a_run_goes_on_with_kernels_or_without(first_with_kernels):
    cfg = KINDS["direct thresholds, momentum"]
    plain = learner(cfg)
    runs = [fused(cfg), learner(cfg)]
    one, other = runs if first_with_kernels else runs[::-1]
    for index, (x, y) in enumerate(batches(cfg, 16)):
        plain.update(x, y)
        if index == 8:
            other.load_state({name: tensor.clone() for name, tensor in one.state().items()})
            one = other
        one.update(x, y)
    compare_states(one.state(), plain.state(), cfg, rtol=2e-4, atol=2e-6)


def test_a_number_that_is_not_finite_reaches_the_loss():
    cfg = KINDS["as published"]
    for break_even in (0.0, ALWAYS):
        ours = fused(cfg, break_even=break_even)
        for index, (x, y) in enumerate(batches(cfg, 6)):
            if index == 5:
                x[3, 4] = torch.nan
            parts = ours.update(x, y)
        ours.settle()
        assert not parts.loss.isfinite()
        assert not ours.whole


def test_the_inference_form_is_that_of_the_learner_without_kernels():
    cfg = KINDS["skip transcoder"]
    plain, ours = learner(cfg), fused(cfg)
    for x, y in batches(cfg, 8):
        plain.update(x, y)
        ours.update(x, y)
    expected, found = plain.result(), ours.result()
    assert found.cfg == expected.cfg
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
    assert ours.dead() == plain.dead()


def test_a_trainer_reports_what_was_made_again_and_goes_on_from_a_checkpoint(tmp_path, monkeypatch):
    """The trainer's own kernels are replaced by the twins, since Triton's need a GPU."""
    twins = lambda choice, *_: eager_kernels() if choice == "triton" else None
    monkeypatch.setattr("scope_lens.training.trainer.kernels_for", twins)
    monkeypatch.setattr("scope_lens.training.dispatch._LEAST", 4)
    cfg = dataclasses.replace(KINDS["as published"], threshold_init=0.5, steps=30, sparsity_warmup=5)
    rows = torch.cat([x for x, _ in crowded(cfg, 24)])
    store = ActivationStore.from_rows({SITE: rows})

    def run(folder, kernels, *, stop=30, every=4):
        if checkpoints(folder):
            trainer = Trainer.resume(folder, kernels=kernels)
        else:
            trainer = Trainer(cfg, folder=folder, kernels=kernels, report_every=every, checkpoint_every=5)
        for result in trainer.run(store, progress=False):
            if result.step >= stop:
                break
        return trainer

    plain, ours = run(tmp_path / "plain", "eager"), run(tmp_path / "ours", "triton")
    run(tmp_path / "broken", "triton", stop=13)
    broken = run(tmp_path / "broken", "triton")
    for name, tensor in ours.result()[0].state_dict().items():
        torch.testing.assert_close(broken.result()[0].state_dict()[name], tensor, rtol=1e-5, atol=1e-7)
    expected, found = read_log(tmp_path / "plain/log.jsonl"), read_log(tmp_path / "ours/log.jsonl")
    assert [one.step for one in found] == [4, 8, 12, 16, 20, 24, 28, 30]
    for one, other in zip(found, expected, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=2e-2)  # bfloat16
        assert one.l0 == pytest.approx(other.l0, rel=2e-2)
    assert plain.step == ours.step == 30


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "kernels='triton' cannot run here: the dictionaries are on 'cpu' and the kernels need CUDA"),
        ({"device": "cpu"}, "Pass device='cuda' on a machine with an NVIDIA GPU"),
    ],
)
def test_kernels_asked_for_without_cuda_are_refused_with_the_remedy(changes, words, tmp_path):
    cfg = KINDS["as published"]
    with pytest.raises(ValueError, match=words):
        Trainer(cfg, kernels="triton", **{"device": "cpu"} | changes)
    trainer = Trainer(dataclasses.replace(cfg, steps=1), folder=tmp_path, device="cpu")
    ((x, _),) = batches(cfg, 1)
    for _ in trainer.run(ActivationStore.from_rows({SITE: x}), progress=False):
        pass
    with pytest.raises(ValueError, match=words):
        Trainer.resume(tmp_path, kernels="triton", device="cpu")


@pytest.mark.parametrize("progress", [True, False])
def test_a_run_without_cuda_says_so_in_one_line(progress, capsys):
    cfg = dataclasses.replace(KINDS["as published"], steps=3, lr_warmup=1, sparsity_warmup=1, threshold="direct")
    ((x, _),) = batches(cfg, 1)
    store = ActivationStore.from_rows({SITE: x})
    trainer = Trainer(cfg, device="cpu")
    for _ in trainer.run(store, progress=progress):
        break
    for _ in trainer.run(store, progress=progress):  # taken up again
        pass
    for _ in Trainer(cfg, device="cpu", kernels="eager").run(store, progress=False):  # as it was asked for
        pass
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("Training runs on torch's own operations, without the fused kernels: the dicti") == 1


def test_a_kind_that_no_kernel_trains_is_refused_only_where_kernels_are_insisted_on(monkeypatch):
    monkeypatch.setattr("scope_lens.training.fused_step.resolve", lambda *_: "triton")
    cfg = dataclasses.replace(KINDS["as published"], matryoshka=(8,))
    with pytest.raises(ValueError, match=r"config 1 is 'jumprelu' with aux_k=0, matryoshka=\(8,\), 1 latent shards"):
        kernels_for("triton", torch.device("cuda"), [PAPER, cfg])
    assert kernels_for("auto", torch.device("cuda"), [cfg]).name == "triton"
    assert learner(cfg, kernels=eager_kernels())._fused is None


def stationary(cfg, number, *, rows, d, seed=3):
    """Rows whose norms and numbers of parts differ from row to row, the same in every batch."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(3 * d, d, generator=generator)
    for _ in range(number):
        on = (torch.rand(rows, 3 * d, generator=generator) < 0.05) * torch.rand(rows, 1, generator=generator)
        x = on @ directions + 0.05 * torch.randn(rows, d, generator=generator)
        yield x, x


@pytest.mark.parametrize(
    "changes",
    [
        {"activation": "topk", "k": 8, "sparsity": 0.0},
        {"bandwidth": 0.8, "threshold_init": 0.6, "learning_rate": 1e-5},  # more inside the window than active
    ],
)
def test_a_run_that_has_gone_over_stays_sparse_and_overflows_rarely(changes, monkeypatch):
    made = []

    def noted(trained, flight, *, capacity):
        made.append((flight.step, capacity is not None))
        return launch(trained, flight, capacity=capacity)

    monkeypatch.setattr("scope_lens.training.fused_step.launch", noted)
    cfg = dataclasses.replace(PAPER, width=1024, batch_size=128, **changes)
    one = Learner(
        cfg, d_in=24, d_out=24, scale=2.0, model="m", kernels=eager_kernels(), operands=torch.float32, break_even=0.3
    )
    for x, y in stationary(cfg, 30, rows=128, d=24):
        one.update(x, y)
    one.settle()
    sparse = [step for step, is_sparse in made if is_sparse]
    again = len(made) - 30
    assert len(sparse) > 18, "it does not go over"
    assert again <= 6, "updates are made again and again"
    assert sparse[-8:] == list(range(22, 30)), "it goes to and fro"


def test_readings_settle_the_dictionaries_in_their_order():
    """On several ranks an update that is made again is made by all together, so the order is the same on each."""
    settled = []

    class Noting(Learner):
        def settle(self):
            settled.append(self)

    cfg = KINDS["as published"]
    learners = [Noting(cfg, d_in=D, d_out=D, scale=2.5, model="m") for _ in range(12)]
    learners = learners[::2] + learners[1::2]  # not by their addresses
    readings, ((x, _),) = Readings(tuple("abcdefghijkl")), batches(cfg, 1)
    for _ in range(2):
        for index, one in enumerate(learners):
            readings.note(index, one, one.update(x, x), Batch({SITE: x}))
    readings.read(remedy="")
    assert settled == learners
