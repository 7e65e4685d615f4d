"""A graph in one file: a safetensors file, whose header holds everything else as JSON. Nothing in it can run.

1. `write_graph` writes it whole or not at all.
2. `read_graph` refuses a file that is no graph, that was cut or changed, or that a newer version wrote.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from scope_lens.whole_file import whole_file

_HEADER = "scope_lens_graph"
VERSION = 1


def write_graph(path: Path, tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> None:
    """Write a graph's tensors and what describes them.

    Args:
        path: The file, of any name; its folder is created if missing.
        tensors: By name.
        described: What JSON holds.

    Raises:
        OSError: The disk is full or cannot be written; an earlier file stays as it was.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    body = json.dumps(described)
    header = {"version": VERSION, "checksum": _checksum(body, state), "graph": body}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        try:
            save_file(state, part, metadata={_HEADER: json.dumps(header)})
        except SafetensorError as error:
            raise OSError(f"{path} could not be written ({error}); make room, or save to another folder.") from None


def read_graph(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the description that `write_graph` wrote.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: No graph, a damaged one, or one of a newer version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; AttributionGraph.save writes one graph to one file.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()} if _HEADER in metadata else {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no whole safetensors file ({error}). A graph is one such file, written by "
            "AttributionGraph.save; copy it again or make the graph anew."
        ) from None
    if _HEADER not in metadata:
        raise ValueError(
            f"{path} is a safetensors file without {_HEADER!r} in its header, so no graph; expected one that "
            "AttributionGraph.save wrote."
        )
    return tensors, _described(path, metadata[_HEADER], tensors)


def damaged(path: Path, reason: str) -> ValueError:
    """Say that a file began as a graph and is none any more."""
    return ValueError(f"{path} is a damaged graph: {reason}. Copy it again or make the graph anew.")


def _described(path: Path, header: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = json.loads(header)
        version, checksum, body = int(fields["version"]), fields["checksum"], str(fields["graph"])
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise damaged(path, f"its header cannot be read ({type(error).__name__}: {error})") from None
    if version > VERSION:
        raise ValueError(
            f"{path} is a graph of format {version}; this scope_lens reads formats up to {VERSION}. Install a newer "
            "one."
        )
    if checksum != _checksum(body, tensors):
        raise damaged(path, "its checksum is not the one it was written with")
    try:
        return json.loads(body)
    except ValueError as error:
        raise damaged(path, f"its description cannot be read ({error})") from None


def _checksum(body: str, tensors: Mapping[str, Tensor]) -> int:
    checksum = zlib.crc32(body.encode())
    for name, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), checksum)
        if tensor.numel():
            checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, checksum)
    return checksum
