"""The embedded model and its suite: what is there, that it loads, and that it reconstructs held-out text."""

from pathlib import Path

import numpy as np
import pytest
import torch

from scope_lens import demo

SITES = ("res", "mlp", "att", "transcoder")


@pytest.fixture(scope="module")
def model():
    return demo.load_model()


def test_every_layer_has_four_dictionaries_in_gemma_scopes_layout():
    files = sorted(file.relative_to(demo.path() / "suite").as_posix() for file in demo.path().rglob("params.npz"))
    assert len(files) == 16
    for file in files:
        site, layer, width, l0, _ = file.split("/")
        assert site in SITES
        assert layer in {f"layer_{i}" for i in range(4)}
        assert width == "width_1k"
        assert 10 <= int(l0.removeprefix("average_l0_")) <= 55
        with np.load(demo.path() / "suite" / file, allow_pickle=False) as arrays:
            d = 256 if site == "att" else 192
            assert {name: arrays[name].shape for name in arrays} == {
                "W_enc": (d, 1024), "W_dec": (1024, d), "b_enc": (1024,), "b_dec": (d,), "threshold": (1024,)
            }  # fmt: skip
            assert all(arrays[name].dtype == np.float32 for name in arrays)
            np.testing.assert_allclose(np.linalg.norm(arrays["W_dec"], axis=1), 1, rtol=1e-5)
            assert (arrays["threshold"] >= 0).all()


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
    for name in ("train", "truecased_extra"):
        trained_on = (corpora / f"tinystories_{name}.txt").read_text()
        assert not [d for d in documents if d[:120] in trained_on or d[-120:] in trained_on]


def test_the_model_is_the_trained_one_in_bfloat16(model, shared_data):
    from safetensors.torch import load_file

    ours = load_file(demo.path() / "model" / "model.safetensors")
    theirs = load_file(shared_data / "tiny-gemma2-stories" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, weights in ours.items():
        assert weights.dtype == torch.bfloat16
        assert torch.equal(weights, theirs[name].bfloat16())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_dictionaries_reconstruct_held_out_activations(model):
    """FVU and L0 of every dictionary on a few stories, from a plain cache."""
    saes = demo.load_saes()
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
