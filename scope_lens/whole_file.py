"""Files are written whole or not at all: into a neighbour named `<name>.part`, which takes the name when complete."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Generator[Path]:
    """Give the path to write to; when the block ends it replaces `path`, and when the block raises it is removed.

    Args:
        path: The file; an earlier one stays until the new one is complete.
    """
    part = path.with_name(path.name + ".part")
    try:
        part.touch()
        mode = part.stat().st_mode
        yield part
        part.chmod(mode)  # safetensors writes a file that its owner alone may read
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
