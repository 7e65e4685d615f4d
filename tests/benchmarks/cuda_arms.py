"""What bench_cuda_step.py compares: the work, the card's measured ceilings, the floor, and one arm for each trainer.

The work is a JumpReLU autoencoder in the state of a trained one, at the width of Gemma 2 2B's stream: rows of unit
norm, encoder rows of unit norm, and a threshold at which a given number of latents is active. The learning rate is too
small to leave that state. Firing is uniform over the latents, which is the worst case for whoever updates only those
that fired.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

BANDWIDTH, SPARSITY, LR = 0.001, 1e-3, 1e-9


class Work(NamedTuple):
    """One size of the problem."""

    d: int
    d_sae: int
    batch: int
    l0: float

    @property
    def threshold(self) -> float:
        """Threshold at which `l0` latents are active: pre-activations have deviation 1 / sqrt(d)."""
        return statistics.NormalDist(0, self.d**-0.5).inv_cdf(1 - self.l0 / self.d_sae)

    def __str__(self) -> str:
        return f"{self.d} -> {self.d_sae}, batch {self.batch}, L0 {self.l0:g}"


class Arm(NamedTuple):
    """One trainer at one size."""

    name: str
    update: Callable[[], Any]
    held: Any  # what the update works on


def rows_of(work: Work, device: str, *, seed: int = 1) -> Tensor:
    """Raw rows, of norm sqrt(d)."""
    return torch.randn(work.batch, work.d, generator=torch.Generator().manual_seed(seed)).to(device)


def unit_rows(work: Work, device: str) -> Tensor:
    """Latent directions of unit norm, the same for every arm."""
    generator = torch.Generator(device).manual_seed(0)
    rows = torch.randn(work.d_sae, work.d, generator=generator, device=device)
    return rows.div_(rows.norm(dim=1, keepdim=True))


# ---- trainers ----


def kernels_for(device: str):
    """Triton's kernels on a GPU, their twins elsewhere."""
    from scope_lens.training.kernels.choice import resolve
    from scope_lens.training.kernels.kernel_set import eager_kernels, triton_kernels

    return triton_kernels() if resolve("auto", torch.device(device)) == "triton" else eager_kernels()


def ours(work: Work, x: Tensor, device: str, *, dense: bool = False) -> Arm:
    """`Learner.update` with the fused kernels on bfloat16 operands, as they choose their way, or always densely."""
    from scope_lens.training import TrainConfig
    from scope_lens.training.dispatch import BREAK_EVEN
    from scope_lens.training.learner import Learner

    site = "blocks.12.hook_resid_post"
    cfg = TrainConfig(
        hook_in=site, hook_out=site, width=work.d_sae, sparsity=SPARSITY, steps=10**9, batch_size=work.batch,
        learning_rate=LR, lr_warmup=0, sparsity_warmup=0, bandwidth=BANDWIDTH, threshold_init=work.threshold,
        threshold="direct",
    )  # fmt: skip
    learner = Learner(
        cfg,
        d_in=work.d,
        d_out=work.d,
        scale=work.d**0.5,
        model="random",
        device=device,
        kernels=kernels_for(device),
        break_even=0.0 if dense else BREAK_EVEN,
    )
    return Arm("scope_lens, dense" if dense else "scope_lens", lambda: learner.update(x, x), learner)


def sae_lens(work: Work, x: Tensor, device: str) -> Arm:
    """`SAETrainer.step` under bfloat16 autocast, as its `autocast=True` sets it."""
    from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(
            d_in=work.d, d_sae=work.d_sae, apply_b_dec_to_input=True, normalize_activations="none",
            jumprelu_init_threshold=work.threshold, jumprelu_bandwidth=BANDWIDTH, l0_coefficient=SPARSITY,
            device=device,
        )
    )  # fmt: skip
    with torch.no_grad():
        sae.W_dec.copy_(unit_rows(work, device))
        sae.W_enc.copy_(sae.W_dec.T)
    cfg = SAETrainerConfig(
        total_training_samples=10**12, train_batch_size_samples=work.batch, lr=LR, lr_end=LR, adam_beta1=0.0,
        device=device, autocast=True,
    )  # fmt: skip
    trainer = SAETrainer(cfg, sae, data_provider=iter(()))
    inputs = x / work.d**0.5

    def update() -> None:
        trainer.step(inputs)
        trainer.n_training_steps += 1

    return Arm("sae-lens, bf16 autocast", update, trainer)


def dictionary_learning(work: Work, x: Tensor, device: str) -> Arm:
    """`JumpReluTrainer.update` under bfloat16 autocast on bfloat16 rows, as `trainSAE(autocast_dtype=...)` calls it."""
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer

    trainer = JumpReluTrainer(
        steps=10**9, activation_dim=work.d, dict_size=work.d_sae, layer=0, lm_name="", lr=LR, bandwidth=BANDWIDTH,
        warmup_steps=0, sparsity_warmup_steps=None, target_l0=work.l0, device=device,
    )  # fmt: skip
    with torch.no_grad():
        trainer.ae.W_dec.copy_(unit_rows(work, device))
        trainer.ae.W_enc.copy_(trainer.ae.W_dec.T)
        trainer.ae.threshold.fill_(work.threshold)
    inputs = (x / work.d**0.5).to(torch.bfloat16)
    steps = iter(range(2**62))

    def update() -> None:
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            trainer.update(next(steps), inputs)

    return Arm("dictionary_learning, bf16 autocast", update, trainer)


# ---- time and memory ----


def seconds_of(run: Callable[[], Any], *, device: str, times: int) -> float:
    """Seconds of one call, over `times` of them in a row, by the device's own clock."""
    if not device.startswith("cuda"):
        begin = time.perf_counter()
        for _ in range(times):
            run()
        return (time.perf_counter() - begin) / times
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / times


def interleaved(
    arms: dict[str, Callable[[], Any]], *, device: str, rounds: int, times: int, warm: int = 3
) -> dict[str, list[float]]:
    """Seconds of each arm in each round, the arms taking turns."""
    for run in arms.values():
        for _ in range(warm):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, run in arms.items():
            seconds[name].append(seconds_of(run, device=device, times=times))
    return seconds


def median(values: list[float]) -> float:
    return statistics.median(values)


def ratio(over: list[float], under: list[float]) -> float:
    """Median over the rounds of one arm's time over another's."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device.startswith("cuda") else 0


def peak_of(run: Callable[[], Any], *, device: str, before: int) -> float | None:
    """GiB that the arm holds at most during an update, beyond what was allocated before it was made."""
    if not device.startswith("cuda"):
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


# ---- ceilings and floor ----


class Ceilings(NamedTuple):
    """What the card does at best."""

    flops: float  # bfloat16 products a second, both operations of a multiply-add counted
    bytes: float  # read and written a second by a copy

    @classmethod
    def measured(cls, device: str, *, size: int = 8192, copied: int = 2**31) -> "Ceilings":
        """Measure them, on random numbers: the clocks of a card depend on the data."""
        flops = 0.0
        for rows, inner, columns in ((size, size, size), (size // 2, size // 4, 8 * size)):
            a = torch.randn(rows, inner, device=device, dtype=torch.bfloat16)
            b = torch.randn(columns, inner, device=device, dtype=torch.bfloat16).T
            best = min(seconds_of(lambda a=a, b=b: a @ b, device=device, times=10) for _ in range(4))
            flops = max(flops, 2 * rows * inner * columns / best)
        source = torch.zeros(copied // 4, device=device)
        target = torch.empty_like(source)
        best = min(seconds_of(lambda: target.copy_(source), device=device, times=5) for _ in range(4))
        return cls(flops, 2 * copied / best)

    def products(self, work: Work, passes: int) -> float:
        """Seconds of `passes` dense products of the batch with a whole weight matrix."""
        return passes * 2 * work.batch * work.d * work.d_sae / self.flops


class State(NamedTuple):
    """What a batch finds in the dictionary."""

    matter: float  # entries of a row that are active or inside the window
    active: float
    touched: float  # fraction of the latents with such an entry in the batch


def state_of(work: Work, x: Tensor, device: str) -> State:
    """Count over blocks of latents."""
    directions = unit_rows(work, device)
    matter = active = touched = 0
    for block in directions.split(8192):
        pre = (x / work.d**0.5) @ block.T
        is_active = pre > work.threshold
        matters = is_active | ((pre - work.threshold).abs() < BANDWIDTH / 2)
        matter += int(matters.sum())
        active += int(is_active.sum())
        touched += int(matters.any(0).sum())
    return State(matter / work.batch, active / work.batch, touched / work.d_sae)


def floors(work: Work, ceilings: Ceilings, state: State) -> dict[str, float]:
    """Seconds that the step cannot beat, done densely and sparsely.

    Dense: five products and 26 bytes of Adam for each parameter. Sparse: one product, four gathers of weight or
    gradient rows in bfloat16 for the entries that matter, and 18 bytes of Adam for each parameter of a touched latent.
    """
    parameters = 2 * work.d_sae * work.d
    gathered = 4 * work.batch * state.matter * work.d * 2
    return {
        "dense": ceilings.products(work, 5) + 26 * parameters / ceilings.bytes,
        "sparse": ceilings.products(work, 1) + (gathered + 18 * state.touched * parameters) / ceilings.bytes,
    }
