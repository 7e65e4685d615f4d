"""Make `scope_lens/releases/index.json`, the packaged list of Gemma Scope's files.

    python tests/scripts/build_release_index.py ../shared/data/gemma_scope_index.json
    python tests/scripts/build_release_index.py ../shared/data/gemma_scope_index.json --pin

The source lists 2,859 entries over 2,430 files: each file once by its L0, and again where it is the canonical choice of
its cell (layer and width) or has dashboards. This script

1. merges the entries of one file,
2. adds the transcoders that the source leaves out: it lists the sparsest of each layer, and the second and third
   sparsest exist too (52 files; L0s as circuit-tracer's configurations name them),
3. drops the dashboard ids that contradict their file: the listing gives gemma-2-9b/20-gemmascope-res-131k__l0-10 and
   ...__l0-12 to layer_2/width_16k/average_l0_8 and layer_20/width_131k/average_l0_114, so nothing says which
   dictionaries these two dashboards show,
4. writes one row for each cell: [L0s], canonical L0, L0 of the plain Neuronpedia id, L0s with an id of their own,
5. with `--pin`, asks the hub for the present commit of each repository and stores it as the pinned revision. Without
   it the pins of the existing index are kept; an empty pin means that no commit is known.
"""

import argparse
import json
from pathlib import Path

INDEX = Path(__file__).resolve().parents[2] / "scope_lens" / "releases" / "index.json"
TRANSCODERS = "google/gemma-scope-2b-pt-transcoders"
SECOND = "115 104 87 96 157 153 176 130 92 130 159 10 10 14 14 14 17 20 21 19 19 22 24 41 59 68"
THIRD = "165 173 155 167 282 272 329 245 168 235 287 17 18 26 24 25 29 34 34 32 31 36 40 69 96 110"


def cells(entries: list[dict]) -> dict[str, dict[str, dict[str, list]]]:
    """Rows by repository, layer and width: L0s, canonical L0, L0 of the plain id, L0s with an id of their own."""
    repos: dict[str, dict] = {}
    for entry in entries:
        layer = "embedding" if entry["layer"] is None else str(entry["layer"])
        cell = (
            repos.setdefault(entry["repo_id"], {})
            .setdefault(layer, {})
            .setdefault(entry["width_name"], {"l0s": set(), "canonical": None, "plain": None, "own": set()})
        )
        l0 = entry["l0"]
        cell["l0s"].add(l0)
        if entry["canonical"]:
            assert cell["canonical"] is None, entry
            cell["canonical"] = l0
        if entry["neuronpedia"]:
            source = entry["neuronpedia"].split("/")[1]
            plain = f"{layer}-gemmascope-{entry['site']}-{entry['width_name']}"
            if source == plain:
                assert cell["plain"] is None, entry
                cell["plain"] = l0
            elif source == f"{plain}__l0-{l0}":
                cell["own"].add(l0)
            else:
                print(f"dropped: {entry['neuronpedia']} contradicts {entry['repo_id']}/{entry['path']}")
    for further in (SECOND, THIRD):
        for layer, l0 in enumerate(further.split()):
            repos[TRANSCODERS][str(layer)]["16k"]["l0s"].add(int(l0))
    order = {name: i for i, name in enumerate(["4k", "16k", "32k", "65k", "131k", "262k", "524k", "1m"])}
    return {
        repo: {
            layer: {
                width: [sorted(c["l0s"]), c["canonical"], c["plain"], sorted(c["own"])]
                for width, c in sorted(widths.items(), key=lambda item: order[item[0]])
            }
            for layer, widths in sorted(layers.items(), key=lambda item: (not item[0].isdecimal(), item[0].zfill(2)))
        }
        for repo, layers in repos.items()
    }


def revisions(repos: list[str], *, ask_hub: bool) -> dict[str, str]:
    if ask_hub:
        from huggingface_hub import HfApi

        return {repo: HfApi().model_info(repo).sha or "" for repo in repos}
    kept = json.loads(INDEX.read_text())["revisions"] if INDEX.is_file() else {}
    return {repo: kept.get(repo, "") for repo in repos}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the listing to pack, as JSON")
    parser.add_argument("--pin", action="store_true", help="store the present commit of each repository")
    arguments = parser.parse_args()
    listing = json.loads(arguments.source.read_text())
    rows = cells(listing["entries"])
    index = {
        "source": listing["source"],
        "revisions": revisions(list(rows), ask_hub=arguments.pin),
        "cells": rows,
    }
    part = INDEX.with_name(INDEX.name + ".part")
    part.write_text(_by_line(index))
    part.replace(INDEX)
    files = sum(len(row[0]) for layers in rows.values() for widths in layers.values() for row in widths.values())
    print(f"{files} files, {INDEX.stat().st_size} bytes")


def _by_line(index: dict) -> str:
    """JSON with one layer a line, so that a change of the index reads as a change of lines."""
    lines = [
        "{",
        f'"source": {json.dumps(index["source"])},',
        f'"revisions": {json.dumps(index["revisions"], indent=0)},',
    ]
    lines.append('"cells": {')
    for i, (repo, layers) in enumerate(index["cells"].items()):
        lines.append(f'"{repo}": {{')
        body = [f'"{layer}": {json.dumps(widths, separators=(",", ":"))}' for layer, widths in layers.items()]
        lines.append(",\n".join(body))
        lines.append("}" + ("," if i + 1 < len(index["cells"]) else ""))
    return "\n".join([*lines, "}", "}"]) + "\n"


if __name__ == "__main__":
    main()
