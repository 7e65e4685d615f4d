"""Making a bridge: by hub name, from a local folder, or around a loaded Hugging Face model."""

import copy
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformer_lens import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scope_lens.sites import refuse_half_precision


def boot_from_pretrained(
    name_or_path: str | Path, *, device: str | torch.device | None, dtype: torch.dtype, revision: str | None
) -> TransformerBridge:
    """See `ScopeModel.from_pretrained`."""
    name = str(name_or_path)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{folder} holds no config.json; a model folder has the Hugging Face layout (config.json, "
                "*.safetensors, tokenizer files)."
            )
        name = str(folder)
    elif isinstance(name_or_path, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(
            f"There is no folder {folder}; give a hub name such as 'google/gemma-2-2b' or a folder."
        )
    kind = (folder / "config.json").read_text() if folder.is_dir() else name.rsplit("/", maxsplit=1)[-1]
    if dtype == torch.float16 and "gemma" in kind.lower():
        raise ValueError(
            f"{name} in float16: Gemma's activations overflow float16. Use dtype=torch.bfloat16 or torch.float32."
        )
    try:
        bridge = TransformerBridge.boot_transformers(name, device=device, dtype=dtype, revision=revision)
    except SafetensorError as error:
        raise ValueError(
            f"The weights of {name!r} are damaged or truncated ({error}). Download or copy them again."
        ) from error
    except OSError as error:
        raise FileNotFoundError(
            f"The model {name!r} could not be loaded: {str(error).splitlines()[0]} Check the name, the network (or "
            "download it beforehand and give its folder), and for Gemma that its licence is accepted and you are "
            "logged in."
        ) from error
    refuse_half_precision(bridge)
    return bridge


def boot_from_hf(hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> TransformerBridge:
    """See `ScopeModel.from_hf`."""
    if tokenizer is not None and "name_or_path" not in tokenizer.init_kwargs:
        # TransformerLens looks these up to reload a tokenizer that does not add BOS; one made in memory has neither.
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.init_kwargs.update(name_or_path=tokenizer.name_or_path, add_bos_token=True)
    architecture = (getattr(hf_model.config, "architectures", None) or [type(hf_model).__name__])[0]
    return build_bridge_from_module(
        hf_model,
        architecture,
        hf_config=hf_model.config,
        tokenizer=tokenizer,
        model_name=hf_model.config.name_or_path or architecture,
    )
