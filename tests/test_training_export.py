"""Trained dictionaries on disk: both formats, the measured L0, what one format cannot hold."""

import dataclasses
import json

import pytest
import torch

from scope_lens import HookedSAE, demo
from scope_lens.releases import hooks_for, load, open_suite, read_npz
from scope_lens.training import (
    ActivationStore,
    HeldOut,
    TrainConfig,
    Trainer,
    gemma_scope_path,
    measure_l0,
    save_gemma_scope,
    save_suite,
)


@pytest.fixture(scope="module")
def store():
    torch.manual_seed(0)
    x = 3 * torch.randn(500, 8)
    return ActivationStore.from_rows(
        {"blocks.1.hook_resid_post": x, "blocks.1.ln2.hook_normalized": x * 2, "blocks.1.hook_mlp_out": x + 1},
        model="some/model",
    )


def trained(store, *fields):
    """Dictionaries of layer 1 after a few updates: site and settings of each."""
    configs = []
    for site, more in fields:
        hook_in, hook_out = hooks_for(site, 1)
        settings = {
            "hook_in": hook_in, "hook_out": hook_out, "width": 32, "sparsity": 0.01, "steps": 12, "batch_size": 32,
            "learning_rate": 1e-2, "lr_warmup": 2, "sparsity_warmup": 2, "bandwidth": 0.1, "threshold": "direct",
        }  # fmt: skip
        configs.append(TrainConfig(**settings | more))
    trainer = Trainer(configs)
    list(trainer.run(store, progress=False))
    return trainer.result()


def by_hand(sae, x):
    """Active latents of each row on average, in float64."""
    weights = {name: p.detach().double() for name, p in sae.named_parameters()}
    pre = x.double() @ weights["W_enc"] + weights["b_enc"]
    return (pre > weights["threshold"]).sum().item() / len(x)


def test_a_suite_is_read_back_in_both_formats(store, tmp_path):
    saes = trained(
        store, ("res", {}), ("transcoder", {}), ("mlp", {"activation": "batchtopk", "k": 5, "sparsity": 0.0})
    )
    saved = save_suite(saes, tmp_path, on=store)
    (everything,) = store.batches("blocks.1.hook_resid_post", size=500)
    expected = by_hand(saes[0], everything[0])
    assert saved[0].l0.average_l0 == pytest.approx(expected)
    assert saved[0].l0.measured_on == f"500 rows of the activation store {store.manifest.source}"
    assert saved[0].folder == tmp_path / f"res/layer_1/width_32/average_l0_{round(expected)}"
    assert [record.native_only for record in saved] == ["", "", ""]
    assert sorted(p.name for p in saved[0].folder.iterdir()) == [
        "config.json", "measured.json", "params.npz", "sae.safetensors",
    ]  # fmt: skip
    measured = json.loads((saved[0].folder / "measured.json").read_text())
    assert (measured["average_l0"], measured["measured_on"]) == saved[0].l0

    releases = open_suite(tmp_path, model="some/model")
    assert [(r.site, r.layer, r.width) for r in releases] == [("res", 1, 32), ("mlp", 1, 32), ("transcoder", 1, 32)]
    loaded = {release.site: load(release, local_dir=tmp_path) for release in releases}
    x = everything[0]
    for sae, record in zip(saes, saved, strict=True):
        native = HookedSAE.load(record.folder)
        npz = loaded[record.folder.relative_to(tmp_path).parts[0]]
        assert native.cfg == dataclasses.replace(sae.cfg, path=record.folder.relative_to(tmp_path).as_posix())
        assert (npz.cfg.hook_in, npz.cfg.hook_out, npz.cfg.model) == (sae.cfg.hook_in, sae.cfg.hook_out, "some/model")
        assert torch.equal(native(x), sae(x))
        assert torch.equal(npz(x), sae(x))


def test_what_params_npz_cannot_hold_is_saved_natively_and_says_so(store, tmp_path, random_sae):
    topk = {"activation": "topk", "k": 5, "sparsity": 0.0}
    saes = trained(store, ("res", topk), ("transcoder", {"skip": True}))
    saes.append(random_sae("blocks.1.hook_resid_mid", d_in=8, d_sae=32))
    chat = ("bos", "eos", "pad", "chat_prefix")
    saes.append(random_sae("blocks.1.hook_mlp_out", d_in=8, d_sae=32, untrained=chat))
    rows = {name: torch.randn(200, 8) for name in (*store.sites, "blocks.1.hook_resid_mid")}
    saved = save_suite(saes, tmp_path, on=ActivationStore.from_rows(rows))
    assert [record.native_only for record in saved] == [
        "activation='topk'",
        "skip=True",
        "the hooks blocks.1.hook_resid_mid and blocks.1.hook_resid_mid, which are no site of its layout",
        f"untrained={chat}",
    ]
    assert saved[0].folder == tmp_path / "res/layer_1/width_32/average_l0_5"
    assert saved[2].folder.relative_to(tmp_path).parts[:2] == ("blocks.1.hook_resid_mid", "width_32")
    assert not list(tmp_path.rglob("params.npz"))
    for sae, record in zip(saes, saved, strict=True):
        x = torch.randn(5, 8)
        assert torch.equal(HookedSAE.load(record.folder)(x), sae(x))
        assert json.loads((record.folder / "measured.json").read_text())["native_only"] == record.native_only
        with pytest.raises(ValueError, match="format has no place for") if sae.cfg.skip else nothing():
            save_gemma_scope(sae, tmp_path / "other")


class nothing:
    def __enter__(self):
        return None

    def __exit__(self, *error):
        return True


def test_dictionaries_with_one_path_are_kept_apart(store, tmp_path, random_sae):
    """Two seeds often have the same rounded L0."""
    sae = random_sae("blocks.1.hook_resid_post", d_in=8, d_sae=32)
    saved = save_suite([sae, sae, sae], tmp_path, on=store)
    path = saved[0].folder.relative_to(tmp_path)
    assert [record.folder.relative_to(tmp_path) for record in saved] == [path, "twin_2" / path, "twin_3" / path]
    assert {release.path for release in open_suite(tmp_path)} == {
        path.as_posix(), f"twin_2/{path.as_posix()}", f"twin_3/{path.as_posix()}",
    }  # fmt: skip
    x = torch.randn(5, 8)
    assert all(torch.equal(load(release, local_dir=tmp_path)(x), sae(x)) for release in open_suite(tmp_path))


def test_l0_of_held_out_text(random_sae):
    model, text = demo.load_model(), demo.text()[:2]
    sae = random_sae("blocks.1.hook_resid_post", d_in=192, d_sae=64)
    found = measure_l0(sae, on=HeldOut(model=model, text=text))
    rows = ActivationStore.harvest(model, text, sites=[sae.cfg.hook_in], dtype=torch.float32, progress=False)
    (everything,) = rows.batches(sae.cfg.hook_in, size=rows.rows)
    assert found.average_l0 == pytest.approx(by_hand(sae, everything[0]), rel=1e-4)
    assert found.measured_on.startswith("held-out text, ")
    few = measure_l0(sae, on=rows, rows=10)
    assert few.measured_on.startswith("10 rows of the activation store")


def test_a_relu_dictionary_has_thresholds_of_zero(tmp_path, random_sae):
    relu = random_sae("blocks.0.hook_resid_post", d_in=8, activation="relu")
    file = save_gemma_scope(relu, str(tmp_path / gemma_scope_path(layer=0, width=96, l0=48.4)))
    assert file.parent.name == "average_l0_48"
    hooks = hooks_for("res", 0)
    read = read_npz(file, hook_in=hooks.hook_in, hook_out=hooks.hook_out)
    x = torch.randn(20, 8)
    assert read.cfg.activation == "jumprelu"
    assert torch.equal(read.threshold, torch.zeros(96))
    assert torch.equal(read(x), relu(x))


def test_what_the_format_has_no_place_for(tmp_path, random_sae):
    hook = "blocks.0.hook_resid_post"
    for fields, reason in [
        ({"activation": "topk", "k": 3}, "activation='topk'"),
        ({"hook_out": "blocks.1.hook_mlp_out", "skip": True}, "skip=True"),
        ({"pre_encoder_bias": True}, "pre_encoder_bias=True"),
    ]:
        sae = random_sae(hook, fields.pop("hook_out", None), d_in=8, **fields)
        with pytest.raises(ValueError, match=rf"has no place for {reason}.*HookedSAE\.save"):
            save_gemma_scope(sae, tmp_path)
    assert list(tmp_path.iterdir()) == []
