"""The hook points of attached dictionaries, under the names users give them.

A dictionary attached at `blocks.3.hook_mlp_out` has its hook points under `blocks.3.hook_mlp_out.hook_sae_acts_post`
and the like, and under every other name of that site. The bridge does not know them; this module splits what a user
asks for into the bridge's part and the dictionaries' part, and joins the results.
"""

import inspect
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from torch import Tensor
from transformer_lens import ActivationCache, TransformerBridge
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities.slice import Slice

from scope_lens.attachments import Attachments

Direction = Literal["fwd", "bwd"]
_MARK = ".hook_sae_"


class LatentHook(NamedTuple):
    """A hook to be added at a dictionary's hook point, under the name that the user gave."""

    name: str
    point: HookPoint
    fn: Callable[..., Any]
    direction: Direction


class LatentHooks:
    """Names and hooks of the dictionaries attached to one bridge."""

    def __init__(self, bridge: TransformerBridge, attachments: Attachments) -> None:
        self._bridge = bridge
        self._attachments = attachments

    def points(self) -> dict[str, HookPoint]:
        """Hook points of the attached dictionaries by every name they have, the config's spelling first."""
        found: dict[str, HookPoint] = {}
        for attachment in self._attachments:
            sae = attachment.sae
            for site in dict.fromkeys((sae.cfg.hook_out, *self._attachments.sites.names(attachment.writes))):
                found |= {f"{site}.{name}": point for name, point in sae.hook_dict.items()}
        return found

    def split(
        self, fwd_hooks: Sequence[Any], bwd_hooks: Sequence[Any]
    ) -> tuple[list[LatentHook], dict[Direction, list[Any]]]:
        """Separate hooks at dictionaries from the bridge's own; a predicate may mean both.

        Raises:
            KeyError: A name with `hook_sae_` that no attached dictionary has.
        """
        points = self.points()
        ours: list[LatentHook] = []
        theirs: dict[Direction, list[Any]] = {"fwd": [], "bwd": []}
        directions: tuple[tuple[Direction, Sequence[Any]], ...] = (("fwd", fwd_hooks), ("bwd", bwd_hooks))
        for direction, hooks in directions:
            for wanted, fn in hooks:
                if isinstance(wanted, str) and _MARK in wanted:
                    ours.append(LatentHook(wanted, self._named(points, wanted), fn, direction))
                    continue
                theirs[direction].append((wanted, fn))
                if callable(wanted):
                    # One hook a point, under the first of its names that the predicate takes.
                    taken = {point: name for name, point in reversed(points.items()) if wanted(name)}
                    ours += [LatentHook(name, point, fn, direction) for point, name in taken.items()]
        return ours, theirs

    @contextmanager
    def added(
        self,
        hooks: Sequence[LatentHook],
        *,
        squeeze: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Generator[None]:
        """Add hooks at dictionaries for a block of code; only these are removed at its end."""
        handles: list[tuple[LatentHook, Any]] = []
        try:
            for hook in hooks:
                fn = _without_batch(hook.fn) if squeeze else hook.fn
                handles.append((hook, hook.point.add_hook(fn, dir=hook.direction, alias_names=[hook.name])))
            yield
        finally:
            for hook, handle in handles:
                if reset_hooks_end:
                    handle.hook.remove()
                    own = hook.point.fwd_hooks if hook.direction == "fwd" else hook.point.bwd_hooks
                    own[:] = [kept for kept in own if kept is not handle]
                if clear_contexts:
                    hook.point.clear_context()

    def run_with_cache(
        self, *args: Any, names_filter: Any, **kwargs: Any
    ) -> tuple[Any, ActivationCache | dict[str, Tensor]]:
        """The bridge's `run_with_cache`, with the dictionaries' activations added to its cache."""
        points = self.points()
        wanted, bridge_filter = self._split_filter(points, names_filter)
        signature = inspect.signature(self._bridge.run_with_cache)
        given = signature.bind(*args, names_filter=bridge_filter, **kwargs)
        given.apply_defaults()
        settings = given.arguments
        cached: dict[str, Tensor] = {}
        hooks = _storing(
            {name: points[name] for name in wanted},
            cached,
            incl_bwd=settings["incl_bwd"],
            device=settings["kwargs"].get("device"),
            remove_batch_dim=settings["remove_batch_dim"],
            pos_slice=settings["pos_slice"],
        )
        with self.added(hooks, reset_hooks_end=settings["reset_hooks_end"], clear_contexts=settings["clear_contexts"]):
            output, cache = self._bridge.run_with_cache(*given.args, **given.kwargs)
        if isinstance(cache, ActivationCache):
            cache.cache_dict.update(cached)
        else:
            cache.update(cached)
        return output, cache

    def caching_hooks(
        self, names_filter: Any, *, cache: dict[str, Tensor] | None = None, **settings: Any
    ) -> tuple[dict[str, Tensor], list[Any], list[Any]]:
        """The bridge's `get_caching_hooks`, with hooks for the dictionaries' activations added."""
        points = self.points()
        wanted, bridge_filter = self._split_filter(points, names_filter)
        cache, fwd, bwd = self._bridge.get_caching_hooks(bridge_filter, cache=cache, **settings)
        for hook in _storing({name: points[name] for name in wanted}, cache, **settings):
            (fwd if hook.direction == "fwd" else bwd).append((hook.name, hook.fn))
        return cache, fwd, bwd

    def _split_filter(self, points: dict[str, HookPoint], names_filter: Any) -> tuple[list[str], Any]:
        """Names at dictionaries that a filter means, and the filter that the bridge gets."""
        if names_filter is None:
            return list(points), None
        if callable(names_filter):
            return [name for name in points if names_filter(name)], names_filter
        names = [names_filter] if isinstance(names_filter, str) else list(names_filter)
        ours = [name for name in names if _MARK in name]
        for name in ours:
            self._named(points, name)
        theirs = [name for name in names if _MARK not in name]
        unknown = [name for name in theirs if self._attachments.sites.find(self._bridge, name) is None]
        if unknown:
            raise KeyError(f"names_filter holds names that matched no hook points: {unknown}. Check bridge.hook_dict.")
        if not theirs:
            return ours, lambda name: False  # noqa: ARG005
        return ours, theirs

    def _named(self, points: dict[str, HookPoint], name: str) -> HookPoint:
        if name not in points:
            sites = [attachment.sae.cfg.hook_out for attachment in self._attachments]
            raise KeyError(
                f"No attached dictionary has the hook point {name!r}. Attached are {sites or 'none'}; each has "
                "<site>.hook_sae_input, _acts_pre, _acts_post, _recons, _error and _output."
            )
        return points[name]


def _storing(
    wanted: dict[str, HookPoint],
    cache: dict[str, Tensor],
    *,
    incl_bwd: bool = False,
    device: Any = None,
    remove_batch_dim: bool = False,
    pos_slice: Any = None,
) -> list[LatentHook]:
    """Hooks that store what passes under every wanted name of its point."""
    kept_positions = Slice.unwrap(pos_slice)

    def store(names: list[str], suffix: str) -> Callable[..., None]:
        def save(tensor: Tensor, hook: Any) -> None:  # noqa: ARG001
            kept = kept_positions.apply(tensor.detach().to(device), dim=1)
            if remove_batch_dim and kept.shape[0] == 1:
                kept = kept[0]
            cache.update(dict.fromkeys([name + suffix for name in names], kept))

        return save

    by_point: dict[HookPoint, list[str]] = {}
    for name, point in wanted.items():
        by_point.setdefault(point, []).append(name)
    hooks = [LatentHook(names[0], point, store(names, ""), "fwd") for point, names in by_point.items()]
    if incl_bwd:
        hooks += [LatentHook(names[0], point, store(names, "_grad"), "bwd") for point, names in by_point.items()]
    return hooks


def _without_batch(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Show a hook its tensor without a batch axis of size one, and put the axis back on what it returns."""

    def squeezed(tensor: Tensor, hook: Any) -> Any:
        if tensor.shape[0] != 1:
            return fn(tensor, hook=hook)
        result = fn(tensor[0], hook=hook)
        return result[None] if isinstance(result, Tensor) and result.ndim == tensor.ndim - 1 else result

    return squeezed
