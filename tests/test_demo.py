"""The embedded model and its suite: what is there, that it loads, and that it reconstructs held-out text."""

import json
import lzma
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from scope_lens import demo
from scope_lens.releases import load, open_suite

SITES = ("res", "mlp", "att", "transcoder")
# Nouns of the agreement pairs that no training sentence was made from (docs/benchmarks/demo_suite.md).
HELD_OUT = {
    form for noun in ("carpenter", "friend", "lawyer", "singer", "chair", "tree") for form in (noun, f"{noun}s")
} | {"woman", "women"}


@pytest.fixture(scope="module")
def model():
    return demo.load_model()


def test_the_files_are_in_gemma_scopes_layout():
    files = sorted(file.relative_to(demo.path() / "suite").as_posix() for file in demo.path().rglob("params.npz"))
    assert len(files) == 21
    for file in files:
        site, layer, width, l0, _ = file.split("/")
        assert site in SITES
        assert layer in {f"layer_{i}" for i in range(4)}
        assert width in {"width_1k", "width_4k"}
        assert 5 <= int(l0.removeprefix("average_l0_")) <= 90
        with np.load(demo.path() / "suite" / file, allow_pickle=False) as arrays:
            d, latents = 256 if site == "att" else 192, {"width_1k": 1024, "width_4k": 4096}[width]
            assert {name: arrays[name].shape for name in arrays} == {
                "W_enc": (d, latents), "W_dec": (latents, d), "b_enc": (latents,), "b_dec": (d,),
                "threshold": (latents,),
            }  # fmt: skip
            assert all(arrays[name].dtype == np.float32 for name in arrays)
            np.testing.assert_allclose(np.linalg.norm(arrays["W_dec"], axis=1), 1, rtol=1e-5)
            assert (arrays["threshold"] >= 0).all()


def test_every_site_of_every_layer_has_one_dictionary_and_one_layer_has_a_ladder():
    saes = demo.load_saes()
    assert [(sae.cfg.path.split("/")[:2], sae.cfg.d_sae) for sae in saes] == [
        ([site, f"layer_{layer}"], 1024) for site in ("res", "mlp", "att", "transcoder") for layer in range(4)
    ]
    ladder = [sae.cfg.path for sae in demo.load_ladder()]
    rungs = [Path(path).name.removeprefix("average_l0_") for path in ladder]
    assert {path.rsplit("/", 1)[0] for path in ladder} == {"res/layer_2/width_1k", "res/layer_2/width_4k"}
    for width in (0, 3):
        low, middle, high = map(int, rungs[width : width + 3])
        assert 1.5 * low < middle
        assert 1.5 * middle < high
    assert saes[2].cfg.path == ladder[1]


def test_the_suite_opens_as_any_other():
    found = open_suite(demo.path() / "suite", model=demo.MODEL_NAME)
    assert len(found) == 21
    wide = [release for release in found if release.width == 4096]
    assert [(release.site, release.layer) for release in wide] == [("res", 2)] * 3
    assert load(wide[0], local_dir=demo.path() / "suite").cfg.path == demo.load_ladder()[3].cfg.path


def test_what_is_embedded_is_within_its_size():
    size = sum(file.stat().st_size for file in demo.path().rglob("*") if file.is_file())
    assert size < 60e6


def test_dictionaries_are_chosen_by_site_and_layer():
    assert len(demo.load_saes()) == 16
    (sae,) = demo.load_saes(sites="transcoder", layers=2)
    assert (sae.cfg.hook_in, sae.cfg.hook_out) == ("blocks.2.ln2.hook_normalized", "blocks.2.hook_mlp_out")
    assert sae.cfg.model == demo.MODEL_NAME
    chosen = demo.load_saes(sites=["res", "att"], layers=[0, 3])
    assert [sae.cfg.hook_in for sae in chosen] == [
        "blocks.0.hook_resid_post", "blocks.3.hook_resid_post", "blocks.0.attn.hook_z", "blocks.3.attn.hook_z"
    ]  # fmt: skip
    with pytest.raises(KeyError, match=r"no site \['attn'\]"):
        demo.load_saes(sites="attn")
    with pytest.raises(KeyError, match=r"no layer \['4'\]"):
        demo.load_saes(layers=4)


def test_the_hold_out_text_was_not_trained_on(shared_data):
    documents, corpora = demo.text(), shared_data / "corpora"
    assert len(documents) == 161
    assert set(documents) < set((corpora / "tinystories_val.txt").read_text().split("\n<|endoftext|>\n"))
    for name in (
        "tinystories_train.txt",
        "tinystories_truecased_extra.txt",
        "fairytales.txt",
        "childrens_classics.txt.xz",
    ):
        file = corpora / name
        trained_on = lzma.decompress(file.read_bytes()).decode() if file.suffix == ".xz" else file.read_text()
        assert not [d for d in documents if d[:120] in trained_on or d[-120:] in trained_on]


def test_the_model_is_stored_in_bfloat16_and_loaded_in_float32(model):
    stored = load_file(demo.path() / "model" / "model.safetensors")
    assert {weights.dtype for weights in stored.values()} == {torch.bfloat16}
    assert sum(weights.numel() for weights in stored.values()) == 3_148_992
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_model_predicts_held_out_stories(model):
    """Nats per token on the first 25, BOS to their 256th token."""
    total, count = 0.0, 0
    for story in demo.text()[:25]:
        tokens = model.to_tokens(story)[:, :256]
        with torch.no_grad():
            logits = model(tokens)[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum").item()
        count += tokens.shape[1] - 1
    assert total / count < 2.4


@pytest.mark.parametrize(("file", "overall", "on_held_out"), [("simple_train", 0.95, 0.9), ("nounpp_train", 0.9, 0.75)])
def test_the_verb_agrees_with_its_subject(model, shared_data, file, overall, on_held_out):
    """Prompts whose nouns were in none of the model's training sentences, and some of the others."""
    rows = [json.loads(line) for line in (shared_data / "agreement" / f"{file}.json").read_text().splitlines()][:240]
    answers = torch.tensor([
        [model.to_tokens(row[answer], prepend_bos=False).item() for answer in ("clean_answer", "patch_answer")]
        for row in rows
    ])  # fmt: skip
    prompts = [model.to_tokens(row["clean_prefix"]) for row in rows]
    held_out = torch.tensor([bool(HELD_OUT & set(row["clean_prefix"].split())) for row in rows])
    right = torch.zeros(len(rows), dtype=torch.bool)
    for length in {prompt.shape[1] for prompt in prompts}:
        chosen = [i for i, prompt in enumerate(prompts) if prompt.shape[1] == length]
        with torch.no_grad():
            logits = model(torch.cat([prompts[i] for i in chosen]))[:, -1]
        verbs = logits.gather(1, answers[chosen])
        right[chosen] = verbs[:, 0] > verbs[:, 1]
    assert held_out.sum() > 40
    assert right[held_out].double().mean() >= on_held_out
    assert right.double().mean() >= overall


def test_dictionaries_reconstruct_held_out_activations(model):
    """FVU and L0 of every dictionary on a few stories, from a plain cache."""
    saes = [*demo.load_saes(), *demo.load_ladder()]
    names = {name for sae in saes for name in (sae.cfg.hook_in, sae.cfg.hook_out)}
    tokens = [model.to_tokens(story)[:, :256] for story in demo.text()[:6]]
    with torch.no_grad():
        caches = [model.run_with_cache(ids, names_filter=lambda name: name in names)[1] for ids in tokens]
        for sae in saes:
            x, y = (
                torch.cat([cache[name][0, 1:].flatten(1) for cache in caches])
                for name in (sae.cfg.hook_in, sae.cfg.hook_out)
            )
            acts = sae.encode(x)
            fvu = (y - sae.decode(acts)).pow(2).sum() / (y - y.mean(0)).pow(2).sum()
            l0 = (acts > 0).sum(1).double().mean().item()
            stated = int(Path(sae.cfg.path).name.removeprefix("average_l0_"))
            assert fvu < 0.3, sae.cfg.path
            assert l0 == pytest.approx(stated, rel=0.15), sae.cfg.path
