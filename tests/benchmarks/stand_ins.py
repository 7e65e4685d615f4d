"""Lets the training code be imported on a machine that has torch and little else.

A training step needs torch, Triton, jaxtyping, safetensors and NumPy; what its package imports beside them (language
models, stores, downloads) is not used by a step. Where such a module is missing, a stand-in takes its place: any name
in it is an empty class. TransformerLens' two classes that a dictionary is built of are given as far as a step needs
them: a module with `setup`, and a hook point that lets everything pass. The peers' packages are entered by the same
door.

Only for benchmarks of the step. Nothing here is imported by the package or its tests of behaviour.
"""

import importlib.machinery
import importlib.util
import sys
from types import ModuleType

from torch import nn

# What the packages compared import at the top and a step does not call.
OPTIONAL = (
    "transformer_lens", "transformers", "datasets", "huggingface_hub", "tensorstore", "tokenizers", "accelerate",
    "plotly", "pandas", "tyro", "wandb", "nltk", "dotenv", "babe", "automated_interpretability",
    "tenacity", "nnsight", "zstandard", "matplotlib", "matplotlib_inline", "typer", "requests", "tqdm", "yaml",
    "scipy", "sklearn",
)  # fmt: skip


class HookPoint(nn.Module):
    """Lets its input pass."""

    def forward(self, x):
        return x


class HookedRootModule(nn.Module):
    """A module that is set up once its parts are there."""

    def __init__(self, *_args) -> None:
        super().__init__()

    def setup(self) -> None:
        pass


class _StandIn(ModuleType):
    __path__ = ()
    __version__ = "0"

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        known = {"HookPoint": HookPoint, "HookedRootModule": HookedRootModule}
        value = known.get(name) or type(name, (), {"__init__": lambda *_args, **_kwargs: None})
        setattr(self, name, value)
        return value


class _Finder:
    def __init__(self, names: frozenset[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path=None, target=None):
        if name.partition(".")[0] not in self.names:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module) -> None:
        pass


def enter(*, force: bool = False) -> list[str]:
    """Put stand-ins where modules are missing, and say which.

    Args:
        force: Stand in for installed ones too, which shows on any machine that the benchmark runs on a bare one. It is
            always so beside sae-lens, which cannot be imported beside TransformerLens 4.
    """
    force = force or importlib.util.find_spec("sae_lens") is not None
    missing = [name for name in OPTIONAL if force or importlib.util.find_spec(name) is None]
    if missing:
        sys.meta_path.insert(0, _Finder(frozenset(missing)))
    return missing
