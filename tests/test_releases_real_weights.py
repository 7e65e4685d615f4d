"""Real Gemma Scope weights: ten latents of a layer-20 dictionary, with activations and tokens of gemma-2-2b."""

import gzip
import json
import lzma
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from scope_lens.releases import from_path, load


@pytest.fixture(scope="module")
def folder(shared_data) -> Path:
    return shared_data / "gemmascope-slices" / "layer_20"


@pytest.fixture(scope="module")
def texts(folder) -> list[dict]:
    with gzip.open(folder / "acts.jsonl.gz", "rt") as lines:
        return [json.loads(line) for line in lines]


def test_the_reader_takes_the_real_file(folder):
    sae = load(from_path("google/gemma-scope-2b-pt-res", "layer_20/width_65k/average_l0_114"), local_dir=folder)
    assert (sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.hook_in) == (2304, 10, "blocks.20.hook_resid_post")
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(10), atol=1e-4, rtol=0)
    assert (sae.threshold > 0).all()


def test_no_stored_activation_lies_below_its_threshold(folder, texts):
    """The activations are another implementation's output for the same latents."""
    sae = load(from_path("google/gemma-scope-2b-pt-res", "layer_20/width_65k/average_l0_114"), local_dir=folder)
    features = [entry["feature"] for entry in json.loads((folder / "features.json").read_text())]
    counted = 0
    for text in texts:
        threshold = sae.threshold[features.index(text["feature"])]
        activations = torch.tensor(text["sae_act"])
        assert (activations > threshold).all()
        counted += len(activations)
    assert counted == 250


def test_the_tokens_are_the_gemma_tokenizers(shared_data, texts):
    """The texts are chats whose untrained prefix, BOS and the user's turn marker, was left out of the rows."""
    with lzma.open(shared_data / "tokenizers" / "gemma2" / "tokenizer.json.xz", "rt") as file:
        tokenizer = Tokenizer.from_str(file.read())
    assert tokenizer.encode("The quick brown fox").ids == [2, 651, 4320, 8426, 25341]
    encodings = tokenizer.encode_batch([text["input"] for text in texts])
    for text, encoding in zip(texts, encodings, strict=True):
        assert encoding.tokens[:4] == ["<bos>", "<start_of_turn>", "user", "\n"]
        assert encoding.tokens[4:] == text["tokens"]
        assert all(0 <= position < len(text["tokens"]) for position in text["sae_pos"])
