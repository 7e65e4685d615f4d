"""`evaluate`: how much of the model survives when dictionaries stand in for its activations.

Definitions, after Gemma Scope (arXiv 2408.05147), section 4.1:

- splice-in: the site becomes `x_hat`; splice-out: it becomes `y - f @ W_dec`, each f computed from the stream it meets.
- `FVU = sum |y - y_hat|^2 / sum |y - mean(y)|^2`, the mean over the whole data; for a transcoder y is at `hook_out`.
- A term counts where the dictionaries were trained on the *input* token. A loss term and the divergence beside it also need
  a next token that is neither BOS nor PAD. So FVU, L0 and dead latents count the last position of a sequence, losses do
  not. Several dictionaries: a position counts where all of them were trained.

Steps:

1. Take out what is attached, for the time of the evaluation.
2. First loop: a clean forward (which also gives FVU, L0, dead latents and the mean), splice-in, splice-out.
3. Second loop: every site ablated.
4. Sums in float64, counts in int64; a batch's sums are added in one step, so an interrupt keeps whole batches only.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm
from transformer_lens import TransformerBridge

from scope_lens.attachments import OwnHook, Positions, attachments_of, flat_activation
from scope_lens.evaluation.predictions import compare, cross_entropy
from scope_lens.evaluation.result import EvalResult, EvaluationInterrupted
from scope_lens.evaluation.site_sums import SiteSums
from scope_lens.evaluation.tokens import Tokens, leading_pad, rows_hash, token_rows
from scope_lens.model import ScopeModel
from scope_lens.sae import HookedSAE
from scope_lens.special_tokens import SpecialTokens, special_token_ids, untrained_positions

Ablation = Literal["zero", "mean"]
_AtSite = Callable[[int, Tensor, Tensor], Tensor | None]  # dictionary, x, y -> what flows on; None leaves y


def evaluate(
    model: ScopeModel,
    tokens: Tokens,
    *,
    saes: HookedSAE | Sequence[HookedSAE],
    batch_size: int = 8,
    context: int = 1024,
    positions: Positions = "trained",
    ablation: Ablation = "mean",
    progress: bool = True,
) -> EvalResult:
    """Measure what the model loses by dictionaries, and how well they reconstruct.

    Clean means that no dictionary is attached; what was attached is back afterwards, also when the evaluation fails or is
    interrupted. Four forward passes a batch. Hooks that the user put on the model stay in force in all of them.

    FVU, L0, dead latents and splice-out come from the dictionary's equations; hooks on the dictionary's own hook points act
    in splice-in only.

    Args:
        model: The language model.
        tokens: Token ids (seq, pos) with BOS in front of every row; several such tensors, which may differ in length (a
            generator is read once and kept as ids); or documents, which `pack` cuts into rows. PAD ids on either side are
            masked.
        saes: One dictionary, or several that are spliced in together.
        batch_size: Sequences in a forward pass; the numbers do not depend on it (but those of a BatchTopK dictionary do,
            whose latents depend on the other rows by definition).
        context: Length of the rows that text is cut into; at most the model's own context is taken.
        positions: "trained" splices and ablates where a dictionary was trained, "all" everywhere. What counts is the same.
        ablation: Replace a site by zero, or by its mean over the counted positions of the whole data.
        progress: Whether to show a progress bar.

    Returns:
        Losses in nats per token; FVU, L0 and dead latents by `hook_out`.

    Raises:
        ValueError: No tokens, tokens that the model cannot read or that lack BOS, nothing that counts, or a dictionary that
            does not fit.
        KeyError: A hook that the model does not have.
        EvaluationInterrupted: Ctrl-C after at least one batch; its `result` has the numbers so far.

    Source: Gemma Scope, section 4.1 (delta loss, FVU, masking); Appendix B for transcoders.
    """
    saes = [saes] if isinstance(saes, HookedSAE) else list(saes)
    _check_settings(saes, batch_size=batch_size, positions=positions, ablation=ablation)
    bridge = model.model
    with attachments_of(bridge).set_aside(bridge), _in_eval_mode(bridge), torch.no_grad():
        with model.saes(saes, positions=positions):
            pass  # refuses a dictionary that does not fit before any work
        rows = token_rows(model, tokens, context=context)
        run = _Run(model, saes, positions=positions)
        batches = [batch for group in rows for batch in group.split(batch_size)]
        settings = _settings(model, saes, rows, batch_size, context, positions, ablation)

        sums: _Sums | None = None
        bar = tqdm(total=4 * len(batches), desc="evaluate", unit="forward", disable=not progress)
        try:
            for ids in batches:
                batch = run.batch(ids)
                found = run.clean_in_out(batch, bar)
                sums = found if sums is None else sums + found
            assert sums is not None
            sums.check()
            ablated = [run.ablated(run.batch(ids), sums.sites, ablation, bar) for ids in batches]
        except KeyboardInterrupt:
            if sums is None or not sums.n_terms:
                raise
            done = _first_sequences(rows, sums.n_sequences)
            settings |= {"complete": False, "n_sequences": sums.n_sequences}
            raise EvaluationInterrupted(_result(sums, None, saes, rows_hash(done), settings)) from None
        finally:
            bar.close()
        return _result(sums, torch.cat(ablated), saes, rows_hash(rows), settings)


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Token ids and what follows from them."""

    tokens: Int[Tensor, "seq pos"]
    attention_mask: Int[Tensor, "seq pos"] | None
    counted: Bool[Tensor, "seq pos"]  # every dictionary was trained on the input
    scored: Bool[Tensor, "seq pos"]  # and the next token is there and no BOS or PAD
    written: list[Bool[Tensor, "seq pos"] | None]  # where each dictionary is spliced; None is everywhere


@dataclass(frozen=True, kw_only=True)
class _Sums:
    """Sums over batches; `losses` has a row a sequence: clean, spliced, spliced out, divergence."""

    losses: Float[Tensor, "seq 4"]
    terms: Int[Tensor, " seq"]
    masked: int
    sites: list[SiteSums]

    def __add__(self, other: "_Sums") -> "_Sums":
        return _Sums(
            losses=torch.cat([self.losses, other.losses]),
            terms=torch.cat([self.terms, other.terms]),
            masked=self.masked + other.masked,
            sites=[mine + theirs for mine, theirs in zip(self.sites, other.sites, strict=True)],
        )

    @property
    def n_terms(self) -> int:
        return int(self.terms.sum())

    @property
    def n_sequences(self) -> int:
        return len(self.terms)

    def check(self) -> None:
        if not self.n_terms:
            raise ValueError(
                f"Nothing counts in {self.n_sequences} sequences: every prediction is from a position that the dictionaries "
                "were not trained on (BOS, EOS, PAD), or of BOS or PAD. Give sequences with real text in them."
            )


class _Run:
    """The forward passes of one evaluation."""

    def __init__(self, model: ScopeModel, saes: Sequence[HookedSAE], *, positions: Positions) -> None:
        self.model = model
        self.saes = saes
        self.positions: Positions = positions
        self.special: SpecialTokens = special_token_ids(model.model)
        self.kinds = {kind for sae in saes for kind in sae.cfg.untrained}
        resolve = attachments_of(model.model).sites.resolve
        self.points = [(resolve(model.model, sae.cfg.hook_in), resolve(model.model, sae.cfg.hook_out)) for sae in saes]
        self.device = next(iter(model.model.parameters())).device

    def batch(self, ids: Int[Tensor, "seq pos"]) -> _Batch:
        """Mark what counts and what is spliced."""
        tokens = ids.to(self.device)
        padded = leading_pad(tokens, self.special)
        # Right padding needs no mask in a causal model.
        attention_mask = (~padded).long() if bool(padded.any()) else None

        def marked(kinds: Sequence[str]) -> Tensor:
            return untrained_positions(tokens, self.special, kinds, attention_mask=attention_mask)

        counted = ~marked(tuple(self.kinds))
        scored = counted & ~marked(("bos", "pad")).roll(-1, dims=1)
        scored[:, -1] = False
        written = [None if self.positions == "all" else ~marked(sae.cfg.untrained) for sae in self.saes]
        return _Batch(tokens=tokens, attention_mask=attention_mask, counted=counted, scored=scored, written=written)

    def clean_in_out(self, batch: _Batch, bar: Any) -> _Sums:
        """The three forwards of the first loop; at most two logits tensors live at a time."""
        sites: dict[int, SiteSums] = {}

        def observe(index: int, x: Tensor, y: Tensor) -> None:
            sites[index] = SiteSums.of(self.saes[index], x[batch.counted], y[batch.counted])

        def write_out(index: int, x: Tensor, y: Tensor) -> Tensor:
            sae = self.saes[index]
            return _subtract(y, sae.write(sae.activate(sae.pre_activation(x))))

        clean = self._forward(batch, bar, at_sites=observe)
        with self.model.saes(self.saes, positions=self.positions):
            spliced = self._forward(batch, bar)
        ce_clean, ce_spliced, divergence = compare(clean, spliced, batch.tokens)
        del clean, spliced
        ce_out = cross_entropy(self._forward(batch, bar, at_sites=write_out), batch.tokens)
        return _Sums(
            losses=_by_sequence(torch.stack([ce_clean, ce_spliced, ce_out, divergence], dim=-1), batch.scored),
            terms=batch.scored.sum(1).cpu(),
            masked=int(batch.scored[:, :-1].logical_not().sum()),
            sites=[sites[index] for index in range(len(self.saes))],
        )

    def ablated(self, batch: _Batch, sites: Sequence[SiteSums], ablation: Ablation, bar: Any) -> Float[Tensor, " seq"]:
        """The summed loss of each sequence with every site ablated."""

        def ablate(index: int, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG001
            return torch.zeros_like(y) if ablation == "zero" else sites[index].mean.to(y).expand_as(y)

        losses = cross_entropy(self._forward(batch, bar, at_sites=ablate), batch.tokens)
        return _by_sequence(losses[..., None], batch.scored)[:, 0]

    def _forward(self, batch: _Batch, bar: Any, *, at_sites: _AtSite | None = None) -> Float[Tensor, "seq pos vocab"]:
        """One forward pass, with `at_sites` called at every dictionary's site."""
        with ExitStack() as stack:
            for hook in [] if at_sites is None else self._site_hooks(batch, at_sites):
                stack.callback(hook.remove)
                hook.add()
            logits = self.model.model(
                batch.tokens, return_type="logits", attention_mask=batch.attention_mask, use_cache=False
            )
        bar.update()
        return logits

    def _site_hooks(self, batch: _Batch, at_sites: _AtSite) -> list[OwnHook]:
        """Hooks that read and write; readers come last, so that they see what flows on."""
        writers: list[OwnHook] = []
        readers: list[OwnHook] = []
        for index, (reads, writes) in enumerate(self.points):
            read: dict[str, Tensor] = {}
            writers.append(OwnHook(writes, self._writer(index, batch, at_sites, None if reads is writes else read)))
            if reads is not writes:
                readers.append(OwnHook(reads, lambda tensor, hook, read=read: read.update(x=tensor)))
        return writers + readers

    def _writer(
        self, index: int, batch: _Batch, at_sites: _AtSite, read: dict[str, Tensor] | None
    ) -> Callable[..., Tensor | None]:
        cfg = self.saes[index].cfg
        written = batch.written[index]

        def write(tensor: Tensor, hook: Any) -> Tensor | None:  # noqa: ARG001
            y = flat_activation(tensor, cfg.d_out, cfg.hook_out)
            x = y if read is None else read.get("x")
            if x is None:
                raise ValueError(
                    f"The dictionary that writes {cfg.hook_out!r} reads {cfg.hook_in!r}, which has not fired in this forward "
                    "pass. Its input must come before its output; check the hook names."
                )
            new = at_sites(index, flat_activation(x, cfg.d_in, cfg.hook_in), y)
            if new is None:
                return None
            if written is not None:
                new = torch.where(written[..., None], new, y)
            return new.reshape(tensor.shape)

        return write


def _subtract(y: Tensor, written: Tensor) -> Tensor:
    exact = torch.promote_types(torch.promote_types(y.dtype, written.dtype), torch.float32)
    return (y.to(exact) - written.to(exact)).to(y.dtype)


def _by_sequence(terms: Float[Tensor, "seq pos kind"], scored: Bool[Tensor, "seq pos"]) -> Float[Tensor, "seq kind"]:
    """Sum the counted terms of each sequence in float64; what is not counted may be anything, NaN too."""
    return terms.double().masked_fill(~scored[..., None], 0).sum(1).cpu()


def _result(
    sums: _Sums,
    ablated: Float[Tensor, " seq"] | None,
    saes: Sequence[HookedSAE],
    tokens_hash: str,
    settings: dict[str, Any],
) -> EvalResult:
    n = sums.n_terms
    ce_clean, ce_spliced, ce_out, divergence = (sums.losses.sum(0) / n).tolist()
    ce_ablated = math.nan if ablated is None else float(ablated.sum() / n)
    at_stake = ce_ablated - ce_clean
    by_site = {sae.cfg.hook_out: site for sae, site in zip(saes, sums.sites, strict=True)}
    return EvalResult(
        ce_clean=ce_clean,
        ce_spliced=ce_spliced,
        ce_spliced_out=ce_out,
        ce_ablated=ce_ablated,
        delta_loss=ce_spliced - ce_clean,
        delta_loss_se=_clustered_error(sums.losses[:, 1] - sums.losses[:, 0], sums.terms),
        delta_loss_out=ce_out - ce_clean,
        loss_recovered=(ce_ablated - ce_spliced) / at_stake if at_stake else math.nan,
        kl=divergence,
        fvu={name: site.fvu for name, site in by_site.items()},
        l0={name: site.l0 for name, site in by_site.items()},
        dead={name: site.dead for name, site in by_site.items()},
        n_tokens=n,
        n_masked=sums.masked,
        tokens_hash=tokens_hash,
        settings=settings,
    )


def _clustered_error(differences: Float[Tensor, " seq"], terms: Int[Tensor, " seq"]) -> float:
    """Standard error of the mean per token, with the sequence as the independent unit.

    With d_s the sum over sequence s, n_s its terms and m the mean: `sqrt(S / (S - 1) * sum (d_s - m n_s)^2) / sum n_s`. For
    sequences of equal length that is the standard deviation of their means over sqrt(S).
    """
    differences, terms = differences[terms > 0], terms[terms > 0].double()
    n = len(terms)
    if n < 2:
        return math.nan
    residuals = differences - terms * (differences.sum() / terms.sum())
    return float((n / (n - 1) * residuals.square().sum()).sqrt() / terms.sum())


def _first_sequences(rows: Sequence[Tensor], n: int) -> Iterator[Tensor]:
    for tensor in rows:
        if n > 0:
            yield tensor[:n]
        n -= len(tensor)


@contextmanager
def _in_eval_mode(bridge: TransformerBridge) -> Iterator[None]:
    """Switch dropout off for a block of code; modules that were training train again afterwards."""
    training = [module for module in bridge.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _check_settings(saes: Sequence[HookedSAE], *, batch_size: int, positions: str, ablation: str) -> None:
    if not saes:
        raise ValueError("evaluate needs at least one dictionary: saes is empty.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected 1 or more sequences.")
    for name, value, known in (("positions", positions, Positions), ("ablation", ablation, Ablation)):
        if value not in get_args(known):
            raise ValueError(f"{name} is {value!r}; expected one of {get_args(known)}.")


def _settings(
    model: ScopeModel,
    saes: Sequence[HookedSAE],
    rows: Sequence[Tensor],
    batch_size: int,
    context: int,
    positions: str,
    ablation: str,
) -> dict[str, Any]:
    parameter = next(iter(model.model.parameters()))
    n_sequences = sum(len(tensor) for tensor in rows)
    return {
        "model": model.model.cfg.model_name,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": str(parameter.device),
        "saes": [
            {
                "hook_in": sae.cfg.hook_in,
                "hook_out": sae.cfg.hook_out,
                "d_sae": sae.cfg.d_sae,
                "activation": sae.cfg.activation,
                "model": sae.cfg.model,
                "release": sae.cfg.release,
                "path": sae.cfg.path,
                "untrained": list(sae.cfg.untrained),
                "dtype": str(sae.dtype).removeprefix("torch."),
            }
            for sae in saes
        ],
        "batch_size": batch_size,
        "context": min(context, int(model.model.cfg.n_ctx)),
        "longest_sequence": max(tensor.shape[1] for tensor in rows),
        "positions": positions,
        "ablation": ablation,
        "n_sequences": n_sequences,
        "n_sequences_given": n_sequences,
        "complete": True,
        "versions": {name: version(name) for name in ("scope-lens", "torch", "transformer-lens", "transformers")},
    }
