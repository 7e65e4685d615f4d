"""What a splice costs beside bare torch that does the same sums: `python tests/benchmarks/bench_splice.py`.

1. A forward pass with 4 dictionaries, beside a plain forward pass plus 4 bare codecs (encode, compare, decode).
2. The same with the error term and nothing edited, beside without.
3. 42 small dictionaries on 42 layers and 16 tokens, attaching included: all Python, the worst case.
4. Decoding at 2304 x 16384 at the L0 of Gemma Scope, beside the dense product.
"""

import torch
from arms import interleaved, ratio, write
from transformers import Gemma2Config, Gemma2ForCausalLM

from scope_lens.model import ScopeModel
from scope_lens.sae import HookedSAE, SAEConfig


def random_model(*, d_model: int, layers: int, vocab: int = 4096) -> ScopeModel:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=vocab, hidden_size=d_model, intermediate_size=4 * d_model, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, head_dim=d_model // 8, sliding_window=64,
        query_pre_attn_scalar=d_model // 8, max_position_embeddings=1024, attn_implementation="eager",
    )  # fmt: skip
    return ScopeModel.from_hf(Gemma2ForCausalLM(config).eval())


def random_sae(layer: int, d: int, d_sae: int, *, density: float) -> HookedSAE:
    """A residual dictionary whose latents fire with about this probability on unit-variance input."""
    sae = HookedSAE(SAEConfig(d_in=d, d_out=d, d_sae=d_sae, hook_in=f"blocks.{layer}.hook_resid_post",
                              hook_out=f"blocks.{layer}.hook_resid_post"))  # fmt: skip
    with torch.no_grad():
        sae.W_enc.normal_(std=d**-0.5)
        sae.W_dec.normal_(std=d**-0.5)
        sae.threshold.fill_(float(torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - density))))
    return sae


def bare(saes: list[HookedSAE], x: torch.Tensor) -> None:
    for sae in saes:
        pre = x @ sae.W_enc + sae.b_enc
        acts = pre * (pre > sae.threshold)
        acts @ sae.W_dec + sae.b_dec


def with_saes(model: ScopeModel, tokens: torch.Tensor, saes: list[HookedSAE], **options) -> None:
    with model.saes(saes, **options):
        model(tokens)


def forward_rows() -> list[dict]:
    rows = []
    for d, layers, d_sae, density, rounds in (
        (768, 8, 8192, 0.5, 7),
        (768, 8, 8192, 0.01, 7),
        (256, 8, 2048, 0.03, 25),
    ):
        model = random_model(d_model=d, layers=layers)
        tokens = torch.randint(3, 4096, (4, 128))
        saes = [random_sae(layer, d, d_sae, density=density) for layer in range(0, layers, layers // 4)]
        x = torch.randn(4, 128, d)
        for sae in saes:
            # Random residual streams are not of unit variance; the density is what counts for the cost.
            _, cache = model.run_with_cache(tokens, names_filter=sae.cfg.hook_in)
            sae.threshold.data.mul_(float(cache[sae.cfg.hook_in].std()))

        def plain(model=model, tokens=tokens, saes=saes, x=x) -> None:
            model(tokens)
            bare(saes, x)

        seconds = interleaved({
            "plain": plain,
            "spliced": lambda m=model, t=tokens, s=saes: with_saes(m, t, s),
            "error": lambda m=model, t=tokens, s=saes: with_saes(m, t, s, use_error_term=True),
        }, rounds=rounds)  # fmt: skip
        size = f"d {d}, {layers} layers, {d_sae} latents, 4 x 128 tokens, {density:.0%} active"
        rows.append({"work": f"forward with 4 SAEs ({size})", "baseline": "plain forward + bare codecs"}
                    | ratio(seconds, "spliced", "plain"))  # fmt: skip
        rows.append({"work": f"the same, error term, unedited ({size})", "baseline": "without error term"}
                    | ratio(seconds, "error", "spliced"))  # fmt: skip
    return rows


def many_row() -> dict:
    model = random_model(d_model=256, layers=42)
    tokens = torch.randint(3, 4096, (1, 16))
    saes = [random_sae(layer, 256, 512, density=0.1) for layer in range(42)]
    x = torch.randn(1, 16, 256)

    def plain() -> None:
        model(tokens)
        bare(saes, x)

    seconds = interleaved({"plain": plain, "spliced": lambda: with_saes(model, tokens, saes)}, rounds=30)
    return {
        "work": "42 SAEs on 42 layers (d 256, 512 latents), 1 x 16 tokens, attach included",
        "baseline": "plain forward + 42 bare codecs",
    } | ratio(seconds, "spliced", "plain")


def decode_rows() -> list[dict]:
    sae = random_sae(0, 2304, 16384, density=0.5)
    rows = []
    for batch in (128, 1024):
        for l0 in (70, 150, 230):
            acts = torch.zeros(batch, 16384)
            for row in acts:
                row[torch.randperm(16384)[:l0]] = torch.rand(l0) + 0.1
            seconds = interleaved(
                {"dense": lambda a=acts: a @ sae.W_dec, "ours": lambda a=acts: sae.write(a)}, rounds=7
            )
            measured = ratio(seconds, "dense", "ours")
            rows.append(
                {"work": f"decode 2304 x 16384, L0 {l0}, {batch} tokens: times faster", "baseline": "dense"} | measured
            )
    return rows


if __name__ == "__main__":
    write(
        "splice",
        "Cost of a splice",
        [*forward_rows(), many_row(), *decode_rows()],
        notes="`ratio` is the median over rounds of arm / baseline (for decoding baseline / arm), "
        "`low` and `high` its quartiles.",
    )
