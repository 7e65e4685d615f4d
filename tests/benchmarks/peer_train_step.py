"""sae-lens' own training step beside the bare one: run by `bench_train_step.py --peer PYTHON` with sae-lens' Python."""

import json
import time
from importlib.metadata import version

import torch
from arms import interleaved, ratio
from eager_step import EagerLearner
from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

BANDWIDTH, SPARSITY, LR = 0.01, 1e-3, 1e-9


def rows() -> list[dict]:
    d, d_sae, batch = 256, 4096, 2048
    result = []
    for name, density in (("first steps, 44 % active", 0.436), ("L0 64", 64 / d_sae)):
        threshold = float(torch.distributions.Normal(0, d**-0.5).icdf(torch.tensor(1 - density)))
        sae = JumpReLUTrainingSAE(
            JumpReLUTrainingSAEConfig(
                d_in=d, d_sae=d_sae, apply_b_dec_to_input=True, normalize_activations="none",
                jumprelu_init_threshold=threshold, jumprelu_bandwidth=BANDWIDTH, l0_coefficient=SPARSITY,
            )
        )  # fmt: skip
        with torch.no_grad():
            sae.W_dec.normal_()
            sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
            sae.W_enc.copy_(sae.W_dec.T)
        cfg = SAETrainerConfig(
            total_training_samples=10**9, train_batch_size_samples=batch, lr=LR, lr_end=LR, adam_beta1=0.0
        )
        trainer = SAETrainer(cfg, sae, data_provider=iter(()))
        bare = EagerLearner(d, d_sae, threshold=threshold, scale=1.0, lr=LR, sparsity=SPARSITY, bandwidth=BANDWIDTH)
        x = torch.randn(batch, d, generator=torch.Generator().manual_seed(1)) / d**0.5

        @torch.enable_grad()
        def theirs(trainer: SAETrainer = trainer, x: torch.Tensor = x) -> None:
            trainer.step(x)
            trainer.n_training_steps += 1

        seconds = interleaved(
            {"bare": lambda b=bare, x=x: b.update(x, x), "theirs": theirs}, rounds=9, clock=time.process_time
        )
        work = f"256 -> 4096, batch 2048, {name}: sae-lens {version('sae-lens')}, SAETrainer.step"
        result.append({"work": work, "over": "bare eager"} | ratio(seconds, "bare", "theirs"))
    return result


if __name__ == "__main__":
    print(json.dumps(rows()))
