"""Whether the kernels compute on this device what their twins do, at sizes that the interpreter cannot reach.

1. Every kernel against its eager twin, at the width of Gemma 2 2B, with rows and latents that no tile divides.
2. Runs of some hundred updates on the kernels against the learner without them, densely and sparsely.

The tests hold the same on small sizes; a page of times should not be written by kernels that are wrong.
"""

from collections.abc import Callable, Iterator

import cuda_arms as arms
import torch
from torch import Tensor

# Of the largest number of an array: sums in another order, and results that are rounded to bfloat16.
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
SITE = "blocks.12.hook_resid_post"


def kernel_rows(device: str, *, d: int, d_sae: int, batch: int) -> list[dict]:
    """One row for each kernel and dtype: the largest difference from the twin, as a share of the largest number."""
    from scope_lens.training.kernels.kernel_set import eager_kernels

    kernels, twins = arms.kernels_for(device), eager_kernels()
    rows = []
    for operands in (torch.bfloat16, torch.float32):
        case = _Case(device, operands, d=d, d_sae=d_sae, batch=batch)
        for name, run in case.kernels().items():
            found, expected = run(kernels), run(twins)
            apart = max(_apart(a, b) for a, b in zip(_tensors(found), _tensors(expected), strict=True))
            rows.append(
                {"kernel": name, "operands": str(operands).removeprefix("torch.")}
                | {"largest difference": f"{apart:.1e}", "agrees": apart < CLOSE[operands]}
            )
    return rows


def run_rows(device: str, *, updates: int, d: int, width: int, batch: int) -> list[dict]:
    """Losses and L0 of whole runs: the largest relative differences from the learner without kernels."""
    from scope_lens.training import TrainConfig
    from scope_lens.training.learner import Learner

    cfg = TrainConfig(
        hook_in=SITE, hook_out=SITE, width=width, sparsity=0.02, steps=10**6, batch_size=batch, learning_rate=1e-3,
        lr_warmup=10, sparsity_warmup=updates // 4, bandwidth=0.05, threshold_init=0.1,
    )  # fmt: skip
    sizes = {"d_in": d, "d_out": d, "scale": 2.5, "model": "", "device": device}
    rows = []
    for operands in (torch.float32, torch.bfloat16):
        for way, break_even in (("dense", 0.0), ("sparse", 1.0)):
            plain = Learner(cfg, **sizes)
            fused = Learner(
                cfg, **sizes, kernels=arms.kernels_for(device), operands=operands, break_even=break_even
            )  # fmt: skip
            pairs = [(plain.update(x, x), fused.update(x, x)) for x in _batches(updates, d, batch, device)]
            fused.settle()
            bound = 1e-3 if operands == torch.float32 else 1e-2
            loss = max(abs(float(b.loss / a.loss) - 1) for a, b in pairs)
            l0 = max(abs(float(b.l0 / a.l0) - 1) for a, b in pairs)
            rows.append(
                {"run": f"{updates} updates, {d} -> {width}, batch {batch}", "way": way}
                | {"operands": str(operands).removeprefix("torch."), "loss": f"{loss:.1e}", "L0": f"{l0:.1e}"}
                | {"agrees": loss < bound and l0 < 1e-2}
            )
    return rows


def _batches(number: int, d: int, batch: int, device: str) -> Iterator[Tensor]:
    """Rows made of a few of 40 directions each, so that there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(40, d, generator=generator)
    for _ in range(number):
        weights = torch.rand(batch, 40, generator=generator)
        on = (torch.rand(batch, 40, generator=generator) < 0.08) * weights
        yield (on @ directions + 0.05 * torch.randn(batch, d, generator=generator)).to(device)


class _Case:
    """The operands of every kernel, as an update has them."""

    def __init__(self, device: str, operands: torch.dtype, *, d: int, d_sae: int, batch: int) -> None:
        work = arms.Work(d, d_sae, batch, 0.01 * d_sae)
        generator = torch.Generator().manual_seed(3)
        self.x = (arms.rows_of(work, device) / d**0.5).to(operands)
        self.y = torch.randn(batch, d, generator=generator).to(device)
        self.master = arms.unit_rows(work, device)
        self.weight = self.master.to(operands)
        self.bias = 0.01 * torch.randn(d_sae, generator=generator).to(device)
        self.b_dec = torch.randn(d, generator=generator).to(device)
        self.threshold = torch.full((d_sae,), work.threshold, device=device)
        self.half = 0.1 * work.threshold
        self.slope = torch.rand(batch, generator=generator).to(device)
        self.capacity = max(48, d_sae // 16)  # no row overflows: what is kept then is undefined
        self.k = max(2, d_sae // 200)

    def kernels(self) -> dict[str, Callable]:
        """Each kernel as a function of the set of kernels; what it reads comes from the twins."""
        from scope_lens.training.kernels.entries import columns_of
        from scope_lens.training.kernels.kernel_set import eager_kernels
        from scope_lens.training.kernels.update import FromEntries

        twins, weight, threshold = eager_kernels(), self.weight, self.threshold
        entries = twins.encode(
            self.x, weight, self.bias, threshold, half_window=self.half, capacity=self.capacity
        )  # fmt: skip
        columns = columns_of(entries, len(weight))
        residual = twins.residual(entries, weight, self.b_dec, self.y, rows=len(self.x))
        source = FromEntries(columns, entries.act, residual.d_recons)
        acts = twins.encode_dense(self.x, weight, self.bias, threshold, half_window=self.half)
        half, capacity = self.half, self.capacity
        return {
            "encode": lambda set_: self._exactly(
                set_.encode(self.x, weight, self.bias, threshold, half_window=half, capacity=capacity)
            ),
            "topk_encode": lambda set_: set_.topk_encode(
                self.x, weight, self.bias, k=self.k, floor=threshold[:1], capacity=capacity
            ).act.sum(1),  # where two latents tie for the last place, either may have it
            "decode": lambda set_: set_.decode(entries, weight, self.b_dec),
            "residual": lambda set_: set_.residual(entries, weight, self.b_dec, self.y, rows=len(self.x)),
            "latent_gradients": lambda set_: set_.latent_gradients(entries, weight, residual.d_recons),
            "latent_sums": lambda set_: set_.latent_sums(
                entries, residual.d_act, columns, threshold, self.slope, half_window=half
            ),
            "weight_gradients": lambda set_: set_.weight_gradients(source, len(weight)),
            "update_rows, from entries": lambda set_: self._updated(set_, source),
            "update_rows, from a gradient": lambda set_: self._updated(set_, self.master.flip(0) + 0.1),
            # By how far a latent exceeds its threshold: at the last bit the two may decide apart.
            "encode_dense": lambda set_: (
                set_.encode_dense(self.x, weight, self.bias, threshold, half_window=half).acts.float() - threshold
            ).clamp(min=0),
            "dense_gradients": lambda set_: set_.dense_gradients(residual.d_recons, weight, acts, self.slope),
            "product": lambda set_: set_.product(self.x, weight.T),
            "weighted_rows": lambda set_: set_.weighted_rows(weight, self.bias),
        }  # fmt: skip

    def _exactly(self, entries) -> Tensor:
        """The latents as a matrix: an entry that one side has and the other has not shows at its size.

        At the last bit of a pre-activation the two may decide apart, so a decision counts by how far it is from one.
        """
        out = torch.zeros(len(entries.latent), len(self.weight) + 1, device=entries.pre.device)
        out.scatter_(1, entries.latent.long(), entries.pre)
        return (out[:, :-1] - (self.threshold[0] - self.half)).clamp(min=0)

    def _updated(self, set_, gradient) -> tuple[Tensor, Tensor, Tensor]:
        from scope_lens.training.kernels.update import RowAdam

        master, shadow, betas = self.master.clone(), self.weight.clone(), (0.0, 0.999)
        last = torch.zeros(len(master), dtype=torch.int32, device=master.device)
        state = RowAdam(second=torch.zeros_like(master), first=None, last=last)
        for step in (1, 2):
            set_.update_rows(
                master, state, gradient, shadow=shadow, unit_rows=True, step=step, lr=1e-2, betas=betas, eps=1e-4,
                halted=torch.zeros(1, dtype=torch.int32, device=master.device),
            )  # fmt: skip
        within = (shadow.float() - master).abs() <= master.abs() / 128  # a unit in bfloat16's last place
        return master, state.second, within


def _tensors(value) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in _tensors(part)]


def _apart(found: Tensor, expected: Tensor) -> float:
    scale = expected.double().abs().max().clamp(min=1e-30)
    return float((found.double() - expected.double()).abs().max() / scale)
