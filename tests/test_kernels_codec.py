"""A dictionary's encode and decode through the kernels, beside `HookedSAE` itself."""

import pytest
import torch

from scope_lens.training.kernels.codec import SparseCodec
from scope_lens.training.kernels.kernel_set import triton_kernels

SITE = "blocks.1.hook_resid_post"
KINDS = {
    "jumprelu": {},
    "relu": {"activation": "relu"},
    "topk": {"activation": "topk", "k": 7},
    "transcoder with skip": {"hook_out": "blocks.1.hook_mlp_out", "d_out": 33, "skip": True},
    "training form": {"pre_encoder_bias": True},
    "training form, topk": {"activation": "topk", "k": 5, "pre_encoder_bias": True},
}


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def build(random_sae, kind: str, *, kernels: str = "eager", device: str = "cpu", dtype=torch.float32, d_sae: int = 300):
    sae = random_sae(SITE, d_in=48, d_sae=d_sae, **KINDS[kind]).to(device).to(dtype)
    codec = SparseCodec(sae, kernels="eager")
    if kernels == "triton":
        # The public choice asks for a GPU; the interpreter runs the same kernels on the CPU.
        codec._kernels = triton_kernels()
    return sae, codec


def dense(entries, d_sae: int) -> torch.Tensor:
    """The latents as a matrix; only the first `count` slots of a row are looked at."""
    slots = torch.arange(entries.latent.shape[1], device=entries.latent.device)
    valid = slots < entries.count[:, None]
    out = torch.zeros(len(entries.latent), d_sae, device=entries.act.device)
    for row in range(len(out)):
        out[row, entries.latent[row, valid[row]].long()] = entries.act[row, valid[row]]
    return out


@pytest.mark.parametrize(
    ("kind", "kernels"),
    [*((kind, "eager") for kind in KINDS), ("jumprelu", "triton"), ("training form, topk", "triton")],
)
def test_agrees_with_the_dictionary(random_sae, kind, kernels, device):
    sae, codec = build(random_sae, kind, kernels=kernels, device=device)
    x = torch.randn(3, 7, 48, device=device)
    entries = codec.encode(x)
    with torch.no_grad():
        acts = sae.encode(x).reshape(21, -1)
    torch.testing.assert_close(dense(entries, 300), acts, rtol=1e-5, atol=1e-6)
    assert torch.equal(entries.l0.cpu(), (acts != 0).sum(-1).cpu().int())
    recons = codec.decode(entries, x) if sae.W_skip is not None else codec.decode(entries)
    with torch.no_grad():
        torch.testing.assert_close(recons, sae.decode(acts, x.reshape(21, 48)), rtol=1e-5, atol=1e-5)
        out = codec.forward(x)
        torch.testing.assert_close(out, sae(x), rtol=1e-5, atol=1e-5)
    assert out.shape == (3, 7, sae.cfg.d_out)


@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_a_bfloat16_dictionary_decides_in_float32(random_sae, kind):
    sae, codec = build(random_sae, kind, dtype=torch.bfloat16)
    x = torch.randn(40, 48).bfloat16()
    entries = codec.encode(x)
    # Products of bfloat16 numbers are exact in float64, so the active set is known.
    pre = x.double() @ sae.W_enc.double() + sae.b_enc.double()
    if kind == "jumprelu":
        active = pre > sae.threshold.double()
    else:
        active = torch.zeros_like(pre, dtype=torch.bool).scatter(-1, pre.topk(7).indices, True) & (pre > 0)
    expected = torch.where(active, pre, 0).float()
    torch.testing.assert_close(dense(entries, 300), expected, rtol=1e-5, atol=1e-5)
    recons = codec.decode(entries)
    assert recons.dtype == torch.bfloat16
    torch.testing.assert_close(recons, sae.decode(sae.encode(x)), rtol=0.02, atol=0.05)


def test_bfloat16_operands_of_a_float32_dictionary_are_rounded_once(random_sae):
    sae = random_sae(SITE, d_in=48, d_sae=300)
    codec = SparseCodec(sae, operands=torch.bfloat16)
    x = torch.randn(30, 48)
    pre = x.bfloat16().double() @ sae.W_enc.bfloat16().double() + sae.b_enc.double()
    expected = torch.where(pre > sae.threshold, pre, 0)
    torch.testing.assert_close(dense(codec.encode(x), 300), expected.float(), rtol=1e-5, atol=1e-5)
    recons = expected @ sae.W_dec.bfloat16().double() + sae.b_dec.double()
    torch.testing.assert_close(codec.forward(x), recons.float(), rtol=1e-5, atol=1e-5)
    assert codec.forward(x).dtype == torch.float32


def test_room_grows_until_every_row_fits(random_sae):
    sae, codec = build(random_sae, "relu", d_sae=700)
    codec._capacity = 4
    x = torch.randn(9, 48)
    entries = codec.encode(x)
    assert entries.count.max() > 256
    assert codec._capacity == 512
    torch.testing.assert_close(dense(entries, 700), sae.encode(x).detach(), rtol=1e-5, atol=1e-6)
    assert codec.encode(x[:1]).latent.shape == (1, 512)  # the room is kept


def test_every_latent_of_a_row_may_be_active(random_sae):
    sae, codec = build(random_sae, "relu")
    with torch.no_grad():
        sae.b_enc.fill_(50.0)
    codec = SparseCodec(sae)
    x = torch.randn(3, 48)
    torch.testing.assert_close(dense(codec.encode(x), 300), sae.encode(x).detach(), rtol=1e-5, atol=1e-5)


def test_topk_rows_of_very_different_size_are_exact(random_sae):
    """The floor comes from a sample: quiet rows have too few candidates, loud ones too many."""
    sae, codec = build(random_sae, "topk", d_sae=400)
    x = torch.randn(200, 48) * torch.logspace(-3, 3, 200)[torch.randperm(200), None]
    entries = codec.encode(x)
    torch.testing.assert_close(dense(entries, 400), sae.encode(x).detach(), rtol=1e-5, atol=1e-6)
    assert (entries.latent.diff(dim=1) > 0).all()


def test_topk_with_fewer_positive_latents_than_k(random_sae):
    sae, _ = build(random_sae, "topk")
    with torch.no_grad():
        sae.b_enc.fill_(-4.0)
    entries = SparseCodec(sae).encode(torch.randn(20, 48))
    assert entries.l0.max() < 7
    assert (entries.act >= 0).all()


@pytest.mark.parametrize("kind", ["jumprelu", "relu", "topk"])
def test_a_broken_row_stays_visible_and_alone(random_sae, kind):
    sae, codec = build(random_sae, kind)
    x = torch.randn(6, 48)
    x[2, 5] = torch.nan
    out = codec.forward(x)
    assert out[2].isnan().all()
    whole = [0, 1, 3, 4, 5]
    with torch.no_grad():
        torch.testing.assert_close(out[whole], sae(x[whole]), rtol=1e-5, atol=1e-5)


def test_no_active_latent_leaves_the_bias(random_sae):
    sae, codec = build(random_sae, "jumprelu")
    with torch.no_grad():
        sae.threshold.fill_(1e6)
    codec = SparseCodec(sae)
    torch.testing.assert_close(codec.forward(torch.randn(4, 48)), sae.b_dec.detach().expand(4, 48))
    assert codec.forward(torch.randn(0, 48)).shape == (0, 48)


def test_the_codec_is_a_picture_of_the_dictionary(random_sae):
    sae, codec = build(random_sae, "jumprelu")
    x = torch.randn(5, 48)
    before = codec.encode(x)
    with torch.no_grad():
        sae.W_enc.zero_()
    assert torch.equal(codec.encode(x).act, before.act)


def test_what_it_cannot_do_is_said(random_sae):
    batchtopk = random_sae(SITE, d_in=48, activation="batchtopk", k=4)
    with pytest.raises(ValueError, match=r"found batchtopk, whose latents depend on the other rows.*exported as Jump"):
        SparseCodec(batchtopk)
    sae = random_sae(SITE, d_in=48)
    with pytest.raises(ValueError, match=r"found torch.float64. Pass operands=torch.float32."):
        SparseCodec(sae.double())
    sae.float()
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="kernels='triton' cannot run here"):
            SparseCodec(sae, kernels="triton")
    with pytest.raises(ValueError, match=r"width d_in=48; found shape \(2, 47\)"):
        SparseCodec(sae).encode(torch.randn(2, 47))
    skip = random_sae(SITE, "blocks.1.hook_mlp_out", d_in=48, skip=True)
    codec = SparseCodec(skip)
    with pytest.raises(ValueError, match=r"call decode\(entries, x\), or forward\(x\)"):
        codec.decode(codec.encode(torch.randn(2, 48)))
