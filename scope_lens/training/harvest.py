"""Fill arrays with the activations of a model's hook points.

1. Documents become token sequences; special positions are left out, and a random sample of the others is drawn.
2. Every kept position has its row number before the first forward, so a harvest that is taken up again writes what an
   unbroken one would have written. Rows stand in the order of the text; a reader shuffles them.
3. The model runs batch by batch, and each forward is broken off as soon as the last site has fired.
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

from scope_lens.model import ScopeModel
from scope_lens.packing import pack
from scope_lens.sites import Sites
from scope_lens.special_tokens import special_token_ids, untrained_positions

_LONGEST_CONTEXT = 1_024  # Gemma Scope's, arXiv 2408.05147, section 3.1
_BATCHES_BETWEEN_NOTES = 64


@dataclass(frozen=True, kw_only=True)
class HarvestPlan:
    """What a harvest will do, settled before the first forward.

    Attributes:
        model: The language model.
        model_name: Its name.
        tokens: Token ids.
        row_of: Row number of each position, -1 where it is left out.
        widths: Each site's width, flattened over heads.
        pad: Ids of padding tokens.
        rows: Number of rows.
        fingerprint: Hash of the tokens, the settings and the model.
    """

    model: ScopeModel
    model_name: str
    tokens: Int[Tensor, "seq pos"]
    row_of: Int[Tensor, "seq pos"]
    widths: Mapping[str, int]
    pad: tuple[int, ...]
    rows: int
    fingerprint: str

    @classmethod
    def make(
        cls,
        model: ScopeModel,
        text_or_tokens: Sequence[str] | Int[Tensor, "seq pos"],
        *,
        sites: Sequence[str],
        rows: int,
        seed: int,
    ) -> "HarvestPlan":
        """Tokenise, resolve the sites, measure their widths on one token, and draw the sample.

        Raises:
            KeyError: The model has no such hook.
            ValueError: No site, no row to keep, a site that does not fire, or token ids of a wrong shape.
        """
        if not sites or len(set(sites)) != len(sites):
            raise ValueError(f"A harvest needs one or more sites, each named once; found {list(sites)}.")
        bridge = model.model
        known = Sites(bridge)
        for site in sites:
            known.resolve(bridge, site)
        special = special_token_ids(bridge)
        if isinstance(text_or_tokens, Tensor):
            tokens = text_or_tokens.cpu().long()
        else:
            documents = [text_or_tokens] if isinstance(text_or_tokens, str) else text_or_tokens
            tokens = pack(model, documents, context=min(int(bridge.cfg.n_ctx), _LONGEST_CONTEXT))
        if tokens.ndim != 2 or tokens.shape[1] > bridge.cfg.n_ctx:
            raise ValueError(
                f"Token ids have the shape (seq, pos), with at most {bridge.cfg.n_ctx} positions for this model; found "
                f"{tuple(tokens.shape)}."
            )
        counted = ~untrained_positions(tokens, special, ("bos", "eos", "pad"))
        positions = counted.flatten().nonzero().flatten()
        order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(seed))[:rows]
        if len(order) == 0:
            raise ValueError(
                f"There is no activation to harvest: {tuple(tokens.shape)} tokens hold {len(positions)} that are "
                f"not BOS, EOS or padding, and rows={rows}. Give the harvest text, or more rows."
            )
        row_of = torch.full((tokens.numel(),), -1)
        row_of[positions[order.sort().values]] = torch.arange(len(order))
        name = str(bridge.cfg.model_name)
        settings = f"{name} {list(model.attached)} {tuple(tokens.shape)} {list(sites)} {rows} {seed}"
        fingerprint = hashlib.sha256(settings.encode() + tokens.numpy().tobytes())
        # The first weights of each parameter tell one checkpoint of a model from another.
        for parameter in bridge.parameters():
            fingerprint.update(parameter.detach().flatten()[:64].cpu().float().numpy().tobytes())
        caught = _activations(model, tokens[:1, :2], sites=sites, pad=special.pad)
        return cls(
            model=model,
            model_name=name,
            tokens=tokens,
            row_of=row_of.view_as(tokens),
            widths={site: rows.shape[-1] for site, rows in caught.items()},
            pad=special.pad,
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
        The number of sequences done, at intervals and at the end.
    """
    starts = range(first, len(plan.tokens), batch_size)
    for i, start in enumerate(tqdm(starts, desc="harvest", unit="batch", disable=not progress)):
        row_of = plan.row_of[start : start + batch_size].flatten()
        kept = row_of >= 0
        if kept.any():
            tokens = plan.tokens[start : start + batch_size]
            for site, rows in _activations(plan.model, tokens, sites=tuple(plan.widths), pad=plan.pad).items():
                arrays[site][row_of[kept]] = rows[kept].to(arrays[site].dtype)
        if (i + 1) % _BATCHES_BETWEEN_NOTES == 0:
            yield min(start + batch_size, len(plan.tokens))
    yield len(plan.tokens)


class _Done(Exception):  # noqa: N818  a signal, not an error
    """Every site has fired."""


def _activations(
    model: ScopeModel, tokens: Int[Tensor, "seq pos"], *, sites: Sequence[str], pad: tuple[int, ...]
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
    mask = ~torch.isin(tokens, torch.tensor(pad, dtype=tokens.dtype))
    kwargs: dict[str, Any] = {} if bool(mask.all()) else {"attention_mask": mask.long().to(device)}
    with (
        torch.no_grad(),
        bridge.hooks(fwd_hooks=[(site, keep(site)) for site in sites]),
        contextlib.suppress(_Done),
    ):
        bridge(tokens.to(device), use_cache=False, **kwargs)
    silent = [site for site in sites if site not in caught]
    if silent:
        raise ValueError(f"The hooks {silent} did not fire in a forward; choose sites that are not gated.")
    return {site: caught[site] for site in sites}
