"""The page of bench_graph.py from its record."""

NAMES = {"attribute": "the graph", "prune": "pruning", "export": "JSON", "prune and export": "pruning and JSON"}

HEAD = """\
# An attribution graph beside circuit-tracer

Command: `python tests/benchmarks/bench_graph.py --circuit-tracer <python>`

The same random Gemma 2 with a transcoder on every layer, the same prompt, and the same graph: every active latent is a
node and a target, with errors, tokens and the ten logits. Both packages read the weights from the same files, run in
processes of their own, and take turns; the first round does not count. Seconds are medians over the other rounds, wall
time and processor time of all threads. A ratio is circuit-tracer's over ours in the same round: median, least and
greatest. Peak memory is that of the whole process, libraries and weights included; on a GPU, what is allocated there.

"the graph" is `attribute` of each package from tokens to edges; ours includes its checks. "pruning" is at 0.8 of the
nodes' influence and 0.98 of the edges'. "JSON" is the file that Neuronpedia reads, from a graph already pruned;
circuit-tracer is spared its second pruning and the reading of the tokenizer. Its batch of 32 was faster at tiny than 8,
16, 64 and 256.
"""


def page(record: dict) -> str:
    """The page as text.

    Args:
        record: What bench_graph.py writes as graph.json.
    """
    lines = [HEAD]
    for name, found in record["measured"].items():
        lines += [*section(name, found), ""]
    for name, needs in record["needs"].items():
        if name not in record["measured"]:
            lines += [f"## {name}, on a GPU", "", "**Not measured**: no CUDA device was at hand.", needs, ""]
            lines += [f"`--sizes {name}` runs it.", ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def section(name: str, found: dict) -> list[str]:
    versions = ", ".join(
        f"{arm} beside {', '.join(f'{package} {number}' for package, number in packages.items())}"
        for arm, packages in found["versions"].items()
    )
    load = " to ".join(str(value) for value in found["load"])
    lines = [
        f"## {name}",
        "",
        (
            f"{found['size']}. Threads of each: {found['threads']}. Rounds that count: "
            f"{len(found['rounds']['scope_lens']['prune'])}. circuit-tracer's batch: {found['batch']}."
        ),
        "",
        f"date: {found['date']} · machine: {found['device']}, load average {load} · {versions}",
        "",
        "| work | wall s, ours | theirs | ratio | processor s, ours | theirs | ratio | peak MiB, ours | theirs |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in found["table"]:
        cells = [NAMES[row["work"]]]
        for key in ("wall", "cpu"):
            cells += [f"{row[f'{key}_scope_lens']:.3g}", f"{row[f'{key}_circuit_tracer']:.3g}"]
            cells.append(f"**{row[f'{key}_ratio']:.1f}** ({row[f'{key}_low']:.1f} to {row[f'{key}_high']:.1f})")
        cells += [f"{row['peak_mib_scope_lens']:,.0f}", f"{row['peak_mib_circuit_tracer']:,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    held, size = found["held_mib"], found["json_bytes"]
    lines += [
        "",
        f"Held before the first graph: {held['scope_lens']:,} and {held['circuit_tracer']:,} MiB.",
        f"The JSON: {size['scope_lens'] / 2**20:.1f} and {size['circuit_tracer'] / 2**20:.1f} MiB.",
        "",
        "| the two graphs | |",
        "|---|--:|",
    ]
    lines += [f"| {what} | {value:,} |" for what, value in found["agreement"].items()]
    return lines
