"""The reservoir and the stream: every row once a pass, mixed, in place, bit for bit."""

from collections import Counter

import pytest
import torch
from store_material import MLP, NORMED, RES, bridged, harvest, one_pass, stream, token_ids

from scope_lens.training.store.reservoir import Reservoir
from scope_lens.training.store.seeds import generator


@pytest.fixture(scope="module")
def model():
    return bridged()


@pytest.fixture
def tokens():
    return token_ids(60)


def places(reader):
    origin = reader.origin()
    return list(zip(origin.doc.tolist(), origin.pos.tolist(), strict=True))


def test_every_row_of_a_pass_is_served_exactly_once(model, tokens):
    """What was served and what the reservoir still holds: each row as often as there were passes over it."""
    store = stream(model, tokens, sites=[RES], rows=200)
    reader, served = store.reader([RES], size=40), Counter()
    source, text = store._source, store._source._harvest.corpus
    for _ in range(60):
        reader.next()
        served.update(places(reader))
    reservoir = source._reservoir
    waiting = text.origin(reservoir._places[reservoir._slots(reservoir._served, reservoir.held)])
    counts = served + Counter(zip(waiting.doc.tolist(), waiting.pos.tolist(), strict=True))
    passes, sequences = source._pass, source._order[: source._sequence]
    assert passes == 3
    assert 0 < len(sequences) < 60
    begun = set(sequences.tolist())
    kept = (tokens != 2) & (tokens != 1) & (tokens != 0)
    assert counts == {(doc, pos): passes + (doc in begun) for doc, pos in kept.nonzero().tolist()}


def test_a_row_once_put_is_drawn_once():
    """The reservoir by itself, with every slot number in the way: wrap-around, odd sizes, refills of any size."""
    reservoir = Reservoir({"a": 2, "b": 3}, rows=101, dtype=torch.float32, device=torch.device("cpu"))
    reservoir.seed(generator(0))
    put, drawn, number, sizes = 0, [], 0, generator(1)
    while number < 2_000 or reservoir.held >= 13:
        n = int(torch.randint(1, 40, (), generator=sizes))
        if number < 2_000 and n <= reservoir.room:
            ids = torch.arange(number, number + n)
            rows = {"a": ids[:, None].float().expand(-1, 2), "b": -ids[:, None].float().expand(-1, 3)}
            reservoir.put(rows, ids)
            number += n
            put += n
        if reservoir.held >= 13:
            if reservoir.spent(13):
                reservoir.shuffle()
            out = {"a": torch.empty(13, 2), "b": torch.empty(13, 3)}
            ids = reservoir.draw(out, 13)
            assert torch.equal(out["a"], ids[:, None].float().expand(-1, 2))
            assert torch.equal(out["b"], -ids[:, None].float().expand(-1, 3))
            drawn += ids.tolist()
    assert len(set(drawn)) == len(drawn) == put - reservoir.held


def test_batches_are_the_models_rows_and_pairs_fit(model, tokens):
    whole = harvest(model, tokens, sites=[NORMED, MLP])
    origin, *columns = one_pass(whole, NORMED, MLP)
    by_place = {
        place: rows
        for place, *rows in zip(zip(origin.doc.tolist(), origin.pos.tolist(), strict=True), *columns, strict=True)
    }
    reader = stream(model, tokens, sites=[NORMED, MLP], rows=150).reader([NORMED, MLP], size=32)
    for _ in range(30):
        batch = reader.next()
        for i, place in enumerate(places(reader)):
            for site, row in zip((NORMED, MLP), by_place[place], strict=True):
                torch.testing.assert_close(batch[site][i], row, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stream_goes_on_bit_for_bit(model, tokens, dtype):
    def fresh():
        return stream(model, tokens, sites=[RES, MLP], rows=150, dtype=dtype, seed=4).reader(
            [MLP, RES], size=32, seed=9
        )

    reader = fresh()
    for _ in range(18):  # the reservoir is in the second pass
        reader.next()
    state = {name: tensor.clone() for name, tensor in reader.state().items()}
    expected = [reader.next() for _ in range(15)]
    resumed = fresh()
    resumed.load_state(state)
    for batch in expected:
        found = resumed.next()
        assert all(torch.equal(found[site], batch[site]) for site in (RES, MLP))
    again = fresh()
    for _ in range(18):
        again.next()
    assert all(torch.equal(a, state[name]) for name, a in again.state().items())


def test_a_state_of_another_stream_is_refused(model, tokens):
    state = stream(model, tokens, sites=[RES], rows=150).reader([RES], size=32).state()
    for settings in ({"rows": 120}, {"dtype": torch.bfloat16}, {"sites": [MLP]}):
        other = stream(model, tokens, **{"sites": [RES], "rows": 150} | settings)
        with pytest.raises(ValueError, match="The saved state holds .* Make the stream with the sites, rows and dtype"):
            other.reader(other.sites, size=32).load_state(state)


def test_the_reservoir_is_refilled_in_place(model, tokens):
    store = stream(model, tokens, sites=[RES], rows=200)
    reader = store.reader([RES], size=40)
    arrays = store._source._reservoir.arrays
    pointer, held = arrays[RES].data_ptr(), []
    for _ in range(40):
        reader.next()
        held.append(store._source._reservoir.held)
    assert arrays is store._source._reservoir.arrays
    assert arrays[RES].data_ptr() == pointer
    assert arrays[RES].shape == (200, 48)
    assert min(held) > 200 - 3 * 11  # there is never room for another forward of three sequences


def test_batches_are_mixed(model):
    """A reservoir of a third of the text, refilled sequence by sequence, against rows drawn at random from it."""
    store = stream(model, token_ids(200), sites=[RES], rows=700)
    found = store.mixing(size=50, batches=30)
    of_a_third = 64 * (1 - (1 - 1 / 64) ** 50)  # distinct ones of 50 rows from 700 rows of 64 documents: 34.9
    assert of_a_third < found.documents < found.documents_shuffled
    assert found.distance == pytest.approx(1, abs=0.07)
    reader, neighbours = store.reader([RES], size=50), []
    for _ in range(30):
        reader.next()
        key = torch.tensor([doc * 1_000 + pos for doc, pos in places(reader)])
        neighbours.append(int((key.sort().values.diff() == 1).sum()))
    # Rows of a batch that stood side by side in the text: of 50 from 700, 50 * 49 / 700 = 3.5 by chance.
    assert sum(neighbours) / 30 == pytest.approx(3.5, abs=1.4)
    whole = stream(model, token_ids(64), sites=[RES], rows=10**6).mixing(size=50, batches=12)
    assert whole.documents_ratio == pytest.approx(1, abs=0.1)


def test_a_stream_over_all_of_the_text_serves_batches_as_a_pass(model, tokens):
    store = stream(model, tokens, sites=[RES], rows=10**6)
    assert store.rows == 60 * 11 - 4
    assert sum(len(x) for (x,) in store.batches(RES, size=32)) == store.rows // 32 * 32


def test_norms_are_those_of_the_rows_it_holds(model, tokens):
    store = stream(model, tokens, sites=[RES], rows=10**6)
    assert store.scale(RES) == pytest.approx(harvest(model, tokens, sites=[RES]).scale(RES), rel=1e-6)
    assert store.manifest.rows == 656
    assert store.manifest.source != harvest(model, tokens, sites=[RES]).manifest.source


def test_one_batch_size_a_stream(model, tokens):
    store = stream(model, tokens, sites=[RES, MLP], rows=200)
    first, second = store.reader([RES], size=32), store.reader([MLP], size=32)
    first.next()
    taken = set(places(first))
    second.next()
    assert taken.isdisjoint(places(second))  # one reservoir: what one was served the other is not
    with pytest.raises(ValueError, match=r"read in batches of 32 \(seed 0\) and cannot be read in batches of 40"):
        store.reader([RES], size=40)
    with pytest.raises(ValueError, match=r"batches of 32 \(seed 1\) as well.*harvest into a folder"):
        store.reader([RES], size=32, seed=1)


def test_bad_requests_are_refused(model, tokens):
    with pytest.raises(ValueError, match="The store has 20 rows, fewer than a batch of 32"):
        stream(model, tokens, sites=[RES], rows=20).reader([RES], size=32)
    with pytest.raises(ValueError, match="batches of 32 and sequences of up to 11 rows need 43"):
        stream(model, tokens, sites=[RES], rows=40).reader([RES], size=32)
    stream(model, tokens, sites=[RES], rows=43).reader([RES], size=32).next()
    for settings, message in (
        ({"rows": 0}, "rows is 0; expected 1 row or more"),
        ({"batch_size": 0}, "batch_size is 0; expected 1 sequence or more"),
        ({"dtype": torch.float64}, "dtype=torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            stream(model, tokens, **{"sites": [RES]} | settings)
    with pytest.raises(KeyError, match="no site"):
        stream(model, tokens, sites=[RES], rows=100).reader([MLP], size=32)


@pytest.mark.parametrize("rows", [43, 44, 50, 60, 75])
def test_a_small_reservoir_never_runs_dry(model, tokens, rows):
    reader = stream(model, tokens, sites=[RES], rows=rows, batch_size=8).reader([RES], size=32)
    served = []
    for _ in range(45):
        reader.next()
        served += places(reader)
    assert max(Counter(served).values()) - min(Counter(served).values()) <= 2


def test_numbers_that_are_not_finite_stop_the_stream(tokens):
    model, forwards = bridged(), []

    def spoil(tensor, hook):
        forwards.append(1)
        return tensor * float("nan") if len(forwards) > 30 else tensor

    model.model.hook_dict[RES].add_hook(spoil)
    reader = stream(model, tokens, sites=[RES], rows=200).reader([RES], size=32)
    with pytest.raises(ValueError, match=f"activations at '{RES}' are not finite .* in document"):
        for _ in range(50):
            assert reader.next()[RES].isfinite().all()


def test_on_a_gpu_the_forwards_run_beside_the_caller(model, tokens, monkeypatch):
    """With streams that only note what is asked of them: the order of waits, and checks that come later."""
    log = []

    class Side:
        def wait_stream(self, other):
            log.append("side waits for caller")

    class Caller:
        def wait_stream(self, other):
            log.append("caller waits for side")

    class On:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            log.append("begin side")

        def __exit__(self, *error):
            log.append("end side")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Caller())
    monkeypatch.setattr(torch.cuda, "stream", On)
    plain = stream(model, tokens, sites=[RES], rows=200).reader([RES], size=32)
    store = stream(model, tokens, sites=[RES], rows=200)
    source = store._source
    source._side = Side()
    reader = store.reader([RES], size=32)
    for _ in range(25):
        del log[:]
        due = source._reservoir.spent(32)
        assert torch.equal(reader.next()[RES], plain.next()[RES])
        assert log[: 1 if due else 0] == ["caller waits for side"] * due
        refills = log[int(due) :]
        assert refills == ["side waits for caller", "begin side", "end side"] * (len(refills) // 3)
    source._unchecked.append((source._next_batch(), {RES: torch.tensor(False)}))
    with pytest.raises(ValueError, match=f"'{RES}' are not finite as float32 in documents"):
        for _ in range(8):
            reader.next()
