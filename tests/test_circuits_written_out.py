"""The written-out linear model against the model itself, and its reverse against its forward."""

import functools
import itertools

import pytest
import torch
from conftest import make_hf, make_sae

from scope_lens.circuits.float64 import in_float64
from scope_lens.circuits.frozen import frozen_points, holding, norm_edits_expected, record
from scope_lens.circuits.linear import TOKENS
from scope_lens.circuits.places import hook_names, places_of
from scope_lens.circuits.written_out import WrittenOut, covers
from scope_lens.model import ScopeModel

D_MODEL, Z_WIDTH, POS = 48, {"gemma2": 80, "gemma3": 80, "llama": 48}, 14
# Canonical names of the sites that pass where a dictionary is not trained.
RESIDUAL = ("embed.hook_out", "0.hook_in", "0.hook_out", "1.hook_in", "1.hook_out", "2.hook_out")


def transcoder(layer, read="ln2.hook_normalized", **fields):
    return make_sae(
        f"blocks.{layer}.{read}", f"blocks.{layer}.hook_mlp_out", d_in=D_MODEL, untrained=("bos",), **fields
    )


def at(name, width=D_MODEL, **fields):
    return make_sae(name, d_in=width, **{"untrained": ("bos",)} | fields)


MIXES = {
    "transcoders": lambda z: [transcoder(layer) for layer in range(3)],
    "transcoders with skip and gain": lambda z: [
        transcoder(0, skip=True),
        transcoder(1, "ln2.hook_out", skip=True),
        transcoder(2, "mlp.hook_in"),
    ],
    "attention and mlp": lambda z: [
        at("blocks.0.attn.hook_z", z),
        at("blocks.1.attn.hook_z", z, skip=True),
        transcoder(1),
        at("blocks.2.attn.hook_z", z, untrained=("bos", "eos")),
        transcoder(2),
    ],
    "trained everywhere": lambda z: [
        at("blocks.0.hook_resid_post", untrained=()),
        at("blocks.1.attn.hook_z", z, untrained=()),
        make_sae("blocks.1.ln2.hook_out", "blocks.1.hook_mlp_out", d_in=D_MODEL, skip=True),
    ],
    "residual at every layer": lambda z: [at(f"blocks.{layer}.hook_resid_post") for layer in range(3)],
    "all at once": lambda z: [
        at("hook_embed"),
        at("blocks.0.attn.hook_z", z),
        at("blocks.0.hook_attn_out"),
        transcoder(0, "ln2.hook_out", skip=True),
        at("blocks.1.hook_resid_pre", skip=True),
        transcoder(1),
        at("blocks.1.hook_resid_post"),
        at("blocks.2.hook_attn_out", skip=True, untrained=("bos", "eos")),
        at("blocks.2.hook_mlp_out"),
    ],
    "none": lambda z: [],
}
CASES = [("gemma2", mix) for mix in MIXES] + [
    *itertools.product(("gemma3", "llama"), ("transcoders with skip and gain", "attention and mlp", "all at once"))
]


def prompt():
    """BOS in front and EOS inside, both untrained positions; longer than the sliding window of 8."""
    ids = torch.randint(3, 199, (1, POS), generator=torch.Generator().manual_seed(3))
    ids[0, 0], ids[0, 5] = 2, 1
    return ids


@functools.cache
def exact_model(architecture):
    hf = make_hf(architecture, bos_token_id=2, eos_token_id=1, initializer_range=0.2)
    return in_float64(ScopeModel.from_hf(hf).model)


@functools.cache
def build(architecture, mix):
    """The linear model in float64, everything one clean pass showed, and the bridge."""
    torch.manual_seed(0)
    bridge, hooks = exact_model(architecture)
    saes = [sae.double() for sae in MIXES[mix](Z_WIDTH[architecture])]
    names = [name for sae in saes for name in hook_names(bridge, sae)]
    _, seen = record(bridge, prompt(), {"hook_embed", "ln_final.hook_out", *frozen_points(bridge), *names}, hooks=hooks)
    places = places_of(bridge, prompt(), saes, list(seen))
    assert covers(bridge, places)
    return WrittenOut(bridge, seen, places, torch.float64), seen, bridge


def assert_same(found, expected, digits=1e-12):
    torch.testing.assert_close(found, expected, rtol=0, atol=digits * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize(("architecture", "mix"), CASES)
def test_forward_with_its_sources_is_the_model(architecture, mix):
    model, seen, _ = build(architecture, mix)
    stream = model.forward(sources=True)
    for place, reads, writes in zip(model.places, stream.reads, stream.writes, strict=True):
        assert_same(reads, seen[place.reads][0].flatten(1))
        assert_same(writes, seen[place.writes][0].flatten(1))
    assert_same(stream.final, seen["ln_final.hook_out"][0])
    assert torch.equal(stream.embed, seen["hook_embed"][0])


@pytest.mark.parametrize(("architecture", "mix"), CASES)
def test_forward_without_sources_is_what_the_frozen_model_makes_of_the_constants(architecture, mix):
    model, seen, bridge = build(architecture, mix)
    reads, hooks = {}, holding({name: seen[name] for name in frozen_points(bridge)})
    hooks.append(("hook_embed", lambda tensor, hook: torch.zeros_like(tensor)))

    def constants(place):
        def read(tensor, hook):
            reads[place.stage] = tensor[0].flatten(1)

        def write(tensor, hook):
            leaves = place.sae.b_dec.detach().expand(POS, -1)
            if place.sae.W_skip is not None:
                leaves = leaves + reads[place.stage] @ place.sae.W_skip.detach()
            passes = tensor if place.writes.endswith(RESIDUAL) else seen[place.writes]
            return torch.where(place.trained[:, None], leaves, passes[0].flatten(1)).reshape(tensor.shape)

        return [(place.reads, read), (place.writes, write)]

    for place in model.places:
        hooks += constants(place)
    hooks.append(("ln_final.hook_out", lambda tensor, hook: reads.update(final=tensor[0])))
    with norm_edits_expected(), torch.no_grad():
        bridge.run_with_hooks(prompt(), fwd_hooks=hooks, use_cache=False)
    bias = model.forward(sources=False)
    for stage, found in enumerate(bias.reads):
        assert_same(found, reads[stage])
    assert_same(bias.final, reads["final"])
    assert bias.embed.count_nonzero() == 0


@pytest.mark.parametrize(("architecture", "mix"), CASES)
@pytest.mark.parametrize("pos", [POS - 1, 6, 0])
def test_sweep_is_the_adjoint_of_forward(architecture, mix, pos):
    model, seen, _ = build(architecture, mix)
    embed = torch.randn(POS, D_MODEL, dtype=torch.float64)
    written = [torch.randn_like(seen[place.writes][0].flatten(1)) for place in model.places]
    written = [w * place.trained[:, None] for w, place in zip(written, model.places, strict=True)]
    whole, bias = model.run(embed, written), model.forward(sources=False)
    reads = [a - b for a, b in zip([*whole.reads, whole.final], [*bias.reads, bias.final], strict=True)]
    cotangents = {
        stage: torch.randn(2 + stage % 3, read.shape[1], dtype=torch.float64)
        for stage, read in enumerate(reads)
        if stage != 1  # a stage without targets
    }
    expected = torch.cat([cotangents[stage] @ reads[stage][pos] for stage in sorted(cotangents, reverse=True)])
    found = torch.zeros_like(expected)
    called = []

    def absorb(stage, rows, gradient, *, first=0):
        called.append(stage)
        assert gradient.shape[1] == rows
        assert rows == sum(len(rows) for reader, rows in cotangents.items() if reader > stage)
        source = embed if stage == TOKENS else written[stage]
        assert source[:first].count_nonzero() == 0
        found[:rows] += torch.einsum("prd,pd->r", gradient, source[first : first + len(gradient)])

    model.sweep(pos, cotangents, absorb)
    assert called == list(range(len(model.places) - 1, TOKENS - 1, -1))
    assert_same(found, expected)


def test_in_float32_the_linear_model_is_a_bfloat16_model_to_its_rounding():
    bridge = ScopeModel.from_hf(make_hf("gemma2", initializer_range=0.2)).model
    bridge.to(torch.bfloat16)
    sae = transcoder(1).to(torch.bfloat16)
    names = hook_names(bridge, sae)
    _, seen = record(bridge, prompt(), {"hook_embed", "ln_final.hook_out", *frozen_points(bridge), *names})
    model = WrittenOut(bridge, seen, places_of(bridge, prompt(), [sae], list(seen)), torch.float32)
    stream = model.forward(sources=True)
    assert stream.final.dtype == torch.float32
    assert_same(stream.final, seen["ln_final.hook_out"][0].float(), digits=0.02)
    called = []
    model.sweep(4, {0: torch.randn(2, D_MODEL)}, lambda stage, rows, gradient, first=0: called.append(gradient.dtype))
    assert called == [torch.float32]


def test_covers_says_what_is_written_out():
    def covered(architecture, *saes, **overrides):
        bridge = ScopeModel.from_hf(make_hf(architecture, **overrides)).model
        names = [name for sae in saes for name in hook_names(bridge, sae)]
        _, seen = record(bridge, prompt(), names)
        return covers(bridge, places_of(bridge, prompt(), saes, list(seen)))

    assert covered("gemma2", at("blocks.1.hook_out"), at("blocks.1.attn.o.hook_in", 80))  # other names of covered sites
    assert not covered("gpt2")
    assert not covered("llama", attention_bias=True)
    assert not covered("gemma2", at("blocks.1.mlp.hook_out"))  # before the norm behind the MLP
    assert not covered("gemma2", make_sae("blocks.0.ln2.hook_out", "blocks.1.hook_mlp_out", d_in=D_MODEL))
    assert not covered("gemma2", make_sae("blocks.0.hook_resid_mid", "blocks.0.hook_mlp_out", d_in=D_MODEL))
