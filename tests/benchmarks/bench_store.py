"""The activation store beside bare torch and NumPy: `python tests/benchmarks/bench_store.py`.

1. The reservoir of 512 MiB, rows in and rows out, beside a loop of `index_select` and `index_copy_` on a tensor of the
   same size, and beside a mixing buffer that joins and shuffles its parts anew, as sae-lens' does. Memory is the peak
   of a process of its own over the 512 MiB.
2. Two dictionaries at one site beside one, harvest included, and beside a step of the learner.
3. Random blocks of 4,096 rows from disk, warm, beside a NumPy memory map of the same bytes.
4. How well batches are mixed.

Arms take turns in one process and are timed in CPU seconds, which hold on a machine that is not idle too.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import process_time

import numpy as np
import tensorstore as ts
import torch
from arms import interleaved, ratio, write

from scope_lens import demo
from scope_lens.training import ActivationStore, TrainConfig, Trainer
from scope_lens.training.learner import Learner
from scope_lens.training.store import zarr_rows
from scope_lens.training.store.corpus import Origin
from scope_lens.training.store.mixing import measure_mixing
from scope_lens.training.store.reservoir import Reservoir
from scope_lens.training.store.zarr_rows import ZarrRows

BUFFER, BATCH, BLOCK = 512 << 20, 4_096, 4_096
SHAPES = ((256, torch.float32), (2_304, torch.bfloat16))
NOTES = (
    "`ratio` is the median over rounds of baseline / arm, so above 1 the arm is faster; `low` and `high` are its "
    "quartiles. Times are CPU seconds of the process, its input and output threads included; on an idle machine one "
    "thread takes as many seconds. Goals: 700k rows a second and 1.05 x memory for the reservoir (rows "
    "of 256 numbers in float32), two dictionaries for 1.1 x one and a step, 5 GB/s from disk."
)


def our_buffer(d: int, dtype: torch.dtype) -> Callable[[], object]:
    """Half a buffer of rows in and out of the package's reservoir."""
    rows = BUFFER // (d * dtype.itemsize)
    reservoir = Reservoir({"x": d}, rows=rows, dtype=dtype, device=torch.device("cpu"))
    new, places, batch = torch.ones(BATCH, d, dtype=dtype), torch.zeros(BATCH, dtype=torch.long), torch.empty(BATCH, d)
    while reservoir.room >= BATCH:
        reservoir.put({"x": new}, places)

    def run() -> None:
        for _ in range(rows // 2 // BATCH):
            if reservoir.spent(BATCH):
                reservoir.shuffle()
            reservoir.draw({"x": batch}, BATCH)
            reservoir.put({"x": new}, places)

    return run


def bare_buffer(d: int, dtype: torch.dtype) -> Callable[[], object]:
    """The same with a tensor, `index_select` and `index_copy_`."""
    rows = BUFFER // (d * dtype.itemsize)
    array, new = torch.ones(rows, d, dtype=dtype), torch.ones(BATCH, d, dtype=dtype)

    def run() -> None:
        for slots in torch.randperm(rows)[: rows // 2 // BATCH * BATCH].split(BATCH):
            array.index_select(0, slots).float()
            array.index_copy_(0, slots, new)

    return run


def joining_buffer(d: int, dtype: torch.dtype) -> Callable[[], object]:
    """The same with a list of parts that are joined and shuffled whenever the buffer is full."""
    rows = BUFFER // (d * dtype.itemsize)
    new = torch.ones(BATCH, d, dtype=dtype)
    kept = [torch.ones(rows - rows // 2, d, dtype=dtype)]

    def run() -> None:
        parts = [kept.pop(), *(new.clone() for _ in range(rows // 2 // BATCH))]
        whole = torch.cat(parts)
        whole = whole[torch.randperm(len(whole))]
        for batch in whole[rows - rows // 2 :].split(BATCH):
            batch.float()
        kept.append(whole[: rows - rows // 2].clone())

    return run


BUFFERS = {"reservoir": our_buffer, "bare": bare_buffer, "joined": joining_buffer}


def peak_memory(buffer: str, shape: int) -> float:
    """Peak memory of a process that runs one buffer, over the bytes of its rows."""
    command = [sys.executable, __file__, "--peak", buffer, str(shape)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / BUFFER


def print_peak(buffer: str, shape: int) -> None:
    """What `peak_memory` runs."""
    torch.set_num_threads(1)
    (torch.ones(BATCH, 64).float()[torch.randperm(BATCH)], np.ones(4)[np.arange(2)])
    before = kib_of("VmRSS")
    run = BUFFERS[buffer](*SHAPES[shape])
    for _ in range(3):
        run()
    print((kib_of("VmHWM") - before) * 1_024)


def kib_of(field: str) -> int:
    """Memory of this process as Linux counts it; `getrusage` begins with the peak of the parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def buffer_rows(rounds: int) -> list[dict]:
    table = []
    for shape, (d, dtype) in enumerate(SHAPES):
        seconds = interleaved(
            {name: make(d, dtype) for name, make in BUFFERS.items()}, rounds=rounds, clock=process_time
        )
        memory = {name: round(peak_memory(name, shape), 2) for name in BUFFERS}
        n = BUFFER // (d * dtype.itemsize) // 2 // BATCH * BATCH
        for name, label in (("bare", "bare index_select, index_copy_"), ("joined", "parts joined and shuffled")):
            table.append({
                "work": f"reservoir of 512 MiB, rows of {d} in {str(dtype).removeprefix('torch.')}, batches of {BATCH}",
                "over": label,
                **ratio(seconds, name, "reservoir"),
                "per CPU second": f"{n / statistics.median(seconds['reservoir']) / 1e3:,.0f}k rows",
                "note": f"memory {memory['reservoir']} x, {label.split()[0]} {memory[name]} x",
            })  # fmt: skip
    return table


def two_dictionaries(rounds: int) -> list[dict]:
    model, site, updates = demo.load_model(), "blocks.1.hook_resid_post", 8
    text = [story for story in demo.text() for _ in range(40)]
    settings = {
        "hook_in": site, "hook_out": site, "width": 1_024, "sparsity": 1e-3, "steps": 10**6, "batch_size": 2_048,
    }  # fmt: skip
    configs = [TrainConfig(**settings, seed=seed) for seed in (0, 1)]

    def run(n: int) -> Callable[[], object]:
        store = ActivationStore.stream(model, text, sites=[site], rows=65_536, progress=False)
        results = Trainer(configs[:n], device="cpu").run(store, progress=False)
        return lambda: [next(results) for _ in range(updates * n)]

    d = int(model.cfg.d_model)
    learner = Learner(configs[0], d_in=d, d_out=d, scale=1.0, model="")
    x = torch.randn(2_048, d)
    arms = {"one": run(1), "two": run(2), "step": lambda: [learner.update(x, x) for _ in range(updates)]}
    seconds = interleaved(arms, rounds=rounds, clock=process_time)
    seconds["one and a step"] = [a + b for a, b in zip(seconds["one"], seconds["step"], strict=True)]
    work = f"two dictionaries {d} -> 1024 at one site, stream of the embedded model, batch 2048: time"
    rows = updates * 2_048
    return [
        {"work": work, "over": f"{over}, goal {goal}", **ratio(seconds, "two", over),
         "per CPU second": f"{rows / statistics.median(seconds['two']) / 1e3:,.1f}k rows"}
        for over, goal in (("one and a step", "1.1 or less"), ("one", "below 2"))
    ]  # fmt: skip


def disk(folder: Path, rounds: int) -> list[dict]:
    rows, d = 131_072, 2_304
    data = torch.randint(-3_000, 3_000, (rows, d), dtype=torch.int16)
    raw = np.memmap(folder / "raw", dtype=np.int16, mode="w+", shape=(rows, d))
    raw[:] = data.numpy()
    array = ZarrRows(folder / "rows", shape=(rows, d), dtype=torch.bfloat16, create=True)
    for first in range(0, rows, zarr_rows.SHARD_ROWS):
        array.write(first, data[first : first + zarr_rows.SHARD_ROWS].view(torch.bfloat16))
    calls = ts.open(
        {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/rows/"}},
        context=ts.Context({"cache_pool": {"total_bytes_limit": 0}}),
    ).result()
    order = np.random.default_rng(0).permutation(rows // BLOCK)[:16] * BLOCK
    reads = {
        "store": lambda i: array.read([(i, i + BLOCK)]).result(),
        "memmap": lambda i: torch.from_numpy(np.array(raw[i : i + BLOCK])),
        "read calls": lambda i: calls[i : i + BLOCK].read().result(),
    }

    def blocks(read: Callable[[int], object]) -> None:
        for i in order:
            read(int(i))  # a fresh tensor, and the last one is gone

    seconds = interleaved(
        {name: partial(blocks, read) for name, read in reads.items()}, rounds=rounds, clock=process_time
    )
    size = len(order) * BLOCK * d * 2
    return [
        {
            "work": f"random blocks of {BLOCK} rows of {d} in bfloat16 from disk, warm",
            "over": over,
            **ratio(seconds, name, "store"),
            "per CPU second": f"{size / statistics.median(seconds['store']) / 1e9:.1f} GB, "
            f"{over.split()[0]} {size / statistics.median(seconds[name]) / 1e9:.1f} GB",
            "note": "",
        }
        for name, over in (("memmap", "NumPy memory map"), ("read calls", "TensorStore without file_io_mode memmap"))
    ]


def mixing() -> list[dict]:
    """Places only: sequences of 1,023 kept positions in random order through reservoirs of two sizes."""
    length, sequences, table = 1_023, 20_000, []
    population = Origin(*(torch.arange(length * sequences) for _ in range(3)))
    population = population._replace(doc=population.doc // length, pos=population.pos % length)
    for slots in (1 << 20, 1 << 18):
        reservoir = Reservoir({"x": 1}, rows=slots, dtype=torch.float32, device=torch.device("cpu"))
        reservoir.seed(torch.Generator().manual_seed(0))
        order, drawn = iter(torch.randperm(sequences).tolist()), []
        batch = {"x": torch.empty(BATCH, 1)}
        while len(drawn) < 2 * slots // BATCH:
            while reservoir.room >= length:
                places = next(order) * length + torch.arange(length)
                reservoir.put({"x": torch.zeros(length, 1)}, places)
            if reservoir.spent(BATCH):
                reservoir.shuffle()
            places = reservoir.draw(batch, BATCH)
            drawn.append(Origin(places, places // length, places % length))
        found = measure_mixing(population, drawn[-64:])
        table.append({
            "work": f"mixing: reservoir of {slots:,} rows, batches of {BATCH}, 20,000 sequences of 1,023 rows",
            "over": "rows drawn at random from all of it",
            "ratio": round(found.documents_ratio, 3),
            "note": f"{found.documents:,.0f} sequences a batch of {found.documents_shuffled:,.0f}; "
            f"distance {found.distance:.3f}",
        })  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peak", nargs=2, metavar=("BUFFER", "SHAPE"), help="print the peak memory of one buffer")
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    if arguments.peak:
        print_peak(arguments.peak[0], int(arguments.peak[1]))
        return
    torch.manual_seed(0)
    folder = Path(tempfile.mkdtemp())
    try:
        rows = disk(folder, arguments.rounds)
    finally:
        shutil.rmtree(folder)
    rows += buffer_rows(arguments.rounds) + two_dictionaries(arguments.rounds) + mixing()
    write("store", "Activation store", rows, notes=NOTES)


if __name__ == "__main__":
    main()
