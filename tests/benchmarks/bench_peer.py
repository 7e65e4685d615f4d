"""The same work in sae-lens, in a virtual environment of its own: `python tests/benchmarks/bench_peer.py`.

sae-lens 6.54 needs transformer-lens < 4, so it cannot be installed beside this package. Make its environment with

    pip install torch==2.13.0 && pip install transformer-lens==3.9.0 && pip install sae-lens==6.54.12

and run this file with its Python. The sizes are those of bench_splice.py and bench_load.py; each ratio is taken inside
one process to bare torch that does the same sums, so the two pages can be read beside each other.
"""

import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from arms import interleaved, ratio, write
from sae_lens import HookedSAETransformer, JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from transformer_lens import HookedTransformerConfig


def random_model(*, d_model: int, layers: int, vocab: int = 4096) -> HookedSAETransformer:
    torch.manual_seed(0)
    config = HookedTransformerConfig(
        n_layers=layers, d_model=d_model, n_ctx=1024, d_head=d_model // 8, n_heads=8, n_key_value_heads=4,
        d_mlp=4 * d_model, d_vocab=vocab, act_fn="gelu_pytorch_tanh", normalization_type="RMS", gated_mlp=True,
        positional_embedding_type="rotary", rotary_dim=d_model // 8, use_normalization_before_and_after=True,
        attn_scores_soft_cap=50.0, output_logits_soft_cap=30.0, final_rms=True,
    )  # fmt: skip
    return HookedSAETransformer(config).eval()


def random_sae(layer: int, d: int, d_sae: int, *, density: float, std: float = 1.0) -> JumpReLUSAE:
    metadata = SAEMetadata(hook_name=f"blocks.{layer}.hook_resid_post")
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d, d_sae=d_sae, apply_b_dec_to_input=False, metadata=metadata))
    with torch.no_grad():
        sae.W_enc.normal_(std=d**-0.5)
        sae.W_dec.normal_(std=d**-0.5)
        sae.threshold.fill_(std * float(torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - density))))
    return sae


def bare(saes: list[JumpReLUSAE], x: torch.Tensor) -> None:
    for sae in saes:
        pre = x @ sae.W_enc + sae.b_enc
        acts = pre * (pre > sae.threshold)
        acts @ sae.W_dec + sae.b_dec


def forward_rows() -> list[dict]:
    rows = []
    for d, layers, d_sae, density, rounds in (
        (768, 8, 8192, 0.5, 7),
        (768, 8, 8192, 0.01, 7),
        (256, 8, 2048, 0.03, 25),
    ):
        model = random_model(d_model=d, layers=layers)
        tokens = torch.randint(3, 4096, (4, 128))
        saes = []
        for layer in range(0, layers, layers // 4):
            name = f"blocks.{layer}.hook_resid_post"
            _, cache = model.run_with_cache(tokens, names_filter=name)
            saes.append(random_sae(layer, d, d_sae, density=density, std=float(cache[name].std())))
        x = torch.randn(4, 128, d)

        def plain(model=model, tokens=tokens, saes=saes, x=x) -> None:
            model(tokens)
            bare(saes, x)

        seconds = interleaved({
            "plain": plain,
            "spliced": lambda m=model, t=tokens, s=saes: m.run_with_saes(t, saes=s),
            "error": lambda m=model, t=tokens, s=saes: m.run_with_saes(t, saes=s, use_error_term=True),
        }, rounds=rounds)  # fmt: skip
        size = f"d {d}, {layers} layers, {d_sae} latents, 4 x 128 tokens, {density:.0%} active"
        rows.append({"work": f"forward with 4 SAEs ({size})", "baseline": "plain forward + bare codecs"}
                    | ratio(seconds, "spliced", "plain"))  # fmt: skip
        rows.append({"work": f"the same, error term, unedited ({size})", "baseline": "without error term"}
                    | ratio(seconds, "error", "spliced"))  # fmt: skip
    return rows


def many_rows() -> list[dict]:
    model = random_model(d_model=256, layers=42)
    tokens = torch.randint(3, 4096, (1, 16))
    saes = [random_sae(layer, 256, 512, density=0.1) for layer in range(42)]
    x = torch.randn(1, 16, 256)

    def plain() -> None:
        model(tokens)
        bare(saes, x)

    seconds = interleaved({"plain": plain, "spliced": lambda: model.run_with_saes(tokens, saes=saes)}, rounds=30)
    work = "42 SAEs on 42 layers (d 256, 512 latents), 1 x 16 tokens, attach included"
    return [{"work": work, "baseline": "plain forward + 42 bare codecs"} | ratio(seconds, "spliced", "plain")]


def load_rows() -> list[dict]:
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "params.npz"
        np.savez(
            file,
            W_enc=generator.standard_normal((2304, 16384), dtype=np.float32),
            W_dec=generator.standard_normal((16384, 2304), dtype=np.float32),
            b_enc=np.zeros(16384, np.float32), b_dec=np.zeros(2304, np.float32), threshold=np.ones(16384, np.float32),
        )  # fmt: skip

        def numpy() -> dict:
            with np.load(file) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays}

        def theirs() -> dict:
            # The loop of gemma_2_sae_huggingface_loader, without its download.
            with np.load(file) as arrays:
                return {name: torch.tensor(arrays[name]).to(dtype=torch.float32).to("cpu") for name in arrays}

        seconds = interleaved({"numpy": numpy, "theirs": theirs}, rounds=7)
    work = "load a 2304 x 16384 npz (the loader's loop alone, no module, no checks)"
    return [{"work": work, "baseline": "np.load + from_numpy"} | ratio(seconds, "theirs", "numpy")]


if __name__ == "__main__":
    names = {name: version(name) for name in ("sae-lens", "transformer-lens")}
    write("peer", "The same work in sae-lens", [*forward_rows(), *many_rows(), *load_rows()], notes=json.dumps(names))
