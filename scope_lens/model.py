"""`ScopeModel`: a TransformerBridge with dictionaries attached to its hook points.

TransformerLens 4 has no `HookedTransformer` to subclass, and its bridges are made by factories, so ScopeModel holds a
bridge and delegates to it (docs/decisions/0001). What it adds:

1. `add_sae`, `saes`, `reset_saes`: splice dictionaries in, for good or for a block of code.
2. The dictionaries' own hook points under `<site>.hook_sae_*`, for every name the site has, wherever TransformerLens
   takes hook names: `run_with_cache`, `run_with_hooks`, `hooks`, `add_hook`, `hook_dict`.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from transformer_lens import ActivationCache, TransformerBridge
from transformer_lens.hook_points import HookPoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scope_lens.attached import Attached, SAEHandle
from scope_lens.attachments import Attachment, Positions, attachments_of
from scope_lens.boot import boot_from_hf, boot_from_pretrained
from scope_lens.folding import fold_mlp_norm as _fold_mlp_norm
from scope_lens.latent_hooks import LatentHooks
from scope_lens.sae import HookedSAE
from scope_lens.sites import refuse_half_precision

Saes = HookedSAE | Sequence[HookedSAE]
NamedHook = tuple[str | Callable[[str], bool], Callable[..., Any]]


class ScopeModel:
    """A language model with sparse dictionaries spliced in.

    Everything not defined here is the bridge's: `model.generate`, `model.to_tokens`, `model.cfg` ... act on the model
    with its attached dictionaries. The hooks live on the bridge, so `model.model(tokens)` is spliced as well, and a
    second ScopeModel over the same bridge shares the attachments.

    Args:
        model: The bridge; it is neither subclassed nor edited.
    """

    __slots__ = ("_bridge", "_latent_hooks")
    _bridge: TransformerBridge
    _latent_hooks: LatentHooks

    def __init__(self, model: TransformerBridge) -> None:
        if not isinstance(model, TransformerBridge):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"ScopeModel wraps a TransformerBridge; found {type(model).__name__}. Use ScopeModel.from_hf for a "
                "Hugging Face model, ScopeModel.from_pretrained for a name or folder."
            )
        object.__setattr__(self, "_bridge", model)
        object.__setattr__(self, "_latent_hooks", LatentHooks(model, attachments_of(model)))

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
    ) -> "ScopeModel":
        """Load a model by its hub name or from a local folder in the Hugging Face layout.

        Args:
            name_or_path: E.g. "google/gemma-2-2b", or a folder with config.json and the weights.
            device: None takes a GPU where there is one.
            dtype: Dtype of the weights; float16 is refused for Gemma.
            revision: Branch, tag or commit on the hub.

        Raises:
            FileNotFoundError: A path that does not exist, or a hub that cannot be reached.
            ValueError: float16 for Gemma.
        """
        return cls(boot_from_pretrained(name_or_path, device=device, dtype=dtype, revision=revision))

    @classmethod
    def from_hf(cls, hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> "ScopeModel":
        """Wrap a loaded Hugging Face model.

        TransformerLens replaces submodules of `hf_model` in place; pass a deep copy to keep the original usable.

        Args:
            hf_model: Any causal language model that TransformerLens bridges.
            tokenizer: Needed for text input and for the chat prefix.
        """
        return cls(boot_from_hf(hf_model, tokenizer))

    # ---- delegation ----

    @property
    def model(self) -> TransformerBridge:
        """The bridge."""
        return self._bridge

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model with what is attached; arguments as for the bridge."""
        return self._bridge(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(self._bridge, name)
        if not inspect.ismethod(value) or value.__self__ is not self._bridge:
            return value

        @functools.wraps(value)
        def delegated(*args: Any, **kwargs: Any) -> Any:
            result = value(*args, **kwargs)
            return self if result is self._bridge else result

        return delegated

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(type(self), name):
            raise AttributeError(f"ScopeModel.{name} cannot be set.")
        if not hasattr(self._bridge, name):
            raise AttributeError(
                f"Neither ScopeModel nor the bridge has an attribute {name!r}, so setting it would have no effect."
            )
        setattr(self._bridge, name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._bridge)})

    def __repr__(self) -> str:
        return f"ScopeModel({self._bridge.cfg.model_name}, attached={list(self.attached)})"

    def __copy__(self) -> "ScopeModel":
        return ScopeModel(self._bridge)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ScopeModel":
        """An independent model with copies of the attached dictionaries."""
        own = attachments_of(self._bridge)
        copied = ScopeModel(own.deepcopy_bridge(self._bridge, memo))
        for attachment in own:
            sae = copy.deepcopy(attachment.sae, memo)
            copied.add_sae(sae, use_error_term=attachment.use_error_term, positions=attachment.positions)
        return copied

    def to(self, *args: Any, **kwargs: Any) -> "ScopeModel":
        """Move the model, and the attached dictionaries to its device; dictionaries keep their own dtype.

        Raises:
            ValueError: float16 for Gemma.
        """
        for wanted in (*args, *kwargs.values()):
            dtype = wanted.dtype if isinstance(wanted, torch.Tensor) else wanted
            if isinstance(dtype, torch.dtype):
                refuse_half_precision(self._bridge, dtype)
        self._bridge.to(*args, **{"print_details": False} | kwargs)
        if getattr(self._bridge.cfg, "n_devices", 1) == 1:
            device = next(iter(self._bridge.parameters())).device
            for sae in self.attached.values():
                sae.to(device)
        return self

    def cuda(self, device: int | torch.device | None = None) -> "ScopeModel":
        """Move the model and the attached dictionaries to a CUDA device."""
        return self.to(
            "cuda" if device is None else torch.device("cuda", device) if isinstance(device, int) else device
        )

    def cpu(self) -> "ScopeModel":
        """Move the model and the attached dictionaries to the CPU."""
        return self.to("cpu")

    # ---- attaching ----

    @property
    def attached(self) -> Mapping[str, HookedSAE]:
        """The attached dictionaries by `hook_out`; any alias of a site is accepted as key."""
        return Attached(self._bridge)

    def add_sae(self, sae: HookedSAE, *, use_error_term: bool = False, positions: Positions = "trained") -> SAEHandle:
        """Splice a dictionary in at its site until it is removed.

        Args:
            sae: The dictionary; its config names the site.
            use_error_term: Add back what the dictionary misses, so that the model computes what it did and the latents
                can be read and edited.
            positions: "trained" passes the positions in `sae.cfg.untrained` through unchanged, "all" splices
                everywhere.

        Returns:
            A handle whose `remove()` takes the dictionary out.

        Raises:
            KeyError: The model has no such hook.
            ValueError: A hook that does not fire, a site another dictionary writes, a wrong width or device, a gain
                that was folded away, Gemma in float16, or a chat prefix asked for without a chat template.
        """
        if not isinstance(sae, HookedSAE):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"add_sae takes one HookedSAE, found {type(sae).__name__}; saes(...) takes several.")
        attachments = attachments_of(self._bridge)
        attachment = attachments.attach(self._bridge, sae, use_error_term=use_error_term, positions=positions)
        return SAEHandle(sae, attachment, attachments)

    def reset_saes(self, sites: str | Sequence[str] | None = None) -> None:
        """Detach dictionaries.

        Args:
            sites: One site or several, by any name; None detaches all.

        Raises:
            KeyError: Nothing is attached at one of the sites; then nothing is detached.
        """
        attachments = attachments_of(self._bridge)
        if sites is None:
            doomed = list(attachments)
        else:
            doomed: list[Attachment] = []
            for name in [sites] if isinstance(sites, str) else sites:
                found = attachments.find(self._bridge, name)
                if found is None:
                    raise KeyError(f"No dictionary is attached at {name!r}; attached are {list(self.attached)}.")
                doomed.append(found)
        for attachment in doomed:
            attachments.detach(attachment)

    @contextmanager
    def saes(
        self, saes: Saes = (), *, use_error_term: bool = False, positions: Positions = "trained"
    ) -> Generator["ScopeModel"]:
        """Attach dictionaries for a block of code, on top of what is attached.

        At the end, and when the block raises, exactly what was attached before is attached again.

        Args:
            saes: One dictionary or several.
            use_error_term: As in `add_sae`.
            positions: As in `add_sae`.
        """
        attachments = attachments_of(self._bridge)
        before = tuple(attachments)
        try:
            for sae in [saes] if isinstance(saes, HookedSAE) else saes:
                self.add_sae(sae, use_error_term=use_error_term, positions=positions)
            yield self
        finally:
            now = set(attachments)
            for attachment in now - set(before):
                attachments.detach(attachment)
            for attachment in before:
                if attachment not in now:
                    attachments.restore(self._bridge, attachment)

    # ---- running ----

    def run_with_saes(
        self,
        *args: Any,
        saes: Saes = (),
        use_error_term: bool = False,
        positions: Positions = "trained",
        **kwargs: Any,
    ) -> Any:
        """One forward pass with dictionaries attached for it; the rest goes to the bridge's forward."""
        with self.saes(saes, use_error_term=use_error_term, positions=positions):
            return self._bridge(*args, **kwargs)

    def run_with_cache_with_saes(
        self,
        *args: Any,
        saes: Saes = (),
        names_filter: str | Sequence[str] | Callable[[str], bool] | None = None,
        use_error_term: bool = False,
        positions: Positions = "trained",
        **kwargs: Any,
    ) -> tuple[Any, ActivationCache | dict[str, torch.Tensor]]:
        """`run_with_cache` with dictionaries attached for this call."""
        with self.saes(saes, use_error_term=use_error_term, positions=positions):
            return self.run_with_cache(*args, names_filter=names_filter, **kwargs)

    def run_with_hooks_with_saes(
        self,
        *args: Any,
        saes: Saes = (),
        fwd_hooks: Sequence[NamedHook] = (),
        bwd_hooks: Sequence[NamedHook] = (),
        use_error_term: bool = False,
        positions: Positions = "trained",
        **kwargs: Any,
    ) -> Any:
        """`run_with_hooks` with dictionaries attached for this call."""
        with self.saes(saes, use_error_term=use_error_term, positions=positions):
            return self.run_with_hooks(*args, fwd_hooks=fwd_hooks, bwd_hooks=bwd_hooks, **kwargs)

    def run_with_cache(
        self,
        *args: Any,
        names_filter: str | Sequence[str] | Callable[[str], bool] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ActivationCache | dict[str, torch.Tensor]]:
        """Run and cache activations, `<site>.hook_sae_*` of the attached dictionaries included.

        Args:
            *args: As for the bridge.
            names_filter: A hook name, several, or a predicate on names; None caches everything.
            **kwargs: As for the bridge.

        Raises:
            KeyError: A name that neither the model nor an attached dictionary has.
        """
        return self._latent_hooks.run_with_cache(*args, names_filter=names_filter, **kwargs)

    def run_with_hooks(
        self,
        *args: Any,
        fwd_hooks: Sequence[NamedHook] = (),
        bwd_hooks: Sequence[NamedHook] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Run with temporary hooks; names may be `<site>.hook_sae_*` of an attached dictionary.

        Args:
            *args: As for the bridge.
            fwd_hooks: Pairs of a name (or a predicate on names) and a function of (tensor, hook).
            bwd_hooks: The same for gradients.
            reset_hooks_end: Whether the hooks are removed at the end.
            clear_contexts: Whether the hooks' contexts are cleared at the end.
            **kwargs: As for the bridge.

        Raises:
            KeyError: A name that neither the model nor an attached dictionary has.
        """
        ours, theirs = self._latent_hooks.split(fwd_hooks, bwd_hooks)
        squeeze = bool(kwargs.get("remove_batch_dim", False))
        with self._latent_hooks.added(
            ours, squeeze=squeeze, reset_hooks_end=reset_hooks_end, clear_contexts=clear_contexts
        ):
            return self._bridge.run_with_hooks(
                *args,
                fwd_hooks=theirs["fwd"],
                bwd_hooks=theirs["bwd"],
                reset_hooks_end=reset_hooks_end,
                clear_contexts=clear_contexts,
                **kwargs,
            )

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Sequence[NamedHook] = (),
        bwd_hooks: Sequence[NamedHook] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Generator["ScopeModel"]:
        """Add hooks for a block of code; names may be `<site>.hook_sae_*` of an attached dictionary."""
        ours, theirs = self._latent_hooks.split(fwd_hooks, bwd_hooks)
        with (
            self._latent_hooks.added(ours, reset_hooks_end=reset_hooks_end, clear_contexts=clear_contexts),
            self._bridge.hooks(theirs["fwd"], theirs["bwd"], reset_hooks_end, clear_contexts),
        ):
            yield self

    def add_hook(
        self,
        name: str | Callable[[str], bool],
        hook_fn: Callable[..., Any],
        dir: Literal["fwd", "bwd"] = "fwd",  # noqa: A002
        is_permanent: bool = False,
    ) -> None:
        """Add a hook until `reset_hooks`; the name may be `<site>.hook_sae_*` of an attached dictionary."""
        ours, theirs = self._latent_hooks.split([(name, hook_fn)], [])
        for spelled, point, fn, _ in ours:
            point.add_hook(fn, dir=dir, is_permanent=is_permanent, alias_names=[spelled])
        for spelled, fn in theirs["fwd"]:
            self._bridge.add_hook(spelled, fn, dir=dir, is_permanent=is_permanent)

    def add_perma_hook(
        self,
        name: str | Callable[[str], bool],
        hook_fn: Callable[..., Any],
        dir: Literal["fwd", "bwd"] = "fwd",  # noqa: A002
    ) -> None:
        """Add a hook that `reset_hooks` leaves alone; names as in `add_hook`."""
        self.add_hook(name, hook_fn, dir=dir, is_permanent=True)

    def get_caching_hooks(
        self, names_filter: str | Sequence[str] | Callable[[str], bool] | None = None, **kwargs: Any
    ) -> tuple[dict[str, torch.Tensor], list[NamedHook], list[NamedHook]]:
        """A cache and the hooks that fill it, for `hooks` or `run_with_hooks`; arguments as for the bridge."""
        return self._latent_hooks.caching_hooks(names_filter, **kwargs)

    def reset_hooks(self, *args: Any, **kwargs: Any) -> None:
        """Remove user hooks from the model and from every dictionary that is or was attached; what is attached stays.

        Arguments as for the bridge; `including_permanent=True` takes the splices out as well.
        """
        for sae in attachments_of(self._bridge).ever:
            sae.reset_hooks(*args, **kwargs)
        self._bridge.reset_hooks(*args, **kwargs)

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """Every hook point by name: the bridge's and the attached dictionaries'."""
        return {**self._bridge.hook_dict, **self._latent_hooks.points()}


def fold_mlp_norm(model: ScopeModel, layers: Sequence[int] | None = None) -> None:
    """Fold the pre-MLP norm's gain into W_in and W_gate, in place, for work on weights.

    Afterwards `blocks.L.ln2.hook_out` equals `blocks.L.ln2.hook_normalized`; logits do not change. A Gemma Scope
    transcoder does not need it: it reads `ln2.hook_normalized`, which never has the gain.

    Args:
        model: A model with RMSNorm and an MLP of `nn.Linear` weights (Gemma 2, Gemma 3, Llama).
        layers: Layers to fold; None folds all.

    Raises:
        ValueError: A layer folded before, a norm that is no RMSNorm, or an attached dictionary that needs the gain;
            then nothing is changed.
        IndexError: A layer the model does not have.
    """
    _fold_mlp_norm(model.model, layers)
