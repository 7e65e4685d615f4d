"""One dictionary under training: its optimiser, one update, and the inference form.

An update (Gemma Scope, arXiv 2408.05147, section 3.2):

1. Loss and gradients on normalised rows (`scope_lens.training.objectives`).
2. On several ranks, the gradients are summed over those that have other rows (`scope_lens.training.ranks`).
3. The part of each `W_dec` row's gradient that is parallel to the row is taken out.
4. Adam.
5. `W_dec` rows are rescaled to unit norm.

The baselines are trained by the same steps. Normalisation divides by one fixed number: the root mean squared norm
of the encoder's input. A transcoder's target is divided by the same number (Appendix B).

On a GPU steps 1 to 5 are the kernels' (`scope_lens.training.fused_step`). The host runs ahead there: what an update
gives, and the weights, are final after `settle`.

After the initialisation nothing is drawn at random, so a learner's state holds no generator; on the CPU an update is
the same bit for bit, whatever else is trained. No part of an update waits for the device.
"""

import dataclasses

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from scope_lens.sae import HookedSAE, SAEConfig
from scope_lens.training.adam_state import adam_state, load_adam_state
from scope_lens.training.config import TrainConfig
from scope_lens.training.dispatch import BREAK_EVEN
from scope_lens.training.fused_step import FusedStep, can_fuse
from scope_lens.training.initialisation import initialise, normalise_rows, project_out_rows
from scope_lens.training.kernels.kernel_set import Kernels
from scope_lens.training.losses import LossParts
from scope_lens.training.objectives import objective_for
from scope_lens.training.ranks import ALONE, Ranks


class Learner:
    """A dictionary in its training form with its optimiser; on several ranks, this rank's latents of it.

    Args:
        cfg: Settings.
        d_in: Width of the encoder's input.
        d_out: Width of the target.
        scale: What inputs and targets are divided by.
        model: Name of the language model, for the dictionary's config.
        device: Where it is trained; the initial values are drawn on the CPU, so they do not depend on it.
        ranks: Which rows and latents this process has.
        kernels: What updates are made of, for the kinds that train on kernels; None takes the step written by hand for
            the CPU, or autograd.
        operands: dtype of what kernels multiply: bfloat16 or float32.
        break_even: Share of the latents that matter in a row up to which kernels work sparsely.

    Raises:
        ValueError: Width, batch or k do not fit the ranks.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        *,
        d_in: int,
        d_out: int,
        scale: float,
        model: str,
        device: str | torch.device = "cpu",
        ranks: Ranks = ALONE,
        kernels: Kernels | None = None,
        operands: torch.dtype = torch.bfloat16,
        break_even: float = BREAK_EVEN,
    ) -> None:
        check_divides(cfg, ranks)
        self.cfg = cfg
        self.scale = scale
        self.ranks = ranks
        whole = HookedSAE(
            SAEConfig(
                d_in=d_in,
                d_out=d_out,
                d_sae=cfg.width,
                hook_in=cfg.hook_in,
                hook_out=cfg.hook_out,
                # The gate of a Gated dictionary is a ReLU; its magnitudes are the objective's.
                activation="relu" if cfg.activation == "gated" else cfg.activation,
                k=cfg.k,
                skip=cfg.skip,
                pre_encoder_bias=cfg.hook_in == cfg.hook_out,
                model=model,
                untrained=cfg.untrained,
            )
        )
        # Every rank draws the whole dictionary, so that it does not depend on the number of ranks.
        initialise(whole, seed=cfg.seed)
        self.sae = _shard(whole, ranks)
        self.sae.to(device)
        self.objective = objective_for(self.sae, cfg, ranks)
        # A JumpReLU's own threshold is not trained: Adam sees it, or its logarithm, as the objective's theta.
        self.parameters = {name: p for name, p in self.sae.named_parameters() if name != "threshold"}
        self.parameters |= self.objective.parameters
        self.last_fired = torch.zeros(self.sae.cfg.d_sae, dtype=torch.int64, device=device)
        self._fused: FusedStep | None = None
        if kernels is not None and can_fuse(cfg, ranks):
            self._fused = FusedStep(
                self.sae,
                cfg,
                self.objective,
                last_fired=self.last_fired,
                kernels=kernels,
                operands=operands,
                ranks=ranks,
                break_even=break_even,
            )
        else:
            self.adam = torch.optim.Adam(
                self.parameters.values(), lr=cfg.learning_rate, betas=cfg.betas, eps=cfg.adam_eps, fused=True
            )
        self.step = 0  # updates made
        self._half_made = False
        self._loss: Tensor | None = None

    @property
    def whole(self) -> bool:
        """Whether the state is that after `step` updates, none half made and the last one's loss finite."""
        self.settle()
        return not self._half_made and (self._loss is None or bool(self._loss.isfinite()))

    def update(self, x: Float[Tensor, "batch d_in"], y: Float[Tensor, "batch d_out"]) -> LossParts:
        """Make one update on rows of raw activations, and give the loss before it, detached.

        On several ranks all of them make it together, each with its rows, and the loss is this rank's share.

        Args:
            x: Encoder inputs.
            y: Targets; the same tensor for an autoencoder.
        """
        inputs = x / self.scale
        targets = inputs if y is x else y / self.scale
        if self._fused is not None:
            self._half_made = True
            parts = self._fused.update((inputs, targets), step=self.step)
            self.step += 1
            self._loss = parts.loss
            self._half_made = False
            return parts
        parts = self.objective.gradients((inputs, targets), step=self.step, dead=self._maybe_dead())
        with torch.no_grad():
            for parameter in self.parameters.values():
                assert parameter.grad is not None
                self.ranks.sum_over_rows_(parameter.grad)
            project_out_rows(self.sae.W_dec)
            self.adam.param_groups[0]["lr"] = self.cfg.learning_rate_at(self.step)
            self._half_made = True
            self.adam.step()
            normalise_rows(self.sae.W_dec)
            self.objective.constrain()
            self.step += 1
            self.last_fired.masked_fill_(self.ranks.any_over_rows(parts.fired), self._rows_seen())
            self._loss = parts.loss
            self._half_made = False
        return parts

    def settle(self) -> None:
        """See to it that every update is made and its numbers final, also those that the host has only launched."""
        if self._fused is not None:
            self._fused.settle()

    def dead(self) -> float:
        """Give the fraction of the whole dictionary's latents that did not fire in the last `dead_after` rows."""
        self.settle()
        return float(self.ranks.sum_over_latents_(self.dead_latents().double().sum()) / self.cfg.width)

    def dead_latents(self) -> Bool[Tensor, " d_sae"]:
        """Say which of this rank's latents did not fire in the last `dead_after` rows."""
        return self._rows_seen() - self.last_fired >= self.cfg.dead_after

    def result(self) -> HookedSAE:
        """Give the dictionary in its inference form: it reads and writes raw activations.

        All kinds but TopK come as JumpReLU dictionaries (`scope_lens.training.objectives`). On several ranks all of
        them ask for it together, and each gets the whole dictionary.
        """
        self.settle()
        return _whole(self.objective.inference().to_inference(self.scale), self.ranks)

    def state(self) -> dict[str, Tensor]:
        """Give everything an update depends on, by name; of the tensors that count latents, this rank's part."""
        self.settle()
        tensors = {name: parameter.detach() for name, parameter in self.parameters.items()}
        tensors |= adam_state(self.adam, self.parameters) if self._fused is None else self._fused.state()
        return tensors | self.objective.buffers | {"last_fired": self.last_fired, "step": torch.tensor(self.step)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take up the state that another learner of the same settings gave, or this rank's part of it.

        Raises:
            KeyError: A tensor is missing.
            ValueError: A tensor has another shape.
        """
        own = self.parameters | self.objective.buffers | {"last_fired": self.last_fired}
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise ValueError(f"{name} has shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])
            if self._fused is None:
                load_adam_state(self.adam, self.parameters, state)
            else:
                self._fused.load_state(state)
            self.step = int(state["step"])

    def _maybe_dead(self) -> Tensor | None:
        """The dead latents; None where it is known without waiting for the device that there are none."""
        if self._rows_seen() < self.cfg.dead_after:
            return None
        dead = self.dead_latents()
        # Another shard may have dead latents where this one has none, and what follows is done together.
        known = dead.device.type == "cpu" and self.ranks.n_latent == 1
        return None if known and not dead.any() else dead

    def _rows_seen(self) -> int:
        return self.step * self.cfg.batch_size


def check_divides(cfg: TrainConfig, ranks: Ranks) -> None:
    """Check that a dictionary and its batches can be divided among the ranks.

    Raises:
        ValueError: Width or batch do not divide, or a shard has fewer than k latents.
    """
    ranks.rows(cfg.batch_size)
    own = ranks.latents(cfg.width)
    if cfg.k is not None and cfg.k > own.stop - own.start:
        raise ValueError(
            f"k={cfg.k} is more than the {own.stop - own.start:,} latents of each of {ranks.n_latent} latent shards; "
            "choose fewer shards."
        )


def _shard(whole: HookedSAE, ranks: Ranks) -> HookedSAE:
    if ranks.n_latent == 1:
        return whole
    own = ranks.latents(whole.cfg.d_sae)
    sae = HookedSAE(dataclasses.replace(whole.cfg, d_sae=own.stop - own.start))
    sae.load_state_dict({name: ranks.shard(name, tensor) for name, tensor in whole.state_dict().items()})
    return sae


def _whole(shard: HookedSAE, ranks: Ranks) -> HookedSAE:
    if ranks.n_latent == 1:
        return shard
    sae = HookedSAE(dataclasses.replace(shard.cfg, d_sae=shard.cfg.d_sae * ranks.n_latent))
    sae.to(shard.device, shard.dtype)
    sae.load_state_dict({name: ranks.whole(name, tensor) for name, tensor in shard.state_dict().items()})
    return sae
