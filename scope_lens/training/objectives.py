"""What is trained, one class for each kind of dictionary: its extra parameters, its loss and its inference form.

| kind      | trained beside the weights | activation in training        | inference form                         |
|-----------|----------------------------|-------------------------------|----------------------------------------|
| jumprelu  | theta                      | JumpReLU                      | itself                                 |
| topk      | -                          | the k largest of a row        | itself                                 |
| batchtopk | -                          | the k * rows largest          | JumpReLU, threshold learnt on the way  |
| relu      | -                          | ReLU                          | JumpReLU with threshold 0: the same    |
| gated     | r_mag, b_mag               | gate and magnitude            | JumpReLU with exp(r_mag): the same     |

So every kind but TopK, whose latents depend on each other, can be written in Gemma Scope's format.
"""

import dataclasses
from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from scope_lens.sae import HookedSAE
from scope_lens.training.baselines import AuxK, gated_loss, relu_loss, topk_loss
from scope_lens.training.config import TrainConfig
from scope_lens.training.jumprelu_step import StepWorkspace, jumprelu_step
from scope_lens.training.losses import LossParts, jumprelu_loss
from scope_lens.training.ranks import ALONE, Ranks

Batch = tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch d_out"]]

_CUTOFF_MEMORY = 0.99  # of the running mean: about the last hundred batches


class Objective(ABC):
    """One kind of dictionary under training.

    Args:
        sae: The dictionary in its training form, or this rank's shard of it.
        cfg: Settings of the whole dictionary.
        ranks: Whose rows and latents it is trained on.

    Attributes:
        parameters: What is trained beside the dictionary's own weights, by name.
        buffers: What an update changes without a gradient, by name.
    """

    def __init__(self, sae: HookedSAE, cfg: TrainConfig, ranks: Ranks) -> None:
        self._sae, self._cfg, self._ranks = sae, cfg, ranks
        self.parameters: dict[str, nn.Parameter] = {}
        self.buffers: dict[str, Tensor] = {}

    @abstractmethod
    def loss(self, batch: Batch, *, step: int, dead: Bool[Tensor, " d_sae"] | None) -> LossParts:
        """Give the loss of update `step` on normalised rows; `dead` is None as long as no latent can be dead."""

    @abstractmethod
    def inference(self) -> HookedSAE:
        """Give the dictionary with the activation it has outside training, still in normalised units."""

    def gradients(self, batch: Batch, *, step: int, dead: Bool[Tensor, " d_sae"] | None) -> LossParts:
        """Put the gradient of every trained parameter into its `.grad`, and give the loss, detached."""
        for parameter in (*self._sae.parameters(), *self.parameters.values()):
            parameter.grad = None
        parts = self.loss(batch, step=step, dead=dead)
        parts.loss.backward()
        return parts.detached()

    def constrain(self) -> None:  # noqa: B027
        """Bring the extra parameters back into their range after Adam."""


class JumpReLUObjective(Objective):
    """A JumpReLU dictionary: `theta` is the threshold, or its logarithm, as Adam sees it."""

    def __init__(self, sae: HookedSAE, cfg: TrainConfig, ranks: Ranks) -> None:
        super().__init__(sae, cfg, ranks)
        assert sae.threshold is not None
        initial = torch.full_like(sae.threshold, cfg.threshold_init)
        self.theta = nn.Parameter(initial.log() if cfg.threshold == "log" else initial)
        # The dictionary's own threshold follows theta only in `inference`.
        sae.threshold.requires_grad = False
        sae.threshold.copy_(initial)
        self.parameters["theta"] = self.theta
        self._workspace: StepWorkspace | None = None  # made at the first update, which knows the dtype

    def threshold(self) -> Float[Tensor, " d_sae"]:
        """Give the thresholds, differentiable in `theta`."""
        return self.theta.exp() if self._cfg.threshold == "log" else self.theta

    def loss(self, batch: Batch, *, step: int, dead: Bool[Tensor, " d_sae"] | None) -> LossParts:  # noqa: ARG002
        """Give the loss of update `step`."""
        cfg = self._cfg
        return jumprelu_loss(
            self._sae,
            batch,
            threshold=self.threshold(),
            sparsity=cfg.sparsity_term_at(step),
            bandwidth=cfg.bandwidth,
            prefixes=cfg.matryoshka,
            ranks=self._ranks,
        )

    def gradients(self, batch: Batch, *, step: int, dead: Bool[Tensor, " d_sae"] | None) -> LossParts:
        """Take the step written by hand where there is one for this config and device, autograd elsewhere."""
        sae, cfg = self._sae, self._cfg
        if cfg.matryoshka or sae.device.type != "cpu":
            return super().gradients(batch, step=step, dead=dead)
        if self._workspace is None:
            self._workspace = StepWorkspace(sae)
            self.theta.grad = torch.empty_like(self.theta)
        assert self.theta.grad is not None
        threshold = self.threshold().detach()
        parts = jumprelu_step(
            sae,
            batch,
            threshold=threshold,
            threshold_grad=self.theta.grad,
            sparsity=cfg.sparsity_term_at(step),
            bandwidth=cfg.bandwidth,
            workspace=self._workspace,
            ranks=self._ranks,
        )
        if cfg.threshold == "log":
            self.theta.grad *= threshold
        return parts

    @torch.no_grad()
    def constrain(self) -> None:
        """Keep the thresholds from becoming negative, where JumpReLU is not defined."""
        if self._cfg.threshold == "direct":
            self.theta.clamp_(min=0)

    @torch.no_grad()
    def inference(self) -> HookedSAE:
        """Give the dictionary with its trained thresholds."""
        return _as_jumprelu(self._sae, {"threshold": self.threshold()})


class TopKObjective(Objective):
    """A TopK or BatchTopK dictionary; `cutoff` is the running mean of each batch's smallest active latent."""

    def __init__(self, sae: HookedSAE, cfg: TrainConfig, ranks: Ranks) -> None:
        super().__init__(sae, cfg, ranks)
        # The second entry is the weight of what the mean has seen, which removes the zero it starts from.
        self.buffers["cutoff"] = torch.zeros(2, dtype=torch.float64, device=sae.device)

    def loss(self, batch: Batch, *, step: int, dead: Bool[Tensor, " d_sae"] | None) -> LossParts:  # noqa: ARG002
        """Give the loss, with the auxiliary one once latents can be dead."""
        cfg = self._cfg
        aux = None if dead is None or not cfg.aux_k else AuxK(dead, cfg.aux_k, cfg.aux_coefficient)
        parts, smallest = topk_loss(self._sae, batch, prefixes=cfg.matryoshka, aux=aux, ranks=self._ranks)
        cutoff = self.buffers["cutoff"]
        seen = torch.stack([smallest.double(), torch.ones_like(cutoff[1])])
        # A batch without an active latent says nothing.
        cutoff.copy_(torch.where(smallest.isfinite(), cutoff.lerp(seen, 1 - _CUTOFF_MEMORY), cutoff))
        return parts

    @torch.no_grad()
    def inference(self) -> HookedSAE:
        """Give TopK as it is, and BatchTopK as JumpReLU with one threshold for all latents (arXiv 2412.06410)."""
        if self._sae.cfg.activation == "topk":
            return self._sae
        mean, weight = self.buffers["cutoff"]
        return _as_jumprelu(self._sae, {"threshold": (mean / weight.clamp(min=1e-12)).expand(self._sae.cfg.d_sae)})


class ReLUObjective(Objective):
    """A ReLU dictionary with an L1 penalty."""

    def loss(self, batch: Batch, *, step: int, dead: Bool[Tensor, " d_sae"] | None) -> LossParts:  # noqa: ARG002
        """Give the loss of update `step`."""
        cfg = self._cfg
        return relu_loss(self._sae, batch, sparsity=cfg.sparsity_at(step), prefixes=cfg.matryoshka, ranks=self._ranks)

    @torch.no_grad()
    def inference(self) -> HookedSAE:
        """Give it as JumpReLU with threshold 0, which is ReLU."""
        return _as_jumprelu(self._sae, {"threshold": torch.zeros_like(self._sae.b_enc)})


class GatedObjective(Objective):
    """A Gated dictionary: the dictionary's own `b_enc` is the gate's bias."""

    def __init__(self, sae: HookedSAE, cfg: TrainConfig, ranks: Ranks) -> None:
        super().__init__(sae, cfg, ranks)
        self.r_mag = nn.Parameter(torch.zeros_like(sae.b_enc))
        self.b_mag = nn.Parameter(torch.zeros_like(sae.b_enc))
        self.parameters |= {"r_mag": self.r_mag, "b_mag": self.b_mag}

    def loss(self, batch: Batch, *, step: int, dead: Bool[Tensor, " d_sae"] | None) -> LossParts:  # noqa: ARG002
        """Give the loss of update `step`."""
        return gated_loss(
            self._sae,
            batch,
            r_mag=self.r_mag,
            b_mag=self.b_mag,
            sparsity=self._cfg.sparsity_at(step),
            ranks=self._ranks,
        )

    @torch.no_grad()
    def inference(self) -> HookedSAE:
        """Give it as JumpReLU: `mag = exp(r_mag) (gate - b_gate) + b_mag`, so the gate opens where mag exceeds theta.

        `theta = max(0, b_mag - exp(r_mag) b_gate)`; a latent fires where the gate is open and the magnitude positive.

        Source: arXiv 2404.16014, section 3.2, the equivalence with a JumpReLU.
        """
        ratio = self.r_mag.exp()
        changed = {
            "W_enc": self._sae.W_enc * ratio,
            "b_enc": self.b_mag,
            "threshold": (self.b_mag - ratio * self._sae.b_enc).clamp(min=0),
        }
        return _as_jumprelu(self._sae, changed)


def objective_for(sae: HookedSAE, cfg: TrainConfig, ranks: Ranks = ALONE) -> Objective:
    """Give the objective of a config, for a dictionary in its training form, or this rank's shard of it."""
    match cfg.activation:
        case "jumprelu":
            return JumpReLUObjective(sae, cfg, ranks)
        case "topk" | "batchtopk":
            return TopKObjective(sae, cfg, ranks)
        case "relu":
            return ReLUObjective(sae, cfg, ranks)
        case "gated":
            return GatedObjective(sae, cfg, ranks)


def _as_jumprelu(sae: HookedSAE, changed: dict[str, Tensor]) -> HookedSAE:
    """A JumpReLU dictionary that shares the weights of `sae`, but for those that are replaced."""
    cfg = dataclasses.replace(sae.cfg, activation="jumprelu", k=None)
    with torch.device("meta"):
        shared = HookedSAE(cfg)
    shared.load_state_dict({**sae.state_dict(), **changed}, assign=True)
    return shared
