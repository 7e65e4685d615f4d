"""How much memory a graph will need, and how much there is: known before the work, not after it.

1. `refuse_long_prompt` looks at the forward pass: attention patterns grow with the square of the prompt.
2. `rows_that_fit` looks at the edges, once it is known how many latents are active, and at the sweep, which is cut into
   as many parts as the memory asks for.
3. `available_memory` is what the machine has left, or what is left of the limit that a container sets.

The numbers are upper bounds of what is held at once; Python, libraries and weights are there already.
"""

import math
from itertools import accumulate
from pathlib import Path

import psutil
import torch
from transformer_lens import TransformerBridge

from scope_lens.circuits.sources import Sources
from scope_lens.sites import layer_of

_MOST_ROWS = 256  # more targets in one product make it no faster
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def refuse_long_prompt(bridge: TransformerBridge, n_pos: int, *, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a prompt whose attention patterns and logits do not fit.

    Args:
        bridge: The model.
        n_pos: Length of the prompt.
        dtype: Of the sweep.
        device: Where the model is.

    Raises:
        ValueError: It needs more than there is; how much, and how long a prompt would fit.
    """
    cfg = bridge.cfg
    parameters = list(bridge.parameters())
    own, swept = parameters[0].dtype.itemsize, dtype.itemsize
    # Every layer's pattern is held as it was recorded and in the sweep's dtype; one layer's scores pass through a few
    # copies in float32. Logits: the model's, a copy, and those of the linear model. Weights: attention's, written out.
    square = cfg.n_heads * (cfg.n_layers * (own + swept) + 4 * 4)
    line = 3 * cfg.d_vocab * own + cfg.n_layers * cfg.d_model * (own + swept) * 4
    weights = 2 * cfg.n_layers * cfg.d_model * cfg.n_heads * cfg.d_head * swept
    if dtype == torch.float64:
        weights += sum(parameter.numel() for parameter in parameters) * swept
    available = available_memory(device)
    needed = square * n_pos**2 + line * n_pos + weights
    if needed <= available:
        return
    room = max(0, available - weights)
    fits = int((math.sqrt(line**2 + 4 * square * room) - line) / (2 * square))
    raise ValueError(
        f"A prompt of {n_pos} tokens needs about {_gib(needed)} for its forward pass (attention patterns, logits, and "
        f"copies of weights in {str(dtype).removeprefix('torch.')}); {_gib(available)} is free. About {fits} tokens "
        "would fit."
    )


def rows_that_fit(sources: Sources, n_ends: int, *, max_latents: int | None, sweep_width: int) -> int:
    """How many targets a sweep may take at once.

    Args:
        sources: All that writes.
        n_ends: Number of logits and directions.
        max_latents: As `attribute` takes it.
        sweep_width: Numbers that a sweep holds for each row and position.

    Raises:
        ValueError: The edges need more than there is; how much, and what would fit.
    """
    itemsize, n_pos = sources.embed.dtype.itemsize, sources.n_pos
    # Every edge is there as its row was found and, with the number of its source, in the order of the nodes.
    edges = edges_at_most(sources, n_ends) * (2 * itemsize + 4)
    latents = sources.n_latents
    if max_latents is not None and latents:
        edges *= min(max_latents, latents) / latents
    # A block of edges is there as products gave it, with its columns in order, and as truth values.
    row = n_pos * sweep_width * itemsize + sources.n_nodes * (2 * itemsize + 1)
    available = available_memory(sources.embed.device)
    rows = int((available - edges) // row)
    if rows >= 1:
        return min(rows, _MOST_ROWS)
    share = max(0.0, available - row) / edges if edges else 0.0
    few = int(min(latents if max_latents is None else max_latents, latents) * share)
    raise ValueError(
        f"The graph of {n_pos} tokens and {latents} active latents needs about {_gib(edges + row)} for its edges and "
        f"the sweep; {_gib(available)} is free. A prompt of about {int(n_pos * math.sqrt(share))} tokens would fit, or "
        f"max_latents={few}."
    )


def edges_at_most(sources: Sources, n_ends: int) -> int:
    """Number of edges if everything reached everything behind it, at its own and later positions, up to a cut stream.

    Args:
        sources: All that writes.
        n_ends: Number of logits and directions, as if all were read at the last position.
    """
    total = 0
    tokens = torch.arange(1, sources.n_pos + 1)
    written, reaching = tokens, tokens  # sources up to each position: all, and those that no cut of the stream hides
    for part in sources.parts:
        place = part.place
        # What is read in an earlier layer than it writes may have been read before a cut.
        seen = reaching if layer_of(place.reads) == layer_of(place.writes) else written
        total += int(torch.bincount(part.pos.cpu(), minlength=sources.n_pos) @ seen)
        if place.passes and place.sae.W_skip is None:
            # Past the cut comes what reaches an untrained position, from there or from before it.
            last = (~place.trained).nonzero()[-1:, 0].tolist()
            reaching = reaching.clamp(max=int(reaching[last[0]])) if last else torch.zeros_like(reaching)
        written, reaching = (counts + torch.tensor(part.starts[1:]) for counts in (written, reaching))
    return total + n_ends * int(reaching[-1])


def available_memory(device: torch.device) -> int:
    """Bytes that can be had: on a GPU what is free and what torch keeps unused, else the machine's or the container's.

    Args:
        device: Where the tensors will be.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return min([int(psutil.virtual_memory().available), *cgroup_rooms(_CGROUPS, _OWN_CGROUPS)])


def cgroup_rooms(root: Path, own: Path) -> list[int]:
    """Bytes left below each memory limit of this process' control groups, of either version.

    Args:
        root: Where control groups are mounted.
        own: File that names those of this process, as /proc/self/cgroup.
    """
    rooms: list[int] = []
    lines = own.read_text().splitlines() if own.is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # A group is limited by those above it too. In a container the names may be the host's; its top is its own.
        for folder in accumulate(Path(path.lstrip("/")).parts, Path.__truediv__, initial=top):
            room = _room(folder, *names)
            if room is not None:
                rooms.append(room)
    return rooms


def _room(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    if not ((folder / limit).is_file() and (folder / usage).is_file()):
        return None
    allowed = (folder / limit).read_text().strip()
    if allowed == "max":
        return None
    stat = folder / "memory.stat"
    entries = dict(line.split() for line in stat.read_text().splitlines()) if stat.is_file() else {}
    return int(allowed) - int((folder / usage).read_text()) + int(entries.get(reclaimable, 0))


def _gib(n: float) -> str:
    return f"{n / 2**30:.3g} GiB"
