"""The memory of a fused update, 16k to 1M latents: `python tests/benchmarks/bench_memory.py`.

The account (`scope_lens.training.kernels.account`) is set beside the tensors that an update really makes: it runs on
torch's "meta" device, where tensors have sizes and no memory, and every one is counted from its making to its end
(tests/live_bytes.py). No GPU is needed. `PYTHONPATH=peers` (see bench_cuda_step.py) counts the peers' updates alike.
"""

import contextlib
import json
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import cuda_arms
import stand_ins
from arms import RESULTS
from cuda_page import table
from live_bytes import LiveBytes, peaks_of_an_update

GIB = 2**30
D, BATCH, CAPACITY = 2304, 4096, 256
SIZES = {"16k": 16_384, "65k": 65_536, "131k": 131_072, "262k": 262_144, "524k": 524_288, "1M": 1_048_576}
CARD = 140.4  # GiB of an H200, whose 143,771 MiB its driver reports
MODELLED = {"65k": 9.8, "131k": 19.6, "1M": 156.0}  # sae-lens, float32, from its tensors' sizes

NOTES = f"""\
d_in = d_out = {D}, batch {BATCH}, {CAPACITY} entries a row, bfloat16 operands, Adam with beta1 = 0. GiB, the raw batch
not counted. `account` is `memory_account(...).peak`; `counted` are the tensors alive at the worst moment of an update
that ran on torch's meta device, where they have sizes and no memory. Neither counts the scratch space of sorts and
products, the allocator's rounding, or the kernels' code: some hundred MiB. A checkpoint, an evaluation on held-out text
and `Trainer.result()` have a copy of the weights beside what is held. **A peak measured on a GPU is still open.**

Goal at 65k: 4 GiB beside the activations. One H200 has {CARD} GiB: a million latents take a third of it.
"""

PEER_NOTES = """\
The peers' updates at 65k, counted the same way, in float32 (autocast does not run on the meta device; it adds copies)
and with Adam one tensor at a time. sae-lens' peak modelled from the sizes of its tensors: 9.8 GiB at 65k, 19.6 at 131k
and 156 at 1M, which one H200 does not have.
"""


def gib(value: float) -> float:
    return round(value / GIB, 2)


def rows() -> tuple[list[dict], list[dict]]:
    from scope_lens.training.kernels.account import memory_account

    totals, items = [], []
    for name, width in SIZES.items():
        account = memory_account(d_in=D, d_sae=width, batch_size=BATCH, capacity=CAPACITY)
        counted = peaks_of_an_update(width, d=D, batch_size=BATCH, capacity=CAPACITY)
        totals.append(
            {
                "latents": name,
                "held": gib(sum(account.held.values())),
                "sparse update": gib(sum(account.sparse.values())),
                "dense update": gib(sum(account.dense.values())),
                "account": gib(account.peak),
                "counted, sparse": gib(counted["sparse"]),
                "counted, dense": gib(counted["dense"]),
                "share of an H200": f"{account.peak / GIB / CARD:.0%}",
                "sae-lens, modelled": MODELLED.get(name, "-"),
            }
        )
        for part in ("held", "sparse", "dense"):
            for item, size in getattr(account, part).items():
                row = next((row for row in items if (row["part"], row["item"]) == (part, item)), None)
                if row is None:
                    items.append(row := {"part": part, "item": item})
                row[name] = round(size / GIB, 3)
    return totals, items


def peer_rows() -> list[dict]:
    """Peaks of the peers' updates at 65k, counted on the meta device."""
    work = cuda_arms.Work(D, SIZES["65k"], BATCH, 80.0)
    found = []
    for name, build in (
        ("sae_lens", cuda_arms.sae_lens),
        ("dictionary_learning", cuda_arms.dictionary_learning),
    ):
        if find_spec(name) is None:
            continue
        with (
            LiveBytes() as live,
            torch.device("meta"),
            mock.patch.object(torch, "autocast", return_value=contextlib.nullcontext()),
            mock.patch.object(torch.Tensor, "item", return_value=0.5),
            mock.patch.object(cuda_arms, "unit_rows", side_effect=lambda work, _: torch.empty(work.d_sae, work.d)),
        ):
            x = torch.empty(BATCH, D)
            arm = build(work, x, "meta")
            for _ in range(2):
                live.peak = live.now
                arm.update()
            counted = {"held": gib(live.now - x.nbytes), "at most": gib(live.peak - x.nbytes)}
            found.append({"trainer": f"{arm.name.partition(',')[0]} {version(name.replace('_', '-'))}"} | counted)
    return found


def main() -> None:
    stand_ins.enter()
    totals, items = rows()
    known = RESULTS / "memory.json"
    peers = peer_rows() or (json.loads(known.read_text())["peers"] if known.is_file() else [])
    where = {
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "command": "python tests/benchmarks/bench_memory.py",
    }
    record = {"environment": where, "totals": totals, "items": items, "peers": peers}
    known.write_text(json.dumps(record, indent=2) + "\n")
    lines = ["# The memory of a training step", "", " · ".join(f"{key}: {value}" for key, value in where.items()), ""]
    lines += [NOTES, *table(totals), "## By item, at most", "", *table(items)]
    if peers:
        lines += ["## Peers", "", PEER_NOTES, *table(peers)]
    known.with_suffix(".md").write_text("\n".join(lines).rstrip("\n") + "\n")


if __name__ == "__main__":
    main()
