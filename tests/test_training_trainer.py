"""Runs: many dictionaries from one store, resuming bit for bit, a planted dictionary recovered, errors."""

import contextlib
import dataclasses
import shutil

import pytest
import torch

from scope_lens.training import ActivationStore, TrainConfig, Trainer
from scope_lens.training.store import StoreManifest

A, B = "blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"
CFG = TrainConfig(
    hook_in=A, hook_out=A, width=32, sparsity=0.01, steps=25, batch_size=16, learning_rate=3e-3, lr_warmup=5,
    lr_decay=5, sparsity_warmup=10, bandwidth=0.1, threshold_init=0.02, dead_after=100,
)  # fmt: skip
TRANSCODER = dataclasses.replace(CFG, hook_out=B, steps=18, threshold="direct", seed=1)


def store_of(rows, source="s", **sites):
    """A store around given rows."""
    sites = {{"a": A, "b": B}[name]: x for name, x in sites.items()}
    return ActivationStore(
        StoreManifest(
            model="some/model",
            sites=tuple(sites),
            widths=tuple(x.shape[1] for x in sites.values()),
            mean_square_norms=tuple(float(x.double().pow(2).sum(1).mean()) for x in sites.values()),
            rows=rows,
            dtype="float32",
            source=source,
        ),
        sites,
    )


@pytest.fixture
def store():
    x = 3 * torch.randn(100, 8)
    return store_of(100, a=x, b=x @ torch.randn(8, 5))


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def finish(trainer, store):
    return list(trainer.run(store, progress=False))


def weights(trainer):
    return [sae.state_dict() for sae in trainer.result()]


def numbers(results):
    return [[getattr(r, name) for name in ("index", "step", "loss", "fvu", "l0", "dead")] for r in results]


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name], other[name]), name


def test_a_run_yields_each_update_and_trains(store):
    trainer = Trainer([CFG, TRANSCODER])
    results = finish(trainer, store)
    assert [(r.index, r.step) for r in results if r.step in (1, 18, 19)] == [(0, 1), (1, 1), (0, 18), (1, 18), (0, 19)]
    first, last = results[0], results[-1]
    assert last.step == 25
    assert last.fvu < first.fvu
    assert 0 < last.l0 < first.l0 <= 32
    assert last.tokens_per_second > 0
    autoencoder, transcoder = trainer.result()
    assert (autoencoder.cfg.d_in, autoencoder.cfg.d_out, autoencoder.cfg.model) == (8, 8, "some/model")
    assert (transcoder.cfg.d_in, transcoder.cfg.d_out, transcoder.cfg.hook_out) == (8, 5, B)


def test_results_are_those_of_the_batch(store):
    trainer = Trainer(dataclasses.replace(CFG, lr_warmup=0, sparsity_warmup=0))
    run = trainer.run(store, progress=False)
    result = next(run)
    # One update was made; its result speaks of the dictionary as it was initialised.
    fresh = Trainer(dataclasses.replace(CFG, lr_warmup=0, sparsity_warmup=0))
    fresh._prepare(store)
    (x,) = store.take([A], store.order(0)[:16])
    sae, scale = fresh._learners[0].sae.double(), store.scale(A)
    x = x.double() / scale
    acts = sae.encode(x)
    error = (x - sae.decode(acts)).pow(2).sum()
    assert result.l0 == pytest.approx((acts > 0).sum().item() / 16)
    assert result.fvu == pytest.approx((error / (x - x.mean(0)).pow(2).sum()).item(), rel=1e-4)
    assert result.loss == pytest.approx((error / 16).item() + 0.01 * result.l0, rel=1e-4)


def test_dictionaries_train_as_if_alone(store):
    together = Trainer([CFG, TRANSCODER])
    finish(together, store)
    alone = [Trainer(CFG), Trainer(TRANSCODER)]
    for trainer in alone:
        finish(trainer, store)
    assert_same(weights(together), [weights(trainer)[0] for trainer in alone])


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(store, tmp_path):
    whole = Trainer([CFG, TRANSCODER])
    results = finish(whole, store)
    folder, killed = tmp_path / "run", tmp_path / "killed"
    broken = Trainer([CFG, TRANSCODER], folder=folder, checkpoint_every=7)
    for result in broken.run(store, progress=False):
        if result.step == 17:  # past the checkpoint at 14 and past one pass over the 100 rows
            shutil.copytree(folder, killed)  # what a kill leaves
            break
    resumed = Trainer.resume(killed)
    assert resumed.step == 14
    assert resumed.configs == broken.configs
    rest = finish(resumed, store)
    assert numbers(rest) == numbers(r for r in results if r.step > 14)
    assert_same(weights(whole), weights(resumed))
    assert_same(weights(whole), weights(Trainer.resume(killed)))
    assert finish(Trainer.resume(killed), store) == []


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("last", [(0, 1), (1, 1), (0, 12), (1, 12), (0, 18), (0, 20), (0, 25)])
def test_a_run_broken_off_between_checkpoints_goes_on_bit_for_bit(store, tmp_path, capsys, last, error):
    """Between two updates and between two dictionaries, by the caller's loop and by an error."""
    whole = Trainer([CFG, TRANSCODER])
    results = finish(whole, store)
    broken, seen = Trainer([CFG, TRANSCODER], folder=tmp_path), []
    with contextlib.suppress(KeyboardInterrupt, RuntimeError):
        for result in broken.run(store, progress=False):
            seen.append(result)
            if (result.index, result.step) == last:
                if error is None:
                    break
                raise error
    resumed = Trainer.resume(tmp_path)
    assert resumed.step == last[1] - 1
    seen += resumed.run(store)
    assert f"{last[1] - 1}/25 " in capsys.readouterr().err
    assert numbers(seen) == numbers(results)
    assert_same(weights(whole), weights(resumed))


@pytest.mark.parametrize(
    ("function", "kept"),
    [("jumprelu_loss", 12), ("project_out_rows", 12), ("normalise_rows", 10)],  # the last one comes after Adam's step
)
def test_a_half_made_update_is_not_checkpointed(store, tmp_path, monkeypatch, function, kept):
    whole, broken = Trainer([CFG, TRANSCODER]), Trainer([CFG, TRANSCODER], folder=tmp_path, checkpoint_every=5)
    finish(whole, store)

    def interrupted(*args, **settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        for result in broken.run(store, progress=False):
            if (result.index, result.step) == (1, 12):
                patch.setattr(f"scope_lens.training.learner.{function}", interrupted)
    resumed = Trainer.resume(tmp_path)
    assert resumed.step == kept
    finish(resumed, store)
    assert_same(weights(whole), weights(resumed))
    if kept == 12:
        finish(broken, store)
        assert_same(weights(whole), weights(broken))
    else:
        with pytest.raises(ValueError, match=rf"Update 12 for '{A}' was broken off halfway.*Trainer\.resume"):
            finish(broken, store)


@pytest.mark.parametrize("every", [2, 1000])
def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(tmp_path, every):
    rows = torch.randn(100, 8)
    store = store_of(100, a=rows)
    rows[store.order(0)[16 * 4]] = torch.nan  # in the fifth batch
    trainer = Trainer(CFG, folder=tmp_path, checkpoint_every=every)
    with pytest.raises(ValueError, match="is nan at step 5"):
        finish(trainer, store)
    if every == 2:
        resumed = Trainer.resume(tmp_path)
        assert resumed.step == 4
        assert all(tensor.isfinite().all() for tensor in weights(resumed)[0].values())
    else:
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="or its loss was not finite"):
        finish(trainer, store)


def test_a_loop_broken_off_goes_on_in_memory(store):
    whole, broken = Trainer(CFG), Trainer(CFG)
    finish(whole, store)
    for result in broken.run(store, progress=False):
        if result.step == 9:
            break
    finish(broken, store)
    assert broken.step == 25
    assert_same(weights(whole), weights(broken))


def test_an_interrupt_leaves_the_last_checkpoint_whole(store, tmp_path, monkeypatch):
    trainer = Trainer(CFG, folder=tmp_path, checkpoint_every=5)
    with pytest.raises(KeyboardInterrupt):
        for result in trainer.run(store, progress=False):
            if result.step == 8:
                raise KeyboardInterrupt
    assert Trainer.resume(tmp_path).step == 7

    def half_written(state, part, metadata):
        part.write_bytes(b"half")
        raise KeyboardInterrupt

    trainer = Trainer.resume(tmp_path)
    monkeypatch.setattr("scope_lens.training.trainer.save_file", half_written)
    with pytest.raises(KeyboardInterrupt):
        finish(trainer, store)
    assert Trainer.resume(tmp_path).step == 7
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_a_planted_dictionary_is_recovered():
    """Rows made of two of 24 planted directions on average, in 16 dimensions: training finds them all."""
    planted = torch.nn.functional.normalize(torch.randn(24, 16), dim=1)
    codes = (torch.rand(20_000, 24) < 0.08) * (1 + torch.rand(20_000, 24))
    data = store_of(20_000, a=codes @ planted)
    cfg = TrainConfig(
        hook_in=A, hook_out=A, width=48, sparsity=0.05, steps=1000, batch_size=256, learning_rate=1e-2, lr_warmup=50,
        lr_decay=500, sparsity_warmup=200, bandwidth=0.05, threshold_init=0.02, threshold="direct",
    )  # fmt: skip
    trainer = Trainer(cfg)
    results = finish(trainer, data)
    cosine = (trainer.result()[0].W_dec.detach() @ planted.T).max(0).values
    assert cosine.min() > 0.95
    assert results[-1].fvu < 0.1
    assert results[-1].l0 == pytest.approx((codes > 0).sum(1).float().mean().item(), rel=0.25)


def test_bad_requests_are_refused(store, tmp_path):
    with pytest.raises(ValueError, match="at least one TrainConfig"):
        Trainer([])
    with pytest.raises(ValueError, match="checkpoint_every is 0; expected 1 update or more"):
        Trainer(CFG, checkpoint_every=0)
    with pytest.raises(ValueError, match="Nothing is trained yet"):
        Trainer(CFG).result()
    with pytest.raises(KeyError, match="no site 'blocks.1.hook_mlp_out'"):
        finish(Trainer(TRANSCODER), store_of(100, a=torch.randn(100, 8)))
    with pytest.raises(ValueError, match="3 rows, fewer than a batch of 16"):
        finish(Trainer(CFG), store_of(3, a=torch.randn(3, 8)))
    with pytest.raises(ValueError, match="is nan at step 1; lower the learning rate"):
        finish(Trainer(CFG), store_of(20, a=torch.full((20, 8), torch.nan)))
    with pytest.raises(FileNotFoundError, match="checkpoint.safetensors is missing"):
        Trainer.resume(tmp_path)
    trainer = Trainer(CFG, folder=tmp_path)
    finish(trainer, store)
    with pytest.raises(FileExistsError, match=r"Trainer\.resume"):
        Trainer(CFG, folder=tmp_path)
    with pytest.raises(ValueError, match="began on another store.*'other' with widths"):
        finish(Trainer.resume(tmp_path), store_of(100, "other", a=torch.randn(100, 8)))
    with pytest.raises(ValueError, match=r"widths \(8, 8\).*widths \(9, 9\)"):
        finish(Trainer.resume(tmp_path), store_of(100, a=torch.randn(100, 9)))


@pytest.mark.parametrize("damage", ["cut", "foreign", "empty"])
def test_a_damaged_checkpoint_is_refused(store, tmp_path, damage):
    finish(Trainer(CFG, folder=tmp_path), store)
    file = tmp_path / "checkpoint.safetensors"
    content = file.read_bytes()
    file.write_bytes(
        {"cut": content[: len(content) // 2], "foreign": b"PK\x03\x04" + content[4:], "empty": b""}[damage]
    )
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is no whole checkpoint"):
        Trainer.resume(tmp_path)
