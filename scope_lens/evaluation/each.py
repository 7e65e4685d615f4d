"""Many dictionaries, each evaluated by itself, with a file that grows as they finish.

1. The tokens are made once; their hash, the model's weights and the settings say which run a file belongs to.
2. What the file has of a dictionary with these weights is given back; what it lacks is evaluated.
3. After each dictionary the file is written again, whole. A killed run goes on where it stopped.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from scope_lens.attachments import Positions
from scope_lens.evaluation.fidelity import Ablation, evaluate
from scope_lens.evaluation.result import EvalResult, EvaluationInterrupted
from scope_lens.evaluation.tokens import Tokens, rows_hash, token_rows
from scope_lens.fingerprints import model_fingerprint, sae_fingerprint
from scope_lens.model import ScopeModel
from scope_lens.sae import HookedSAE
from scope_lens.whole_file import whole_file


class Named(NamedTuple):
    """One dictionary's result.

    Attributes:
        name: The dictionary, as it was asked for.
        result: Its evaluation.
    """

    name: str
    result: EvalResult


class Kept(NamedTuple):
    """What a file holds of one dictionary.

    Attributes:
        fingerprint: The weights that were measured.
        result: Their evaluation.
    """

    fingerprint: str
    result: EvalResult


def evaluate_each(
    model: ScopeModel,
    tokens: Tokens,
    *,
    saes: Mapping[str, HookedSAE | Callable[[], HookedSAE]],
    path: str | Path | None = None,
    batch_size: int = 8,
    context: int = 1024,
    positions: Positions = "trained",
    ablation: Ablation = "mean",
    progress: bool = True,
) -> Iterator[Named]:
    """Evaluate dictionaries one after the other, by themselves.

    Args:
        model: The language model.
        tokens: As for `evaluate`.
        saes: Dictionaries by name, or functions that load them, so that only one is in memory.
        path: JSON file of the results. What it holds of this run and of a dictionary with the same name and the same
            weights is not computed again.
        batch_size: As for `evaluate`.
        context: As for `evaluate`.
        positions: As for `evaluate`.
        ablation: As for `evaluate`.
        progress: Whether to show progress bars.

    Yields:
        Results in the order of `saes`, each after it is in the file.

    Raises:
        ValueError: No dictionaries; a file of another run; what `evaluate` refuses.
        EvaluationInterrupted: Ctrl-C; what was measured of the dictionary at work is in the file, marked incomplete,
            and is measured again by the next run.
    """
    if not saes:
        raise ValueError("evaluate_each needs at least one dictionary: saes is empty.")
    rows = token_rows(model, tokens, context=context)
    run = {
        "model": str(model.model.cfg.model_name),
        "weights": model_fingerprint(model.model),
        "dtype": str(next(iter(model.model.parameters())).dtype).removeprefix("torch."),
        "tokens_hash": rows_hash(rows),
        "positions": positions,
        "ablation": ablation,
    }
    path = None if path is None else Path(path)
    kept = {} if path is None or not path.exists() else read_kept(path, run=run)
    # In a log file, where a bar cannot move, the outer one is enough.
    inner = progress and (len(saes) == 1 or sys.stderr.isatty())
    for name in tqdm(saes, desc="dictionaries", unit="dictionary", disable=not progress or len(saes) == 1):
        given = saes[name]
        sae = given if isinstance(given, HookedSAE) else given()
        fingerprint = sae_fingerprint(sae)
        had = kept.get(name)
        if had is None or had.fingerprint != fingerprint or not had.result.settings["complete"]:
            try:
                result = evaluate(
                    model,
                    rows,
                    saes=sae,
                    batch_size=batch_size,
                    positions=positions,
                    ablation=ablation,
                    progress=inner,
                )
                kept[name] = Kept(fingerprint, result)
            except EvaluationInterrupted as interrupted:
                kept[name] = Kept(fingerprint, interrupted.result)
                raise
            finally:
                if path is not None and kept:
                    write_kept(path, kept, run=run)
        yield Named(name, kept[name].result)


def read_results(path: str | Path) -> dict[str, EvalResult]:
    """Read the results in a file of `evaluate_each`, by name.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such file.
    """
    return {name: result for name, (_, result) in read_kept(Path(path)).items()}


def read_kept(path: Path, *, run: Mapping[str, str] | None = None) -> dict[str, Kept]:
    """Read a file of `evaluate_each` with the fingerprints of its dictionaries.

    Args:
        path: The file.
        run: The run it has to be of; None takes any.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such file, or of another run.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found: dict[str, str] = content["run"]
        kept = {
            name: Kept(content["fingerprints"][name], EvalResult.from_json(json.dumps(fields)))
            for name, fields in content["results"].items()
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is no file of results ({type(error).__name__}: {error}). Give another name, or remove it."
        ) from None
    if run is not None and found != dict(run):
        differing = "; ".join(
            f"{key} {found.get(key)!r}, now {run[key]!r}" for key in run if found.get(key) != run[key]
        )
        raise ValueError(f"{path} holds the results of another run: {differing}. Give another name, or remove it.")
    return kept


def write_kept(path: Path, kept: Mapping[str, Kept], *, run: Mapping[str, str]) -> None:
    """Write a file of `evaluate_each`, whole or not at all."""
    content = {
        "run": dict(run),
        "fingerprints": {name: fingerprint for name, (fingerprint, _) in kept.items()},
        "results": {name: json.loads(result.to_json()) for name, (_, result) in kept.items()},
    }
    with whole_file(path) as part:
        part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
