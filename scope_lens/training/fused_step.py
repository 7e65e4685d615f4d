"""Updates on the kernels, launched without waiting for the device, dense or sparse as the batches ask for.

1. An update is launched by what the batches some updates back measured (`scope_lens.training.dispatch`).
2. A row with more entries than there was room for, or a TopK row with too few candidates, halts the run on the device:
   from then on no kernel writes a weight.
3. The host looks at an update's counts some updates later (`scope_lens.training.in_flight`). Where it was halted, it is
   made again densely, and so are those behind it.

So every update is exact and none is lost, and the device never waits for the host.
"""

from collections import deque
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scope_lens.sae import HookedSAE
from scope_lens.training.config import TrainConfig
from scope_lens.training.dispatch import BREAK_EVEN, Dispatcher
from scope_lens.training.fused_state import FusedState
from scope_lens.training.fused_update import Trained, launch
from scope_lens.training.in_flight import LAG, Counts, InFlight
from scope_lens.training.kernels.choice import KernelChoice, resolve
from scope_lens.training.kernels.kernel_set import Kernels, triton_kernels
from scope_lens.training.losses import LossParts
from scope_lens.training.objectives import Objective
from scope_lens.training.ranks import ALONE, Ranks

_DISPATCH, _FLOOR = "fused.dispatch", "fused.floor"


def can_fuse(cfg: TrainConfig, ranks: Ranks = ALONE) -> bool:
    """Say whether this kind of dictionary trains on the kernels: JumpReLU, and TopK whose latents are not spread."""
    if cfg.activation == "topk":
        return not cfg.matryoshka and not cfg.aux_k and ranks.n_latent == 1
    return cfg.activation == "jumprelu" and not cfg.matryoshka


def kernels_for(
    choice: KernelChoice, device: torch.device, configs: Sequence[TrainConfig], ranks: Ranks = ALONE
) -> Kernels | None:
    """Give the kernels that a run takes; None where it takes none.

    Args:
        choice: What was asked for.
        device: Where the dictionaries are.
        configs: All dictionaries of the run.
        ranks: Which rows and latents this process has.

    Raises:
        ValueError: Triton's kernels are asked for, and cannot run here or do not train one of the dictionaries.
    """
    resolved = resolve(choice, device)
    for index, cfg in enumerate(configs):
        if choice == "triton" and not can_fuse(cfg, ranks):
            raise ValueError(
                f"kernels='triton' trains jumprelu, and topk without aux_k on one latent shard, both without "
                f"matryoshka; config {index} is {cfg.activation!r} with aux_k={cfg.aux_k}, "
                f"matryoshka={cfg.matryoshka}, {ranks.n_latent} latent shards. Pass kernels='auto', which takes "
                "torch's own operations for it."
            )
    return triton_kernels() if resolved == "triton" else None


class FusedStep:
    """Updates one dictionary.

    Args:
        sae: The dictionary in its training form, on its device, or a rank's latents of it.
        cfg: Settings.
        objective: Its thresholds and constraints.
        last_fired: For each latent the number of rows seen when it last fired; kept up to date here.
        kernels: The set to call.
        operands: dtype of what is multiplied: bfloat16 or float32.
        ranks: Which rows and latents this process has.
        break_even: Share of the latents at which sparse and dense updates take equally long.
    """

    def __init__(
        self,
        sae: HookedSAE,
        cfg: TrainConfig,
        objective: Objective,
        *,
        last_fired: Int[Tensor, " d_sae"],
        kernels: Kernels,
        operands: torch.dtype = torch.bfloat16,
        ranks: Ranks = ALONE,
        break_even: float = BREAK_EVEN,
    ) -> None:
        state = FusedState(sae, cfg, extra=objective.parameters, operands=operands)
        floor = torch.zeros(1, device=sae.device)
        self._trained = Trained(sae, cfg, objective, state, last_fired, floor, kernels, ranks)
        self._break_even = break_even
        self._dispatch = self._new_dispatch()
        self._flying: deque[InFlight] = deque()

    def update(
        self, batch: tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch d_out"]], *, step: int
    ) -> LossParts:
        """Launch update `step` on normalised rows; the numbers it gives are final after `settle`.

        Args:
            batch: Encoder inputs and targets; the same tensor twice for an autoencoder.
            step: Updates made before.
        """
        while len(self._flying) >= LAG:
            self._land()
        loss, error, l0 = (batch[0].new_zeros(()) for _ in range(3))
        fired = torch.zeros_like(self._trained.last_fired, dtype=torch.bool)
        flight = InFlight(step, batch, LossParts(loss, error, l0, fired))
        self._launch(flight)
        return flight.parts

    def settle(self) -> None:
        """See to it that every update launched so far is made, and its numbers final."""
        while self._flying:
            self._land()

    def state(self) -> dict[str, Tensor]:
        """Give what later updates depend on; Adam's memory in the names and shapes of `torch.optim.Adam`'s state."""
        self.settle()
        own = {_DISPATCH: self._dispatch.state(), _FLOOR: self._trained.floor}
        return self._trained.state.state() | own

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take up what `state`, or a learner without kernels, gave; the parameters have been set before."""
        self._flying.clear()
        self._trained.state.load(state)
        self._dispatch = self._new_dispatch()
        self._trained.floor.zero_()
        if _DISPATCH in state:
            self._dispatch.load_state(state[_DISPATCH])
            self._trained.floor.copy_(state[_FLOOR])

    def _new_dispatch(self) -> Dispatcher:
        return Dispatcher(self._trained.sae.cfg.d_sae, lag=LAG, break_even=self._break_even)

    def _launch(self, flight: InFlight) -> None:
        choice = self._dispatch.choose(flight.step)
        # Triton launches on the current device, whichever device its arguments are on.
        with torch.cuda.device_of(flight.batch[0]):
            counts = launch(self._trained, flight, capacity=choice.capacity if choice.sparse else None)
            flight.counts = Counts(torch.cat([counts, self._trained.state.halted.long()]))
        self._flying.append(flight)

    def _land(self) -> None:
        flight = self._flying.popleft()
        assert flight.counts is not None
        most, total, halted = flight.counts.read()
        if not flight.again:
            self._dispatch.observe(flight.step, most=most, mean=total / len(flight.batch[0]), halted=bool(halted))
        if halted:
            # Nothing was applied from this update on, and the numbers of those behind it mean nothing.
            flight.again = True
            again = (flight, *self._flying)
            self._flying.clear()
            self._trained.state.halted.zero_()
            for one in again:
                self._launch(one)
