"""The training step on a CUDA GPU: share of the floor, peers, memory, inference, and where the time goes.

    python tests/benchmarks/bench_cuda_step.py                  on a GPU: measures and writes the page (under 8 minutes)
    python tests/benchmarks/bench_cuda_step.py --static         without one: what each kernel occupies, and the floor
    python tests/benchmarks/bench_cuda_step.py --smoke --out DIR    anywhere: tiny sizes, nothing of meaning

Floors are taken from what this very card does in this very run (a product and a copy), not from a data sheet. Arms take
turns; each is timed by the device's clock over several updates in a row.

A bare machine with torch and Triton needs jaxtyping, safetensors and NumPy beside them; what else the package imports
is stood in for (stand_ins.py). The peers are optional. Where pip has the network:

    pip install --no-deps --target peers sae-lens dictionary-learning simple-parsing docstring-parser einops packaging
    PYTHONPATH=peers python tests/benchmarks/bench_cuda_step.py --out results

and where it has not, carry the folder `peers` there: 5 MB of Python, no compiled code.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import cuda_arms as arms
import cuda_check
import stand_ins
import torch
from arms import RESULTS
from cuda_arms import Ceilings, Work
from cuda_page import page

H200 = Ceilings(790e12, 4.3e12)  # what products and copies were seen to reach on one
SIZES = (16_384, 65_536, 131_072)
PEERS = {"sae_lens": arms.sae_lens, "dictionary_learning": arms.dictionary_learning}


class Plan:
    """How large and how long."""

    def __init__(self, *, smoke: bool) -> None:
        self.device = "cpu" if smoke else "cuda"
        self.works = [Work(32, 128, 16, 8.0)] if smoke else [Work(2304, size, 4096, 80.0) for size in SIZES]
        self.rounds, self.times, self.warm = (1, 1, 2) if smoke else (7, 6, 12)
        self.profiled = 1 if smoke else 3
        self.checked = {"d": 40, "d_sae": 300, "batch": 33} if smoke else {"d": 2304, "d_sae": 10_001, "batch": 1000}
        self.run = {"updates": 8 if smoke else 200, "d": 64, "width": 256 if smoke else 4096, "batch": 256}
        self.ceilings = {"size": 64, "copied": 2**16} if smoke else {}


def step_rows(plan: Plan, work: Work, ceilings: Ceilings) -> tuple[list[dict], list[dict]]:
    """One row for each trainer at one size, and our step's kernels."""
    x = arms.rows_of(work, plan.device)
    state = arms.state_of(work, x, plan.device)
    floors = arms.floors(work, ceilings, state)
    made, peaks = [], {}
    builders = [arms.ours, partial(arms.ours, dense=True)]
    builders += [build for name, build in PEERS.items() if find_spec(name)]
    for build in builders:
        before = arms.allocated(plan.device)
        arm = build(work, x, plan.device)
        for _ in range(plan.warm):  # compiles, and moves from dense to sparse
            arm.update()
        peaks[arm.name] = arms.peak_of(arm.update, device=plan.device, before=before)
        made.append(arm)
    updates = {arm.name: arm.update for arm in made}
    seconds = arms.interleaved(updates, device=plan.device, rounds=plan.rounds, times=plan.times)
    kind, ours = min(floors, key=floors.__getitem__), made[0].name
    best = floors[kind]
    rows = [
        {
            "work": str(work),
            "trainer": name,
            "ms": round(arms.median(values) * 1e3, 3),
            "tokens/s": round(work.batch / arms.median(values)),
            "floor ms": round(best * 1e3, 3),
            "floor": kind,
            "share of floor": round(best / arms.median(values), 3),
            "ours is faster by": round(arms.ratio(values, seconds[ours]), 2),
            "peak GiB": None if peaks[name] is None else round(peaks[name], 2),
        }
        for name, values in seconds.items()
    ]
    for row in rows:
        row |= {"entries that matter": round(state.matter, 1), "latents touched": round(state.touched, 4)}
    return rows, profile(made[0].update, plan, work)


def profile(update: Callable[[], object], plan: Plan, work: Work) -> list[dict]:
    """Milliseconds of each kernel in one update, the longest first."""
    cuda = plan.device == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as trace:
        for _ in range(plan.profiled):
            update()
        if cuda:
            torch.cuda.synchronize()
    found = [
        {
            "work": str(work),
            "kernel": event.key[:80],
            "ms": round((event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3 / plan.profiled, 4),
            "calls": round(event.count / plan.profiled, 1),
        }
        for event in trace.key_averages()
    ]
    found.sort(key=lambda row: -row["ms"])
    total = sum(row["ms"] for row in found)
    return [row | {"share": round(row["ms"] / total, 3)} for row in found[:16]]


def encoder_rows(plan: Plan, work: Work, ceilings: Ceilings) -> list[dict]:
    """The fused encoder beside the library's bare product of the same operands, which decides and keeps nothing."""
    kernels = arms.kernels_for(plan.device)
    x = (arms.rows_of(work, plan.device) / work.d**0.5).to(torch.bfloat16)
    weight = arms.unit_rows(work, plan.device).to(torch.bfloat16)
    zero = torch.zeros(work.d_sae, device=plan.device)
    threshold = torch.full_like(zero, work.threshold)
    capacity = min(256, work.d_sae)

    def encode() -> object:
        return kernels.encode(x, weight, zero, threshold, half_window=arms.BANDWIDTH / 2, capacity=capacity)

    seconds = arms.interleaved(
        {"product": lambda: x @ weight.T, "encode": encode}, device=plan.device, rounds=plan.rounds, times=plan.times
    )
    floor = ceilings.products(work, 1)
    return [
        {
            "work": str(work),
            "kernel": name,
            "ms": round(arms.median(values) * 1e3, 4),
            "share of the card's products": round(floor / arms.median(values), 3),
            "speed beside the product": round(arms.ratio(seconds["product"], values), 3),
        }
        for name, values in seconds.items()
    ]


@torch.no_grad()
def inference_rows(plan: Plan, work: Work) -> list[dict]:
    """Encode and decode with the active latents alone, beside dense torch in bfloat16 and the dictionary's forward."""
    from scope_lens.sae import HookedSAE, SAEConfig
    from scope_lens.training.kernels.codec import SparseCodec

    site = "blocks.12.hook_resid_post"
    sae = HookedSAE(SAEConfig(d_in=work.d, d_out=work.d, d_sae=work.d_sae, hook_in=site, hook_out=site))
    sae = sae.to(plan.device)
    sae.W_dec.copy_(arms.unit_rows(work, plan.device))
    sae.W_enc.copy_(sae.W_dec.T)
    sae.threshold.fill_(work.threshold)
    sae = sae.to(torch.bfloat16)
    x = (arms.rows_of(work, plan.device) / work.d**0.5).to(torch.bfloat16)
    codec = SparseCodec(sae)
    threshold = sae.threshold.to(torch.bfloat16)

    def dense() -> torch.Tensor:
        pre = torch.addmm(sae.b_enc, x, sae.W_enc)
        return torch.addmm(sae.b_dec, pre * (pre > threshold), sae.W_dec)

    runs = {
        "SparseCodec": lambda: codec.forward(x),
        "dense torch, all of it bfloat16": dense,
        "HookedSAE, decision in float32": lambda: sae(x),
    }
    seconds = arms.interleaved(runs, device=plan.device, rounds=plan.rounds, times=plan.times)
    return [
        {
            "work": str(work),
            "encode + decode": name,
            "ms": round(arms.median(values) * 1e3, 3),
            "codec is faster by": round(arms.ratio(values, seconds["SparseCodec"]), 2),
        }
        for name, values in seconds.items()
    ]


def measure(plan: Plan) -> dict:
    """All of the page's measured tables."""
    torch.manual_seed(0)
    begin = time.perf_counter()
    ceilings = Ceilings.measured(plan.device, **plan.ceilings)
    found: dict = {"ceilings": ceilings._asdict(), "steps": [], "kernels": [], "encoder": [], "inference": []}
    found["checks"] = cuda_check.kernel_rows(plan.device, **plan.checked)
    found["runs"] = cuda_check.run_rows(plan.device, **plan.run)
    print(f"checks: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    for work in plan.works:
        steps, kernels = step_rows(plan, work, ceilings)
        found["steps"] += steps
        found["kernels"] += kernels
        if plan.device == "cuda":
            torch.cuda.empty_cache()
        found["encoder"] += encoder_rows(plan, work, ceilings)
        print(f"{work}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    found["inference"] = inference_rows(plan, plan.works[min(1, len(plan.works) - 1)])
    found["seconds"] = round(time.perf_counter() - begin)
    return found


def static() -> dict:
    """What is known without a GPU: each kernel compiled for sm_90, and the floor at an H200's usual ceilings."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from sm90_cases import CASES, compiled

    launches = [
        {"function": name, **launch._asdict(), "grid": " x ".join(map(str, launch.grid)), "blocks": launch.blocks}
        for name in CASES
        for launch in compiled(name)
    ]
    state = arms.State(matter=85.0, active=80.0, touched=0.0)
    rows = []
    for size in SIZES:
        work = Work(2304, size, 4096, 80.0)
        touched = 1 - (1 - state.matter / size) ** work.batch
        floors = arms.floors(work, H200, state._replace(touched=touched))
        best = min(floors.values())
        rows.append(
            {"work": str(work)}
            | {f"{name} ms": round(value * 1e3, 2) for name, value in floors.items()}
            | {"ms at 70 % of it": round(best / 0.7 * 1e3, 2), "tokens/s at 70 %": round(0.7 * work.batch / best)}
        )
    return {"triton": version("triton"), "launches": launches, "floors": rows}


def environment(device: str) -> dict:
    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "-"

    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: installed(name) for name in ("triton", "sae-lens", "dictionary-learning")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--static", action="store_true", help="compile facts and floors, without a GPU")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--bare", action="store_true", help="stand in for optional packages even where installed")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not (options.static or options.smoke or torch.cuda.is_available()):
        parser.error("torch finds no CUDA device: pass --static for what is known without one, or --smoke")
    sys.path.append(str(Path(__file__).parents[2]))  # a checkout that is not installed
    stand_ins.enter(force=options.bare)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "cuda_step.json"
    known = next((f for f in (file, RESULTS / "cuda_step.json") if f.is_file()), None)
    record = json.loads(known.read_text()) if known else {"static": None, "environment": None, "measured": None}
    if options.static:
        record["static"] = static()
    else:
        plan = Plan(smoke=options.smoke)
        record |= {"environment": environment(plan.device), "measured": measure(plan)}
    file.write_text(json.dumps(record, indent=2) + "\n")
    file.with_suffix(".md").write_text(page(record))
    if record["measured"] and not all(row["agrees"] for name in ("checks", "runs") for row in record["measured"][name]):
        sys.exit("Some kernels disagree with their twins on this device: see the page's first tables.")


if __name__ == "__main__":
    main()
