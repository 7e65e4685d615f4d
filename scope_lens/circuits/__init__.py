"""Circuits: attribution graphs, their verification, interventions, export.

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
