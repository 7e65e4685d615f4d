"""Circuits: attribution graphs, their verification, interventions, export.

1. A graph as data: `graph` on `graph_records` and `edges`; `influence`, `pruning` and `merging` make smaller ones,
   `graph_file` and `networkx_graph` keep it elsewhere, `export` writes Neuronpedia's JSON.
2. Making one: `attribution` reads the `prompt`, finds the `places` of dictionaries and the `targets`, records what is
   `frozen`, and asks `memory`. What writes is in `sources`; `rows` sweeps from readers back to them, `selection` says
   which latents stay, `nodes` puts the graph together, and `self_checks` looks at it.
3. The linear model that it sweeps, `linear`, in two ways: `written_out` (from `layers`, back by `pull_back`) and
   `through_autograd`. `float64` makes the copy for exact graphs.
4. Against the model: `interventions` edits latents, `verification` takes sources away by `probes`.

The public names below are imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scope_lens.circuits.attribution import attribute
    from scope_lens.circuits.graph import AttributionGraph, GraphChecks, GraphScores, Kind
    from scope_lens.circuits.interventions import Intervention, run_with_interventions
    from scope_lens.circuits.targets import Target
    from scope_lens.circuits.verification import Verification, verify

__all__ = [
    "AttributionGraph",
    "GraphChecks",
    "GraphScores",
    "Intervention",
    "Kind",
    "Target",
    "Verification",
    "attribute",
    "run_with_interventions",
    "verify",
]

_HOME = {
    "AttributionGraph": "graph",
    "GraphChecks": "graph",
    "GraphScores": "graph",
    "Intervention": "interventions",
    "Kind": "graph",
    "Target": "targets",
    "Verification": "verification",
    "attribute": "attribution",
    "run_with_interventions": "interventions",
    "verify": "verification",
}
_MODULES = ("export",)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"scope_lens.circuits.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'scope_lens.circuits' has no attribute {name!r}; public names are {__all__}.")
    return getattr(import_module(f"scope_lens.circuits.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
