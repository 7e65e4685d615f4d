"""Rows that several dictionaries train on: read once, moved once, checked once.

Dictionaries of one batch size share a reader over all their sites. The order of a reader's rows does not depend on
which sites it reads, so each dictionary sees what a reader of its own would give it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from scope_lens.training.config import TrainConfig
from scope_lens.training.ranks import ALONE, Ranks
from scope_lens.training.store import ActivationStore
from scope_lens.training.store.reader import RowReader
from scope_lens.training.store.transfer import to_device


class Batch:
    """One batch at every site of a group, with what is the same for all its dictionaries.

    On several ranks it has this rank's rows, and its numbers are this rank's shares of those of the whole batch.

    Args:
        rows: Raw activations by site.
        ranks: Whose rows these are.
    """

    def __init__(self, rows: dict[str, Tensor], *, ranks: Ranks = ALONE) -> None:
        self.rows = rows
        self._ranks = ranks
        self._sums: dict[str, Tensor] = {}
        self._spreads: dict[str, Tensor] = {}

    def sum(self, site: str) -> Float[Tensor, ""]:
        """Give the sum of a site's numbers, which is finite only if they all are."""
        if site not in self._sums:
            self._sums[site] = self.rows[site].sum()
        return self._sums[site]

    def spread(self, site: str) -> Float[Tensor, ""]:
        """`mean ||y - mean(y)||^2` over the batch, raw units."""
        if site not in self._spreads:
            rows = self.rows[site]
            mean = self._ranks.join_rows(rows.mean(0))
            self._spreads[site] = self._ranks.part((rows - mean).square_().sum(-1).mean())
        return self._spreads[site]


class Group:
    """The dictionaries of one batch size and the reader they share.

    Args:
        batch_size: Rows of a batch.
        members: Their configs by index.
        reader: Over all their sites.
        ranks: Which of the rows this process trains on.
    """

    def __init__(
        self, batch_size: int, members: dict[int, TrainConfig], reader: RowReader, *, ranks: Ranks = ALONE
    ) -> None:
        self.batch_size = batch_size
        self.members = members
        self.reader = reader
        self._ranks = ranks
        self._own = ranks.rows(batch_size)
        self._latest: dict[str, Tensor] | None = None

    def next(self, device: torch.device) -> Batch:
        """Read the next batch and move this rank's rows; on the store's device it overwrites the one before."""
        self._latest = self.reader.next(self._latest)
        rows = {site: to_device(rows[self._own], device) for site, rows in self._latest.items()}
        return Batch(rows, ranks=self._ranks)


def groups_of(
    configs: Sequence[TrainConfig], store: ActivationStore, *, seed: int, ranks: Ranks = ALONE
) -> list[Group]:
    """Open one reader for each batch size, over the union of its dictionaries' sites.

    Args:
        configs: All dictionaries of the run.
        store: Where the rows come from.
        seed: Of their order.
        ranks: Which of the rows this process trains on.

    Raises:
        KeyError: The store lacks a site.
        ValueError: The store has fewer rows than a batch; or several ranks would each make rows of their own.
    """
    if store.streams and not ranks.alone:
        raise ValueError(
            "ActivationStore.stream makes its rows while they are read, so several ranks would train on different "
            "ones. Harvest into a folder that every rank opens (ActivationStore.harvest(path=...)), or train in one "
            "process."
        )
    groups: list[Group] = []
    for size in sorted({cfg.batch_size for cfg in configs}):
        members = {index: cfg for index, cfg in enumerate(configs) if cfg.batch_size == size}
        sites = sorted({site for cfg in members.values() for site in (cfg.hook_in, cfg.hook_out)})
        groups.append(Group(size, members, store.reader(sites, size=size, seed=seed), ranks=ranks))
    return groups


_FIELDS = ("source", "model", "model_fingerprint", "tokenizer", "data")


def identity_of(store: ActivationStore, configs: Sequence[TrainConfig]) -> dict[str, Any]:
    """Give what tells a run's rows from those of another store, as JSON holds it.

    Raises:
        KeyError: The store lacks a site.
        ValueError: It has rows from positions that a dictionary is not to be trained at.
    """
    for cfg in configs:
        # Of rows at hand nobody knows which positions they come from.
        if store.manifest.model_fingerprint and (kept := set(cfg.untrained) - set(store.manifest.untrained)):
            raise ValueError(
                f"The dictionary for {cfg.hook_out!r} is not to be trained at {sorted(kept)}, but the store has rows "
                "from there. Harvest with untrained=cfg.untrained."
            )
    widths = [[store.width(cfg.hook_in), store.width(cfg.hook_out)] for cfg in configs]
    return {name: getattr(store.manifest, name) for name in _FIELDS} | {"widths": widths}


def refuse_another(began: dict[str, Any], found: dict[str, Any]) -> None:
    """Compare what `identity_of` gave of the store a run began with and of the one it is to go on with.

    Raises:
        ValueError: They differ; the message says in what.
    """
    changed = "; ".join(
        f"{name} {began.get(name)!r}, now {found[name]!r}" for name in found if found[name] != began.get(name)
    )
    if changed:
        raise ValueError(f"This run began on another store: {changed}. Go on with the store it began with.")
