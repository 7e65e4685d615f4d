"""Which dictionaries are attached to a bridge, and the hooks that splice them in.

The hooks live on the bridge's own HookPoints, so a direct call of the bridge is spliced as well, and every ScopeModel
over one bridge shares one `Attachments`.

1. `attach` resolves the two sites, checks everything that can be checked without a forward pass, and adds a hook at
   `hook_out`; a transcoder's `hook_in` gets a hook that reads, shared by all who read there.
2. At the start of a forward pass the attention mask and the length of the KV cache are noted, and token ids as they
   reach `embed.hook_in`. From these follow the positions a dictionary was never trained on.
3. The hook at `hook_out` splices. At the end of the pass, a failed one included, everything noted is dropped.

Every hook carries a level of its own, which is TransformerLens' public way to remove exactly one's own hooks. They are
permanent hooks: `reset_hooks()` is for the user's.
"""

import copy
import weakref
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from transformer_lens import TransformerBridge
from transformer_lens.hook_points import HookPoint, LensHandle

from scope_lens.sae import HookedSAE
from scope_lens.sites import Sites, check_fits, refuse_folded_gain, refuse_half_precision, uses_gain
from scope_lens.special_tokens import SpecialTokens, special_token_ids, untrained_positions
from scope_lens.splice import splice

Positions = Literal["trained", "all"]

_LEVELS = count(-1, -1)  # TransformerLens' own context levels count upwards from zero


@dataclass(frozen=True, kw_only=True, eq=False)
class Attachment:
    """One dictionary at its site, as it was attached."""

    sae: HookedSAE
    reads: HookPoint
    writes: HookPoint
    use_error_term: bool
    positions: Positions
    hook: "OwnHook"


@dataclass(eq=False)
class OwnHook:
    """A permanent hook of ours at one HookPoint, removable and checkable through TransformerLens' public API."""

    point: HookPoint
    fn: Callable[..., Tensor | None]
    level: int = field(default_factory=lambda: next(_LEVELS))
    handle: LensHandle | None = None

    def add(self) -> None:
        """Register the hook behind those that are there."""
        self.handle = self.point.add_hook(self.fn, is_permanent=True, level=self.level)

    def remove(self) -> None:
        """Take exactly this hook out."""
        self.point.remove_hooks("fwd", including_permanent=True, level=self.level)
        self.handle = None

    @property
    def alive(self) -> bool:
        """Whether the hook is still there; `reset_hooks(including_permanent=True)` takes it away."""
        return any(handle is self.handle for handle in self.point.fwd_hooks)

    def make_last(self) -> None:
        """Move the hook behind those added since, so that it sees what really flows on."""
        if self.alive and self.point.fwd_hooks[-1] is not self.handle:
            self.remove()
            self.add()


@dataclass(eq=False)
class _Reader:
    hook: OwnHook
    users: int = 0


@dataclass
class _Forward:
    """What one forward pass has shown so far."""

    tokens: Tensor | None = None
    attention_mask: Tensor | None = None
    offset: int = 0
    read: dict[HookPoint, Tensor] = field(default_factory=dict[HookPoint, Tensor])
    untrained: dict[tuple[str, ...], Tensor | None] = field(default_factory=dict[tuple[str, ...], Tensor | None])


class Attachments:
    """The dictionaries attached to one bridge."""

    def __init__(self, bridge: TransformerBridge) -> None:
        self.sites = Sites(bridge)
        self._bridge = weakref.ref(bridge)
        self.folded_layers: set[int] = set()
        self.ever: WeakSet[HookedSAE] = WeakSet()  # whose hook points users may have hooked
        self._by_point: dict[HookPoint, Attachment] = {}
        self._readers: dict[HookPoint, _Reader] = {}
        self._forward = _Forward()
        self._special = SpecialTokens((), (), (), ())
        self._prefix_of: tuple[Any, Any] | None = None
        self._gained: set[Attachment] = set()
        self._tokens_hook: OwnHook | None = None
        self._around_forward: tuple[torch.utils.hooks.RemovableHandle, ...] = ()

    # ---- attach and detach ----

    def attach(
        self, bridge: TransformerBridge, sae: HookedSAE, *, use_error_term: bool, positions: Positions
    ) -> Attachment:
        """Splice `sae` in at its site from now on; see `ScopeModel.add_sae` for what is refused."""
        if positions not in ("trained", "all"):
            raise ValueError(f"positions is {positions!r}; expected 'trained' or 'all'.")
        reads = self.sites.resolve(bridge, sae.cfg.hook_in)
        writes = self.sites.resolve(bridge, sae.cfg.hook_out)
        occupant = self.at(writes)
        if occupant is not None:
            other = occupant.sae.cfg
            raise ValueError(
                f"{sae.cfg.hook_out!r} is written by a dictionary already ({other.release or 'unnamed'} {other.path}, "
                f"attached as {other.hook_out!r}); two cannot write one site. Call "
                f"reset_saes({other.hook_out!r}) first."
            )
        check_fits(bridge, sae, self.sites, self.folded_layers)
        self._know_special_tokens(bridge, wanted=sae.cfg.untrained if positions == "trained" else ())
        if positions == "trained" and "chat_prefix" in sae.cfg.untrained:
            untrained_positions(torch.zeros(1, 1, dtype=torch.long), self._special, ("chat_prefix",))

        attachment = Attachment(
            sae=sae,
            reads=reads,
            writes=writes,
            use_error_term=use_error_term,
            positions=positions,
            hook=OwnHook(writes, lambda tensor, hook: self._splice(attachment, tensor)),  # noqa: ARG005
        )
        self.restore(bridge, attachment)
        return attachment

    def restore(self, bridge: TransformerBridge, attachment: Attachment) -> None:
        """Put in what `detach` took out, so that handles of it keep working."""
        self._watch_forward(bridge)
        if attachment.reads is not attachment.writes:
            self._read(attachment.reads)
        attachment.hook.add()
        self._by_point[attachment.writes] = attachment
        self.ever.add(attachment.sae)
        if uses_gain(bridge, attachment.sae, self.sites):
            self._gained.add(attachment)

    def detach(self, attachment: Attachment) -> None:
        """Take one dictionary out again; does nothing when it is out already."""
        if self._by_point.get(attachment.writes) is not attachment:
            return
        del self._by_point[attachment.writes]
        self._gained.discard(attachment)
        attachment.hook.remove()
        if attachment.reads is not attachment.writes:
            reader = self._readers[attachment.reads]
            reader.users -= 1
            if reader.users == 0:
                reader.hook.remove()
                del self._readers[attachment.reads]
        if not self._by_point:
            self._stop_watching()

    @contextmanager
    def set_aside(self, bridge: TransformerBridge) -> Generator[None]:
        """Make every dictionary inert for a block of code; their hooks keep their place, their handles keep working."""
        kept = {attachment.writes: attachment for attachment in self}
        self._by_point = {}
        try:
            yield
        finally:
            for attachment in self:
                self.detach(attachment)
            self._by_point = kept
            self._forward = _Forward()
            if kept:
                self._watch_forward(bridge)

    def find(self, bridge: TransformerBridge, name: str) -> Attachment | None:
        """What is attached at a site, by any of its names; None where nothing is."""
        point = self.sites.find(bridge, name)
        return None if point is None else self.at(point)

    def at(self, point: HookPoint) -> Attachment | None:
        """What is attached at a HookPoint, or None."""
        found = self._by_point.get(point)
        if found is not None and not found.hook.alive:
            self.detach(found)
            return None
        return found

    def __iter__(self) -> Iterator[Attachment]:
        return iter([found for point in tuple(self._by_point) if (found := self.at(point)) is not None])

    def __deepcopy__(self, memo: dict[int, Any]) -> "Attachments":
        raise ValueError(
            f"A bridge with dictionaries attached ({[a.sae.cfg.hook_out for a in self]}) cannot be deep-copied: their "
            "hooks would splice by this bridge's state. Copy the ScopeModel, or detach first (reset_saes())."
        )

    def deepcopy_bridge(self, bridge: TransformerBridge, memo: dict[int, Any]) -> TransformerBridge:
        """Copy the bridge without what is attached: hooks are closures, and a copy of one would still splice here."""
        attached = tuple(self)
        # TransformerLens' joint attention keeps its last pattern, which cannot be copied with its gradient's graph.
        for module in bridge.modules():
            for value in vars(module).values():
                if isinstance(value, Tensor) and not value.is_leaf:
                    memo[id(value)] = value.detach()
        self._stop_watching()
        try:
            copied = copy.deepcopy(bridge, memo)
        finally:
            if attached:
                self._watch_forward(bridge)
        names = {point: name for name, point in bridge.hook_dict.items()}
        points = copied.hook_dict
        for own in (*(a.hook for a in attached), *(reader.hook for reader in self._readers.values())):
            points[names[own.point]].remove_hooks("fwd", including_permanent=True, level=own.level)
        attachments_of(copied).folded_layers.update(self.folded_layers)
        return copied

    # ---- one forward pass ----

    def _splice(self, attachment: Attachment, tensor: Tensor) -> Tensor | None:
        if self._by_point.get(attachment.writes) is not attachment:
            return None  # set aside
        sae = attachment.sae
        y = flat_activation(tensor, sae.cfg.d_out, sae.cfg.hook_out)
        if y.device != sae.device:
            raise ValueError(
                f"The dictionary for {sae.cfg.hook_out!r} is on {sae.device}, the activation there on {y.device}. "
                f"Call sae.to({str(y.device)!r})."
            )
        x = y if attachment.reads is attachment.writes else self._read_input(attachment)
        out = splice(sae, x, y, use_error_term=attachment.use_error_term, untrained=self._untrained(attachment, y))
        return None if out is y else out.reshape(tensor.shape)

    def _read_input(self, attachment: Attachment) -> Tensor:
        cfg = attachment.sae.cfg
        x = self._forward.read.get(attachment.reads)
        if x is None:
            raise ValueError(
                f"The dictionary that writes {cfg.hook_out!r} reads {cfg.hook_in!r}, which has not fired in this "
                "forward pass. Its input must come before its output; check the hook names, or whether hooks were "
                "removed."
            )
        return flat_activation(x, cfg.d_in, cfg.hook_in)

    def _untrained(self, attachment: Attachment, y: Tensor) -> Tensor | None:
        kinds = attachment.sae.cfg.untrained
        if attachment.positions == "all" or not kinds:
            return None
        forward = self._forward
        if kinds not in forward.untrained:
            if forward.tokens is None:
                raise ValueError(
                    f"The dictionary at {attachment.sae.cfg.hook_out!r} leaves the positions {kinds} alone, but this "
                    "forward pass shows no token ids (it started from embeddings or at a layer, or another forward "
                    "pass ran inside it). Pass token ids, or attach with positions='all'."
                )
            marked = untrained_positions(
                forward.tokens, self._special, kinds, attention_mask=forward.attention_mask, offset=forward.offset
            )
            # On a CPU an empty mask is dropped once; on a GPU the question would stop the stream.
            empty = marked.device.type == "cpu" and not bool(marked.any())
            forward.untrained[kinds] = None if empty else marked
        marked = forward.untrained[kinds]
        return None if marked is None else marked.to(y.device).reshape(y.shape[:-1])

    def _read(self, point: HookPoint) -> None:
        reader = self._readers.get(point)
        if reader is None:

            def note(tensor: Tensor, hook: Any) -> None:  # noqa: ARG001
                self._forward.read[point] = tensor

            reader = self._readers[point] = _Reader(OwnHook(point, note))
        if not reader.hook.alive:
            reader.hook.add()
        reader.users += 1

    def _know_special_tokens(self, bridge: TransformerBridge, *, wanted: Collection[str]) -> None:
        prefix = self._special.chat_prefix
        self._special = special_token_ids(bridge)._replace(chat_prefix=prefix)
        if "chat_prefix" not in wanted:
            return
        # Rendering a chat template takes a millisecond, which attaching for every forward pass would pay each time.
        source = (bridge.tokenizer, getattr(bridge.tokenizer, "chat_template", None))
        if self._prefix_of is None or self._prefix_of[0] is not source[0] or self._prefix_of[1] != source[1]:
            self._special, self._prefix_of = special_token_ids(bridge, chat_prefix=True), source

    def _watch_forward(self, bridge: TransformerBridge) -> None:
        if not self._around_forward:
            module = bridge.original_model
            self._around_forward = (
                module.register_forward_pre_hook(self._begin, with_kwargs=True),
                module.register_forward_hook(self._end, always_call=True),
            )
        if self._tokens_hook is None:

            def note(tensor: Tensor, hook: Any) -> None:  # noqa: ARG001
                self._forward.tokens = tensor

            self._tokens_hook = OwnHook(self.sites.resolve(bridge, "embed.hook_in"), note)
        if not self._tokens_hook.alive:
            self._tokens_hook.add()

    def _stop_watching(self) -> None:
        for handle in self._around_forward:
            handle.remove()
        self._around_forward = ()
        if self._tokens_hook is not None:
            self._tokens_hook.remove()
        self._tokens_hook = None
        self._forward = _Forward()

    def _begin(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        past = kwargs.get("past_key_values")
        bridge = self._bridge()
        assert bridge is not None, "its forward pass is running"
        # Both can have changed since attaching, by a cast or by TransformerLens' compatibility mode.
        refuse_half_precision(bridge)
        for attachment in self._gained:
            refuse_folded_gain(bridge, attachment.sae, self.sites, self.folded_layers)
        self._forward = _Forward(
            attention_mask=kwargs.get("attention_mask"),
            offset=0 if past is None else int(past.get_seq_length()),
        )
        for reader in self._readers.values():
            reader.hook.make_last()

    def _end(self, *_: Any) -> None:
        self._forward = _Forward()


_ATTACHMENTS: "WeakKeyDictionary[TransformerBridge, Attachments]" = WeakKeyDictionary()


def attachments_of(bridge: TransformerBridge) -> Attachments:
    """The one `Attachments` of a bridge, made at the first call."""
    found = _ATTACHMENTS.get(bridge)
    if found is None:
        found = _ATTACHMENTS[bridge] = Attachments(bridge)
    return found


def flat_activation(tensor: Tensor, width: int, name: str) -> Tensor:
    """Heads and head dimensions in one axis where the dictionary's width says so, else the tensor as it is.

    Raises:
        ValueError: The tensor has another width.
    """
    if tensor.shape[-1] == width:
        return tensor
    if tensor.ndim >= 4 and tensor.shape[-2] * tensor.shape[-1] == width:
        return tensor.flatten(-2)
    raise ValueError(
        f"The activation at {name!r} has shape {tuple(tensor.shape)}; the dictionary attached there expects "
        f"width {width}."
    )
