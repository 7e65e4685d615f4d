"""What several verbs take from the command line: text files, a language model, a device."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from scope_lens.model import ScopeModel

SiteName = Literal["res", "mlp", "att", "transcoder", "embedding"]
ModelDtype = Literal["float32", "bfloat16"]
EMBEDDED = "demo"
_HELD_OUT_STORIES = 40
_DOCUMENTS = "\n<|endoftext|>\n"


def documents(files: Sequence[str | Path], *, embedded: Literal["first", "last"] = "last") -> list[str]:
    """Read text files; documents in a file are separated by a line `<|endoftext|>`.

    Args:
        files: Their names. Where there is no file "demo", it stands for stories that the package holds.
        embedded: Which of these: the first, to train on, or the last 40, to evaluate on.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no UTF-8.
    """
    found: list[str] = []
    for file in map(Path, files):
        if str(file) == EMBEDDED and not file.exists():
            from scope_lens import demo

            stories = demo.text()
            found += stories[:-_HELD_OUT_STORIES] if embedded == "first" else stories[-_HELD_OUT_STORIES:]
            continue
        if not file.is_file():
            raise FileNotFoundError(f"There is no text file {file}.")
        try:
            found += file.read_text(encoding="utf-8").split(_DOCUMENTS)
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is no UTF-8 text ({error}).") from None
    return found


def check_writable(*paths: Path | None) -> None:
    """Refuse before any work what could not be written after it.

    Raises:
        FileNotFoundError: A folder, or a file in a folder that does not exist.
    """
    for path in paths:
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise FileNotFoundError(f"{path} cannot be written: it is a folder, or its folder does not exist.")


def language_model(name: str, *, device: str | None, dtype: ModelDtype = "float32") -> "ScopeModel":
    """Load a language model: a hub name, a folder in the Hugging Face layout, or "demo" for the embedded one.

    Raises:
        ValueError: A device that cannot be used here, or what `ScopeModel.from_pretrained` refuses.
    """
    import torch

    from scope_lens.model import ScopeModel
    from scope_lens.releases.placement import check_device

    if device is not None:
        check_device(device)
    if name == EMBEDDED and not Path(name).exists():
        from scope_lens import demo

        name = str(demo.path() / "model")
    return ScopeModel.from_pretrained(name, device=device, dtype=getattr(torch, dtype))
