"""Every Triton kernel compiles for an H200, at the sizes that matter, into something that can be fast.

Triton needs no GPU for that. Its interpreter, in which the other tests run the kernels, is decided at import, so a
process of its own compiles them (`tests/sm90_cases.py`).
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sm90 import SHARED_LIMIT, Launch

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "scope_lens" / "training" / "kernels"


def compiled(operands: str, *flags: str) -> dict[str, list[Launch]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, ROOT / "tests" / "sm90_cases.py", "--json", "--operands", operands, *flags],
        env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(run.stdout.splitlines()[-1])
    return {case: [Launch(**launch) for launch in launches] for case, launches in found.items()}


def check(launches: dict[str, list[Launch]], *, tensor_cores: bool, spills: bool = False) -> None:
    for case, found in launches.items():
        assert found, f"{case} launches nothing"
        for launch in found:
            told = f"{case}: {launch}"
            assert spills or launch.stack == 0, f"registers are spilled; {told}"
            assert launch.shared <= SHARED_LIMIT, f"too much shared memory; {told}"
            assert launch.blocks >= 1, f"does not fit on a multiprocessor; {told}"
            if launch.dots and tensor_cores:
                assert launch.wgmma > 0, f"the product misses the full-rate tensor cores; {told}"
                assert launch.mma == 0, f"a part of the product misses them; {told}"
            if launch.dots and not tensor_cores:
                assert launch.wgmma == launch.mma == 0, f"a product of float32 operands is rounded; {told}"


def test_bfloat16_kernels_spill_nothing_and_use_the_tensor_cores():
    launches = compiled("bfloat16")
    check(launches, tensor_cores=True)
    # Whatever is launched anywhere in the package has been compiled here.
    launched = {(path.stem, kernel) for path in KERNELS.glob("*_triton.py") for kernel in launched_in(path)}
    assert launched
    assert launched == {(launch.module, launch.kernel) for found in launches.values() for launch in found}


def launched_in(path: Path) -> set[str]:
    source = path.read_text()
    kernels = set(re.findall(r"@triton\.jit[^\n]*\n(?:@[^\n]+\n)*def (\w+)\(", source))
    return kernels & set(re.findall(r"(\w+)\[", source))


@pytest.mark.slow
def test_float32_kernels_are_ieee():
    check(compiled("float32"), tensor_cores=False)


@pytest.mark.slow
@pytest.mark.parametrize("operands", ["bfloat16", "float32"])
def test_sizes_that_nothing_divides_compile_too(operands):
    # Loads that cannot be vectorised take more registers; these sizes have to be right, not fast.
    check(compiled(operands, "--ragged"), tensor_cores=operands == "bfloat16", spills=True)
