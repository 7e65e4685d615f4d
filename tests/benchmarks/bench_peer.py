"""The same work in sae-lens, in a virtual environment of its own: `python tests/benchmarks/bench_peer.py`.

sae-lens 6.54 needs transformer-lens < 4, so it cannot be installed beside this package. Make its environment with

    pip install torch==2.13.0 && pip install transformer-lens==3.9.0 && pip install sae-lens==6.54.12

and run this file with its Python. The sizes are those of bench_splice.py and bench_load.py; each ratio is taken inside
one process to bare torch that does the same sums, so the two pages can be read beside each other.
"""

import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from arms import interleaved, ratio, splice_rows, write
from sae_lens import HookedSAETransformer, JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from transformer_lens import HookedTransformerConfig


def random_model(d_model: int, layers: int) -> HookedSAETransformer:
    torch.manual_seed(0)
    config = HookedTransformerConfig(
        n_layers=layers, d_model=d_model, n_ctx=1024, d_head=d_model // 8, n_heads=8, n_key_value_heads=4,
        d_mlp=4 * d_model, d_vocab=4096, act_fn="gelu_pytorch_tanh", normalization_type="RMS", gated_mlp=True,
        positional_embedding_type="rotary", rotary_dim=d_model // 8, use_normalization_before_and_after=True,
        attn_scores_soft_cap=50.0, output_logits_soft_cap=30.0, final_rms=True,
    )  # fmt: skip
    return HookedSAETransformer(config).eval()


def random_sae(layer: int, d: int, d_sae: int) -> JumpReLUSAE:
    metadata = SAEMetadata(hook_name=f"blocks.{layer}.hook_resid_post")
    return JumpReLUSAE(JumpReLUSAEConfig(d_in=d, d_sae=d_sae, apply_b_dec_to_input=False, metadata=metadata))


def run(model: HookedSAETransformer, tokens: torch.Tensor, saes: list[JumpReLUSAE], use_error_term: bool) -> None:
    model.run_with_saes(tokens, saes=saes, use_error_term=use_error_term)


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
    rows = [*splice_rows(random_model, random_sae, run), *load_rows()]
    write("peer", "The same work in sae-lens", rows, notes=", ".join(f"{k} {v}" for k, v in names.items()))
