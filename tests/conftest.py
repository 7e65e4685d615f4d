"""Shared material: small random models of every architecture, random dictionaries, the real data beside the repo."""

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

# Kernels run in Triton's interpreter where there is no GPU. Triton looks at this when transformers imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from scope_lens.model import ScopeModel
from scope_lens.sae import HookedSAE, SAEConfig

VOCAB = 199


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = Path(__file__).parents[2] / "shared" / "data"
    assert folder.is_dir(), f"{folder} is missing; the tests need the data folder beside the repository."
    return folder


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """What has to be equal bit for bit needs a fixed number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomise_norms(model: PreTrainedModel) -> PreTrainedModel:
    """Gains start at one and hide every mistake about them."""
    for name, parameter in model.named_parameters():
        if "norm" in name or ".ln_" in name:
            with torch.no_grad():
                parameter.add_(0.4 * torch.randn_like(parameter))
    return model.eval()


def make_hf(architecture: str, **overrides) -> PreTrainedModel:
    """A tiny random Hugging Face model with every mechanism of its architecture switched on."""
    torch.manual_seed(1)
    small = {
        "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "attn_implementation": "eager",
    }  # fmt: skip
    gemma = {"head_dim": 20, "sliding_window": 8, "query_pre_attn_scalar": 40}
    match architecture:
        case "gemma2":
            caps = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
            model = Gemma2ForCausalLM(Gemma2Config(**small | gemma | caps | overrides))
        case "gemma3":
            model = Gemma3ForCausalLM(Gemma3TextConfig(**small | gemma | overrides))
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**small | overrides))
        case "gpt2":
            config = GPT2Config(
                vocab_size=VOCAB, n_embd=48, n_layer=3, n_head=4, n_positions=128, attn_implementation="eager",
                bos_token_id=2, eos_token_id=1, pad_token_id=0,
            )  # fmt: skip
            model = GPT2LMHeadModel(config)
        case _:
            raise ValueError(architecture)
    return randomise_norms(model)


@pytest.fixture
def hf_model() -> Callable[..., PreTrainedModel]:
    return make_hf


@pytest.fixture
def gemma2() -> tuple[ScopeModel, PreTrainedModel]:
    """A bridged tiny Gemma 2 and an untouched copy of the Hugging Face model under it."""
    hf = make_hf("gemma2")
    return ScopeModel.from_hf(copy.deepcopy(hf)), hf


@pytest.fixture
def tokens() -> torch.Tensor:
    """(2, 14) token ids with BOS in front and no other special token."""
    ids = torch.randint(3, VOCAB, (2, 14))
    ids[:, 0] = 2
    return ids


def make_sae(hook_in: str, hook_out: str | None = None, *, d_in: int, d_out: int | None = None, **fields) -> HookedSAE:
    """A random dictionary whose latents are neither all silent nor all active."""
    cfg = SAEConfig(
        d_in=d_in,
        d_out=d_out or d_in,
        d_sae=fields.pop("d_sae", 96),
        hook_in=hook_in,
        hook_out=hook_out or hook_in,
        **fields,
    )
    sae = HookedSAE(cfg)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
            if name == "threshold":
                parameter.copy_(0.05 + 0.1 * torch.rand_like(parameter))
            if name == "W_dec":
                parameter.div_(parameter.norm(dim=1, keepdim=True))
    return sae


@pytest.fixture
def random_sae() -> Callable[..., HookedSAE]:
    return make_sae
