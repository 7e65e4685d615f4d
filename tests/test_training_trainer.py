"""Runs: shared rows, results, resuming bit for bit, what is refused."""

import dataclasses
import json
import math
import shutil
import threading

import pytest
import torch

from scope_lens.training import ActivationStore, TrainConfig, Trainer, checkpoints, read_log

pytestmark = pytest.mark.usefixtures("one_thread")

A, B = "blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"
CFG = TrainConfig(
    hook_in=A, hook_out=A, width=32, sparsity=0.01, steps=25, batch_size=16, learning_rate=3e-3, lr_warmup=5,
    lr_decay=5, sparsity_warmup=10, bandwidth=0.1, threshold_init=0.02, threshold="direct", dead_after=100,
)  # fmt: skip
TRANSCODER = dataclasses.replace(CFG, hook_out=B, steps=18, seed=1)


def store_of(n, **sites):
    """A store around rows at hand."""
    return ActivationStore.from_rows({{"a": A, "b": B}[name]: x for name, x in sites.items()}, model="some/model")


@pytest.fixture
def store():
    x = 3 * torch.randn(100, 8)
    return store_of(100, a=x, b=x @ torch.randn(8, 5))


def finish(trainer, store):
    return list(trainer.run(store, progress=False))


def weights(trainer):
    return [sae.state_dict() for sae in trainer.result()]


def numbers(results):
    """All of the results but how long they took."""
    return [dataclasses.replace(r, tokens_per_second=0.0) for r in results]


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name], other[name]), name


# ---- results ----


def test_a_run_yields_each_update_and_trains(store):
    trainer = Trainer([CFG, TRANSCODER])
    results = finish(trainer, store)
    assert [(r.index, r.step) for r in results if r.step in (1, 18, 19)] == [(0, 1), (1, 1), (0, 18), (1, 18), (0, 19)]
    first, last = results[0], results[-1]
    assert (first.name, results[1].name) == ("0_res_layer_0_width_32", f"1_{A}-{B}_width_32")
    assert last.step == 25
    assert last.fvu < first.fvu
    assert 0 < last.l0 < first.l0 <= 32
    assert all(r.tokens_per_second > 0 for r in results)
    assert all(r.evaluation is None for r in results)
    autoencoder, transcoder = trainer.result()
    assert (autoencoder.cfg.d_in, autoencoder.cfg.d_out, autoencoder.cfg.model) == (8, 8, "some/model")
    assert (transcoder.cfg.d_in, transcoder.cfg.d_out, transcoder.cfg.hook_out) == (8, 5, B)


def test_results_are_those_of_the_batch(store):
    cfg = dataclasses.replace(CFG, lr_warmup=0, sparsity_warmup=0)
    trainer = Trainer(cfg, seed=5)
    result = next(trainer.run(store, progress=False))
    # One update was made; its result speaks of the dictionary as it was initialised.
    fresh = Trainer(cfg)
    fresh._begin(store)
    x = store.reader([A], size=16, seed=5).next()[A]
    sae, scale = fresh._learners[0].sae.double(), store.scale(A)
    x = x.double() / scale
    acts = sae.encode(x)
    error = (x - sae.decode(acts)).pow(2).sum()
    assert result.l0 == pytest.approx((acts > 0).sum().item() / 16)
    assert result.fvu == pytest.approx((error / (x - x.mean(0)).pow(2).sum()).item(), rel=1e-4)
    assert result.loss == pytest.approx((error / 16).item() + 0.01 * result.l0, rel=1e-4)


def test_the_order_of_the_rows_is_the_run_s(store):
    """Trainer(seed=) orders the rows; a config's seed is that of its initialisation."""
    first = [next(Trainer(CFG, seed=seed).run(store, progress=False)) for seed in (0, 0, 1)]
    assert first[0].loss == first[1].loss != first[2].loss
    seen = []
    reader = store.reader([A], size=16, seed=3)
    trainer = Trainer(dataclasses.replace(CFG, steps=9, seed=8, sparsity_warmup=3), seed=3)
    run = trainer.run(store, progress=False)
    next(run)
    update = trainer._learners[0].update
    trainer._learners[0].update = lambda x, y: (seen.append(x.clone()), update(x, y))[1]
    list(run)
    reader.next()
    assert all(torch.equal(x, reader.next()[A]) for x in seen)
    assert len(seen) == 8  # beyond the 6 batches of one pass


KINDS = [
    CFG,
    dataclasses.replace(CFG, seed=7, sparsity=0.03),
    TRANSCODER,
    dataclasses.replace(CFG, activation="topk", k=4, sparsity=0.0, aux_k=8, sparsity_warmup=0, dead_after=50),
    dataclasses.replace(CFG, activation="batchtopk", k=4, sparsity=0.0, sparsity_warmup=0, batch_size=24, steps=12),
    dataclasses.replace(CFG, activation="gated", threshold="log", batch_size=24),
    dataclasses.replace(CFG, activation="relu", threshold="log", seed=3),
    dataclasses.replace(TRANSCODER, skip=True, target_l0=3.0),
    dataclasses.replace(CFG, matryoshka=(8, 16), frequency_penalty=0.01),
]


def test_dictionaries_train_as_if_alone(store):
    """Different seeds, kinds, sparsities, sites, batch sizes and lengths, one run of each and one of all of them."""
    together = Trainer(KINDS, seed=2)
    results = numbers(finish(together, store))
    for index, cfg in enumerate(KINDS):
        alone = Trainer(cfg, seed=2)
        own = numbers(finish(alone, store))
        assert own == [dataclasses.replace(r, index=0, name=alone.names[0]) for r in results if r.index == index]
        assert_same(weights(alone), [weights(together)[index]])


def test_several_dictionaries_read_each_batch_once(store, monkeypatch):
    taken = []
    read = type(store).reader

    def counted(self, sites, *, size, seed=0):
        reader = read(self, sites, size=size, seed=seed)
        following = reader.next
        reader.next = lambda into=None: (taken.append((tuple(sites), size)), following(into))[1]
        return reader

    monkeypatch.setattr(type(store), "reader", counted)
    finish(Trainer([CFG, TRANSCODER, CFG]), store)
    assert taken == [((A, B), 16)] * 25


def test_results_at_intervals(store):
    """Every tenth and the last of each; the numbers and the weights are those of a run that reports all."""
    every, seldom = Trainer([CFG, TRANSCODER]), Trainer([CFG, TRANSCODER], report_every=10)
    results, thinned = finish(every, store), finish(seldom, store)
    assert [(r.index, r.step) for r in thinned] == [(0, 10), (1, 10), (1, 18), (0, 20), (0, 25)]
    assert all(r in numbers(results) for r in numbers(thinned))
    assert_same(weights(every), weights(seldom))


# ---- resuming ----


def log_of(folder):
    return numbers(read_log(folder / "log.jsonl"))


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(store, tmp_path):
    whole = Trainer(KINDS, seed=4, folder=tmp_path / "whole")
    results = finish(whole, store)
    folder, killed = tmp_path / "run", tmp_path / "killed"
    broken = Trainer(KINDS, folder=folder, checkpoint_every=7, seed=4)
    for result in broken.run(store, progress=False):
        if result.step == 17:  # past the checkpoint at 14 and past one pass over the 100 rows
            shutil.copytree(folder, killed)  # what a kill leaves
            break
    assert len(log_of(killed)) > 14 * len(KINDS)
    resumed = Trainer.resume(killed)
    assert resumed.step == 14
    assert resumed.configs == broken.configs
    rest = finish(resumed, store)
    assert numbers(rest) == numbers(r for r in results if r.step > 14)
    assert log_of(killed) == log_of(tmp_path / "whole") == numbers(results)
    assert_same(weights(whole), weights(resumed))
    assert_same(weights(whole), weights(Trainer.resume(killed)))
    assert finish(Trainer.resume(killed), store) == []
    states = [checkpoint_tensors(folder) for folder in (killed, tmp_path / "whole")]
    assert_same(states[:1], states[1:])  # optimisers, dead counters and readers too


def checkpoint_tensors(folder):
    from safetensors.torch import load_file

    return load_file(max(checkpoints(folder).values()))


def test_a_resumed_stream_equals_an_unbroken_one_bit_for_bit(gemma2, tmp_path):
    """The reservoir, its random state and its place in the text are in the checkpoint."""
    model, _ = gemma2
    tokens = torch.randint(3, 199, (40, 14))
    tokens[:, 0] = 2

    def stream():
        return ActivationStore.stream(model, tokens, sites=[A], rows=120, seed=1, batch_size=2, progress=False)

    cfg = dataclasses.replace(CFG, steps=60)  # 960 rows of 520 that the text has
    whole = Trainer([cfg, dataclasses.replace(cfg, seed=1)], seed=6)
    results = finish(whole, stream())
    for result in Trainer(whole.configs, folder=tmp_path, checkpoint_every=13, seed=6).run(stream(), progress=False):
        if result.step == 45:
            break
    assert sorted(checkpoints(tmp_path)) == [26, 39, 45]
    resumed = Trainer.resume(tmp_path, step=39)
    rest = finish(resumed, stream())
    assert numbers(rest) == numbers(r for r in results if r.step > 39)
    assert_same(weights(whole), weights(resumed))
    assert log_of(tmp_path) == numbers(results)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("last", [(0, 1), (1, 1), (0, 12), (1, 12), (0, 18), (0, 20), (0, 25)])
def test_a_run_broken_off_goes_on_bit_for_bit(store, tmp_path, capsys, last, error):
    """After a step, and between the results of two dictionaries, by the caller's loop and by an error."""
    whole = Trainer([CFG, TRANSCODER])
    results = finish(whole, store)
    broken = Trainer([CFG, TRANSCODER], folder=tmp_path)
    if error is None:
        stop_at(broken, store, last, None)
    else:
        with pytest.raises(error):
            stop_at(broken, store, last, error)
    resumed = Trainer.resume(tmp_path)
    assert resumed.step == last[1]
    list(resumed.run(store))
    assert f"{last[1]}/25 " in capsys.readouterr().err
    assert log_of(tmp_path) == numbers(results)
    assert_same(weights(whole), weights(resumed))


def stop_at(trainer, store, last, error):
    for result in trainer.run(store, progress=False):
        if (result.index, result.step) == last:
            if error is None:
                break
            raise error


def test_a_loop_broken_off_goes_on_in_memory(store):
    """What was not given to the first loop is given to the second."""
    whole, broken, seen = Trainer([CFG, TRANSCODER]), Trainer([CFG, TRANSCODER]), []
    results = finish(whole, store)
    for result in broken.run(store, progress=False):
        seen.append(result)
        if (result.index, result.step) == (0, 9):
            break
    seen += finish(broken, store)
    assert broken.step == 25
    assert numbers(seen) == numbers(results)
    assert_same(weights(whole), weights(broken))


@pytest.mark.parametrize("place", ["learner.normalise_rows", "learner.project_out_rows", "trainer.Readings.read"])
def test_a_half_made_step_is_not_checkpointed(store, tmp_path, monkeypatch, place):
    whole, broken = Trainer([CFG, TRANSCODER]), Trainer([CFG, TRANSCODER], folder=tmp_path, checkpoint_every=5)
    finish(whole, store)

    def interrupted(*args, **settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        for result in broken.run(store, progress=False):
            if (result.index, result.step) == (1, 12):
                patch.setattr(f"scope_lens.training.{place}", interrupted)
    resumed = Trainer.resume(tmp_path)
    assert resumed.step == 10
    finish(resumed, store)
    assert_same(weights(whole), weights(resumed))
    with pytest.raises(ValueError, match=r"Step 1[23] of this run was broken off halfway.*Trainer\.resume"):
        finish(broken, store)


def test_an_older_checkpoint_can_be_gone_on_from(store, tmp_path):
    whole = Trainer(CFG)
    results = finish(whole, store)
    finish(Trainer(CFG, folder=tmp_path, checkpoint_every=5), store)
    assert sorted(checkpoints(tmp_path)) == [15, 20, 25]
    resumed = Trainer.resume(tmp_path, step=15)
    run = resumed.run(store, progress=False)
    next(run)
    assert sorted(checkpoints(tmp_path)) == [15]  # the newer ones are given up
    assert len(log_of(tmp_path)) == 16
    list(run)
    assert sorted(checkpoints(tmp_path)) == [15, 20, 25]
    assert log_of(tmp_path) == numbers(results)
    assert_same(weights(whole), weights(resumed))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 7; it holds those of \[15, 20, 25\]"):
        Trainer.resume(tmp_path, step=7)


def test_the_log_is_one_line_a_result(store, tmp_path):
    results = finish(Trainer([CFG, TRANSCODER], folder=tmp_path), store)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert len(lines) == len(results) == 43
    assert json.loads(lines[1])["name"] == results[1].name
    assert read_log(tmp_path / "log.jsonl") == results
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"index": 0, "st')  # a kill in the middle of a line
    assert read_log(tmp_path / "log.jsonl") == results
    finish(Trainer.resume(tmp_path), store)
    assert (tmp_path / "log.jsonl").read_text().splitlines() == lines
    (tmp_path / "log.jsonl").write_text("\n".join(lines[:9]) + "\n")
    with pytest.raises(ValueError, match=r"log\.jsonl has \d+ bytes and had \d+ when the checkpoint was written"):
        finish(Trainer.resume(tmp_path), store)
    (tmp_path / "log.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"log\.jsonl, line 1 is no result of a Trainer"):
        read_log(tmp_path / "log.jsonl")
    with pytest.raises(FileNotFoundError, match="a Trainer with a folder writes log.jsonl"):
        read_log(tmp_path / "none.jsonl")


def test_numbers_that_are_not_finite_are_valid_json(tmp_path):
    """Rows that are all the same have no variance, so their FVU is infinite."""
    finish(
        Trainer(dataclasses.replace(CFG, steps=2, lr_decay=0, lr_warmup=1, sparsity_warmup=1), folder=tmp_path),
        store_of(40, a=torch.ones(40, 8)),
    )
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=pytest.fail)["fvu"] == "Infinity"
    assert [r.fvu for r in read_log(tmp_path / "log.jsonl")] == [math.inf, math.inf]


# ---- numbers that are not finite ----


@pytest.mark.parametrize("every", [2, 1000])
@pytest.mark.parametrize("report_every", [1, 25])
def test_activations_that_are_not_finite_leave_the_last_checkpoint(tmp_path, every, report_every):
    rows = 3 * torch.randn(100, 8)
    store = store_of(100, a=rows)
    reader = store.reader([A], size=16)
    fifth = [reader.next()[A] for _ in range(5)][-1]
    rows[(rows == fifth[3]).all(1)] = torch.nan
    trainer = Trainer(CFG, folder=tmp_path, checkpoint_every=every, report_every=report_every)
    with pytest.raises(ValueError, match=rf"activations at '{A}' are not finite in the batch of step 5.*is whole"):
        finish(trainer, store)
    resumed = Trainer.resume(tmp_path)
    assert resumed.step == (4 if every == 2 else 0)
    assert all(tensor.isfinite().all() for tensor in weights(resumed)[0].values())
    assert len(log_of(tmp_path)) == (4 if report_every == 1 else 0)
    with pytest.raises(ValueError, match="or a number in it was not finite"):
        finish(trainer, store)


def test_the_input_of_a_transcoder_is_checked_too(tmp_path):
    x, y = torch.randn(100, 8), torch.randn(100, 5)
    store = store_of(100, a=x, b=y)
    x[:] = torch.inf
    with pytest.raises(ValueError, match=rf"activations at '{A}' are not finite in the batch of step 1"):
        finish(Trainer(TRANSCODER), store)
    x[:], y[:] = 1.0, torch.nan
    with pytest.raises(ValueError, match=rf"activations at '{B}' are not finite in the batch of step 1"):
        finish(Trainer(TRANSCODER), store)


def test_a_loss_or_a_weight_that_is_not_finite(store, tmp_path):
    hot = dataclasses.replace(CFG, learning_rate=1e38, lr_warmup=0)
    with pytest.raises(ValueError, match=rf"loss of 0_res_layer_0_width_32 at '{A}' is .* at step 2; lower the learn"):
        finish(Trainer(hot), store)
    # Updates that leave weights which no finite loss shows are found before they are saved.
    trainer = Trainer(CFG, folder=tmp_path, checkpoint_every=3)
    run = trainer.run(store, progress=False)
    next(run)
    next(run)
    for state in trainer._learners[0].adam.state.values():
        state["exp_avg_sq"].fill_(torch.inf)
    with pytest.raises(
        ValueError, match=r"adam\.W_enc\.exp_avg_sq of 0_res.* is not finite after step 3; lower.*whole"
    ):
        next(run)
    assert sorted(checkpoints(tmp_path)) == [0]


# ---- what is refused ----


def test_bad_requests_are_refused(store, tmp_path):
    with pytest.raises(ValueError, match="at least one TrainConfig"):
        Trainer([])
    for name in ("checkpoint_every", "keep", "evaluate_every", "report_every"):
        with pytest.raises(ValueError, match=f"{name} is 0; expected 1 or more"):
            Trainer(CFG, **{name: 0})
    with pytest.raises(ValueError, match="Nothing is trained yet"):
        Trainer(CFG).result()
    with pytest.raises(KeyError, match="no site 'blocks.1.hook_mlp_out'"):
        finish(Trainer(TRANSCODER), store_of(100, a=torch.randn(100, 8)))
    with pytest.raises(ValueError, match="3 rows, fewer than a batch of 16"):
        finish(Trainer(CFG), store_of(3, a=torch.randn(3, 8)))
    with pytest.raises(FileNotFoundError, match="holds no checkpoint_<step>.safetensors"):
        Trainer.resume(tmp_path)


def test_a_folder_belongs_to_one_run(store, tmp_path):
    configs = [CFG, TRANSCODER]
    finish(Trainer(configs, folder=tmp_path), store)
    with pytest.raises(FileExistsError, match=r"holds a run of these configs already.*Trainer\.resume"):
        Trainer(configs, folder=tmp_path)
    other = [CFG, dataclasses.replace(TRANSCODER, sparsity=0.5, seed=2)]
    for call in (lambda: Trainer(other, folder=tmp_path), lambda: Trainer.resume(tmp_path, configs=other)):
        with pytest.raises(ValueError, match=r"other configs: config 1: sparsity 0\.01, now 0\.5; config 1: seed 1, n"):
            call()
    with pytest.raises(ValueError, match="2 dictionaries, now 1"):
        Trainer.resume(tmp_path, configs=CFG)
    assert Trainer.resume(tmp_path, configs=configs).step == 25
    loose = tmp_path / "loose"
    loose.mkdir()
    (loose / "log.jsonl").write_text("{}\n")
    with pytest.raises(FileExistsError, match=r"log\.jsonl is there already and no checkpoint belongs to it"):
        finish(Trainer(CFG, folder=loose), store)


def test_another_store_is_refused(store, tmp_path):
    finish(Trainer(CFG, folder=tmp_path), store)
    with pytest.raises(ValueError, match=r"began on another store: source '\w+', now '\w+'\. Go on with the store it"):
        finish(Trainer.resume(tmp_path), store_of(100, a=torch.randn(100, 8)))
    with pytest.raises(ValueError, match=r"widths \[\[8, 8\]\], now \[\[9, 9\]\]"):
        finish(Trainer.resume(tmp_path), store_of(100, a=torch.randn(100, 9)))


def test_a_store_with_positions_that_are_not_to_be_trained_at(gemma2, tokens):
    store = ActivationStore.harvest(gemma2[0], tokens, sites=[A], progress=False)
    cfg = dataclasses.replace(CFG, untrained=("bos", "eos", "pad", "chat_prefix"))
    with pytest.raises(ValueError, match=r"not to be trained at \['chat_prefix'\], but the store has rows from there"):
        finish(Trainer(cfg), store)


def test_a_run_too_short_for_its_thresholds_warns_once(store):
    cfg = dataclasses.replace(CFG, threshold="log", learning_rate=7e-5)
    with pytest.warns(UserWarning, match="change log.threshold. by") as noted:
        finish(Trainer(cfg), store)
    assert len(noted) == 1


def test_a_run_in_another_thread(store, tmp_path):
    """Signal handlers belong to the main thread; elsewhere a run goes without them."""
    trainer, seen = Trainer(CFG, folder=tmp_path), []
    thread = threading.Thread(target=lambda: seen.extend(finish(trainer, store)))
    thread.start()
    thread.join()
    assert len(seen) == 25
