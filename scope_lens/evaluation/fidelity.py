"""`evaluate`: how much of the model survives when dictionaries stand in for its activations.

Definitions, after Gemma Scope (arXiv 2408.05147), section 4.1:

- Splice-in: the site becomes `x_hat`. Splice-out: it becomes `y - f @ W_dec`, each f computed from the stream it meets.
- `FVU = sum |y - y_hat|^2 / sum |y - mean(y)|^2`, the mean over the whole data. For a transcoder y is at `hook_out`.
- A term counts where the dictionaries, all of them, were trained on the *input* token. A loss term, and the divergence
  beside it, also needs a next token that is neither BOS nor PAD. So FVU, L0 and dead latents count the last position of
  a sequence; losses do not.

Steps:

1. Set aside what is attached.
2. First loop: a clean forward, which also gives FVU, L0, dead latents and the mean; splice-in; splice-out.
3. Second loop: every site ablated.
4. Divide the sums (float64) by the counts (int64).
"""

import math
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from scope_lens.attachments import Positions, attachments_of
from scope_lens.eval_mode import in_eval_mode
from scope_lens.evaluation.passes import Ablation, Passes, Sums
from scope_lens.evaluation.result import EvalResult, EvaluationInterrupted
from scope_lens.evaluation.tokens import Tokens, rows_hash, token_rows
from scope_lens.model import ScopeModel
from scope_lens.sae import HookedSAE


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

    Four forward passes a batch. Clean means that no dictionary is attached; what was attached acts again afterwards,
    also when the evaluation fails or is interrupted. Hooks that the user put on the model stay in force throughout.
    Hooks on a dictionary's own hook points act in splice-in only.

    Args:
        model: The language model.
        tokens: Token ids (seq, pos) with BOS in front of every row and PADs on either side; several such tensors, which
            may differ in length (a generator is read once and kept as ids); or documents, which `pack` cuts into rows.
        saes: One dictionary, or several that are spliced in together.
        batch_size: Sequences in a forward pass; two tensors of logits (batch_size, pos, vocabulary) are held at a time.
            The numbers do not depend on it, except for a BatchTopK dictionary, whose latents depend on the other rows
            by definition.
        context: Length of the rows that text is cut into; at most the model's own context.
        positions: "trained" splices and ablates where a dictionary was trained, "all" everywhere. What counts is the
            same.
        ablation: Replace a site by zero, or by its mean over the counted positions of the whole data.
        progress: Whether to show a progress bar.

    Returns:
        Losses in nats per token; FVU, L0 and dead latents by `hook_out`.

    Raises:
        ValueError: No tokens, tokens that the model cannot read or that lack BOS, nothing that counts, or a dictionary
            that does not fit.
        KeyError: A hook that the model does not have.
        EvaluationInterrupted: Ctrl-C after at least one batch; its `result` has the numbers so far.

    Source: Gemma Scope, section 4.1 (delta loss, FVU, masking); Appendix B for transcoders.
    """
    saes = [saes] if isinstance(saes, HookedSAE) else list(saes)
    _check_settings(saes, batch_size=batch_size, positions=positions, ablation=ablation)
    bridge = model.model
    with attachments_of(bridge).set_aside(bridge), in_eval_mode(bridge), torch.no_grad():
        with model.saes(saes, positions=positions):
            pass  # a dictionary that does not fit is refused before any work
        rows = token_rows(model, tokens, context=context)
        batches = [batch for group in rows for batch in group.split(batch_size)]
        settings = _settings(model, saes, rows) | {
            "batch_size": batch_size,
            "context": min(context, int(bridge.cfg.n_ctx)),
            "positions": positions,
            "ablation": ablation,
        }
        sums: Sums | None = None
        with tqdm(total=4 * len(batches), desc="evaluate", unit="forward", disable=not progress, leave=None) as bar:
            passes = Passes(model, saes, positions=positions, on_forward=bar.update)
            try:
                for ids in batches:
                    found = passes.clean_in_out(passes.batch(ids))
                    sums = found if sums is None else sums + found
                assert sums is not None, "there is a batch"
                _check_counts(sums)
                ablated = [passes.ablated(passes.batch(ids), sums.sites, ablation) for ids in batches]
            except KeyboardInterrupt:
                if sums is None or sums.n_terms == 0:
                    raise
                settings |= {"complete": False, "n_sequences": len(sums.terms)}
                done = rows_hash(_first(rows, len(sums.terms)))
                raise EvaluationInterrupted(_result(sums, None, saes, settings, done)) from None
        return _result(sums, torch.cat(ablated), saes, settings, rows_hash(rows))


def _result(
    sums: Sums,
    ablated: Float[Tensor, " seq"] | None,
    saes: Sequence[HookedSAE],
    settings: dict[str, Any],
    tokens_hash: str,
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

    With d_s the sum over sequence s, n_s its terms and m the mean per token, over the S sequences that have terms:
    `sqrt(S / (S - 1) * sum (d_s - m n_s)^2) / sum n_s`. For sequences of equal length that is the standard deviation of
    their means over sqrt(S).
    """
    differences, terms = differences[terms > 0], terms[terms > 0].double()
    n = len(terms)
    if n < 2:
        return math.nan
    residuals = differences - terms * (differences.sum() / terms.sum())
    return float((n / (n - 1) * residuals.square().sum()).sqrt() / terms.sum())


def _first(rows: Sequence[Tensor], n: int) -> Iterator[Tensor]:
    for tensor in rows:
        yield tensor[: max(n, 0)]
        n -= len(tensor)


def _check_settings(saes: Sequence[HookedSAE], *, batch_size: int, positions: str, ablation: str) -> None:
    if not saes:
        raise ValueError("evaluate needs at least one dictionary: saes is empty.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected 1 sequence or more.")
    for name, value, known in (("positions", positions, Positions), ("ablation", ablation, Ablation)):
        if value not in get_args(known):
            raise ValueError(f"{name} is {value!r}; expected one of {get_args(known)}.")


def _check_counts(sums: Sums) -> None:
    if sums.n_terms == 0:
        raise ValueError(
            f"Nothing counts in {len(sums.terms)} sequences: every prediction is made at a position that the "
            "dictionaries were not trained on (BOS, EOS, PAD), or is of BOS or PAD. Give sequences with text in them."
        )


def _settings(model: ScopeModel, saes: Sequence[HookedSAE], rows: Sequence[Tensor]) -> dict[str, Any]:
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
        "longest_sequence": max(tensor.shape[1] for tensor in rows),
        "n_sequences": n_sequences,
        "n_sequences_given": n_sequences,
        "complete": True,
        "versions": {name: version(name) for name in ("scope-lens", "torch", "transformer-lens", "transformers")},
    }
