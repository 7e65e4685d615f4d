"""Fill arrays with the activations of a model's hook points.

1. Documents become token sequences; special positions are left out, and a random sample of the others is drawn.
2. Every kept position has its row number before the first forward, so a harvest that is taken up again writes what an
   unbroken one would have written. Rows stand in the order of the text; a reader shuffles them.
3. The model runs batch by batch, and each forward is broken off as soon as the last site has fired. Leading padding is
   masked out; padding behind the text cannot act on it.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from scope_lens.fingerprints import model_fingerprint
from scope_lens.model import ScopeModel
from scope_lens.packing import Tokens, leading_pad, token_rows
from scope_lens.sites import Sites
from scope_lens.special_tokens import SpecialTokens, special_token_ids, untrained_positions

_LONGEST_CONTEXT = 1_024  # Gemma Scope's, arXiv 2408.05147, section 3.1


@dataclass(frozen=True, kw_only=True)
class HarvestPlan:
    """What a harvest will do, settled before the first forward.

    Attributes:
        model: The language model.
        model_name: Its name.
        tokens: Token ids, one tensor for each run of sequences of one length.
        row_of: Row number of each position of each tensor, -1 where it is left out.
        widths: Each site's width, flattened over heads.
        special: Ids of special tokens.
        rows: Number of rows.
        fingerprint: Hash of the tokens, the settings and the model.
    """

    model: ScopeModel
    model_name: str
    tokens: Sequence[Int[Tensor, "_ _"]]
    row_of: Sequence[Int[Tensor, "_ _"]]
    widths: Mapping[str, int]
    special: SpecialTokens
    rows: int
    fingerprint: str

    @classmethod
    def make(
        cls,
        model: ScopeModel,
        text_or_tokens: Tokens,
        *,
        sites: str | Sequence[str],
        rows: int,
        seed: int,
    ) -> "HarvestPlan":
        """Tokenise, resolve the sites, measure their widths on one token, and draw the sample.

        Raises:
            KeyError: The model has no such hook.
            ValueError: No site, no row to keep, a site that does not fire, or tokens that `token_rows` refuses.
        """
        sites = (sites,) if isinstance(sites, str) else tuple(sites)
        if not sites or len(set(sites)) != len(sites):
            raise ValueError(f"A harvest needs one or more sites, each named once; found {list(sites)}.")
        if rows < 1:
            raise ValueError(f"rows is {rows}; expected 1 row or more.")
        bridge = model.model
        known = Sites(bridge)
        for site in sites:
            known.resolve(bridge, site)
        special = special_token_ids(bridge)
        tokens = token_rows(model, text_or_tokens, context=_LONGEST_CONTEXT, purpose="harvest")
        counted = [~untrained_positions(part, special, ("bos", "eos", "pad")).flatten() for part in tokens]
        positions = torch.cat(counted).nonzero().flatten()
        shapes = " ".join(str(tuple(part.shape)) for part in tokens)
        order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(seed))[:rows]
        if len(order) == 0:
            raise ValueError(
                f"There is no activation to harvest: all of the {shapes} tokens are BOS, EOS or padding. Give the "
                "harvest text."
            )
        row_of = torch.full((sum(part.numel() for part in tokens),), -1)
        row_of[positions[order.sort().values]] = torch.arange(len(order))
        name = str(bridge.cfg.model_name)
        settings = f"{name} {list(model.attached)} {shapes} {list(sites)} {rows} {seed}"
        fingerprint = hashlib.sha256(settings.encode())
        for part in tokens:
            fingerprint.update(part.numpy().tobytes())
        fingerprint.update(model_fingerprint(bridge).encode())
        caught = _activations(model, tokens[0][:1, :2], sites=sites, special=special)
        return cls(
            model=model,
            model_name=name,
            tokens=tokens,
            row_of=[
                rows.view_as(part)
                for rows, part in zip(row_of.split([part.numel() for part in tokens]), tokens, strict=True)
            ],
            widths={site: rows.shape[-1] for site, rows in caught.items()},
            special=special,
            rows=len(order),
            fingerprint=fingerprint.hexdigest(),
        )


def fill(
    plan: HarvestPlan, arrays: Mapping[str, Tensor], *, batch_size: int, first: int = 0, progress: bool
) -> Iterator[int]:
    """Write each kept activation to its row.

    Args:
        plan: What to harvest.
        arrays: One of shape (rows, width) for each site; written in place.
        batch_size: Sequences of a forward.
        first: First sequence to run.
        progress: Whether a progress bar is shown.

    Yields:
        The number of sequences done, after each batch.
    """
    done, total = first, sum(len(part) for part in plan.tokens)
    label = "harvest, resumed" if first else "harvest"
    with tqdm(total=total, initial=first, desc=label, unit="sequence", disable=not progress) as bar:
        for tokens, row_of in _batches(plan, batch_size, first):
            kept = row_of >= 0
            if kept.any():
                caught = _activations(plan.model, tokens, sites=tuple(plan.widths), special=plan.special)
                for site, rows in caught.items():
                    arrays[site][row_of[kept]] = rows[kept].to(arrays[site].dtype)
            done += len(tokens)
            bar.update(len(tokens))
            yield done


def _batches(plan: HarvestPlan, size: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and, flat, their row numbers, from sequence `first` on."""
    passed = 0
    for tokens, row_of in zip(plan.tokens, plan.row_of, strict=True):
        for start in range(max(first - passed, 0), len(tokens), size):
            yield tokens[start : start + size], row_of[start : start + size].flatten()
        passed += len(tokens)


class _Done(Exception):  # noqa: N818  a signal, not an error
    """Every site has fired."""


def _activations(
    model: ScopeModel, tokens: Int[Tensor, "seq pos"], *, sites: Sequence[str], special: SpecialTokens
) -> dict[str, Tensor]:
    """Each site's activations of a forward, one row for each position, flattened over heads at hook_z."""
    caught: dict[str, Tensor] = {}

    def keep(site: str) -> Any:
        def hook(tensor: Tensor, hook: Any) -> None:
            del hook
            caught[site] = tensor.detach().reshape(tokens.numel(), -1).cpu()
            if len(caught) == len(sites):
                raise _Done

        return hook

    bridge = model.model
    device = next(iter(bridge.parameters())).device
    padded = leading_pad(tokens, special)
    mask = (~padded).long().to(device) if bool(padded.any()) else None
    with (
        torch.no_grad(),
        bridge.hooks(fwd_hooks=[(site, keep(site)) for site in sites]),
        contextlib.suppress(_Done),
    ):
        bridge(tokens.to(device), attention_mask=mask, use_cache=False)
    silent = [site for site in sites if site not in caught]
    if silent:
        raise ValueError(f"The hooks {silent} did not fire in a forward; choose sites that are not gated.")
    return {site: caught[site] for site in sites}
