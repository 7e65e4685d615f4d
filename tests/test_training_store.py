"""The store: what enters it, against plain torch hooks on Hugging Face; how it is read back; bad requests."""

import copy

import pytest
import torch
from store_material import (
    BOS,
    EOS,
    MLP,
    NORMED,
    PAD,
    RES,
    SITES,
    Z,
    at_place,
    bridged,
    by_plain_hooks,
    harvest,
    hf_gemma,
    one_pass,
    shrink,
    token_ids,
)

from scope_lens.model import ScopeModel
from scope_lens.training import ActivationStore
from scope_lens.training.store import corpus, site_rows
from scope_lens.training.store.chat import wrap_in_chat


@pytest.fixture(scope="module")
def hf():
    return hf_gemma()


@pytest.fixture(scope="module")
def model(hf):
    return bridged(hf)


@pytest.fixture
def tokens():
    return token_ids()


@pytest.fixture(scope="module")
def stories(shared_data):
    return ScopeModel.from_pretrained(shared_data / "tiny-gemma2-stories")


def test_rows_are_the_models_activations_at_ordinary_tokens(hf, model, tokens):
    store = harvest(model, tokens)
    expected = by_plain_hooks(hf, tokens)
    kept = (tokens != BOS) & (tokens != EOS) & (tokens != PAD)
    assert store.rows == int(kept.sum()) == 10 * 12 - 10 - 1 - 3
    origin, *rows = one_pass(store, *SITES)
    assert torch.equal(origin.token_id, tokens[origin.doc, origin.pos])
    assert torch.equal((origin.doc * 12 + origin.pos).sort().values, kept.flatten().nonzero().flatten())
    for site, found in zip(SITES, rows, strict=True):
        x = expected[site]
        torch.testing.assert_close(found, x[origin.doc, origin.pos], rtol=1e-5, atol=1e-5)
        assert store.width(site) == x.shape[-1]
        assert store.scale(site) == pytest.approx(x[kept].double().pow(2).sum(1).mean().sqrt().item(), rel=1e-5)


def test_text_is_packed_and_every_token_of_it_is_kept_with_its_document(stories, monkeypatch):
    monkeypatch.setattr(corpus, "_LONGEST_CONTEXT", 32)
    documents = [f"Once upon a time there was a cat with {n} hats. It was a big cat." * n for n in (1, 2, 5, 0, 3)]
    store = harvest(stories, documents, sites=[RES])
    ids = [stories.model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in documents]
    found = at_place(store, RES)
    assert set(found) == {(doc, pos) for doc, row in enumerate(ids) for pos in range(len(row))}
    origin, _ = one_pass(store, RES)
    assert all(ids[doc][pos] == token for token, doc, pos in zip(*(column.tolist() for column in origin), strict=True))
    first = torch.tensor([[stories.model.tokenizer.bos_token_id, *ids[0]]])
    _, cache = stories.model.run_with_cache(first)
    for pos in range(len(ids[0])):
        torch.testing.assert_close(found[0, pos], cache[RES][0, pos + 1], rtol=1e-4, atol=1e-4)


def test_a_pair_of_sites_gives_rows_of_the_same_tokens(hf, model, tokens):
    store, expected = harvest(model, tokens), by_plain_hooks(hf, tokens)
    x, y = next(store.batches((NORMED, MLP), size=999))
    distance = torch.cdist(x, expected[NORMED].flatten(0, 1))
    assert float(distance.min(1).values.max()) < 0.05
    torch.testing.assert_close(y, expected[MLP].flatten(0, 1)[distance.argmin(1)], rtol=1e-4, atol=1e-4)


def test_names_of_one_hook_are_one_site(model, tokens):
    canonical = "blocks.1.ln2_post.hook_out"
    store = harvest(model, tokens, sites=[MLP, canonical, MLP])
    assert store.sites == (MLP,)
    assert store.width(canonical) == store.width(MLP) == 48
    assert store.scale(canonical) == store.scale(MLP)
    batch = store.reader([canonical, MLP], size=8).next()
    assert batch[canonical] is batch[MLP]
    assert torch.equal(next(store.batches(canonical, size=8))[0], next(store.batches(MLP, size=8))[0])
    alone = harvest(model, tokens, sites=canonical)
    assert alone.manifest.source == store.manifest.source


def test_rows_bounds_the_sample(model, tokens):
    everything = at_place(harvest(model, tokens, sites=[RES]), RES)
    store = harvest(model, tokens, sites=[RES], rows=30)
    sample = at_place(store, RES)
    assert len(sample) == store.rows == 30
    assert all(torch.allclose(row, everything[place], rtol=1e-5, atol=1e-5) for place, row in sample.items())
    other = at_place(harvest(model, tokens, sites=[RES], rows=30, seed=1), RES)
    assert set(sample) != set(other)


def test_a_sample_takes_every_position_alike(model):
    """1,000 draws of 20 of 60 positions: each is taken 333 times, give or take five deviations."""
    text = corpus.Corpus(
        model, token_ids()[:6, :11].clamp(min=3).index_fill(1, torch.tensor(0), BOS), untrained=("bos",)
    )
    counts, everything = torch.zeros(66), text.kept.clone()
    for seed in range(1_000):
        text.kept = everything.clone()
        text._count()
        text.sample(20, seed=seed)
        assert text.rows == 20
        counts += text.kept
    assert float((counts[everything] - 1_000 / 3).abs().max()) < 5 * (1_000 * 2 / 9) ** 0.5


def test_the_forward_stops_after_the_last_site(tokens):
    model, later = bridged(), []
    model.model.hook_dict["blocks.1.ln2.hook_in"].add_hook(lambda tensor, hook: later.append(hook.name))
    harvest(model, tokens, sites=[RES, Z])
    assert later == []
    harvest(model, tokens, sites=[MLP])
    assert later


@pytest.mark.parametrize("pad", [BOS, EOS], ids=["pad is bos", "pad is eos"])
@pytest.mark.parametrize("architecture", ["gemma2", "gpt2"])
def test_a_pad_that_is_bos_or_eos_hides_neither(tokens, architecture, pad):
    hf = hf_gemma(architecture)
    hf.config.pad_token_id = pad
    model = ScopeModel.from_hf(hf)
    tokens[4, 9:] = pad
    mask = torch.ones_like(tokens)
    if pad == EOS:  # in front of BOS it is padding
        tokens[5, :4], tokens[5, 4], mask[5, :4] = EOS, BOS, 0
    _, cache = model.model.run_with_cache(tokens, attention_mask=mask)
    origin, rows = one_pass(harvest(model, tokens, sites=RES), RES)
    assert len(rows) == int(((tokens != BOS) & (tokens != EOS)).sum())
    torch.testing.assert_close(rows, cache[RES][origin.doc, origin.pos], rtol=1e-5, atol=1e-5)


def test_tensors_of_several_widths_are_harvested_together(model, tokens):
    """A sequence of each length in turn: each gives the rows that it gives by itself."""
    parts = [tokens[i : i + 1, : 12 - i % 3] for i in range(10)]
    found = at_place(harvest(model, iter(parts), sites=RES), RES)
    for doc, part in enumerate(parts):
        for (_, pos), row in at_place(harvest(model, part, sites=RES), RES).items():
            torch.testing.assert_close(found[doc, pos], row, rtol=1e-5, atol=1e-5)
    assert len(found) == sum(int((part > BOS).sum()) for part in parts)


def test_sequences_of_one_length_share_a_forward(model, tokens):
    parts = [tokens[i : i + 1, : 12 - i % 2] for i in range(8)]
    text = corpus.Corpus(model, parts, untrained=("bos", "eos", "pad"))
    order, done, sizes = text.order(3, 0), 0, []
    while done < len(order):
        batch = text.batch(order, done, size=16)
        sizes.append(batch.tokens.shape)
        done = batch.sequences
    assert sorted(sizes) == [(4, 11), (4, 12)]
    assert not torch.equal(order, text.order(3, 1))


# Reading back


def test_a_pass_is_shuffled_complete_and_repeatable(model, tokens, monkeypatch):
    """With windows of two blocks of 16 rows, so that batches lie across them."""
    shrink(monkeypatch)
    store = harvest(model, tokens, sites=[RES])
    first = torch.cat([x for (x,) in store.batches(RES, size=25, seed=4)])
    again = torch.cat([x for (x,) in store.batches(RES, size=10, seed=4)])
    other = torch.cat([x for (x,) in store.batches(RES, size=25, seed=5)])
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first[first[:, 0].argsort()], other[other[:, 0].argsort()])
    assert len(first) == store.rows


def test_a_reader_passes_again_and_again_and_leaves_partial_batches_out(model, tokens, monkeypatch):
    shrink(monkeypatch)
    store = harvest(model, tokens, sites=[RES])
    reader, passes = store.reader([RES], size=25, seed=1), []
    for _ in range(3):
        rows = []
        for _ in range(store.rows // 25):
            reader.next()
            origin = reader.origin()
            rows += zip(origin.doc.tolist(), origin.pos.tolist(), strict=True)
        assert len(set(rows)) == len(rows) == 100
        passes.append(tuple(rows))
    assert len(set(passes)) == 3


def test_the_order_does_not_depend_on_the_sites(model, tokens, monkeypatch):
    shrink(monkeypatch)
    store = harvest(model, tokens)
    both, alone = store.reader([NORMED, RES], size=17, seed=2), store.reader([RES], size=17, seed=2)
    for _ in range(9):
        assert torch.equal(both.next()[RES], alone.next()[RES])


def test_a_reader_goes_on_bit_for_bit(model, tokens):
    store = harvest(model, tokens)
    reader = store.reader(SITES, size=30, seed=6)
    for _ in range(4):
        reader.next()
    state = reader.state()
    expected = [reader.next() for _ in range(5)]
    resumed = store.reader(SITES, size=30, seed=6)
    resumed.load_state(state)
    for batch in expected:
        found = resumed.next()
        assert all(torch.equal(found[site], batch[site]) for site in SITES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_can_be_written_into_an_earlier_one(model, tokens, dtype):
    store = harvest(model, tokens, dtype=dtype)
    fresh, reusing = (store.reader([RES, Z], size=30) for _ in range(2))
    batch = reusing.next()
    pointer = batch[RES].data_ptr()
    first = fresh.next()
    kept = first[RES].clone()
    for _ in range(4):
        batch, expected = reusing.next(into=batch), fresh.next()
        assert torch.equal(batch[RES], expected[RES])
        assert torch.equal(batch[Z], expected[Z])
        assert batch[RES].data_ptr() == pointer
    assert torch.equal(first[RES], kept)


def test_rows_at_hand_make_a_store():
    x, y = torch.randn(100, 6), torch.randn(100, 3)
    store = ActivationStore.from_rows({"a": x, "b": y}, model="some/model")
    assert (store.rows, store.sites, store.width("b"), store.manifest.model) == (100, ("a", "b"), 3, "some/model")
    assert store.scale("a") == pytest.approx(x.double().pow(2).sum(1).mean().sqrt().item())
    found_x, found_y = next(store.batches(("a", "b"), size=100))
    order = torch.cdist(found_x, x).argmin(1)
    assert torch.equal(order.sort().values, torch.arange(100))
    assert torch.equal(found_y, y[order])
    assert store.manifest.source != ActivationStore.from_rows({"a": x, "b": 2 * y}).manifest.source
    with pytest.raises(ValueError, match="as many rows of one dtype at every site"):
        ActivationStore.from_rows({"a": x, "b": y[:5]})
    with pytest.raises(ValueError, match="rows at 'b' are not finite"):
        ActivationStore.from_rows({"a": x, "b": y / 0})
    with pytest.raises(ValueError, match="Where rows at hand"):
        store.mixing(size=8)


def test_mixing_tells_a_shuffled_batch_from_a_run_of_text(model):
    tokens = token_ids(64, 16)
    store = harvest(model, tokens, sites=[RES], batch_size=64)
    mixed = store.mixing(size=64, batches=30)
    # Rows are drawn without replacement from 64 documents of at most 15 rows: by simulation.
    origin, _ = one_pass(store, RES)
    draws = [origin.doc[torch.randperm(store.rows)[:64]].unique().numel() for _ in range(400)]
    assert mixed.documents_shuffled == pytest.approx(sum(draws) / 400, rel=0.01)
    assert mixed.documents_ratio == pytest.approx(1, abs=0.03)
    assert mixed.distance == pytest.approx(1, abs=0.05)
    assert mixed.pass_rows == store.rows

    from scope_lens.training.store.mixing import measure_mixing

    order = (origin.doc * 16 + origin.pos).argsort()
    run = type(origin)(*(column[order[:64]] for column in origin))
    unmixed = measure_mixing(origin, [run])
    assert unmixed.documents == 5
    assert unmixed.distance == pytest.approx(64 / store.rows, rel=0.05)


def test_it_says_which_documents_it_saw(stories):
    texts = [f"Tim had {n} red balls and {n} blue kites. He went to the park with {n} friends." for n in range(20)]
    store = harvest(stories, texts[:12], sites=[RES])
    assert store.saw(stories, texts[10:]) == [0, 1]
    rows = torch.cat([stories.to_tokens(text) for text in texts[10:14]])
    assert store.saw(stories, rows) == [0, 1]
    of_rows = harvest(stories, rows, sites=[RES])
    assert of_rows.saw(stories, texts) == [10, 11, 12, 13]
    assert of_rows.saw(stories, [texts[9], "Tim had"]) == []


def test_another_model_or_tokenizer_is_refused(model, stories, tokens, monkeypatch):
    store = harvest(model, tokens, sites=[RES])
    store.check_model(model)
    with pytest.raises(ValueError, match="made by another model: 'Gemma2ForCausalLM' with sha256"):
        store.check_model(stories)
    of_stories = harvest(stories, ["Once upon a time"], sites=[RES])
    of_stories.check_model(stories)
    other = copy.deepcopy(stories.model.tokenizer)
    other.add_tokens(["<new>"])
    monkeypatch.setattr(stories.model, "tokenizer", other)
    with pytest.raises(ValueError, match="made by another tokenizer"):
        of_stories.check_model(stories)


def test_documents_in_a_chat_are_kept_everywhere_but_in_the_user_prefix(stories, monkeypatch):
    tokenizer = copy.deepcopy(stories.model.tokenizer)
    monkeypatch.setattr(stories.model, "tokenizer", tokenizer)
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        wrap_in_chat(stories, ["The cat"])
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<user>\n{{ m['content'] | trim }}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}<model>\n{% endif %}"
    )
    prefix, suffix = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("<bos><user>\n", "<end>\n<model>\n")
    )
    documents = ["Once upon a time there was a cat. " * 9, "", "The end"]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in documents]
    rows = wrap_in_chat(stories, documents, context=64)
    room = 64 - len(prefix) - len(suffix)
    pieces = [ids[0][:room], ids[0][room:], ids[2]]
    for row, piece in zip(rows, pieces, strict=True):
        whole = prefix + piece + suffix
        assert row.tolist() == whole + [tokenizer.pad_token_id] * (64 - len(whole))
    store = harvest(stories, rows, sites=[RES], untrained=("bos", "eos", "pad", "chat_prefix"))
    places = {(d, p) for d, piece in enumerate(pieces) for p in range(len(prefix), len(prefix + piece + suffix))}
    assert set(at_place(store, RES)) == places
    assert store.manifest.untrained == ("bos", "chat_prefix", "eos", "pad")
    for bad, message in (({"context": 8}, "at least one of the text must fit"), ({"documents": [""]}, "no text")):
        with pytest.raises(ValueError, match=message):
            wrap_in_chat(stories, **{"documents": documents} | bad)


# Bad requests


def test_bad_requests_are_refused(model, tokens, tmp_path):
    with pytest.raises(KeyError, match="hook_resid_post"):
        harvest(model, tokens, sites=["blocks.0.hook_resid_psot"])
    with pytest.raises(ValueError, match="one or more sites; found none"):
        harvest(model, tokens, sites=[])
    with pytest.raises(ValueError, match="no activation to harvest"):
        harvest(model, torch.full((3, 4), BOS))
    for rows in (0, -1):
        with pytest.raises(ValueError, match=f"rows is {rows}; expected 1 row or more"):
            harvest(model, tokens, rows=rows)
    with pytest.raises(ValueError, match="batch_size is 0; expected 1 sequence or more"):
        harvest(model, tokens, batch_size=0)
    with pytest.raises(ValueError, match="rows of 132 tokens, but the model's context is 128"):
        harvest(model, tokens.repeat(1, 11))
    with pytest.raises(ValueError, match=r"expected integer ids of shape \(seq, pos\), found torch.float32"):
        harvest(model, iter([tokens.float()]))
    with pytest.raises(ValueError, match="ids from 1 to 199, but the model's vocabulary has the ids 0 to 198"):
        harvest(model, tokens.clamp(min=1).index_fill(1, torch.tensor(7), 199))
    with pytest.raises(ValueError, match=r"10 of 10 rows do not begin with BOS \(id 2\)"):
        harvest(model, tokens[:, 1:])
    with pytest.raises(ValueError, match="no tokens to harvest: nothing was given"):
        harvest(model, [])
    with pytest.raises(ValueError, match=r"dtype=torch\.float64"):
        harvest(model, tokens, dtype=torch.float64)
    with pytest.raises(ValueError, match="untrained names \\['prefix'\\]"):
        harvest(model, tokens, untrained=("bos", "prefix"))
    with pytest.raises(ValueError, match="Text needs a tokenizer and this model has none"):
        harvest(model, ["no tokenizer here"])
    with pytest.raises(FileNotFoundError, match="Harvest one"):
        ActivationStore.open(tmp_path)
    store = harvest(model, tokens, sites=[RES])
    with pytest.raises(KeyError, match=r"no site 'blocks\.9\.hook_out'.*blocks\.0\.hook_resid_post"):
        store.batches("blocks.9.hook_out", size=4)
    for read in (store.batches, store.reader):
        with pytest.raises(ValueError, match="size=0"):
            read((RES, RES), size=0)
    with pytest.raises(ValueError, match="The store has 106 rows, fewer than a batch of 107"):
        store.reader([RES], size=107)


def test_activations_that_are_not_finite_are_refused(tokens):
    hf = hf_gemma()
    with torch.no_grad():
        hf.model.embed_tokens.weight[150] = 1e6
    tokens = tokens.clamp(max=149)
    tokens[7, 4] = 150
    model = ScopeModel.from_hf(hf)
    harvest(model, tokens, sites=[RES])
    with pytest.raises(ValueError, match=f"activations at '{RES}' are not finite as float16 in document 7, position 4"):
        harvest(model, tokens, sites=[RES], dtype=torch.float16)
    model.model.hook_dict[Z].add_hook(lambda tensor, hook: tensor / 0)
    with pytest.raises(
        ValueError, match=rf"'{Z}' are not finite as float32 in document \d, position 1\. Run the model"
    ):
        harvest(model, tokens, sites=[RES, Z])


def test_a_site_that_changes_its_width_is_refused(tokens, monkeypatch):
    model, calls = bridged(), []
    caught = site_rows.SiteRows._caught

    def narrow(self, batch):
        calls.append(1)
        rows = caught(self, batch)
        return {site: x[:, :40] if len(calls) == 3 else x for site, x in rows.items()}

    monkeypatch.setattr(site_rows.SiteRows, "_caught", narrow)
    with pytest.raises(ValueError, match=rf"{RES}' is 40 wide in this forward and was 48 wide before \(documents \d"):
        harvest(model, tokens, sites=[RES])
