"""Graphs of random models against the oracle: four architectures, every mix of sites, both ways of computing them."""

import copy
from collections.abc import Callable

import pytest
import torch
from conftest import VOCAB, make_hf, make_sae
from graph_matching import assert_same, laid_over
from graph_oracle import DIRECTION, LATENT, LOGIT, dictionary_of, trace
from torch import Tensor
from transformers import PreTrainedModel

from scope_lens import HookedSAE, ScopeModel
from scope_lens.circuits import Target, attribute

WIDTH, LAYERS, LATENTS = 48, 3, 16
# What is switched on beside what conftest does: windows that a prompt sees, both kinds of layer and of rotation.
SETTINGS = {
    "gemma2": {"sliding_window": 4},
    "gemma3": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "llama": {},
    "gpt2": {},
}
TOKENS = [7, 31]
PATHS = {name: ["written out", "autograd"] for name in SETTINGS} | {"gpt2": ["autograd"]}


def heads_width(hf: PreTrainedModel) -> int:
    config = hf.config
    return config.num_attention_heads * (getattr(config, "head_dim", None) or WIDTH // config.num_attention_heads)


def at(place: str, hf: PreTrainedModel, layers=range(LAYERS), **fields) -> list[HookedSAE]:
    """Autoencoders at one site of several layers."""
    width = heads_width(hf) if place.endswith(("hook_z", "o.hook_in")) else WIDTH
    return [make_sae(f"blocks.{layer}.{place}", d_in=width, d_sae=LATENTS, **fields) for layer in layers]


def across(reads: str, layers=range(LAYERS), writes: str = "hook_mlp_out", **fields) -> list[HookedSAE]:
    """Transcoders of several layers."""
    return [
        make_sae(f"blocks.{layer}.{reads}", f"blocks.{layer}.{writes}", d_in=WIDTH, d_sae=LATENTS, **fields)
        for layer in layers
    ]


def embedding() -> list[HookedSAE]:
    return [make_sae("hook_embed", d_in=WIDTH, d_sae=LATENTS)]


MIXES: dict[str, Callable[[PreTrainedModel], list[HookedSAE]]] = {
    "transcoders": lambda hf: across("ln2.hook_normalized"),
    "skip transcoders": lambda hf: across("ln2.hook_normalized", skip=True),
    "gained transcoders, some with skip": lambda hf: (
        across("ln2.hook_out", [0]) + across("mlp.hook_in", [2], skip=True)
    ),
    "attention": lambda hf: at("attn.hook_z", hf),
    "attention's output": lambda hf: at("hook_attn_out", hf, [0, 2]),
    "MLP output": lambda hf: at("hook_mlp_out", hf, [1, 2]),
    "residual at every layer": lambda hf: at("hook_resid_post", hf),
    "residual once, transcoders": lambda hf: at("hook_resid_post", hf, [1]) + across("ln2.hook_normalized", skip=True),
    "attention and transcoders": lambda hf: at("attn.hook_z", hf, [0, 1]) + across("ln2.hook_normalized", [1, 2]),
    "all": lambda hf: (
        embedding() + at("attn.hook_z", hf) + across("ln2.hook_normalized", skip=True) + at("hook_resid_post", hf)
    ),
    "canonical names": lambda hf: (
        at("hook_out", hf, [0]) + at("attn.o.hook_in", hf, [1]) + across("ln2.hook_out", [1]) + at("hook_in", hf, [2])
    ),
    "trained at other positions": lambda hf: (
        at("hook_resid_post", hf, [0], untrained=())
        + at("attn.hook_z", hf, untrained=("eos",))
        + across("ln2.hook_normalized", untrained=("bos",), skip=True)
        + at("hook_resid_pre", hf, [2])
    ),
    "other activations": lambda hf: (
        across("ln2.hook_normalized", [0], activation="relu")
        + at("hook_resid_post", hf, [1], activation="topk", k=5)
        + at("attn.hook_z", hf, [2], activation="relu", pre_encoder_bias=True)
    ),
}
# What no matrices are written out for: attention's transcoder, other layers' reads, two dictionaries at one hook.
ELSEWHERE = "transcoders elsewhere"
MIXES[ELSEWHERE] = lambda hf: [
    *embedding(),
    *across("ln1.hook_normalized", [0, 2], writes="hook_attn_out", skip=True),
    make_sae("hook_embed", "blocks.0.hook_mlp_out", d_in=WIDTH, d_sae=LATENTS, skip=True),
    make_sae("blocks.0.hook_resid_mid", "blocks.2.hook_mlp_out", d_in=WIDTH, d_sae=LATENTS),
]
FEW = ["gained transcoders, some with skip", "attention", "residual once, transcoders", "all"]
# The second path is the bridge's, whatever the architecture; these have everything that it does at a site.
BOTH_WAYS = ["all", "canonical names", "trained at other positions", "other activations"]
CASES = [("gemma2", mix) for mix in MIXES]
CASES += [(architecture, mix) for architecture in ("gemma3", "llama", "gpt2") for mix in FEW]


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[PreTrainedModel, ScopeModel, Tensor]]:
    made = {}
    for architecture, settings in SETTINGS.items():
        hf = make_hf(architecture, **settings)
        with torch.no_grad():
            # At the size they are initialised with, attention is flat and logits are all alike.
            for parameter in hf.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(6)
        torch.manual_seed(3)
        ids = torch.randint(3, VOCAB, (9,))
        # BOS in front; EOS, which no dictionary was trained on either, in the middle.
        ids[0], ids[5] = hf.config.bos_token_id, hf.config.eos_token_id
        made[architecture] = hf, ScopeModel.from_hf(copy.deepcopy(hf)), ids
    return made


@pytest.mark.parametrize(("architecture", "mix"), CASES)
def test_every_mix_of_sites_is_the_oracles(models, architecture, mix, monkeypatch):
    hf, model, ids = models[architecture]
    saes = MIXES[mix](hf)
    vector = torch.randn(WIDTH)
    site, silent = saes[-1].cfg.hook_out, 11
    oracle = trace(
        hf,
        ids,
        [dictionary_of(sae, hf, ids) for sae in saes],
        logits=[(-1, token) for token in TOKENS],
        directions=[("towards", 3, vector)],
        latents=[(site, -2, silent)],
    )
    targets = [*TOKENS, Target("towards", 3, vector=vector), Target("may be silent", -2, latent=(site, silent))]
    paths = PATHS[architecture] if mix in BOTH_WAYS else PATHS[architecture][:1]
    for path in ["autograd"] if mix == ELSEWHERE else paths:
        if path == "autograd" and mix != ELSEWHERE:
            monkeypatch.setattr("scope_lens.circuits.attribution.covers", lambda *args, **kwargs: False)
        graph = attribute(
            model,
            ids,
            saes=saes[::-1],  # their order means nothing
            targets=targets,
            dtype=torch.float64,
            progress=False,
        )
        assert graph.settings["path"] == path
        assert_same(graph, oracle, relative=1e-9)
        assert graph.checks.forward_only
        assert graph.checks.conservation < 1e-9
    starts = laid_over(graph, oracle.nodes).start.tolist()
    for node, start, active in zip(oracle.nodes, starts, oracle.activation.tolist(), strict=True):
        asked = node.kind == DIRECTION or (node.kind, node.site, node.pos, node.index) == (LATENT, site, 7, silent)
        assert start == pytest.approx(1 if asked else active if node.kind == LOGIT else 0)
