"""Policies about the package as a whole: who may import whom, what an import costs, how files look."""

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import scope_lens

PACKAGE = Path(__file__).parents[1] / "scope_lens"
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
MAX_LINES = 460

# A part imports parts of a lower rank, and its own files.
RANK = {
    "activations": 0,
    "sae_config": 0,
    "whole_file": 0,
    "sae": 1,
    "special_tokens": 2,
    "splice": 2,
    "eval_mode": 2,
    "fingerprints": 2,
    "sites": 2,
    "attachments": 3,
    "attached": 4,
    "boot": 4,
    "folding": 4,
    "latent_hooks": 4,
    "model": 5,
    "releases": 5,
    "packing": 6,
    "evaluation": 7,
    "demo": 7,
    "circuits": 7,
    "training": 8,  # its held-out evaluation is `evaluate`
    "figures": 9,
    "explore": 10,
    "cli": 11,
}
EXCEPTIONS = {("sae", "releases")}  # HookedSAE.from_pretrained, imported when called
CONFINED = {
    "huggingface_hub": ("releases/",),
    "plotly": ("figures/", "explore/"),
    "triton": ("training/kernels/",),
    "tyro": ("cli.py", "cli/"),
    "tensorstore": ("training/",),
    "wandb": ("training/",),
    "tensorboard": ("training/",),
}
LOW_LEVEL = {"torch", "einops", "jaxtyping", "safetensors"}


def imported(source: str) -> Iterator[str]:
    """Every module that a source imports, deferred imports included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            if node.module == "scope_lens":
                yield from (f"scope_lens.{alias.name}" for alias in node.names)


def part(module: str) -> str | None:
    """The part of the package that a module name or a relative path belongs to; None for the package itself."""
    pieces = module.removeprefix("scope_lens").strip(".").removesuffix(".py").replace("/", ".").split(".")
    if pieces[0] in ("", "__init__"):
        return None
    return pieces[0]


def violations(module: str, source: str) -> list[str]:
    own, found = part(module), []
    for name in imported(source):
        top = name.split(".")[0]
        if top == "scope_lens":
            other = part(name)
            upward = own is not None and other not in (None, own) and RANK[other] >= RANK[own]
            if upward and (own, other) not in EXCEPTIONS:
                found.append(f"{module} ({own}) imports {name} ({other})")
        elif not module.startswith(CONFINED.get(top, ("",))):
            found.append(f"{module} imports {top}, which belongs in {CONFINED[top]}")
        elif module in ("activations.py", "circuits/graph.py") and top not in LOW_LEVEL | sys.stdlib_module_names:
            found.append(f"{module} imports {top}")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_dependencies_point_one_way(module):
    assert violations(module, (PACKAGE / module).read_text()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sae.py", "from scope_lens.model import ScopeModel"),
        ("splice.py", "import scope_lens.evaluation"),
        ("releases/npz.py", "from scope_lens import model"),
        ("evaluation/fidelity.py", "def f():\n    import plotly.graph_objects"),
        ("activations.py", "import numpy"),
        ("training/store.py", "import huggingface_hub"),
    ],
)
def test_the_check_sees_a_violation(module, source):
    assert len(violations(module, source)) == 1


def test_no_cycles_between_files():
    names = {"scope_lens." + m.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): m for m in MODULES}
    graph = {
        name: [n for n in imported((PACKAGE / m).read_text()) if n in names and n != name]
        for name, m in names.items()
        if not m.endswith("__init__.py") and name != "scope_lens.sae"  # its one deferred import closes a circle
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"import cycle: {(*path, name)}"
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def loaded_after(code: str) -> set[str]:
    """Top-level modules in memory after a fresh interpreter ran `code`."""
    script = f"""
import json, sys
try:
    {code}
except SystemExit:
    pass
sys.stderr.write(json.dumps(list(sys.modules)))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in json.loads(run.stderr.splitlines()[-1])}


HEAVY = {"torch", "transformer_lens", "transformers", "plotly", "huggingface_hub", "numpy"}


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import scope_lens", HEAVY | {"tyro"}),
        ("import scope_lens.releases; scope_lens.releases.find()", HEAVY),
        ("from scope_lens.cli import main; main(['--help'])", HEAVY),
        ("from scope_lens.cli import main; main(['list', '--model', 'gemma-2-2b', '--layer', '20'])", HEAVY),
        ("from scope_lens import HookedSAE, ScopeModel", {"plotly"}),
        ("from scope_lens import evaluate", {"plotly"}),
        ("import scope_lens.training", {"plotly", "wandb", "tensorboard"}),
    ],
)
def test_imports_cost_what_they_need(code, absent):
    assert loaded_after(code) & absent == set()


def test_the_import_check_sees_a_loaded_module():
    assert "plotly" in loaded_after("import plotly")


@pytest.mark.parametrize("name", scope_lens.__all__)
def test_public_names_exist(name):
    assert getattr(scope_lens, name).__doc__


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'HookedTransformer'; public names are"):
        scope_lens.HookedTransformer  # noqa: B018


@pytest.mark.parametrize("module", MODULES)
def test_files_hold_one_concept(module):
    path = PACKAGE / module
    assert len(path.read_text().splitlines()) <= MAX_LINES
    assert path.stem not in {"utils", "helpers", "common", "manager", "base", "misc"}


@pytest.mark.parametrize("module", MODULES)
def test_no_print_and_nothing_left_open(module):
    source = (PACKAGE / module).read_text()
    tree = ast.parse(source)
    calls = [node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert "print" not in calls
    # Shape checks read annotations as objects; as strings they would check nothing.
    assert "from __future__ import annotations" not in source
    assert not any(word in source for word in ("TODO", "FIXME", "raise NotImplementedError"))
    assert ast.get_docstring(tree)


def test_every_module_imports_alone():
    for module in MODULES:
        importlib.import_module("scope_lens." + module.removesuffix(".py").replace("/", ".").removesuffix(".__init__"))
