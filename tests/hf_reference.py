"""Splices by plain torch hooks on an unbridged Hugging Face model, sharing no code with the package.

`SITES` lists, for each architecture, the hook name and how the same tensor is reached in the Hugging Face module tree.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LAYER = 1


def encode_decode(sae, x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and reconstruction by the written-out equations, JumpReLU."""
    pre = torch.einsum("...i,is->...s", x, sae.W_enc) + sae.b_enc
    latents = torch.where(pre > sae.threshold, pre, torch.zeros((), dtype=pre.dtype))
    recons = torch.einsum("...s,so->...o", latents, sae.W_dec) + sae.b_dec
    if sae.cfg.skip:
        recons = recons + torch.einsum("...i,io->...o", x, sae.W_skip)
    return latents, recons


@dataclass
class Site:
    hook_in: str
    hook_out: str
    writer: Callable[[nn.Module], nn.Module]  # module whose output (or input) is the site
    at_input: bool = False
    reader: Callable[[nn.Module], nn.Module] | None = None  # module that shows the transcoder's input
    read: str = "output"  # "output", or "normalised": the input over its root mean square


def _layer(model: nn.Module) -> nn.Module:
    return model.transformer.h[LAYER] if hasattr(model, "transformer") else model.model.layers[LAYER]


def _gemma_sites() -> dict[str, Site]:
    b = f"blocks.{LAYER}"
    post_mlp = lambda m: _layer(m).post_feedforward_layernorm
    pre_mlp = lambda m: _layer(m).pre_feedforward_layernorm
    return {
        "res": Site(f"{b}.hook_resid_post", f"{b}.hook_resid_post", _layer),
        "res canonical": Site(f"{b}.hook_out", f"{b}.hook_resid_post", _layer),
        "mlp": Site(f"{b}.hook_mlp_out", f"{b}.hook_mlp_out", post_mlp),
        "att": Site(f"{b}.attn.hook_z", f"{b}.attn.hook_z", lambda m: _layer(m).self_attn.o_proj, at_input=True),
        "attn_out": Site(f"{b}.hook_attn_out", f"{b}.hook_attn_out", lambda m: _layer(m).post_attention_layernorm),
        "transcoder": Site(
            f"{b}.ln2.hook_normalized", f"{b}.hook_mlp_out", post_mlp, reader=pre_mlp, read="normalised"
        ),
        "gained transcoder": Site(f"{b}.ln2.hook_out", f"{b}.hook_mlp_out", post_mlp, reader=pre_mlp),
        "embedding": Site("hook_embed", "hook_embed", lambda m: m.model.layers[0], at_input=True),
    }


def _plain_sites(mlp: str, z: Callable[[nn.Module], nn.Module]) -> dict[str, Site]:
    b = f"blocks.{LAYER}"
    return {
        "res": Site(f"{b}.hook_resid_post", f"{b}.hook_resid_post", _layer),
        "mlp": Site(f"{b}.hook_mlp_out", f"{b}.hook_mlp_out", lambda m: getattr(_layer(m), mlp)),
        "att": Site(f"{b}.attn.hook_z", f"{b}.attn.hook_z", z, at_input=True),
    }


SITES: dict[str, dict[str, Site]] = {
    "gemma2": _gemma_sites(),
    "gemma3": _gemma_sites(),
    "llama": _plain_sites("mlp", lambda m: _layer(m).self_attn.o_proj)
    | {
        "normalised transcoder": Site(
            f"blocks.{LAYER}.ln2.hook_normalized", f"blocks.{LAYER}.hook_mlp_out", lambda m: _layer(m).mlp,
            reader=lambda m: _layer(m).post_attention_layernorm, read="normalised",
        )
    },
    "gpt2": _plain_sites("mlp", lambda m: _layer(m).attn.c_proj)
    | {
        "transcoder": Site(
            f"blocks.{LAYER}.ln2.hook_out", f"blocks.{LAYER}.hook_mlp_out", lambda m: _layer(m).mlp,
            reader=lambda m: _layer(m).ln_2,
        )
    },
}  # fmt: skip
CASES = [(architecture, site) for architecture, sites in SITES.items() for site in sites]


@contextmanager
def replaced(model: nn.Module, site: Site, change: Callable[[Tensor, Tensor], Tensor]):
    """Replace the tensor at a site by `change(x, y)`; x is what the encoder reads, y what flows."""
    seen: dict[str, Tensor] = {}
    handles = []
    if site.reader is not None:

        def read(module, args, output):
            x = args[0]
            eps = getattr(module, "eps", None) or getattr(module, "variance_epsilon", None)
            normalised = site.read == "normalised"
            seen["x"] = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() if normalised else output

        handles.append(site.reader(model).register_forward_hook(read))

    def out(module, args, output):
        y = output[0] if isinstance(output, tuple) else output
        new = change(seen.get("x", y), y)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def into(module, args, kwargs):
        if args:
            return (change(seen.get("x", args[0]), args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": change(kwargs["hidden_states"], kwargs["hidden_states"])}

    module = site.writer(model)
    handles.append(
        module.register_forward_pre_hook(into, with_kwargs=True) if site.at_input else module.register_forward_hook(out)
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def width(model: nn.Module, site: str) -> int:
    config = model.config
    if site == "att":
        return config.num_attention_heads * getattr(
            config, "head_dim", config.hidden_size // config.num_attention_heads
        )
    return config.hidden_size
