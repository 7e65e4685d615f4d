"""Write a dictionary as Gemma Scope's files hold it: five float32 arrays in `params.npz`.

Their layout is `layer_{layer}/width_{1k|16k|...}/average_l0_{N}/params.npz`, where N is the measured mean L0, rounded.
"""

from pathlib import Path
from typing import Any

import numpy as np

from scope_lens.releases.release import FILE_NAME, width_name
from scope_lens.sae import HookedSAE
from scope_lens.whole_file import whole_file

_ARRAYS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


def gemma_scope_path(*, layer: int, width: int, l0: float) -> str:
    """Give the folder of a dictionary in Gemma Scope's layout, e.g. "layer_20/width_16k/average_l0_71".

    Args:
        layer: Layer of the language model.
        width: Number of latents.
        l0: Measured mean number of active latents.
    """
    return f"layer_{layer}/width_{width_name(width)}/average_l0_{round(l0)}"


def save_gemma_scope(sae: HookedSAE, folder: Path) -> Path:
    """Write `folder/params.npz`, whole or not at all.

    Args:
        sae: A JumpReLU dictionary in its inference form.
        folder: Created if missing; `gemma_scope_path` names it as Gemma Scope would.

    Returns:
        The file.

    Raises:
        ValueError: The format has no place for what the dictionary is.
    """
    cfg = sae.cfg
    if cfg.activation != "jumprelu" or cfg.skip or cfg.pre_encoder_bias:
        raise ValueError(
            "Gemma Scope's format holds JumpReLU dictionaries without skip term or pre-encoder bias; found "
            f"activation={cfg.activation!r}, skip={cfg.skip}, pre_encoder_bias={cfg.pre_encoder_bias}. Fold the bias "
            "with to_inference, or keep the dictionary with HookedSAE.save."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / FILE_NAME
    arrays: dict[str, Any] = {name: sae.get_parameter(name).detach().float().cpu().numpy() for name in _ARRAYS}
    with whole_file(file) as part, part.open("wb") as stream:
        np.savez(stream, **arrays)
    return file
