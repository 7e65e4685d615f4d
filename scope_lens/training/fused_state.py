"""What updates on the kernels work on: weights latent by latent, their shadows, and Adam's memory.

1. The two weight matrices are (d_sae, d): each latent's row lies together, for `W_enc` too, whose parameter is a
   transposed view. They are float32.
2. Products take a shadow of each in the dtype of the operands, bfloat16 as a rule. The kernel that updates a weight
   writes its shadow.
3. The weights' second moments are kept by rows (`RowAdam`), a first moment only where the recipe has one. Everything
   else is small and belongs to `torch.optim.Adam`.

The state goes into a checkpoint in the names and shapes of `torch.optim.Adam`, so that a run may go on with kernels or
without.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scope_lens.sae import HookedSAE
from scope_lens.training.adam_state import adam_state, load_adam_state
from scope_lens.training.config import TrainConfig
from scope_lens.training.kernels.update import RowAdam, catch_up

WEIGHTS = ("W_enc", "W_dec")


class FusedState:
    """The tensors of one dictionary under training.

    Args:
        sae: The dictionary in its training form, on its device; its weights stay the same tensors.
        cfg: Settings.
        extra: What is trained beside the dictionary's own parameters, by name.
        operands: dtype of what is multiplied.

    Attributes:
        weights: Master weights by name, float32, latent-major; views of the dictionary's parameters.
        vectors: All other trained parameters, by name.
        halted: Not 0 once a batch's entries were not all found; nothing is applied as long as it stands.
    """

    def __init__(
        self, sae: HookedSAE, cfg: TrainConfig, *, extra: Mapping[str, nn.Parameter], operands: torch.dtype
    ) -> None:
        self._cfg = cfg
        sae.W_enc.data = sae.W_enc.data.T.contiguous().T
        self.weights = {"W_enc": sae.W_enc.data.T, "W_dec": sae.W_dec.data}
        self.adam = {
            name: RowAdam(
                second=torch.zeros_like(weight),
                first=torch.zeros_like(weight) if cfg.betas[0] else None,
                last=torch.zeros(len(weight), dtype=torch.int32, device=weight.device),
            )
            for name, weight in self.weights.items()
        }
        self.operands = operands
        self.shadows: dict[str, Tensor | None] = dict.fromkeys(WEIGHTS)
        self._copy_shadows()
        self.vectors = {n: p for n, p in sae.named_parameters() if n not in (*WEIGHTS, "threshold")} | dict(extra)
        self._vector_adam = torch.optim.Adam(
            self.vectors.values(), lr=cfg.learning_rate, betas=cfg.betas, eps=cfg.adam_eps, fused=True
        )
        self.halted = torch.zeros(1, dtype=torch.int32, device=sae.device)

    def operand(self, name: str) -> Float[Tensor, "d_sae d"]:
        """Give a weight as products take it."""
        shadow = self.shadows[name]
        return self.weights[name] if shadow is None else shadow

    def update_vectors(self, *, lr: float) -> None:
        """Let Adam apply the vectors' gradients, unless updates are halted."""
        self._vector_adam.param_groups[0]["lr"] = lr
        # The fused implementation skips an update on the device where this is 1, as it does for a gradient scaler.
        self._vector_adam.found_inf = self.halted[0].clamp(max=1).float()  # pyright: ignore[reportAttributeAccessIssue]
        self._vector_adam.step()

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        """Give what Adam remembers, in the names and shapes of `torch.optim.Adam`'s own state; empty at the start."""
        tensors = adam_state(self._vector_adam, self.vectors)
        if not tensors:
            return {}
        made = tensors["adam.b_enc.step"]
        for name, adam in self.adam.items():
            catch_up(adam, step=int(made), beta2=self._cfg.betas[1])
            # Without momentum it would be the last gradient, which nothing reads: zeros that take no memory.
            first = adam.second.new_zeros(()).expand_as(adam.second) if adam.first is None else adam.first
            tensors[f"adam.{name}.step"] = made.clone()  # safetensors refuses names that share memory
            for key, value in (("exp_avg", first), ("exp_avg_sq", adam.second)):
                tensors[f"adam.{name}.{key}"] = value.T if name == "W_enc" else value
        return tensors

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state`, or a learner without kernels, gave; the parameters have been set before."""
        self.halted.zero_()
        self._copy_shadows()
        for name, adam in self.adam.items():
            made = int(state.get(f"adam.{name}.step", 0))
            adam.last.fill_(made)
            for own, key in ((adam.first, "exp_avg"), (adam.second, "exp_avg_sq")):
                if own is not None and made:
                    own.copy_(state[f"adam.{name}.{key}"].T if name == "W_enc" else state[f"adam.{name}.{key}"])
                elif own is not None:
                    own.zero_()
        load_adam_state(self._vector_adam, self.vectors, state)

    def _copy_shadows(self) -> None:
        if self.operands != torch.float32:
            self.shadows = {name: weight.to(self.operands) for name, weight in self.weights.items()}
