"""A random Gemma 2 with per-layer transcoders in a folder, for bench_graph.py's two arms to read.

The thresholds put the same number of latents above them in every layer, so that the graph has a known size, and lie in
the middle between two pre-activations, so that rounding cannot switch a latent.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import Gemma2Config, Gemma2ForCausalLM

from scope_lens.model import ScopeModel

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")


@dataclass(frozen=True, kw_only=True)
class Size:
    """One size of model, dictionaries and prompt.

    Attributes:
        layers: Layers, each with a transcoder.
        d_model: Width of the residual stream.
        d_head: Width of each of 8 heads, with 4 of keys and values.
        d_mlp: Width of the MLPs.
        d_vocab: Vocabulary.
        d_sae: Latents of each transcoder.
        positions: Length of the prompt, BOS included.
        latents: Active latents of the whole graph.
        batch: circuit-tracer's batch, the fastest of those tried.
        repeats: Rounds, the first of which does not count.
        device: "cpu" or "cuda".
    """

    layers: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    d_sae: int
    positions: int
    latents: int
    batch: int
    repeats: int
    device: str = "cpu"

    @property
    def nodes(self) -> int:
        """Latents, errors, tokens, and the ten logits that a flat distribution gives."""
        return self.latents + (self.layers + 1) * self.positions + 10

    def describe(self) -> str:
        return (
            f"{self.layers} layers, d_model {self.d_model}, {self.d_sae} latents a layer, {self.positions} tokens, "
            f"{self.nodes:,} nodes"
        )

    def needs(self) -> str:
        """What has to be there to run it on a GPU."""
        attention = self.d_model * self.d_head * (8 + 4 + 4 + 8)
        layer = attention + 3 * self.d_model * self.d_mlp + 2 * self.d_model * self.d_sae
        weights = 4 * (self.layers * layer + self.d_vocab * self.d_model) / 2**30
        return (
            f"It needs {weights:.0f} GiB of disk and of memory for the weights, a CUDA build of torch in both "
            f"environments,\nand a GPU that holds the weights of both processes ({2 * weights:.0f} GiB) and the work."
        )


def write(folder: Path, size: Size, *, threads: int) -> None:
    """Fill a folder with plan.json, model.safetensors, layer_<i>/params.npz and a tokenizer."""
    generator = torch.Generator().manual_seed(0)
    config = {
        "vocab_size": size.d_vocab, "hidden_size": size.d_model, "intermediate_size": size.d_mlp,
        "num_hidden_layers": size.layers, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": size.d_head,
        "query_pre_attn_scalar": size.d_head, "max_position_embeddings": 256, "sliding_window": 128,
        "attn_implementation": "eager",
    }  # fmt: skip
    words = torch.randint(len(SPECIAL), size.d_vocab, (size.positions - 1,), generator=generator)
    plan = {
        "config": config, "context": 256, "tokens": [SPECIAL.index("<bos>"), *words.tolist()],
        "threads": threads, "batch": size.batch, "device": size.device,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(plan))
    write_tokenizer(folder, size.d_vocab)

    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # gains of one would hide mistakes about them
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    save_file(
        {n: p.detach() for n, p in model.state_dict().items() if n != "lm_head.weight"}, folder / "model.safetensors"
    )
    reads = encoder_inputs(model, plan["tokens"], size.layers)
    for layer, x in enumerate(reads):
        active = size.latents * (layer + 1) // size.layers - size.latents * layer // size.layers
        write_transcoder(folder / f"layer_{layer}", x, size, active, generator)


@torch.no_grad()
def encoder_inputs(hf: Gemma2ForCausalLM, tokens: list[int], layers: int) -> list[torch.Tensor]:
    """What each transcoder reads at the positions after BOS, (pos, d_model) a layer."""
    names = [f"blocks.{layer}.ln2.hook_normalized" for layer in range(layers)]
    _, cache = ScopeModel.from_hf(hf).run_with_cache(torch.tensor([tokens]), names_filter=lambda name: name in names)
    return [cache[name][0, 1:] for name in names]


def write_transcoder(folder: Path, x: torch.Tensor, size: Size, active: int, generator: torch.Generator) -> None:
    d = size.d_model
    W_enc = torch.randn(d, size.d_sae, generator=generator) * d**-0.5
    W_dec = torch.nn.functional.normalize(torch.randn(size.d_sae, d, generator=generator))
    b_enc = 0.1 * torch.randn(size.d_sae, generator=generator)
    b_dec = 0.1 * torch.randn(d, generator=generator)
    above = (x.float() @ W_enc + b_enc).flatten().topk(active + 1).values
    threshold = torch.full((size.d_sae,), float(above[-2:].mean()))
    folder.mkdir(exist_ok=True)
    arrays = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "threshold": threshold}
    np.savez(folder / "params.npz", **{name: array.numpy() for name, array in arrays.items()})


def write_tokenizer(folder: Path, d_vocab: int) -> None:
    """A tokenizer of one word a token, in files that every version of transformers reads."""
    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), d_vocab))]
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    special = {i: {"content": word} | plain for i, word in enumerate(SPECIAL)}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i} | entry for i, entry in special.items()],
        "normalizer": None, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": "<unk>"},
    }  # fmt: skip
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": special, "bos_token": "<bos>",
        "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>", "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
