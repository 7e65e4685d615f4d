"""Which positions are special: ids from tokenizer or config, padding by mask, the chat prefix by template."""

import copy
import lzma
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from scope_lens.model import ScopeModel
from scope_lens.special_tokens import SpecialTokens, special_token_ids, untrained_positions

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}"
)
PREFIX = (2, 106, 1645, 108)  # <bos> <start_of_turn> user \n


@pytest.fixture(scope="module")
def gemma_tokenizer(shared_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    packed = shared_data / "tokenizers" / "gemma2" / "tokenizer.json.xz"
    (folder / "tokenizer.json").write_bytes(lzma.decompress(packed.read_bytes()))
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", chat_template=TEMPLATE,
    )  # fmt: skip


def bridge(tokenizer=None, **config):
    return SimpleNamespace(tokenizer=tokenizer, original_model=SimpleNamespace(config=SimpleNamespace(**config)))


def ids_of(subject) -> SpecialTokens:
    return special_token_ids.__wrapped__(subject, chat_prefix=True)


def test_ids_come_from_the_tokenizer_then_from_the_config(gemma_tokenizer):
    assert ids_of(bridge(gemma_tokenizer, bos_token_id=50)) == SpecialTokens((2,), (1,), (0,), PREFIX)
    assert ids_of(bridge(bos_token_id=5, eos_token_id=[1, 107], pad_token_id=None)) == SpecialTokens(
        (5,), (1, 107), (), ()
    )
    nested = SimpleNamespace(bos_token_id=7, eos_token_id=8, pad_token_id=9)
    assert ids_of(bridge(text_config=nested)) == SpecialTokens((7,), (8,), (9,), ())


SPECIAL = SpecialTokens((2,), (1,), (0,), PREFIX)


def marked(rows, kinds, **options):
    return untrained_positions(torch.tensor(rows), SPECIAL, kinds, **options).int().tolist()


def test_positions_are_marked_by_id():
    rows = [[2, 50, 1, 60, 0], [2, 2, 50, 60, 70]]
    assert marked(rows, ("bos", "eos", "pad")) == [[1, 0, 1, 0, 1], [1, 1, 0, 0, 0]]
    assert marked(rows, ("eos",)) == [[0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]
    assert marked(rows, ()) == [[0] * 5] * 2


def test_the_mask_counts_as_padding_and_spans_the_cache():
    rows = [[50, 60]]
    mask = torch.tensor([[0, 0, 1, 0, 1]])
    assert marked(rows, ("pad",), attention_mask=mask, offset=3) == [[1, 0]]
    assert marked(rows, ("bos",), attention_mask=mask, offset=3) == [[0, 0]]


def test_the_chat_prefix_is_marked_where_the_sequence_spells_it():
    user, text = list(PREFIX), [500, 600]
    assert marked([user + text], ("chat_prefix",)) == [[1, 1, 1, 1, 0, 0]]
    assert marked([[2, 700, 1645, 108, 9, 9]], ("chat_prefix",)) == [[1, 0, 0, 0, 0, 0]], "it breaks off after BOS"
    assert marked([[500, *user, 9]], ("chat_prefix",)) == [[0] * 6], "a later turn is text the dictionary saw"


def test_the_chat_prefix_counts_from_the_first_real_token():
    padded = [[0, 0, *PREFIX, 500], [*PREFIX, 500, 600, 700]]
    want = [[0, 0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0]]
    assert marked(padded, ("chat_prefix",)) == want
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    assert marked(padded, ("chat_prefix",), attention_mask=mask) == want
    assert marked([[1645, 108, 500]], ("chat_prefix",), offset=2) == [[1, 1, 0]], "behind a KV cache"
    assert marked([[2, 106]], ("chat_prefix",), offset=6) == [[0, 0]]


def test_a_chat_prefix_without_a_template_is_refused_when_attached(gemma2, random_sae):
    model, _ = gemma2
    sae = random_sae("blocks.0.hook_resid_post", d_in=48, untrained=("bos", "chat_prefix"))
    with pytest.raises(ValueError, match="tokenizer has no chat template"):
        model.add_sae(sae)
    model.add_sae(sae, positions="all")


def test_special_ids_are_read_anew_when_a_dictionary_is_attached(shared_data, random_sae):
    model = ScopeModel.from_pretrained(shared_data / "tiny-gemma2-stories", device="cpu")
    sae = random_sae("blocks.1.hook_resid_post", d_in=192)
    ids = torch.tensor([[2, 500, 42, 600]])
    assert changed_positions(model, sae, ids).int().tolist() == [[0, 1, 1, 1]]
    model.model.tokenizer.pad_token_id = 42
    assert changed_positions(model, sae, ids).int().tolist() == [[0, 1, 0, 1]]


def test_a_broken_chat_template_hurts_only_who_needs_it(hf_model, random_sae, gemma_tokenizer):
    broken = copy.deepcopy(gemma_tokenizer)
    broken.chat_template = "{{ raise_exception('system role needed') }}"
    model = ScopeModel.from_hf(hf_model("gemma2", vocab_size=256_000), broken)
    model.add_sae(random_sae("blocks.1.hook_resid_post", d_in=48)).remove()
    with pytest.raises(ValueError, match="cannot render one user turn .*system role needed"):
        model.add_sae(random_sae("blocks.1.hook_resid_post", d_in=48, untrained=("chat_prefix",)))


def changed_positions(model, sae, text, **options):
    flows = []
    site = sae.cfg.hook_out
    with torch.no_grad():
        for saes in ((), sae):
            with model.saes(saes), model.hooks([(site, lambda t, hook: flows.append(t.clone()))]):
                model(text, **options)
    return (flows[0] != flows[1]).any(-1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_text_batches_are_masked_and_equal_unpadded_text(shared_data, random_sae, side):
    model = ScopeModel.from_pretrained(shared_data / "tiny-gemma2-stories", device="cpu")
    sae = random_sae("blocks.1.hook_resid_post", d_in=192)
    texts = ["Once upon a time, there was a little girl who liked to play in the park.", "Tom saw a dog."]
    ids = model.to_tokens(texts, padding_side=side)
    changed = changed_positions(model, sae, texts, padding_side=side)
    assert torch.equal(changed, ~torch.isin(ids, torch.tensor([0, 1, 2])))
    with torch.no_grad(), model.saes(sae):
        batch = model(texts, padding_side=side)
        alone = model(texts[1])[0]
    short = batch[1, -len(alone) :] if side == "left" else batch[1, : len(alone)]
    torch.testing.assert_close(short, alone, atol=2e-4, rtol=1e-4)


def test_an_instruction_tuned_dictionary_leaves_the_prefix_alone(hf_model, random_sae, gemma_tokenizer):
    model = ScopeModel.from_hf(hf_model("gemma2", vocab_size=256_000), gemma_tokenizer)
    sae = random_sae("blocks.1.hook_resid_post", d_in=48, untrained=("bos", "eos", "pad", "chat_prefix"))
    chat = gemma_tokenizer.apply_chat_template([{"role": "user", "content": "Hello there"}], tokenize=False)
    ids = gemma_tokenizer(chat, add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert tuple(ids[0, :4].tolist()) == PREFIX
    assert changed_positions(model, sae, ids).int().tolist() == [[0] * 4 + [1] * (ids.shape[1] - 4)]
    with torch.no_grad(), model.saes(sae):
        kv = model.generate(ids, max_new_tokens=4, do_sample=False, verbose=False, stop_at_eos=False)
        full = model.generate(
            ids, max_new_tokens=4, do_sample=False, verbose=False, stop_at_eos=False, use_past_kv_cache=False
        )
    assert torch.equal(kv, full)
