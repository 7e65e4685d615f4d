"""`scope-lens <verb>`: the package's public functions from a shell.

    scope-lens demo                                            the embedded model and its dictionaries
    scope-lens list --model gemma-2-2b --layer 20              what Gemma Scope contains
    scope-lens info gemma-2-2b/20-gemmascope-res-16k           one dictionary
    scope-lens evaluate google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71 \
        --model google/gemma-2-2b --text stories.txt --json results.json --html fidelity.html
    scope-lens graph --model demo --prompt "Once upon a time" --site transcoder --html graph.html
    scope-lens harvest --model demo --text demo --site res --layer 2 --out store
    scope-lens train --store store --site res --layer 2 --width 1k --sparsity 3e-3 --out run

Tables go to standard output, progress bars and errors to standard error. What a user can get wrong ends with one line
and exit code 1 (2 for the command line itself), Ctrl-C with 130. Nothing heavy is imported before a verb needs it.
"""

import sys
from collections.abc import Sequence

from scope_lens.cli import fidelity, graph, index, training
from scope_lens.cli.app import app
from scope_lens.cli.terminal import complain

__all__ = ["fidelity", "graph", "index", "main", "training"]
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: Words of the command line; None takes the process's.

    Returns:
        Exit code: 0, 1 for an error that the message explains, 130 after Ctrl-C.
    """
    try:
        app.cli(
            prog="scope-lens",
            description="Gemma Scope's dictionaries on TransformerLens 4: what there is, what a model loses by them.",
            args=None if argv is None else list(argv),
        )
    except KeyboardInterrupt as interrupt:
        complain(str(interrupt) or "interrupted")
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of the table, `head` say, has seen enough; Python would complain again when it flushes.
        sys.stdout = None
        return 0
    except (ValueError, KeyError, IndexError, OSError) as error:
        # str() of a KeyError puts its message into quotes.
        complain(str(error.args[0]) if isinstance(error, KeyError) else str(error))
        return 1
    return 0
