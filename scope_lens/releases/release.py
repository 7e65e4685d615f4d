"""One published dictionary as a record, and the grammar of the paths that name it.

A path inside a repository reads `layer_{L}/width_{W}/average_l0_{N}` (or `embedding/width_4k/average_l0_{N}`) and ends
in `params.npz`. Widths are powers of two with a decimal name: 16k is 16,384, 131k is 131,072, 1m is 1,048,576.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

from scope_lens.releases.sites import Site

FILE_NAME = "params.npz"
_PATH = re.compile(r"(?:layer_(?P<layer>\d+)|embedding)/width_(?P<width>\d+[km]?)/(?:average_l0_(?P<l0>\d+)|canonical)")
_WIDTHS = {f"{2**n // 1000}k" if n < 20 else f"{2**n // 10**6}m": 2**n for n in range(10, 23)}
_NAMES = {width: name for name, width in _WIDTHS.items()}


@dataclass(frozen=True, kw_only=True)
class Release:
    """One published dictionary: where its file lies and what its path says of it.

    Attributes:
        repo: Repository on the hub; empty for a dictionary of a local folder (`open_suite`).
        path: Folder of the file inside the repository, e.g. "layer_20/width_16k/average_l0_71".
        model: Hugging Face id of the language model; empty where a local folder does not say.
        site: Where the dictionary attaches.
        layer: Number of the layer; None for the embedding.
        width: Number of latents, as the path names it; the arrays decide when the file is read.
        l0: Average number of active latents a token, as the path states it.
        neuronpedia: Id of the dictionary's dashboards on Neuronpedia; None where there are none.
    """

    repo: str
    path: str
    model: str
    site: Site
    layer: int | None
    width: int
    l0: int
    neuronpedia: str | None

    @property
    def file(self) -> str:
        """Path of the file inside the repository."""
        return f"{self.path}/{FILE_NAME}"

    def __str__(self) -> str:
        return f"{self.repo}/{self.path}" if self.repo else self.path


class PathParts(NamedTuple):
    """What a path says: `layer` is None for the embedding, `l0` is None where it reads "canonical"."""

    layer: int | None
    width: str
    l0: int | None


def parse_path(path: str) -> PathParts | None:
    """Take a path apart; None where it does not follow the grammar. A trailing `/params.npz` is allowed."""
    match = _PATH.fullmatch(path.strip("/").removesuffix(f"/{FILE_NAME}"))
    if match is None:
        return None
    layer, l0 = match["layer"], match["l0"]
    return PathParts(None if layer is None else int(layer), match["width"], None if l0 is None else int(l0))


def parse_width(width: int | str) -> int:
    """Number of latents of a width: an int as it is, "16k" as 16384, "1m" as 1048576.

    Raises:
        KeyError: A name that stands for no power of two.
    """
    if isinstance(width, int):
        return width
    name = width.strip().lower().removeprefix("width_")
    if name.isdecimal():
        return int(name)
    if name not in _WIDTHS:
        raise KeyError(f"{width!r} names no width. Widths are powers of two: {', '.join(_WIDTHS)}, or a plain number.")
    return _WIDTHS[name]


def width_name(width: int) -> str:
    """Name of a width as paths spell it: 16384 is "16k"; a width that has no name is its plain number."""
    return _NAMES.get(width, str(width))
