"""What a dictionary is and where it attaches, as a frozen record that is saved beside the weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

Activation = Literal["relu", "jumprelu", "topk", "batchtopk"]
SpecialPosition = Literal["bos", "eos", "pad", "chat_prefix"]
UNTRAINED: tuple[SpecialPosition, ...] = ("bos", "eos", "pad")  # what no published dictionary was trained on


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """What a dictionary is and where it attaches.

    Attributes:
        d_in: Width of the activation the encoder reads.
        d_out: Width of the activation the decoder writes.
        d_sae: Number of latents.
        hook_in: Hook name the encoder reads, canonical or alias.
        hook_out: Hook name the decoder writes; equal to `hook_in` for an autoencoder.
        activation: Activation function.
        k: Latents kept (each row for `topk`, on average for `batchtopk`); None for the others.
        skip: Whether an affine skip term `x @ W_skip` is added to the reconstruction.
        pre_encoder_bias: Training form of an autoencoder, `pre = (x - b_dec) @ W_enc + b_enc`.
        model: Hugging Face id of the language model, e.g. "google/gemma-2-2b".
        release: Repository the weights came from.
        path: Path inside that repository.
        untrained: Kinds of position the dictionary never saw; they are passed through by a splice.

    Raises:
        ValueError: Fields that contradict each other.
    """

    d_in: int
    d_out: int
    d_sae: int
    hook_in: str
    hook_out: str
    activation: Activation = "jumprelu"
    k: int | None = None
    skip: bool = False
    pre_encoder_bias: bool = False
    model: str = ""
    release: str = ""
    path: str = ""
    untrained: tuple[SpecialPosition, ...] = UNTRAINED

    def __post_init__(self) -> None:
        object.__setattr__(self, "untrained", tuple(self.untrained))
        for name in ("d_in", "d_out", "d_sae"):
            if getattr(self, name) < 1:
                raise ValueError(f"SAEConfig.{name} is {getattr(self, name)}; it must be at least 1.")
        if not self.hook_in or not self.hook_out:
            raise ValueError(f"SAEConfig needs both hook names; found {self.hook_in=} and {self.hook_out=}.")
        if self.activation not in get_args(Activation):
            raise ValueError(f"SAEConfig.activation is {self.activation!r}; expected one of {get_args(Activation)}.")
        needs_k = self.activation in ("topk", "batchtopk")
        if needs_k and (self.k is None or not 1 <= self.k <= self.d_sae):
            raise ValueError(f"{self.activation} keeps k latents, 1 <= k <= d_sae={self.d_sae}; found k={self.k}.")
        if not needs_k and self.k is not None:
            raise ValueError(f"k={self.k} has no meaning for activation {self.activation!r}; leave it None.")
        unknown = set(self.untrained) - set(get_args(SpecialPosition))
        if unknown:
            raise ValueError(f"SAEConfig.untrained holds {sorted(unknown)}; known are {get_args(SpecialPosition)}.")
        if self.is_autoencoder and self.d_in != self.d_out:
            raise ValueError(
                f"An autoencoder reads and writes {self.hook_in!r}, so d_in must equal d_out; "
                f"found d_in={self.d_in}, d_out={self.d_out}. A transcoder names another hook_out."
            )
        if self.pre_encoder_bias and not self.is_autoencoder:
            raise ValueError(
                "pre_encoder_bias subtracts b_dec from the encoder's input, which a transcoder "
                f"({self.hook_in!r} -> {self.hook_out!r}) must not do (Gemma Scope, Appendix B)."
            )

    @property
    def is_autoencoder(self) -> bool:
        """Whether the dictionary writes where it reads."""
        return self.hook_in == self.hook_out


def parameter_shapes(cfg: SAEConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter a dictionary of this config has."""
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (cfg.d_in, cfg.d_sae),
        "b_enc": (cfg.d_sae,),
        "W_dec": (cfg.d_sae, cfg.d_out),
        "b_dec": (cfg.d_out,),
    }
    if cfg.activation == "jumprelu":
        shapes["threshold"] = (cfg.d_sae,)
    if cfg.skip:
        shapes["W_skip"] = (cfg.d_in, cfg.d_out)
    return shapes


def read_config(path: Path) -> SAEConfig:
    """Read a config that `HookedSAE.save` wrote; a file that is none is refused by name."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a saved HookedSAE has config.json and sae.safetensors.")
    try:
        fields: dict[str, Any] = json.loads(path.read_text())
        fields["untrained"] = tuple(fields["untrained"])
        return SAEConfig(**fields)
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no config of a HookedSAE ({type(error).__name__}: {error}).") from None
