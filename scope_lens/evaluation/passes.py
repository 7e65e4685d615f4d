"""The four forward passes over one batch, and the sums they leave.

A batch's sums are one immutable record that is added in one step, so that an interrupt keeps whole batches only.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from scope_lens.attachments import OwnHook, Positions, attachments_of, flat_activation
from scope_lens.evaluation.predictions import compare, cross_entropy
from scope_lens.evaluation.site_sums import SiteSums
from scope_lens.model import ScopeModel
from scope_lens.packing import leading_pad
from scope_lens.sae import HookedSAE
from scope_lens.special_tokens import special_token_ids, untrained_positions

Ablation = Literal["zero", "mean"]
# Index of the dictionary, x, y -> what flows on at the site; None leaves y.
AtSite = Callable[[int, Tensor, Tensor], Tensor | None]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Token ids and what follows from them.

    Attributes:
        tokens: Ids, on the model's device.
        attention_mask: 0 at leading PADs; None where there are none, since a causal model needs no mask for the others.
        counted: Where every dictionary was trained on the input.
        scored: Where there is a loss term: counted, and the next token exists and is no BOS or PAD.
        written: Where each dictionary is spliced or ablated; None is everywhere.
    """

    tokens: Int[Tensor, "seq pos"]
    attention_mask: Int[Tensor, "seq pos"] | None
    counted: Bool[Tensor, "seq pos"]
    scored: Bool[Tensor, "seq pos"]
    written: list[Bool[Tensor, "seq pos"] | None]


@dataclass(frozen=True, kw_only=True)
class Sums:
    """What the first loop sums.

    Attributes:
        losses: Summed over each sequence, nats: clean, spliced, spliced out, and the divergence.
        terms: Loss terms of each sequence.
        masked: Predictions left out.
        sites: One for each dictionary.
    """

    losses: Float[Tensor, "seq 4"]
    terms: Int[Tensor, " seq"]
    masked: int
    sites: list[SiteSums]

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            losses=torch.cat([self.losses, other.losses]),
            terms=torch.cat([self.terms, other.terms]),
            masked=self.masked + other.masked,
            sites=[mine + theirs for mine, theirs in zip(self.sites, other.sites, strict=True)],
        )

    @property
    def n_terms(self) -> int:
        """Loss terms in all."""
        return int(self.terms.sum())


class Passes:
    """Runs the forward passes of one evaluation; nothing else is attached while it does.

    Args:
        model: The model.
        saes: The dictionaries, spliced in together.
        positions: Where they are spliced.
        on_forward: Called after each forward pass.
    """

    def __init__(
        self,
        model: ScopeModel,
        saes: Sequence[HookedSAE],
        *,
        positions: Positions,
        on_forward: Callable[[], object],
    ) -> None:
        self._model = model
        self._saes = saes
        self._positions: Positions = positions
        self._on_forward = on_forward
        prefix = any("chat_prefix" in sae.cfg.untrained for sae in saes)
        self._special = special_token_ids(model.model, chat_prefix=prefix)
        self._device = next(iter(model.model.parameters())).device
        resolve = attachments_of(model.model).sites.resolve
        self._points = [(resolve(model.model, sae.cfg.hook_in), resolve(model.model, sae.cfg.hook_out)) for sae in saes]

    def batch(self, ids: Int[Tensor, "seq pos"]) -> Batch:
        """Mark what counts and what is spliced."""
        tokens = ids.to(self._device)
        padded = leading_pad(tokens, self._special)
        attention_mask = (~padded).long() if bool(padded.any()) else None

        def marked(kinds: Sequence[str]) -> Tensor:
            return untrained_positions(tokens, self._special, kinds, attention_mask=attention_mask)

        counted = ~marked(sorted({kind for sae in self._saes for kind in sae.cfg.untrained}))
        scored = counted & ~marked(("bos", "pad")).roll(-1, dims=1)
        scored[:, -1] = False
        return Batch(
            tokens=tokens,
            attention_mask=attention_mask,
            counted=counted,
            scored=scored,
            written=[None if self._positions == "all" else ~marked(sae.cfg.untrained) for sae in self._saes],
        )

    def clean_in_out(self, batch: Batch) -> Sums:
        """Clean, splice-in and splice-out; at most two logits tensors are alive at a time."""
        sites: dict[int, SiteSums] = {}

        def observe(index: int, x: Tensor, y: Tensor) -> None:
            counted = batch.counted.to(y.device)
            sites[index] = SiteSums.of(self._saes[index], x[counted], y[counted])

        def write_out(index: int, x: Tensor, y: Tensor) -> Tensor:
            sae = self._saes[index]
            written = sae.write(sae.activate(sae.pre_activation(x)))
            exact = torch.promote_types(torch.promote_types(y.dtype, written.dtype), torch.float32)
            return (y.to(exact) - written.to(exact)).to(y.dtype)

        clean = self._forward(batch, observe)
        with self._model.saes(self._saes, positions=self._positions):
            spliced = self._forward(batch, None)
        ce_clean, ce_spliced, divergence = compare(clean, spliced, batch.tokens)
        del clean, spliced
        ce_out = cross_entropy(self._forward(batch, write_out), batch.tokens)
        return Sums(
            losses=_by_sequence(torch.stack([ce_clean, ce_spliced, ce_out, divergence], dim=-1), batch.scored),
            terms=batch.scored.sum(1).cpu(),
            masked=int(batch.scored[:, :-1].logical_not().sum()),
            sites=[sites[index] for index in range(len(self._saes))],
        )

    def ablated(self, batch: Batch, sites: Sequence[SiteSums], ablation: Ablation) -> Float[Tensor, " seq"]:
        """The summed loss of each sequence with every site ablated, in nats."""

        def ablate(index: int, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG001
            return torch.zeros_like(y) if ablation == "zero" else sites[index].mean.to(y).expand_as(y)

        losses = cross_entropy(self._forward(batch, ablate), batch.tokens)
        return _by_sequence(losses[..., None], batch.scored)[:, 0]

    def _forward(self, batch: Batch, at_site: AtSite | None) -> Float[Tensor, "seq pos vocab"]:
        with ExitStack() as stack:
            for hook in [] if at_site is None else self._site_hooks(batch, at_site):
                stack.callback(hook.remove)
                hook.add()
            logits = self._model.model(
                batch.tokens, return_type="logits", attention_mask=batch.attention_mask, use_cache=False
            )
        self._on_forward()
        return logits

    def _site_hooks(self, batch: Batch, at_site: AtSite) -> list[OwnHook]:
        """Hooks that read and write; readers come last, so that they see what flows on."""
        writers: list[OwnHook] = []
        readers: list[OwnHook] = []
        for index, (reads, writes) in enumerate(self._points):
            if reads is writes:
                writers.append(OwnHook(writes, self._writer(index, batch, at_site, read=None)))
                continue
            read: list[Tensor] = []
            writers.append(OwnHook(writes, self._writer(index, batch, at_site, read=read)))
            readers.append(OwnHook(reads, _reader(read)))
        return writers + readers

    def _writer(
        self, index: int, batch: Batch, at_site: AtSite, *, read: list[Tensor] | None
    ) -> Callable[..., Tensor | None]:
        cfg = self._saes[index].cfg
        written = batch.written[index]

        def write(tensor: Tensor, hook: Any) -> Tensor | None:  # noqa: ARG001
            y = flat_activation(tensor, cfg.d_out, cfg.hook_out)
            if read is not None and not read:
                raise ValueError(
                    f"The dictionary that writes {cfg.hook_out!r} reads {cfg.hook_in!r}, which has not fired in this "
                    "forward pass. Its input must come before its output; check the hook names."
                )
            x = y if read is None else flat_activation(read.pop(), cfg.d_in, cfg.hook_in)
            new = at_site(index, x, y)
            if new is None:
                return None
            if written is not None:
                new = torch.where(written.to(y.device)[..., None], new, y)
            return new.reshape(tensor.shape)

        return write


def _reader(read: list[Tensor]) -> Callable[..., None]:
    def note(tensor: Tensor, hook: Any) -> None:  # noqa: ARG001
        read[:] = [tensor]

    return note


def _by_sequence(terms: Float[Tensor, "seq pos kind"], scored: Bool[Tensor, "seq pos"]) -> Float[Tensor, "seq kind"]:
    """Sum the counted terms of each sequence in float64; what is not counted may be anything, NaN too."""
    return terms.double().masked_fill(~scored[..., None], 0).sum(1).cpu()
