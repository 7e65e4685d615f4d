"""One dictionary under training: initialisation, one update, and the inference form.

An update (Gemma Scope, arXiv 2408.05147, section 3.2):

1. Loss and gradients on normalised rows (`scope_lens.training.losses`).
2. The part of each `W_dec` row's gradient that is parallel to the row is taken out.
3. Adam.
4. `W_dec` rows are rescaled to unit norm.

Normalisation divides by one fixed number: the root mean squared norm of the encoder's input. A transcoder's target is
divided by the same number (Appendix B).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scope_lens.sae import HookedSAE, SAEConfig
from scope_lens.training.config import TrainConfig
from scope_lens.training.losses import LossParts, jumprelu_loss


class Learner:
    """A dictionary in its training form with its optimiser.

    Args:
        cfg: Settings.
        d_in: Width of the encoder's input.
        d_out: Width of the target.
        scale: What inputs and targets are divided by.
        model: Name of the language model, for the dictionary's config.
    """

    def __init__(self, cfg: TrainConfig, *, d_in: int, d_out: int, scale: float, model: str) -> None:
        self.cfg = cfg
        self.scale = scale
        autoencoder = cfg.hook_in == cfg.hook_out
        self.sae = HookedSAE(
            SAEConfig(
                d_in=d_in,
                d_out=d_out,
                d_sae=cfg.width,
                hook_in=cfg.hook_in,
                hook_out=cfg.hook_out,
                pre_encoder_bias=autoencoder,
                model=model,
            )
        )
        initialise(self.sae, threshold=cfg.threshold_init, seed=cfg.seed)
        assert self.sae.threshold is not None
        theta = self.sae.threshold.detach().clone()
        # What Adam sees of the threshold. `sae.threshold` keeps its initial value until `result` copies this one there.
        self.theta = nn.Parameter(theta.log() if cfg.threshold == "log" else theta)
        self.sae.threshold.requires_grad = False
        self.parameters = {name: p for name, p in self.sae.named_parameters() if name != "threshold"}
        self.parameters["theta"] = self.theta
        self.adam = torch.optim.Adam(
            self.parameters.values(), lr=cfg.learning_rate, betas=cfg.betas, eps=cfg.adam_eps, fused=True
        )
        self.last_fired = torch.zeros(cfg.width, dtype=torch.int64)
        self.step = 0  # updates made
        # Whether the state is that after `step` updates, none of them half made and none of a loss that is not finite.
        self.whole = True

    def threshold(self) -> Float[Tensor, " d_sae"]:
        """Give the thresholds, differentiable in what Adam sees of them."""
        return self.theta.exp() if self.cfg.threshold == "log" else self.theta

    def update(self, x: Float[Tensor, "batch d_in"], y: Float[Tensor, "batch d_out"]) -> LossParts:
        """Make one update on rows of raw activations, and give the loss before it.

        Args:
            x: Encoder inputs.
            y: Targets; the same tensor for an autoencoder.
        """
        self.adam.zero_grad()
        parts = jumprelu_loss(
            self.sae,
            (x / self.scale, y / self.scale),
            threshold=self.threshold(),
            sparsity=self.cfg.sparsity_at(self.step),
            bandwidth=self.cfg.bandwidth,
        )
        parts.loss.backward()
        with torch.no_grad():
            project_out_rows(self.sae.W_dec)
            self.adam.param_groups[0]["lr"] = self.cfg.learning_rate_at(self.step)
            self.whole = False
            self.adam.step()
            normalise_rows(self.sae.W_dec)
            if self.cfg.threshold == "direct":
                self.theta.clamp_(min=0)  # JumpReLU is defined for thresholds that are not negative
            self.step += 1
            self.last_fired[(parts.acts > 0).any(0)] = self.step * self.cfg.batch_size
            self.whole = bool(parts.loss.isfinite())
        return parts

    def dead(self) -> float:
        """Give the fraction of latents that did not fire in the last `dead_after` rows."""
        silent = self.step * self.cfg.batch_size - self.last_fired
        return float((silent >= self.cfg.dead_after).double().mean())

    def result(self) -> HookedSAE:
        """Give the dictionary in its inference form: it reads and writes raw activations."""
        assert self.sae.threshold is not None
        with torch.no_grad():
            self.sae.threshold.copy_(self.threshold())
        return self.sae.to_inference(self.scale)

    def state(self) -> dict[str, Tensor]:
        """Give everything an update depends on, by name."""
        tensors = {name: parameter.detach() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.adam.state[parameter].items():
                tensors[f"adam.{name}.{key}"] = value
        return tensors | {"last_fired": self.last_fired, "step": torch.tensor(self.step)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take up the state that another learner of the same settings gave.

        Raises:
            KeyError: A tensor is missing.
            ValueError: A tensor has another shape.
        """
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if parameter.shape != state[name].shape:
                    raise ValueError(f"{name} has shape {tuple(state[name].shape)}, expected {tuple(parameter.shape)}")
                parameter.copy_(state[name])
                keys = [key for key in state if key.startswith(f"adam.{name}.")]
                self.adam.state[parameter] = {key.rsplit(".", 1)[1]: state[key].clone() for key in keys}
            self.last_fired = state["last_fired"].clone()
            self.step = int(state["step"])


@torch.no_grad()
def initialise(sae: HookedSAE, *, threshold: float, seed: int) -> None:
    """Set a dictionary's parameters to their initial values, in place.

    `W_dec` is He-uniform with its rows rescaled to unit norm; an autoencoder's `W_enc` is its transpose; biases are
    zero. A transcoder's `W_enc` is an independent draw of unit columns, because the text says only that it is not tied.

    Args:
        sae: The dictionary in its training form.
        threshold: Initial threshold.
        seed: Of the draw.

    Source: Gemma Scope, section 3.2 and Appendix B.
    """
    generator = torch.Generator().manual_seed(seed)
    _unit_rows(sae.W_dec, generator)
    if sae.cfg.is_autoencoder:
        sae.W_enc.copy_(sae.W_dec.T)
    else:
        rows = torch.empty_like(sae.W_enc.T)
        _unit_rows(rows, generator)
        sae.W_enc.copy_(rows.T)
    sae.b_enc.zero_()
    sae.b_dec.zero_()
    assert sae.threshold is not None
    sae.threshold.fill_(threshold)


@torch.no_grad()
def project_out_rows(weight: Float[Tensor, "d_sae d_out"]) -> None:
    """`g - (g . w) w` for each row w of unit norm and its gradient g, in place in `weight.grad`.

    Raises:
        ValueError: `weight` has no gradient.
    """
    if weight.grad is None:
        raise ValueError("project_out_rows works on weight.grad, which is None; call backward first.")
    along = (weight.grad * weight).sum(1, keepdim=True)
    weight.grad.addcmul_(along, weight, value=-1)


@torch.no_grad()
def normalise_rows(weight: Float[Tensor, "d_sae d_out"]) -> None:
    """Rescale each row to unit norm, in place."""
    weight.div_(weight.norm(dim=1, keepdim=True))


def _unit_rows(weight: Tensor, generator: torch.Generator) -> None:
    nn.init.kaiming_uniform_(weight, generator=generator)
    normalise_rows(weight)
