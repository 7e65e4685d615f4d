"""How a user sees what is attached: a mapping by site, and a handle for each dictionary."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from transformer_lens import TransformerBridge

from scope_lens.attachments import Attachment, Attachments, attachments_of
from scope_lens.sae import HookedSAE


@dataclass(frozen=True)
class SAEHandle:
    """What `add_sae` returns: takes its one dictionary out again.

    Attributes:
        sae: The attached dictionary.
    """

    sae: HookedSAE
    _attachment: Attachment
    _attachments: Attachments

    def remove(self) -> None:
        """Detach the dictionary; does nothing when it is detached already."""
        self._attachments.detach(self._attachment)


class Attached(Mapping[str, HookedSAE]):
    """The attached dictionaries by `hook_out`; any other name of a site is accepted as key."""

    def __init__(self, bridge: TransformerBridge) -> None:
        self._bridge = bridge
        self._attachments = attachments_of(bridge)

    def __getitem__(self, name: str) -> HookedSAE:
        found = self._attachments.find(self._bridge, name)
        if found is None:
            raise KeyError(f"No dictionary is attached at {name!r}; attached are {list(self)}.")
        return found.sae

    def __iter__(self) -> Iterator[str]:
        return (attachment.sae.cfg.hook_out for attachment in self._attachments)

    def __len__(self) -> int:
        return len(tuple(self._attachments))

    def __repr__(self) -> str:
        return f"Attached({list(self)})"
