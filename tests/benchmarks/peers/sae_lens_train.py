"""sae-lens' JumpReLU and TopK training classes under its own trainer; see arm.py.

`SAETrainer.step` and the scaler are driven as `SAETrainer.fit` drives them, so that the rows of every step are the
plan's. The normalisation is estimated by its own code.
"""

import tempfile

import numpy as np
import torch
from arm import Arm, main
from sae_lens import SAE, JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

CLASSES = {
    "jumprelu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig),
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
}


def make(plan: dict, run: dict, first: Tensor) -> Arm:
    sae_class, config_class = CLASSES[run["kind"]]
    config = config_class(
        d_in=first.shape[1], d_sae=plan["width"], normalize_activations="expected_average_only_in", **run["sae"]
    )
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=plan["steps"] * plan["batch_size"],
            train_batch_size_samples=plan["batch_size"],
            lr_end=run["trainer"]["lr"] / 10,  # what its runner's config sets
            **run["trainer"],
        ),
        sae_class(config),
        data_provider=iter(()),
    )
    estimates = first.split(plan["batch_size"])
    trainer.activation_scaler.estimate_scaling_factor(first.shape[1], iter(estimates), len(estimates))
    sae = trainer.sae

    def step(x: Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    def export() -> dict[str, np.ndarray]:
        sae.fold_activation_norm_scaling_factor(trainer.activation_scaler.scaling_factor)
        with tempfile.TemporaryDirectory() as folder:
            sae.save_inference_model(folder)
            inference = SAE.load_from_disk(folder)
        arrays = {name: value.detach() for name, value in inference.state_dict().items()}
        if getattr(inference.cfg, "rescale_acts_by_decoder_norm", False):
            # Saving has made the rows of W_dec unit vectors; the flag stays, and has nothing left to rescale by.
            assert torch.allclose(arrays["W_dec"].norm(dim=1), torch.ones(plan["width"]), atol=1e-5)
        if inference.cfg.apply_b_dec_to_input:
            arrays["b_enc"] = arrays["b_enc"] - arrays["b_dec"] @ arrays["W_enc"]
        if run["kind"] == "topk":
            arrays["k"] = torch.tensor(inference.cfg.k)
        return {name: value.numpy() for name, value in arrays.items()}

    return Arm(step, export, sae)


if __name__ == "__main__":
    main(make)
