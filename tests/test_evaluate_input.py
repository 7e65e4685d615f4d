"""What `evaluate` accepts: packing of text, and one clear error for every input that would give wrong numbers."""

import copy

import pytest
import torch

from scope_lens.evaluation import evaluate, pack
from scope_lens.model import ScopeModel

PAD, EOS, BOS = 0, 1, 2


@pytest.fixture(scope="module")
def stories(shared_data):
    return ScopeModel.from_pretrained(shared_data / "tiny-gemma2-stories")


@pytest.fixture
def res(random_sae):
    return random_sae("blocks.1.hook_resid_post", d_in=48)


def ids_of(model, text):
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]


def some_text(shared_data, n):
    return (shared_data / "corpora" / "tinystories_val.txt").read_text().split("<|endoftext|>")[:n]


# ---- packing ----


def test_a_short_text_is_one_row_with_bos_in_front_and_pad_behind(stories):
    rows = pack(stories, ["Once upon a time"], context=9)
    assert rows.tolist() == [[BOS, *ids_of(stories, "Once upon a time"), *[PAD] * 4]]


def test_a_long_text_is_cut_and_nothing_is_lost(stories, shared_data):
    text = some_text(shared_data, 1)[0]
    ids = ids_of(stories, text)
    rows = pack(stories, [text], context=32)
    assert rows.shape == (-(-len(ids) // 31), 32)
    assert (rows[:, 0] == BOS).all()
    assert rows[:, 1:].flatten()[: len(ids)].tolist() == ids
    assert (rows[:, 1:].flatten()[len(ids) :] == PAD).all()


@pytest.mark.parametrize("context", [2, 3, 7, 64, 256])
def test_documents_follow_each_other_with_bos_in_front_of_each(stories, shared_data, context):
    texts = [text[:300] for text in some_text(shared_data, 6)] + ["", "A"]
    rows = pack(stories, texts, context=context)
    assert rows.shape[1] == context
    assert (rows[:, 0] == BOS).all()
    flat = [i for i in rows.flatten().tolist() if i not in (BOS, PAD)]
    per_document = [ids_of(stories, text) for text in texts]
    assert flat == [i for ids in per_document for i in ids]
    # In one long row a BOS marks every document's beginning, and nothing else.
    if context == 256:
        starts = [row.tolist().count(BOS) for row in rows]
        assert sum(starts) >= len(texts) - 1
    assert (rows[:-1] == PAD).sum() <= len(rows)  # a row without room for a BOS and a token is closed early


def test_a_model_without_bos_gets_eos_between_documents(stories, monkeypatch):
    monkeypatch.setattr(stories.cfg, "default_prepend_bos", False)
    first, second = (ids_of(stories, text) for text in ("Once upon", "a time"))
    assert pack(stories, ["Once upon", "a time"], context=6).tolist() == [[*first, EOS, *second, PAD]]


def test_text_is_evaluated_as_its_rows_in_the_context_that_the_model_has(stories, shared_data, random_sae):
    sae = random_sae("blocks.1.hook_resid_post", d_in=192)
    texts = some_text(shared_data, 3)
    got = evaluate(stories, texts, saes=sae, progress=False)
    want = evaluate(stories, pack(stories, texts, context=256), saes=sae, progress=False)
    assert got == want
    assert got.settings["context"] == 256
    assert evaluate(stories, texts[0], saes=sae, context=64, progress=False).settings["longest_sequence"] == 64
    # A trained model: far below the ln(4096) = 8.3 of guessing, and the random dictionary destroys it.
    assert got.ce_clean < 3 < got.ce_spliced


@pytest.mark.parametrize("context", [1, 257])
def test_pack_refuses_a_context_that_the_model_does_not_have(stories, context):
    with pytest.raises(
        ValueError, match=rf"context is {context}; .* at least 2 tokens and this model takes at most 256"
    ):
        pack(stories, ["Once"], context=context)


def test_text_needs_a_tokenizer(gemma2, res):
    with pytest.raises(ValueError, match="Text needs a tokenizer and this model has none; pass token ids"):
        evaluate(gemma2[0], ["Once upon a time"], saes=res)


# ---- refused tokens ----


def rows(n=3, length=10):
    ids = torch.randint(3, 199, (n, length))
    ids[:, 0] = BOS
    return ids


def test_rows_without_bos(gemma2, res):
    tokens = rows()
    tokens[1, 0] = 77
    with pytest.raises(ValueError, match=r"1 of 3 rows do not begin with BOS \(id 2\); row 1 begins with 77") as error:
        evaluate(gemma2[0], tokens, saes=res)
    assert "scope_lens.evaluation.pack" in str(error.value)


def test_rows_without_bos_are_fine_where_the_model_was_trained_so(gemma2, res, monkeypatch):
    model, _ = gemma2
    monkeypatch.setattr(model.cfg, "default_prepend_bos", False)
    assert evaluate(model, rows()[:, 1:], saes=res, progress=False).n_tokens == 3 * 8


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(0, 10, dtype=torch.long), "no tokens to evaluate: nothing was given, or only empty tensors"),
        (torch.zeros(3, 0, dtype=torch.long), "no tokens to evaluate"),
        ([], "no tokens to evaluate"),
        (iter([]), "no tokens to evaluate"),
        (torch.full((2, 6), PAD), r"Nothing counts in 2 sequences: .*\(BOS, EOS, PAD\)"),
        (torch.full((2, 6), BOS), "Nothing counts in 2 sequences"),
        (torch.tensor([[BOS, 5]]), "Nothing counts in 1 sequences"),
        (torch.tensor([[BOS]]), "Nothing counts in 1 sequences"),
        (iter([torch.tensor([BOS, 4, 5])]), r"expected integer ids of shape \(seq, pos\), .* \(3,\).* tokens\[None\]"),
        (iter([torch.tensor([[2.0, 4.0]])]), r"expected integer ids .* torch.float32"),
        (iter([torch.tensor([[BOS, 4, 199]])]), "ids from 2 to 199, .* ids 0 to 198"),
        (iter([torch.tensor([[BOS, 4, -100]])]), "ids from -100 to 4"),
        (iter([torch.tensor([[BOS, 4, 5]]), "text"]), r"holds \['Tensor', 'str'\]; expected token tensors"),
        (iter([[BOS, 4, 5]]), r"holds \['list'\]"),
    ],
)
def test_refused_tokens(gemma2, res, tokens, message):
    with pytest.raises(ValueError, match=message):
        evaluate(gemma2[0], tokens, saes=res, progress=False)


def test_rows_longer_than_the_model_context(gemma2, res):
    with pytest.raises(ValueError, match="rows of 129 tokens, but the model's context is 128. Cut them"):
        evaluate(gemma2[0], rows(1, 129), saes=res)


@pytest.mark.parametrize("texts", [[""], ["", ""]])
def test_empty_text(stories, random_sae, texts):
    with pytest.raises(ValueError, match=rf"no text: {len(texts)} documents, all of them empty"):
        evaluate(stories, texts, saes=random_sae("blocks.1.hook_resid_post", d_in=192))


# ---- refused settings and dictionaries ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"saes": []}, "at least one dictionary: saes is empty"),
        ({"batch_size": 0}, "batch_size is 0; expected 1 sequence or more"),
    ],
)
def test_refused_settings(gemma2, res, settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate(gemma2[0], rows(), **{"saes": res} | settings)


def test_dictionaries_that_do_not_fit(gemma2, random_sae, res):
    model, hf = gemma2
    never_read = iter([torch.tensor([])])
    with pytest.raises(
        ValueError, match="'blocks.1.hook_resid_post' is 48 wide on this model, the dictionary has d_in=50"
    ):
        evaluate(model, never_read, saes=random_sae("blocks.1.hook_resid_post", d_in=50))
    with pytest.raises(KeyError, match="no hook point 'blocks.9.hook_resid_post'"):
        evaluate(model, never_read, saes=random_sae("blocks.9.hook_resid_post", d_in=48))
    with pytest.raises(ValueError, match="two cannot write one site"):
        evaluate(model, never_read, saes=[res, random_sae("blocks.1.hook_out", d_in=48)])
    half = ScopeModel.from_hf(copy.deepcopy(hf))
    half.model.half()
    with pytest.raises(ValueError, match="float16"):
        evaluate(half, never_read, saes=res)
    assert list(never_read), "refused before the tokens are read"
    backwards = random_sae("blocks.2.hook_resid_post", "blocks.1.hook_mlp_out", d_in=48)
    with pytest.raises(ValueError, match="reads 'blocks.2.hook_resid_post', which has not fired in this forward"):
        evaluate(model, rows(), saes=backwards, progress=False)
    assert not model.attached


def test_the_chat_prefix_is_neither_spliced_nor_counted(stories, random_sae, monkeypatch):
    monkeypatch.setattr(stories.tokenizer, "chat_template", "{{ bos_token }}Tom said: {{ messages[0]['content'] }}")
    prefix, text = ids_of(stories, "Tom said: "), ids_of(stories, "Once upon a time there was a cat")
    tokens = torch.tensor([[BOS, *prefix, *text]])
    every_kind = ("bos", "eos", "pad", "chat_prefix")
    sae = random_sae("blocks.1.hook_resid_post", d_in=192, untrained=every_kind)
    got = evaluate(stories, tokens, saes=sae, progress=False)
    assert got.n_tokens == len(text) - 1
    assert got.n_masked == 1 + len(prefix)
    assert got.settings["saes"][0]["untrained"] == list(every_kind)
    monkeypatch.setattr(stories.tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="chat prefix"):
        evaluate(stories, tokens, saes=sae, progress=False)
