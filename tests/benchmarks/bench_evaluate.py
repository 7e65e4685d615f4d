"""What `evaluate` costs beside its forward passes: `python tests/benchmarks/bench_evaluate.py`.

One dictionary, ablation and all: four forward passes a batch are unavoidable, so four plain forwards of the same
batches are the baseline. On top come three encodings (clean, splice-in, splice-out), the losses, the divergence and
the sums.

1. The real tiny Gemma 2 with 1,024 latents.
2. Random models in the shape of Gemma 2, where the head's vocabulary and the dictionary are larger.
3. 26 narrow layers and short sequences: all Python, the worst case for what is done once a call.
"""

from pathlib import Path

import torch
from arms import fill_randomly, interleaved, ratio, write
from bench_splice import random_model, random_sae

from scope_lens.evaluation import evaluate
from scope_lens.model import ScopeModel
from scope_lens.sae import HookedSAE

TINY = Path(__file__).parents[3] / "shared" / "data" / "tiny-gemma2-stories"
NOTES = "Goal: at most 1.15 x four plain forwards (`use_cache=False`), one SAE on the residual stream."


def calibrated(model: ScopeModel, tokens: torch.Tensor, sae: HookedSAE, *, l0: float) -> HookedSAE:
    """Set every threshold so that its latent fires at the same share of these positions."""
    _, cache = model.run_with_cache(tokens, names_filter=sae.cfg.hook_in)
    pre = sae.pre_activation(cache[sae.cfg.hook_in][:, 1:].flatten(0, 1))
    sae.threshold.data.copy_(pre.kthvalue(round(len(pre) * (1 - l0 / sae.cfg.d_sae)), dim=0).values)
    return sae


def row(name: str, model: ScopeModel, tokens: torch.Tensor, sae: HookedSAE, *, l0: float, rounds: int) -> dict:
    tokens[:, 0] = 2
    fill_randomly(sae, density=0.05)
    with torch.no_grad():
        calibrated(model, tokens, sae, l0=l0)

    def four_plain() -> None:
        for batch in tokens.split(8):
            for _ in range(4):
                model(batch, use_cache=False)

    seconds = interleaved(
        {"plain": four_plain, "evaluate": lambda: evaluate(model, tokens, saes=sae, progress=False)}, rounds=rounds
    )
    work = f"{name}, {sae.cfg.d_sae} latents, L0 {l0}, {tokens.shape[0]} x {tokens.shape[1]} tokens"
    return {"work": work, "baseline": "four plain forwards"} | ratio(seconds, "evaluate", "plain")


def main() -> None:
    tiny = ScopeModel.from_pretrained(TINY)
    rows = [
        row("tiny Gemma 2 (d 192, 4 layers, vocabulary 4096)", tiny, torch.randint(3, 4096, (16, 256)),
            random_sae(2, 192, 1024), l0=40, rounds=11),
        row("random, d 512, 8 layers, vocabulary 16384", random_model(d_model=512, layers=8, vocab=16384),
            torch.randint(3, 16384, (8, 128)), random_sae(4, 512, 8192), l0=70, rounds=9),
        row("random, d 256, 26 layers, vocabulary 4096", random_model(d_model=256, layers=26),
            torch.randint(3, 4096, (8, 16)), random_sae(12, 256, 512), l0=25, rounds=15),
    ]  # fmt: skip
    write("evaluate", "evaluate beside its four forward passes", rows, notes=NOTES)


if __name__ == "__main__":
    main()
