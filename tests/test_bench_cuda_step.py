"""The benchmark of the CUDA step runs, from a machine without anything but torch, and writes its page."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "benchmarks"
PAGES = Path(__file__).parents[1] / "docs" / "benchmarks"


@pytest.fixture
def page(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import cuda_page

    return cuda_page.page


def test_a_smoke_run_fills_every_table(tmp_path, page):
    # --bare: without TransformerLens and most other packages, as on a machine that has torch and Triton alone.
    run = subprocess.run(
        [sys.executable, SCRIPTS / "bench_cuda_step.py", "--smoke", "--bare", "--out", tmp_path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    record = json.loads((tmp_path / "cuda_step.json").read_text())
    measured = record["measured"]
    assert {row["trainer"] for row in measured["steps"]} >= {"scope_lens", "scope_lens, dense"}
    for row in measured["steps"]:
        assert row["ms"] > 0
        assert row["tokens/s"] > 0
    assert {row["kernel"] for row in measured["encoder"]} == {"product", "encode"}
    assert len(measured["inference"]) == 3
    assert measured["kernels"]
    assert len(measured["checks"]) == 26
    assert all(row["agrees"] for name in ("checks", "runs") for row in measured[name])
    text = (tmp_path / "cuda_step.md").read_text()
    assert text == page(record)
    assert "are open" not in text


def test_the_committed_page_is_its_record(page):
    record = json.loads((PAGES / "cuda_step.json").read_text())
    assert (PAGES / "cuda_step.md").read_text() == page(record)
    # Nothing of a smoke run, and no GPU's numbers without the GPU's name.
    assert record["measured"] is None or "NVIDIA" in record["environment"]["machine"]
