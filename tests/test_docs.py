"""The README, the documentation and the notebook: their code runs, their commands are the ones that are checked."""

import ast
import json
import re
import shlex
from importlib import import_module
from pathlib import Path

import nbclient
import nbformat
import pytest

import scope_lens.circuits
from scope_lens import cli

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs" / "pages").glob("**/*.md"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
_FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page, language):
    """The code blocks of a page: what follows the language (a title says what the code needs), and the code."""
    return [(rest.strip(), code) for name, rest, code in _FENCE.findall(prose(page)) if name == language]


def prose(page):
    """What a page says; of a notebook, its markdown cells."""
    if page.suffix != ".ipynb":
        return page.read_text()
    cells = json.loads(page.read_text())["cells"]
    return "\n".join("".join(cell["source"]) + "\n" for cell in cells if cell["cell_type"] == "markdown")


def runnable(page):
    return "\n".join(code for rest, code in blocks(page, "python") if not rest)


@pytest.mark.parametrize("page", [README, *(p for p in PAGES if runnable(p))], ids=lambda page: page.stem)
def test_python_code_runs(page, capsys):
    """The blocks of a page, one after the other, as a reader would type them."""
    exec(compile(runnable(page), str(page), "exec"), {"__name__": "__main__"})  # noqa: S102
    capsys.readouterr()


@pytest.mark.parametrize("page", [README, *PAGES, *NOTEBOOKS], ids=lambda page: page.stem)
def test_python_code_that_needs_the_hub_imports_what_exists(page):
    for rest, code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                module = import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
        assert not rest or rest.startswith('title="needs '), f"{page.name}: an info string that no reader understands"


def commands(page):
    lines = "\n".join(code for _, code in blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.mark.parametrize("page", [README, *PAGES, *NOTEBOOKS], ids=lambda page: page.stem)
def test_commands_of_the_index_run_and_others_parse(page, capsys):
    for program, *words in commands(page):
        if program == "scope-lens" and words[0] in ("list", "info"):
            assert cli.main(words) == 0
        elif program == "scope-lens" and words[0] == "evaluate":
            # The files it names are not here; a word that the command line does not know would exit with 2.
            assert cli.main(words) == 1
            assert "There is no text file" in capsys.readouterr().err
        else:
            assert program in ("pip", "pytest", "bash", "hf", "scope-lens", "torchrun"), program


def test_the_checks_install_as_the_readme_says():
    script = (ROOT / ".ci" / "run").read_text()
    for words in commands(README):
        if words[0] in ("pip", "scope-lens") and words[1] in ("install", "demo"):
            line = " ".join(words).replace("pip install", "pip install -qq").replace(".[dev]", "'.[dev]'")
            assert line in script or line == "pip install -qq -c .ci/constraints.txt .", line


def test_the_table_of_the_readme_is_of_the_embedded_dictionaries():
    shown = re.findall(r"\S+/layer_\d+/width_1k/average_l0_\d+$", README.read_text(), re.MULTILINE)
    assert shown == [sae.cfg.path for sae in scope_lens.demo.load_saes()]


def test_the_file_map_of_the_readme_is_the_package():
    ((_, table),) = [block for block in blocks(README, "text") if block[1].startswith("scope_lens/")]
    package = table.partition("tests/")[0]
    named = set(re.findall(r"^  (\S+)", package, re.MULTILINE))
    there = {p.name + "/" * p.is_dir() for p in (ROOT / "scope_lens").iterdir() if not p.name.startswith("__pycache__")}
    assert named == there


def test_the_docstring_of_circuits_names_each_of_its_files():
    named = set(re.findall(r"`(\w+)`", scope_lens.circuits.__doc__))
    assert named == {path.stem for path in (ROOT / "scope_lens" / "circuits").glob("*.py")} - {"__init__"}


def test_every_public_name_has_its_page():
    api = "".join(page.read_text() for page in PAGES if page.parent.name == "api")
    for name in [*scope_lens.__all__, *scope_lens.circuits.__all__]:
        assert f".{name}\n" in api, f"{name} is in __all__ and on no API page"


def test_links_between_pages_and_files_lead_somewhere():
    for page in [README, *PAGES]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.resolve().parent / target).exists() or (page.parent / target).exists(), (page.name, target)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # beside other tests, threads of the kernel wait for each other
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()


def test_there_is_a_notebook():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_without_text_outputs(path):
    for cell in json.loads(path.read_text())["cells"]:
        for output in cell.get("outputs", ()):
            assert output["output_type"] in ("display_data", "execute_result")
            assert any(kind in output["data"] for kind in ("image/png", "application/vnd.plotly.v1+json"))


def test_the_benchmarks_are_listed():
    folder = ROOT / "docs" / "benchmarks"
    listed = set(re.findall(r"\]\((\w+\.md)\)", (folder / "index.md").read_text()))
    assert listed == {page.name for page in folder.glob("*.md")} - {"index.md"}
