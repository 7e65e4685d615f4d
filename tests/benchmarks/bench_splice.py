"""What a splice costs beside bare torch that does the same sums: `python tests/benchmarks/bench_splice.py`.

1. A forward pass with 4 dictionaries, beside a plain forward pass plus 4 bare codecs (encode, compare, decode).
2. The same with the error term and nothing edited, beside without.
3. 42 small dictionaries on 42 layers and 16 tokens, attaching included: all Python, the worst case.
4. Decoding at 2304 x 16384 at the L0 of Gemma Scope, beside the dense product.
"""

import torch
from arms import fill_randomly, interleaved, ratio, splice_rows, write
from transformers import Gemma2Config, Gemma2ForCausalLM

from scope_lens.model import ScopeModel
from scope_lens.sae import HookedSAE, SAEConfig


def random_model(d_model: int, layers: int, vocab: int = 4096) -> ScopeModel:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=vocab, hidden_size=d_model, intermediate_size=4 * d_model, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, head_dim=d_model // 8, sliding_window=64,
        query_pre_attn_scalar=d_model // 8, max_position_embeddings=1024, attn_implementation="eager",
    )  # fmt: skip
    return ScopeModel.from_hf(Gemma2ForCausalLM(config).eval())


def random_sae(layer: int, d: int, d_sae: int) -> HookedSAE:
    site = f"blocks.{layer}.hook_resid_post"
    return HookedSAE(SAEConfig(d_in=d, d_out=d, d_sae=d_sae, hook_in=site, hook_out=site))


def run(model: ScopeModel, tokens: torch.Tensor, saes: list[HookedSAE], use_error_term: bool) -> None:
    model.run_with_saes(tokens, saes=saes, use_error_term=use_error_term)


def decode_rows() -> list[dict]:
    sae = random_sae(0, 2304, 16384)
    fill_randomly(sae, density=0.5)
    rows = []
    for batch in (128, 1024):
        for l0 in (70, 150, 230):
            acts = torch.zeros(batch, 16384)
            for row in acts:
                row[torch.randperm(16384)[:l0]] = torch.rand(l0) + 0.1
            seconds = interleaved(
                {"dense": lambda a=acts: a @ sae.W_dec, "ours": lambda a=acts: sae.write(a)}, rounds=7
            )
            work = f"decode 2304 x 16384, L0 {l0}, {batch} tokens: times faster"
            rows.append({"work": work, "baseline": "dense"} | ratio(seconds, "dense", "ours"))
    return rows


if __name__ == "__main__":
    write(
        "splice",
        "Cost of a splice",
        [*splice_rows(random_model, random_sae, run), *decode_rows()],
        notes="`ratio` is the median over rounds of arm / baseline (for decoding baseline / arm), `low` and `high` its "
        "quartiles. Decoding gathers rows at random, the worst case for a cache.",
    )
