"""The float64 copy of a model: every step in float64, and the model itself as it was."""

import math

import pytest
import torch
from conftest import make_hf
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from scope_lens.circuits.float64 import in_float64
from scope_lens.circuits.frozen import record
from scope_lens.model import ScopeModel

IDS = torch.randint(3, 199, (1, 40), generator=torch.Generator().manual_seed(1))
ROPE = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip


def tables(bridge, hooks=()):
    _, seen = record(bridge, IDS, [f"blocks.{n}.attn.hook_{c}" for n in (0, 1) for c in ("cos", "sin")], hooks=hooks)
    return seen


@pytest.mark.parametrize("kind", ROPE)
def test_rotary_tables_are_hugging_faces_in_float64(kind):
    bridge = ScopeModel.from_hf(make_hf("llama", rope_parameters=ROPE[kind], head_dim=16)).model
    rounded = tables(bridge)
    exact = tables(*in_float64(bridge))
    for name, table in exact.items():
        assert table.dtype == torch.float64
        torch.testing.assert_close(table, rounded[name].double(), rtol=0, atol=1e-5)
        assert not torch.equal(table, rounded[name].double())
    one = exact["blocks.0.attn.hook_cos"] ** 2 + exact["blocks.0.attn.hook_sin"] ** 2
    torch.testing.assert_close(one, torch.ones_like(one), rtol=0, atol=1e-15)
    scaling = {"default": 1.0, "linear": 8.0, "llama3": 1.0}[kind]  # the first pair turns once in 2 pi tokens
    angle = torch.atan2(exact["blocks.0.attn.hook_sin"][0, 1, 0], exact["blocks.0.attn.hook_cos"][0, 1, 0])
    assert float(angle) == pytest.approx(1 / scaling, abs=1e-15)


def test_gemma3_has_one_table_for_windows_and_one_for_all_positions():
    bridge = ScopeModel.from_hf(
        make_hf("gemma3", layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    ).model
    rounded, exact = tables(bridge), tables(*in_float64(bridge))
    for name, table in exact.items():
        torch.testing.assert_close(table, rounded[name].double(), rtol=0, atol=1e-5)
    assert not torch.allclose(exact["blocks.0.attn.hook_cos"], exact["blocks.1.attn.hook_cos"])


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "llama", "gpt2"])
def test_the_copy_is_exact_where_hugging_face_rounds(architecture):
    bridge = ScopeModel.from_hf(make_hf(architecture)).model
    before = bridge(IDS)
    copied, hooks = in_float64(bridge)
    points = ["hook_embed"] + [
        f"blocks.1.{hook}" for hook in ("ln1.hook_in", "ln1.hook_scale", "attn.hook_attn_scores", "attn.hook_pattern")
    ]
    logits, seen = record(copied, IDS, points, hooks=hooks)
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits, before.double(), rtol=0, atol=1e-4)
    assert torch.equal(bridge(IDS), before)
    assert next(bridge.parameters()).dtype == torch.float32

    rows = torch.softmax(seen["blocks.1.attn.hook_attn_scores"], dim=-1)
    torch.testing.assert_close(seen["blocks.1.attn.hook_pattern"], rows, rtol=0, atol=1e-15)
    stream, config = seen["blocks.1.ln1.hook_in"], copied.original_model.config
    if architecture == "gpt2":
        stream = stream - stream.mean(-1, keepdim=True)
    eps = getattr(config, "rms_norm_eps", None) or config.layer_norm_epsilon
    scale = (stream.square().mean(-1, keepdim=True) + eps).sqrt()
    torch.testing.assert_close(seen["blocks.1.ln1.hook_scale"], scale, rtol=1e-14, atol=0)
    if architecture.startswith("gemma"):
        table = copied.embed.original_component.weight
        torch.testing.assert_close(seen["hook_embed"], table[IDS] * math.sqrt(48), rtol=1e-15, atol=0)


def test_what_a_hook_made_of_the_embeddings_stays():
    bridge = ScopeModel.from_hf(make_hf("gemma2")).model
    bridge.add_hook("hook_embed", lambda tensor, hook: tensor + 0.1)
    copied, hooks = in_float64(bridge)
    _, seen = record(copied, IDS, ["hook_embed"], hooks=hooks)
    table = copied.embed.original_component.weight
    torch.testing.assert_close(seen["hook_embed"], table[IDS] * math.sqrt(48) + 0.1, rtol=1e-6, atol=1e-7)


def test_a_pattern_without_scores_stays():
    config = GPTNeoConfig(
        vocab_size=199, hidden_size=48, num_layers=2, num_heads=4, attention_types=[[["global"], 2]],
        max_position_embeddings=64,
    )  # fmt: skip
    bridge = ScopeModel.from_hf(GPTNeoForCausalLM(config).eval()).model
    copied, hooks = in_float64(bridge)
    logits, _ = record(copied, IDS, [], hooks=hooks)
    torch.testing.assert_close(logits, bridge(IDS).double(), rtol=0, atol=1e-5)
