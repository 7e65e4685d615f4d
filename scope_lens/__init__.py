"""Gemma Scope's sparse autoencoders and transcoders as hooked modules on TransformerLens 4.

The public names below are imported when first used, so that `import scope_lens` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scope_lens.evaluation import EvalResult, evaluate
    from scope_lens.model import ScopeModel, fold_mlp_norm
    from scope_lens.sae import HookedSAE, SAEConfig

__version__ = "0.1.0"
__all__ = [
    "EvalResult",
    "HookedSAE",
    "SAEConfig",
    "ScopeModel",
    "evaluate",
    "fold_mlp_norm",
]

_HOME = {
    "EvalResult": "scope_lens.evaluation",
    "HookedSAE": "scope_lens.sae",
    "SAEConfig": "scope_lens.sae",
    "ScopeModel": "scope_lens.model",
    "evaluate": "scope_lens.evaluation",
    "fold_mlp_norm": "scope_lens.model",
}


_PACKAGES = ("circuits", "demo", "evaluation", "figures", "releases", "training")


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"scope_lens.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'scope_lens' has no attribute {name!r}; public names are {__all__}.")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
