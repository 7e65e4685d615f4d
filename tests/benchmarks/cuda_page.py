"""The page docs/benchmarks/cuda_step.md, from the record that bench_cuda_step.py keeps."""

GOALS = """\
Goals at 2304 -> 65536, batch 4096, L0 about 80: 70 % of the floor, 3 times sae-lens at least, 5 times in tokens/s as
the aim, 4 GiB beside the activations, and inference 3 times as fast as dense torch.
"""

FLOOR = """\
The floor is what the arithmetic and the memory traffic that nothing can avoid would take at the card's best rates.
Dense: five products of the batch with a whole weight matrix, and 26 bytes of Adam for each parameter. Sparse: one
product, four gathers of bfloat16 rows for the entries that matter, and 18 bytes of Adam for each parameter of a latent
with such an entry. The smaller one counts.
"""

OPEN = """\
**The rows of this page that need a GPU are open.** No CUDA device was at hand when the kernels were written: no
tokens/s, no share of the floor, no peak memory and no inference time of theirs has been measured, and whether the goals
are reached is not known. `python tests/benchmarks/bench_cuda_step.py` on such a machine fills them in.
What is known without one: every kernel agrees with its eager twin under Triton's interpreter, and compiles for sm_90
into what the table below says. The [memory of an update](memory.md) has been counted.
"""

STATIC = """\
Registers are those of a thread; `stack` is what did not fit into them (0: nothing is spilled); `shared` is bytes of a
block, of 232,448; `dots` counts tile products in the source, `wgmma` the full-rate tensor-core instructions in the
PTX, `mma` those of half the rate; `blocks` run at once on a multiprocessor, as registers and shared memory allow. A
test holds that nothing is spilled.
"""

CHECKS = """\
The largest difference from the eager twin as a share of the array's largest number, where no tile divides rows or
latents; then the largest relative differences of whole runs from the learner without kernels.
"""

MODEL = """\
At 790 TFLOP/s and 4.3 TB/s, which H200s were seen to reach, with 85 entries of a row that matter and firing spread
evenly over the latents. What peers would reach is modelled at 24, 12 and 10 % of the floor (sae-lens, bf16 autocast).
"""


def table(rows: list[dict]) -> list[str]:
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in rows]
    return [*lines, ""]


def page(record: dict) -> str:
    lines = ["# The training step on a CUDA GPU", "", GOALS, FLOOR]
    lines += _measured(record) if record["measured"] else [OPEN]
    if record["static"]:
        lines += _static(record["static"])
    return "\n".join(lines).rstrip("\n") + "\n"


def _measured(record: dict) -> list[str]:
    found = record["measured"]
    rates = f"{found['ceilings']['flops'] / 1e12:.0f} TFLOP/s, {found['ceilings']['bytes'] / 1e12:.2f} TB/s"
    where = " · ".join(f"{key}: {value}" for key, value in record["environment"].items())
    return [
        "## Measured",
        "",
        f"{where} · best rates of the card in this run: {rates} · {found['seconds']} seconds in all",
        "",
        "### Kernels beside their twins on this device",
        "",
        CHECKS,
        *table(found["checks"]),
        *table(found["runs"]),
        "### Updates",
        "",
        "`peak GiB` is beside the activations. Arms took turns; times are medians over rounds.",
        "",
        *table(found["steps"]),
        "### The fused encoder beside the library's product",
        "",
        *table(found["encoder"]),
        "### Inference",
        "",
        *table(found["inference"]),
        "### Where an update's time goes",
        "",
        *table(found["kernels"]),
    ]


def _static(static: dict) -> list[str]:
    return [
        "## The floor at an H200's usual rates",
        "",
        MODEL,
        *table(static["floors"]),
        "## What each kernel occupies on sm_90",
        "",
        f"Compiled by Triton {static['triton']} from the launches at 2304 -> 65536, batch 4096, capacity 256.",
        STATIC,
        *table(static["launches"]),
    ]


def _cell(value: object) -> str:
    if value is None:
        return "open"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)
