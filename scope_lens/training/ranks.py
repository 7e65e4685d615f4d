"""Which rows and which latents a process works on, and the sums that processes make together.

A run on several devices is one process a device, on a mesh of two dimensions:

    data      each rank takes its share of the rows of every batch; weights are the same on all of them
    latent    each rank holds its share of the latents: columns of W_enc, rows of W_dec, their biases, thresholds and
              optimiser state; the rows of a batch are the same on all of them

1. A rank computes with its rows and its latents alone. What the decoder writes and how many latents of a row fire are
   summed over the latent dimension: one sum of reconstructions an update.
2. Losses and gradients are shares: each rank divides by the rows of the whole batch, and the sum over the data
   dimension is what a single process would have.
3. What every rank of the latent dimension has (`b_dec`, `W_skip`) gets the same gradient on each of them.

Gradients follow from two rules. A sum over latents passes its gradient to every summand (`Ranks.join`); what several
shards read gets the sum of their gradients (`Ranks.share`). This is how tensor-parallel layers are cut (Megatron-LM,
arXiv 1909.08053, section 3), and how Gemma Scope's wide dictionaries were (arXiv 2408.05147, section 3.3.1).

`ALONE` is a single process; every method then gives back what it was given.
"""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from scope_lens.training.agreement import Agreement

_DIMENSIONS = ("data", "latent")
# Which axis of a tensor counts latents, by the last part of its name: the only place that says how a state is cut.
_LATENT_AXIS = {"W_enc": 1, "W_dec": 0, "b_enc": 0, "threshold": 0, "theta": 0, "r_mag": 0, "b_mag": 0, "last_fired": 0}


def latent_axis(name: str, n_axes: int) -> int | None:
    """Say which axis of a tensor of a learner's state counts latents; None where every rank has all of it.

    Args:
        name: As `Learner.state` names it, e.g. "W_enc" or "adam.W_enc.exp_avg_sq", with any prefix.
        n_axes: Number of its axes; a vector of optimiser state that belongs to a matrix has one number a latent, a
            scalar belongs to no latent.
    """
    for part in reversed(name.split(".")):
        if part in _LATENT_AXIS:
            return min(_LATENT_AXIS[part], n_axes - 1) if n_axes else None
    return None


class Ranks:
    """The place of this process in a mesh of devices.

    Args:
        mesh: With the dimensions "data" and "latent", or one of them, over all processes; None is a single process.

    Raises:
        ValueError: The mesh has other dimensions, or not all processes are in it.
    """

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        self.mesh = mesh
        self.n_data = self.n_latent = 1
        self.data_rank = self.latent_rank = 0
        self._groups: dict[str, Any] = {}
        if mesh is not None:
            sizes = _sizes(mesh)
            self.n_data, self.n_latent = sizes.get("data", 1), sizes.get("latent", 1)
            self._groups = {name: mesh.get_group(name) for name in sizes}
            self.data_rank, self.latent_rank = (
                mesh.get_local_rank(name) if name in sizes else 0 for name in _DIMENSIONS
            )
        self.agreement = Agreement(several=self.n_data * self.n_latent > 1)

    @property
    def alone(self) -> bool:
        """Whether this process is the only one."""
        return self.n_data * self.n_latent == 1

    @property
    def first(self) -> bool:
        """Whether this process writes what is written once: log, progress bar, evaluation."""
        return self.agreement.rank == 0

    def device(self, asked: str | torch.device | None) -> torch.device:
        """Say where this process computes: where it is asked to, else on the mesh's kind of device, else on a GPU.

        Raises:
            ValueError: What is asked for is another kind of device than the mesh's.
        """
        if self.mesh is None:
            return torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
        kind = self.mesh.device_type
        if asked is not None and torch.device(asked).type != kind:
            raise ValueError(
                f"device={str(asked)!r} on a mesh of {kind!r} devices, whose sums are made there; leave device out."
            )
        if kind == "cuda" and (asked is None or torch.device(asked) == torch.device(kind)):
            return torch.device(kind, torch.cuda.current_device())
        return torch.device(asked or kind)

    # ---- shares ----

    def rows(self, size: int) -> slice:
        """Give this rank's rows of a batch.

        Raises:
            ValueError: The batch does not divide into equal shares.
        """
        return _share_of(size, self.data_rank, self.n_data, what="a batch of {} rows", remedy="batch_size")

    def latents(self, width: int) -> slice:
        """Give this rank's latents of a dictionary.

        Raises:
            ValueError: The width does not divide into equal shares.
        """
        return _share_of(width, self.latent_rank, self.n_latent, what="{} latents", remedy="width")

    def shard(self, name: str, tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shard"]:
        """Cut this rank's latents out of a tensor of the whole state.

        Args:
            name: As `latent_axis` takes it.
            tensor: The whole.
        """
        axis = latent_axis(name, tensor.ndim)
        if self.n_latent == 1 or axis is None:
            return tensor
        own = self.latents(tensor.shape[axis])
        return tensor.narrow(axis, own.start, own.stop - own.start)

    def whole(self, name: str, shard: Shaped[Tensor, "*shard"]) -> Shaped[Tensor, "*shape"]:
        """Put a tensor of the state together again, on every rank.

        Args:
            name: As `latent_axis` takes it.
            shard: This rank's part.
        """
        axis = latent_axis(name, shard.ndim)
        return shard if self.n_latent == 1 or axis is None else torch.cat(self._gather("latent", shard), axis)

    def part(self, mean: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Give this rank's share of a mean over the rows of the whole batch, from the mean over its own rows."""
        return mean if self.n_data == 1 else mean / self.n_data

    # ---- sums that gradients pass through ----

    def join(self, tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Sum over the latent shards; the gradient passes unchanged to each."""
        return tensor if self.n_latent == 1 else _Sum.apply(tensor, self._groups["latent"], None)

    def share(self, tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Give the tensor as it is; its gradient is summed over the latent shards, each of which reads all of it."""
        return tensor if self.n_latent == 1 else _Sum.apply(tensor, None, self._groups["latent"])

    def join_rows(self, mean: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Give the mean over the rows of the whole batch, from the mean over this rank's rows.

        The gradient passes unchanged: that of a share (`part`) of something made from the mean is right as it is.
        """
        return mean if self.n_data == 1 else _Sum.apply(mean / self.n_data, self._groups["data"], None, self.n_data)

    # ---- sums in place, without gradients ----

    def sum_over_latents_(self, tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """Sum over the latent shards, in place."""
        if self.n_latent > 1:
            dist.all_reduce(tensor, group=self._groups["latent"])
        return tensor

    def sum_over_rows_(self, tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """Sum over the ranks that have other rows, in place."""
        if self.n_data > 1:
            dist.all_reduce(tensor, group=self._groups["data"])
        return tensor

    def any_over_rows(self, flags: Bool[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
        """Say where a flag is set on any of the ranks that have other rows."""
        return flags if self.n_data == 1 else self.sum_over_rows_(flags.int()) > 0

    # ---- the largest and the smallest of all ----

    def gather_latents(self, values: Float[Tensor, "batch k"]) -> Float[Tensor, "batch all_k"]:
        """Put the values of every latent shard beside each other, row by row."""
        return values if self.n_latent == 1 else torch.cat(self._gather("latent", values), 1)

    def gather_all(self, values: Float[Tensor, " k"]) -> Float[Tensor, " all_k"]:
        """Put the values of every rank behind each other."""
        for name in self._groups:
            values = torch.cat(self._gather(name, values))
        return values

    def smallest(self, number: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Give the smallest of all ranks' numbers."""
        return number if self.alone else self.gather_all(number.reshape(1)).amin()

    def largest_(self, numbers: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Give the largest of all ranks' numbers, in place: what all of them decide by."""
        for group in self._groups.values():
            dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=group)
        return numbers

    def _gather(self, dimension: str, tensor: Tensor) -> list[Tensor]:
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(self._groups[dimension]))]
        dist.all_gather(parts, tensor, group=self._groups[dimension])
        return parts


class _Sum(torch.autograd.Function):
    """A sum over one group on the way forward, and over another on the way back; None sums over nobody.

    `factor` multiplies the gradient.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ahead: Any, back: Any, factor: float = 1.0) -> Tensor:
        ctx.back, ctx.factor = back, factor
        return _summed(tensor, ahead)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        return _summed(grad * ctx.factor if ctx.factor != 1 else grad, ctx.back), None, None, None


def _summed(tensor: Tensor, group: Any) -> Tensor:
    if group is None:
        return tensor.view_as(tensor)
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _sizes(mesh: DeviceMesh) -> dict[str, int]:
    names = mesh.mesh_dim_names or ()
    if not names or not set(names) <= set(_DIMENSIONS):
        raise ValueError(
            f"A mesh for training has the dimensions {_DIMENSIONS}, or one of them; found {names or 'no names'}. Make "
            "it with init_device_mesh(device_type, (n_data, n_latent), mesh_dim_names=('data', 'latent'))."
        )
    if mesh.size() != dist.get_world_size():
        raise ValueError(
            f"The mesh has {mesh.size()} ranks and the run {dist.get_world_size()} processes; every process trains. "
            "Make the mesh over all of them, or start fewer."
        )
    return {name: mesh.size(index) for index, name in enumerate(names)}


def _share_of(total: int, index: int, parts: int, *, what: str, remedy: str) -> slice:
    if total % parts:
        raise ValueError(
            f"{what.format(f'{total:,}')} cannot be divided equally among {parts} ranks; choose a {remedy} that is a "
            f"multiple of {parts}, or another mesh."
        )
    size = total // parts
    return slice(index * size, (index + 1) * size)


ALONE = Ranks()
