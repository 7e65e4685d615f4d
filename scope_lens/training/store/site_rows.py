"""Activations of a model's hook points at the kept positions of a batch of sequences.

1. Names are resolved to HookPoints once; two names of one HookPoint are one site.
2. A forward is broken off as soon as the last site has fired.
3. What it gives is checked: every site fires, keeps its width, and is finite.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from scope_lens.model import ScopeModel
from scope_lens.sites import Sites
from scope_lens.training.store.corpus import Corpus, SequenceBatch
from scope_lens.training.store.transfer import to_device


class _Done(Exception):  # noqa: N818  a signal, not an error
    """Every site has fired."""


class SiteRows:
    """Runs a model up to its last site.

    Args:
        model: The language model; dictionaries attached to it act.
        sites: Hook names; several names of one hook count once, under the first of them.
        corpus: What is read, for the first forward, which measures widths, and for errors.
        dtype: Of the rows.

    Raises:
        KeyError: The model has no such hook.
        ValueError: No site, or a site that does not fire.
    """

    def __init__(self, model: ScopeModel, sites: str | Sequence[str], *, corpus: Corpus, dtype: torch.dtype) -> None:
        sites = (sites,) if isinstance(sites, str) else tuple(sites)
        if not sites:
            raise ValueError("A harvest needs one or more sites; found none.")
        bridge = model.model
        known = Sites(bridge)
        points = {known.resolve(bridge, site): site for site in reversed(sites)}
        self.sites = tuple(site for site in dict.fromkeys(sites) if site in points.values())
        self.aliases = tuple(
            next(tuple(sorted({site, *known.names(point)})) for point, name in points.items() if name == site)
            for site in self.sites
        )
        self.device = next(iter(bridge.parameters())).device
        self._model, self._corpus, self._dtype = model, corpus, dtype
        self.widths: Mapping[str, int] = {}
        first = corpus.batch(corpus.order(0, 0), 0, size=1)
        self.widths = {site: rows.shape[-1] for site, rows in self._caught(first).items()}

    def __call__(self, batch: SequenceBatch) -> dict[str, Float[Tensor, "row _"]]:
        """Give each site's rows at the kept positions, on the model's device, heads flattened at hook_z.

        Raises:
            ValueError: A site did not fire, has another width than before, or is not finite.
        """
        rows = self.unchecked(batch)
        self.check(batch, {site: torch.isfinite(x).all() for site, x in rows.items()}, rows)
        return rows

    def unchecked(self, batch: SequenceBatch) -> dict[str, Float[Tensor, "row _"]]:
        """Give each site's rows without a look at their values, so that nothing waits for the device."""
        kept = to_device(batch.kept, self.device)
        found: dict[str, Tensor] = {}
        for site, tensor in self._caught(batch).items():
            if tensor.shape[-1] != self.widths[site]:
                raise ValueError(
                    f"The site {site!r} is {tensor.shape[-1]} wide in this forward and was {self.widths[site]} wide "
                    f"before ({self._where(batch)}). A store needs rows of one width; choose another site."
                )
            found[site] = tensor.index_select(0, kept.to(tensor.device)).to(self._dtype)
        return found

    def check(
        self, batch: SequenceBatch, finite: Mapping[str, Bool[Tensor, ""]], rows: Mapping[str, Float[Tensor, "row _"]]
    ) -> None:
        """Raise ValueError where a site is not finite.

        Args:
            batch: What was run.
            finite: Whether each site's rows are; read here, so the device is waited for.
            rows: The rows, to find the position; empty where they are gone.
        """
        for site, good in finite.items():
            if bool(good):
                continue
            where = self._where(batch)
            if site in rows:
                row = int((~torch.isfinite(rows[site]).all(1)).nonzero()[0])
                origin = self._corpus.origin(batch.places[row : row + 1])
                where = f"document {int(origin.doc)}, position {int(origin.pos)}"
            raise ValueError(
                f"The activations at {site!r} are not finite as {str(self._dtype).removeprefix('torch.')} in {where}. "
                "Run the model in float32 or bfloat16, keep the rows in bfloat16 or float32, or leave that text out. "
                "What was harvested before it stays."
            )

    def _where(self, batch: SequenceBatch) -> str:
        documents = self._corpus.origin(batch.places).doc
        return f"documents {int(documents.min())} to {int(documents.max())}"

    def _caught(self, batch: SequenceBatch) -> dict[str, Float[Tensor, "position _"]]:
        """Each site's activations at all positions of a forward, flat."""
        caught: dict[str, Tensor] = {}

        def keep(site: str) -> Any:
            def hook(tensor: Tensor, hook: Any) -> None:
                del hook
                caught[site] = tensor.detach().reshape(batch.tokens.numel(), -1)
                if len(caught) == len(self.sites):
                    raise _Done

            return hook

        bridge = self._model.model
        mask = None if batch.mask is None else to_device(batch.mask, self.device)
        with (
            torch.no_grad(),
            bridge.hooks(fwd_hooks=[(site, keep(site)) for site in self.sites]),
            contextlib.suppress(_Done),
        ):
            bridge(to_device(batch.tokens, self.device), attention_mask=mask, use_cache=False)
        silent = [site for site in self.sites if site not in caught]
        if silent:
            raise ValueError(f"The hooks {silent} did not fire in a forward; choose sites that are not gated.")
        return {site: caught[site] for site in self.sites}
