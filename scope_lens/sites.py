"""The sites of a bridge: which HookPoint a name means, how wide it is, and what may not attach there.

One HookPoint has several names: the canonical one (`blocks.3.ln2_post.hook_out`) and TransformerLens' aliases
(`blocks.3.hook_mlp_out`). They are one site. State is keyed by the HookPoint, never by a name, because TransformerLens'
compatibility mode renames HookPoints.
"""

import difflib
import re

import torch
from transformer_lens import TransformerBridge
from transformer_lens.hook_points import HookPoint

from scope_lens.sae import HookedSAE

_LAYER = re.compile(r"blocks\.(\d+)\.")
_D_MODEL = re.compile(
    r"(hook_embed|embed\.hook_out|blocks\.\d+\.(hook_in|hook_out|hook_resid_(pre|mid|post)|hook_(attn|mlp)_out"
    r"|ln\d(_post)?\.hook_(in|out|normalized)|(attn|mlp)\.hook_(in|out)|attn\.o\.hook_out|mlp\.(gate|in)\.hook_in))"
)
_D_MLP = re.compile(r"blocks\.\d+\.mlp\.(hook_(pre|post|pre_linear)|(gate|in)\.hook_out|out\.hook_in)")
_HEADS = re.compile(r"blocks\.\d+\.attn\.(hook_z|o\.hook_in|hook_q|q\.hook_out)")
_GAINED = re.compile(r"blocks\.\d+\.(ln2\.hook_out|mlp\.((gate|in)\.)?hook_in)")


class Sites:
    """Names of HookPoints of one bridge, canonical and alias."""

    def __init__(self, bridge: TransformerBridge) -> None:
        self._refresh(bridge)

    def resolve(self, bridge: TransformerBridge, name: str) -> HookPoint:
        """The HookPoint that `name` means.

        Raises:
            KeyError: No such hook on this model.
            ValueError: `hook_mlp_in`, or a hook that the model's settings keep from firing.
        """
        if name.endswith("hook_mlp_in"):
            raise ValueError(
                f"{name!r} is refused: in TransformerLens 4 it is the residual stream before the pre-MLP norm, in some "
                "earlier versions it was the MLP's input, and it does not fire by default. Gemma Scope's transcoders "
                "read 'blocks.L.ln2.hook_normalized' (no gain), Gemma Scope 2's 'blocks.L.ln2.hook_out' (with gain)."
            )
        point = self.find(bridge, name)
        if point is None:
            close = difflib.get_close_matches(name, self._points, n=3, cutoff=0.6)
            raise KeyError(
                f"The model has no hook point {name!r}. Close ones: {close}. bridge.hook_dict lists all of them."
            )
        try:
            bridge.check_hooks_to_add(point, name, lambda tensor, hook: None)  # noqa: ARG005
        except ValueError as error:
            raise ValueError(f"{name!r} does not fire on this model as it is set: {error}") from None
        return point

    def find(self, bridge: TransformerBridge, name: str) -> HookPoint | None:
        """The HookPoint that `name` means, whether or not something may attach there; None for an unknown name."""
        if name not in self._points:
            self._refresh(bridge)
        return self._points.get(name)

    def names(self, point: HookPoint) -> tuple[str, ...]:
        """Every name of a HookPoint."""
        return self._names.get(point, ())

    def _refresh(self, bridge: TransformerBridge) -> None:
        self._points: dict[str, HookPoint] = bridge.hook_dict
        names: dict[HookPoint, list[str]] = {}
        for name, point in self._points.items():
            names.setdefault(point, []).append(name)
        self._names = {point: tuple(spelled) for point, spelled in names.items()}


def layer_of(name: str) -> int | None:
    """The layer a hook name speaks of, or None for hooks outside the blocks."""
    found = _LAYER.match(name)
    return int(found.group(1)) if found else None


def needs_gain(names: tuple[str, ...]) -> bool:
    """Whether a site, by its names, is the pre-MLP norm's output with its gain."""
    return any(_GAINED.fullmatch(name) for name in names)


def site_width(bridge: TransformerBridge, names: tuple[str, ...]) -> int | None:
    """Width of a site, heads flattened, as the model's config tells it; None where it does not."""
    if any(_HEADS.fullmatch(name) for name in names):
        return bridge.cfg.n_heads * bridge.cfg.d_head
    if any(_D_MODEL.fullmatch(name) for name in names):
        return bridge.cfg.d_model
    if any(_D_MLP.fullmatch(name) for name in names):
        return bridge.cfg.d_mlp
    return None


def check_fits(bridge: TransformerBridge, sae: HookedSAE, sites: Sites, folded_layers: set[int]) -> None:
    """Refuse what can be refused before a forward pass: width, device, half precision, a folded gain."""
    cfg = sae.cfg
    for name, width, role in ((cfg.hook_in, cfg.d_in, "d_in"), (cfg.hook_out, cfg.d_out, "d_out")):
        names = sites.names(sites.resolve(bridge, name))
        site = site_width(bridge, names)
        if site is not None and site != width:
            raise ValueError(
                f"The site {name!r} is {site} wide on this model, the dictionary has {role}={width}"
                f"{f' (it was trained on {cfg.model})' if cfg.model else ''}. Is it for another model or site?"
            )
    refuse_folded_gain(bridge, sae, sites, folded_layers)
    refuse_half_precision(bridge)
    device = next(iter(bridge.parameters())).device
    # A model split over devices is checked when the site's activation arrives.
    if getattr(bridge.cfg, "n_devices", 1) == 1 and sae.device != device:
        raise ValueError(
            f"The dictionary for {cfg.hook_out!r} is on {sae.device}, the model on {device}. Move one of them: "
            "sae.to(device), or load it with device=."
        )


def uses_gain(bridge: TransformerBridge, sae: HookedSAE, sites: Sites) -> list[tuple[str, int]]:
    """The hooks of a dictionary that carry the pre-MLP norm's gain, each with its layer."""
    found: list[tuple[str, int]] = []
    for name in dict.fromkeys((sae.cfg.hook_in, sae.cfg.hook_out)):
        layer = layer_of(name)
        if layer is not None and needs_gain(sites.names(sites.resolve(bridge, name))):
            found.append((name, layer))
    return found


def refuse_folded_gain(bridge: TransformerBridge, sae: HookedSAE, sites: Sites, folded_layers: set[int]) -> None:
    """Refuse a dictionary that needs the pre-MLP gain on a model whose gain is folded into the weights."""
    for name, layer in uses_gain(bridge, sae, sites):
        if _gain_folded(bridge, layer, folded_layers):
            raise ValueError(
                f"The dictionary uses {name!r}, the pre-MLP norm's output with its gain, but the gain of layer {layer} "
                "is folded into the MLP's weights on this model, so that tensor has no gain now. Load the model "
                "unfolded."
            )


def refuse_half_precision(bridge: TransformerBridge, dtype: torch.dtype | None = None) -> None:
    """Refuse a Gemma model in float16, whose activations overflow there."""
    architecture = str(getattr(bridge.cfg, "architecture", "") or type(bridge.original_model).__name__)
    dtype = dtype or next(iter(bridge.parameters())).dtype
    if dtype == torch.float16 and "gemma" in architecture.lower():
        raise ValueError(
            f"{architecture} in float16: its activations overflow float16 and the soft cap turns them into NaN. "
            "Load it with dtype=torch.bfloat16 or torch.float32."
        )


def _gain_folded(bridge: TransformerBridge, layer: int, folded_layers: set[int]) -> bool:
    if layer in folded_layers:
        return True
    if not getattr(bridge, "compatibility_mode", False):
        return False
    # TransformerLens' compatibility mode folds every gain and leaves the neutral one behind.
    neutral = 0.0 if getattr(bridge.cfg, "rmsnorm_uses_offset", False) else 1.0
    return bool((bridge.blocks[layer].ln2.weight == neutral).all())
