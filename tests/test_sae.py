"""The equations of a dictionary, its forms and its files, against float64 and brute force."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from scope_lens.sae import HookedSAE, SAEConfig
from scope_lens.splice import splice

X = (5, 7)


def float64_reference(sae, x):
    """Pre-activations, latents and reconstruction in numpy float64, by loops over latents for the activation."""
    p = {name: value.detach().double().numpy() for name, value in sae.named_parameters()}
    x = x.double().numpy()
    centred = x - p["b_dec"] if sae.cfg.pre_encoder_bias else x
    pre = centred @ p["W_enc"] + p["b_enc"]
    rows = pre.reshape(-1, pre.shape[-1])
    latents = np.zeros_like(rows)
    match sae.cfg.activation:
        case "relu":
            latents = np.maximum(rows, 0)
        case "jumprelu":
            for j in range(rows.shape[1]):
                fires = rows[:, j] > p["threshold"][j]
                latents[fires, j] = rows[fires, j]
        case "topk":
            for i, row in enumerate(rows):
                best = np.argsort(-row)[: sae.cfg.k]
                latents[i, best] = np.maximum(row[best], 0)
        case "batchtopk":
            best = np.argsort(-rows.reshape(-1))[: sae.cfg.k * len(rows)]
            latents.reshape(-1)[best] = np.maximum(rows.reshape(-1)[best], 0)
    latents = latents.reshape(pre.shape)
    recons = latents @ p["W_dec"] + p["b_dec"]
    if sae.cfg.skip:
        recons = recons + x @ p["W_skip"]
    return pre, latents, recons


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk", "batchtopk"])
@pytest.mark.parametrize("form", ["autoencoder", "transcoder", "skip transcoder", "training form"])
def test_forward_equals_the_written_out_equations(random_sae, activation, form):
    k = 9 if "topk" in activation else None
    fields = {"activation": activation, "k": k}
    if form in ("autoencoder", "training form"):
        sae = random_sae("a", d_in=24, pre_encoder_bias=form == "training form", **fields)
    else:
        sae = random_sae("a", "b", d_in=24, d_out=31, skip=form == "skip transcoder", **fields)
    x = torch.randn(*X, 24)
    pre, latents, recons = float64_reference(sae, x)
    assert 0 < (latents > 0).mean() < 0.9
    np.testing.assert_allclose(sae.pre_activation(x).detach().numpy(), pre, atol=1e-5)
    np.testing.assert_allclose(sae.encode(x).detach().numpy(), latents, atol=1e-5)
    np.testing.assert_allclose(sae.decode(sae.encode(x), x).detach().numpy(), recons, atol=2e-5)
    np.testing.assert_allclose(sae(x).detach().numpy(), recons, atol=2e-5)


def test_hook_points_fire_in_order_and_edits_flow_on(random_sae):
    sae = random_sae("a", "b", d_in=24, d_out=31, skip=True)
    x = torch.randn(*X, 24)
    _, cache = sae.run_with_cache(x)
    assert list(cache) == [
        "hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons", "hook_sae_output",
    ]  # fmt: skip
    doubled = sae.run_with_hooks(x, fwd_hooks=[("hook_sae_input", lambda t, hook: 2 * t)])
    torch.testing.assert_close(doubled, sae(2 * x))
    silent = sae.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", lambda t, hook: 0 * t)])
    torch.testing.assert_close(silent, sae.b_dec + x @ sae.W_skip)


def test_the_threshold_is_strict(random_sae):
    sae = random_sae("a", d_in=4, d_sae=4)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(4))
        sae.b_enc.zero_()
        sae.threshold.fill_(0.5)
    x = torch.tensor([[0.5, 0.5000001, 0.4999, -0.6]])
    assert (sae.encode(x) > 0).tolist() == [[False, True, False, False]]


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk", "batchtopk"])
def test_nan_is_not_silenced(random_sae, activation):
    sae = random_sae("a", d_in=8, activation=activation, k=3 if "topk" in activation else None)
    x = torch.randn(2, 8)
    x[0, 0] = float("nan")
    assert sae(x)[0].isnan().all()


def test_pre_activations_are_decided_in_float32(random_sae):
    """In bfloat16 weights, latents near the threshold must fire as exact sums say, not as rounded ones."""
    sae = random_sae("a", d_in=64, d_sae=2048).to(torch.bfloat16)
    x = torch.randn(200, 64).to(torch.bfloat16)
    exact = x.double() @ sae.W_enc.double() + sae.b_enc.double()
    with torch.no_grad():
        sae.threshold.copy_((exact.mean(0) + 1e-3).float())
    fires = exact > sae.threshold.double()
    near = (exact - sae.threshold.double()).abs() < 1e-5
    got = sae.encode(x) > 0
    positive = exact > 0
    assert torch.equal((got == fires) | near | ~positive, torch.ones_like(fires))
    rounded = (x @ sae.W_enc + sae.b_enc).double() > sae.threshold.double()
    assert (rounded != fires).sum() > 20, "rounding must matter here, or the test is empty"


def test_autocast_does_not_round_pre_activations(random_sae):
    sae, x = random_sae("a", d_in=64), torch.randn(50, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sae.pre_activation(x), sae.pre_activation(x).float())
        under = sae.pre_activation(x)
    assert torch.equal(under, sae.pre_activation(x))


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk", "batchtopk"])
@pytest.mark.parametrize("use_error_term", [False, True])
def test_latents_may_be_edited_in_place_before_a_backward_pass(random_sae, activation, use_error_term):
    sae = random_sae("a", d_in=8, activation=activation, k=3 if "topk" in activation else None)

    def silence(acts, hook):
        acts[..., 3] = 0
        return acts

    with sae.hooks(fwd_hooks=[("hook_sae_acts_post", silence)]):
        x = torch.randn(5, 8)
        splice(sae, x, x, use_error_term=use_error_term, untrained=None).sum().backward()
        sae(x).sum().backward()
    assert sae.W_dec.grad.isfinite().all()


def test_threshold_stays_float32_through_casts(random_sae, tmp_path):
    sae = random_sae("a", d_in=24)
    threshold = sae.threshold.detach().clone()
    for cast in (sae.to(torch.bfloat16), sae.half(), sae.bfloat16()):
        assert cast.threshold.dtype == torch.float32
        assert torch.equal(cast.threshold, threshold)
        assert cast.W_enc.dtype in (torch.bfloat16, torch.float16)
    sae.save(tmp_path)
    loaded = HookedSAE.load(tmp_path, dtype=torch.bfloat16)
    assert loaded.threshold.dtype == torch.float32
    assert torch.equal(loaded.threshold, threshold)
    assert sae.double().threshold.dtype == torch.float64


@pytest.mark.parametrize(("rows", "active"), [(1, 5), (64, 20), (0, 0), (33, 0), (300, 60)])
def test_sparse_decode_equals_the_dense_product(random_sae, rows, active):
    sae = random_sae("a", "b", d_in=8, d_out=600, d_sae=2048)
    acts = torch.zeros(rows, 2048)
    for row in acts:
        row[torch.randperm(2048)[:active]] = torch.rand(active) + 0.1
    dense = acts @ sae.W_dec.detach()
    with torch.no_grad():
        assert rows == 0 or sae._gather_pays(acts)
        sparse = sae.write(acts)
    torch.testing.assert_close(sparse, dense, atol=1e-5, rtol=1e-5)
    assert sparse.shape == dense.shape
    assert not sae._gather_pays(acts), "with gradients the product stays dense: silent latents have gradients too"
    acts = acts.requires_grad_()
    if rows:
        sae.write(acts)[0, 0].backward()
        torch.testing.assert_close(acts.grad[0], sae.W_dec.detach()[:, 0])


def test_dense_latents_stay_dense(random_sae):
    sae = random_sae("a", "b", d_in=8, d_out=600, d_sae=2048)
    with torch.no_grad():
        assert not sae._gather_pays(torch.rand(4, 2048))


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk", "batchtopk"])
def test_appendix_a_folds_the_scale_of_an_autoencoder(random_sae, activation):
    sae = random_sae("a", d_in=24, pre_encoder_bias=True, activation=activation, k=7 if "topk" in activation else None)
    sae = sae.double()
    raw, scale = 13.7 * torch.randn(*X, 24).double(), 13.7
    folded = sae.to_inference(scale)
    assert not folded.cfg.pre_encoder_bias
    torch.testing.assert_close(folded(raw), scale * sae(raw / scale), atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(folded.encode(raw), scale * sae.encode(raw / scale), atol=1e-11, rtol=1e-11)
    assert torch.equal(folded.encode(raw) > 0, sae.encode(raw / scale) > 0)
    assert torch.equal(folded.W_enc, sae.W_enc)
    assert torch.equal(folded.W_dec, sae.W_dec)


def test_appendix_b_scales_a_transcoder_by_the_root_of_d_model(random_sae):
    sae = random_sae("ln2", "mlp_out", d_in=36, d_out=36, skip=True).double()
    residual = torch.randn(*X, 36).double() * 40
    normalised = residual / residual.square().mean(-1, keepdim=True).sqrt()
    scale = 36**0.5
    torch.testing.assert_close(normalised.square().sum(-1).mean().sqrt(), torch.tensor(scale).double())
    folded = sae.to_inference(scale)
    torch.testing.assert_close(folded(normalised), scale * sae(normalised / scale), atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(folded.b_enc, scale * sae.b_enc, msg="no b_dec enters a transcoder's encoder")


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_to_inference_refuses_a_scale_that_is_none(random_sae, scale):
    with pytest.raises(ValueError, match="positive, finite norm"):
        random_sae("a", d_in=4).to_inference(scale)


def test_save_and_load_round_trip(random_sae, tmp_path):
    sae = random_sae(
        "a", "b", d_in=24, d_out=31, skip=True, model="google/gemma-2-2b", untrained=("bos", "chat_prefix")
    )
    sae.save(tmp_path / "deep" / "folder")
    loaded = HookedSAE.load(tmp_path / "deep" / "folder")
    assert loaded.cfg == sae.cfg
    for (name, ours), (other, theirs) in zip(sae.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(ours, theirs)
    x = torch.randn(3, 24)
    assert torch.equal(sae(x), loaded(x))
    assert sorted(p.name for p in (tmp_path / "deep" / "folder").iterdir()) == ["config.json", "sae.safetensors"]


def test_a_failed_save_leaves_the_old_files(random_sae, tmp_path, monkeypatch):
    sae = random_sae("a", d_in=24)
    sae.save(tmp_path)
    before = (tmp_path / "sae.safetensors").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("scope_lens.sae.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        random_sae("a", d_in=12).save(tmp_path)
    assert (tmp_path / "sae.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "sae.safetensors"]


def test_damaged_files_are_refused_by_name(random_sae, tmp_path):
    sae = random_sae("a", d_in=24)
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        HookedSAE.load(tmp_path)
    sae.save(tmp_path)
    weights, config = tmp_path / "sae.safetensors", tmp_path / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="no complete safetensors file"):
        HookedSAE.load(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="sae.safetensors is missing"):
        HookedSAE.load(tmp_path)
    weights.write_bytes(whole)
    for text in ("{", "[]", "{}", json.dumps({"d_in": 24, "untrained": []})):
        config.write_text(text)
        with pytest.raises(ValueError, match="is no config of a HookedSAE"):
            HookedSAE.load(tmp_path)
    config.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(sae.cfg, d_sae=12))))
    with pytest.raises(ValueError, match=r"W_enc has shape \(24, 96\), expected \(24, 12\)"):
        HookedSAE.load(tmp_path)
    config.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(sae.cfg, activation="relu"))))
    with pytest.raises(ValueError, match="expected the arrays"):
        HookedSAE.load(tmp_path)
    with torch.no_grad():
        sae.b_dec[3] = float("inf")
    sae.save(tmp_path)
    with pytest.raises(ValueError, match="b_dec holds numbers that are not finite"):
        HookedSAE.load(tmp_path)


GOOD = {"d_in": 4, "d_out": 4, "d_sae": 8, "hook_in": "a", "hook_out": "a"}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"d_sae": 0}, "d_sae is 0"),
        ({"d_out": 5}, "d_in must equal d_out"),
        ({"hook_in": ""}, "needs both hook names"),
        ({"activation": "topk"}, "found k=None"),
        ({"activation": "topk", "k": 9}, "found k=9"),
        ({"k": 3}, "no meaning for activation 'jumprelu'"),
        ({"hook_out": "b", "pre_encoder_bias": True}, "which a transcoder"),
    ],
)
def test_contradictory_configs_are_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        SAEConfig(**GOOD | fields)


def test_values_outside_a_literal_are_refused_without_runtime_type_checks():
    """Users run without beartype, so the checks of the package itself must answer."""
    program = f"""
from scope_lens.sae import SAEConfig
for wrong in ({{"activation": "gelu"}}, {{"untrained": ("bos", "eod")}}):
    try:
        SAEConfig(**{GOOD!r} | wrong)
    except ValueError as error:
        print(error)
"""
    lines = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert lines[0].startswith("SAEConfig.activation is 'gelu'; expected one of ('relu',")
    assert lines[1].startswith("SAEConfig.untrained holds ['eod']; known are")


def test_wrong_width_and_missing_skip_input_are_refused(random_sae):
    sae = random_sae("blocks.0.hook_mlp_out", d_in=24)
    with pytest.raises(ValueError, match="width d_in=24; found shape"):
        sae.encode(torch.randn(2, 25))
    skip = random_sae("a", "b", d_in=24, skip=True)
    with pytest.raises(ValueError, match=r"call decode\(acts, x\)"):
        skip.decode(skip.encode(torch.randn(2, 24)))


def test_a_new_dictionary_has_every_parameter_and_no_other():
    sae = HookedSAE(SAEConfig(**GOOD))
    assert {n: tuple(p.shape) for n, p in sae.named_parameters()} == {
        "W_enc": (4, 8), "b_enc": (8,), "W_dec": (8, 4), "b_dec": (4,), "threshold": (8,),
    }  # fmt: skip
    assert sae.W_skip is None
    relu = HookedSAE(SAEConfig(**GOOD | {"activation": "relu", "skip": True}))
    assert relu.threshold is None
    assert relu.W_skip.shape == (4, 4)
