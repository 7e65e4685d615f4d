"""What the processes of a run decide together, so that none of them waits for another that has gone elsewhere.

Sums over tensors hang when one process takes part and another does not: after an error on one of them, a signal that
one got a step earlier, a setting that differs. So whatever could part them is agreed on first, over a group of its own
on the CPU that carries nothing else.
"""

import json
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

_PATIENCE = timedelta(hours=12)  # the first rank may evaluate or write for long while the others wait
_AT_ONCE = timedelta(seconds=20)  # ranks that break off at the same step come within that


class Agreement:
    """A group of processes that exchange small things; a single process agrees with itself.

    Args:
        several: Whether there are other processes, all of which make an Agreement now.
    """

    def __init__(self, *, several: bool) -> None:
        self._group: Any = dist.new_group(backend="gloo", timeout=_PATIENCE) if several else None
        self._hasty: Any = dist.new_group(backend="gloo", timeout=_AT_ONCE) if several else None
        self.rank = dist.get_rank() if several else 0

    @property
    def group(self) -> Any:
        """The group, for libraries that exchange objects; None for a single process."""
        return self._group

    def gather(self, value: T) -> list[T]:
        """Give every rank's value, in the order of the ranks; it has to be picklable."""
        if self._group is None:
            return [value]
        return _gather(value, self._group)

    def from_first(self, value: T) -> T:
        """Give the first rank's value to all."""
        return self.gather(value)[0]

    def largest(self, number: int) -> int:
        """Give the largest of all ranks' numbers."""
        if self._group is None:
            return number
        tensor = torch.tensor(number)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group)
        return int(tensor)

    def refuse_differences(self, *, remedy: str = "Start every rank with the same call.", **settings: Any) -> None:
        """Compare what every rank was given.

        Args:
            remedy: Last sentence of the error.
            settings: By name; JSON holds them.

        Raises:
            ValueError: A rank was given something else than the first; all ranks raise the same.
        """
        given = self.gather({name: json.loads(json.dumps(value)) for name, value in settings.items()})
        for rank, other in enumerate(given):
            for name, value in given[0].items():
                if other[name] != value:
                    raise ValueError(
                        f"Rank {rank} was given other {name} than rank 0: {_difference(value, other[name])}. {remedy}"
                    )

    @contextmanager
    def together(self) -> Generator[None]:
        """Run a block on every rank; where it fails on one, it fails on all of them.

        Raises:
            ValueError: Another rank failed, with what it said. A rank that failed itself raises its own error.
        """
        if self._group is None:
            yield
            return
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # noqa: BLE001
            failure = error
        said = self.gather(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, message in enumerate(said):
            if message is not None:
                raise ValueError(f"Rank {rank} failed, and so the others stop too. {message}")

    def all_reach(self, place: int) -> bool:
        """Say whether every rank comes here soon, at the same place; the others may have gone elsewhere or died.

        Where it says no, the ranks can agree on nothing more.
        """
        if self._group is None:
            return True
        try:
            return len(set(_gather(place, self._hasty))) == 1
        except RuntimeError:
            return False


def _gather(value: T, group: Any) -> list[T]:
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _difference(one: Any, other: Any) -> str:
    if isinstance(one, dict) and isinstance(other, dict):
        names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
        return "; ".join(f"{name} {one.get(name)!r}, there {other.get(name)!r}" for name in names)
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        differing = [(i, a, b) for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
        return "; ".join(f"number {i}: {_difference(a, b)}" for i, a, b in differing)
    return f"{one!r}, there {other!r}"
