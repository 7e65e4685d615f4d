"""Where each dictionary of a graph sits: what it reads, what it writes, and in which order.

1. `hook_names` resolves a dictionary's two hooks against the model and refuses what cannot be one graph.
2. `refuse_overwritten` refuses a dictionary whose output never gets past what is frozen.
3. `clean_pass` runs the prompt once and records what flows.
4. `places_of` puts the dictionaries into the order in which their outputs fire, which is the order of the graph: what
   one writes reaches later ones alone.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens import TransformerBridge

from scope_lens.attachments import attachments_of
from scope_lens.circuits.frozen import PARTS, NamedHook, Part, record
from scope_lens.sae import HookedSAE
from scope_lens.sites import check_fits, layer_of
from scope_lens.special_tokens import special_token_ids, untrained_positions

EMBED = "hook_embed"  # where tokens write
FINAL = "ln_final.hook_out"  # where logits and directions read
_RESIDUAL = re.compile(r"hook_embed|blocks\.\d+\.hook_resid_(pre|post)")
_BEFORE_PATTERN = re.compile(r"blocks\.\d+\.attn\.([qk](_norm)?\..+|hook_(q|k|rot_q|rot_k|attn_scores|pattern))")
_BEFORE_MLP_OUT = re.compile(r"blocks\.\d+\.(mlp|ln2_post)\..+")


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """One dictionary of a graph.

    Attributes:
        sae: The dictionary.
        stage: Its number in the order in which the dictionaries' outputs fire, from 0.
        layer: The layer its output belongs to; -1 for the embeddings.
        reads: One hook name of what the encoder reads, the same for every spelling of the site.
        writes: One hook name of what the decoder writes; equal to `reads` for an autoencoder.
        trained: Where the dictionary is spliced. Elsewhere it writes nothing, and a skip term does not apply.
        passes: What becomes of the site where it is not trained. True for the residual stream and the embeddings, which
            flow on; False for outputs of attention and MLP, which are constants there.
    """

    sae: HookedSAE
    stage: int
    layer: int
    reads: str
    writes: str
    trained: Bool[Tensor, " pos"]
    passes: bool


def hook_names(bridge: TransformerBridge, sae: HookedSAE) -> tuple[str, str]:
    """One name for each of a dictionary's two hooks, whatever its config calls them.

    Raises:
        KeyError: The model has no such hook.
        ValueError: A hook that does not fire, or another width or device than the model's.
    """
    attachments = attachments_of(bridge)
    sites = attachments.sites
    names = [sites.names(sites.resolve(bridge, name))[0] for name in (sae.cfg.hook_in, sae.cfg.hook_out)]
    check_fits(bridge, sae, sites, attachments.folded_layers)
    return names[0], names[1]


def refuse_overwritten(
    bridge: TransformerBridge,
    sae: HookedSAE,
    parts: Collection[Part] = PARTS,
    *,
    instead: str = "A graph takes dictionaries of MLP outputs (blocks.L.hook_mlp_out), of attention's outputs and of "
    "the residual stream.",
) -> None:
    """Refuse a dictionary all of whose output frozen parts would overwrite.

    Args:
        bridge: The model.
        sae: The dictionary.
        parts: What is frozen.
        instead: What to do, for the message.

    Raises:
        ValueError: It writes inside an MLP, before what that adds to the residual stream; or queries or keys; or the
            stream between attention and MLP, which TransformerLens does not let a hook write.
    """
    sites = attachments_of(bridge).sites
    names = sites.names(sites.resolve(bridge, sae.cfg.hook_out))
    if any(name.endswith(".hook_resid_mid") for name in names):
        raise ValueError(
            f"The dictionary at {sae.cfg.hook_out!r} cannot be spliced in: TransformerLens takes what a hook leaves "
            "there to the MLP alone, and the residual stream goes on without it. Take one of hook_resid_pre or "
            "hook_resid_post; reading there is right."
        )
    if any(name.endswith(".hook_mlp_out") for name in names):  # without a norm behind the MLP, also mlp.hook_out
        return
    within: dict[Part, tuple[re.Pattern[str], str]] = {
        "patterns": (_BEFORE_PATTERN, "queries or keys, and attention patterns are"),
        "mlps": (_BEFORE_MLP_OUT, "inside an MLP, and the output of that MLP is"),
    }
    for part, (inside, where) in within.items():
        if part in parts and any(inside.fullmatch(name) for name in names):
            raise ValueError(
                f"The dictionary at {sae.cfg.hook_out!r} writes {where} frozen, so that nothing it writes would reach "
                f"anything. {instead}"
            )


class CleanPass(NamedTuple):
    """What one clean forward pass shows.

    Attributes:
        logits: The model's own.
        seen: What flowed, by hook name.
        places: The dictionaries, in the order of the graph.
    """

    logits: Float[Tensor, "1 pos d_vocab"]
    seen: dict[str, Tensor]
    places: list[Place]


def clean_pass(
    bridge: TransformerBridge,
    tokens: Int[Tensor, "1 pos"],
    saes: Sequence[HookedSAE],
    names: Iterable[str] = (),
    *,
    hooks: Sequence[NamedHook] = (),
) -> CleanPass:
    """Run a prompt once and record what dictionaries read and write, and what else is named.

    Args:
        bridge: The model, with nothing attached.
        tokens: The prompt.
        saes: The dictionaries.
        names: Further hook names.
        hooks: As `frozen.record` takes them.

    Raises:
        KeyError: The model has no such hook.
        ValueError: A dictionary that does not fit the model, or what `places_of` refuses.
    """
    sites = [name for sae in saes for name in hook_names(bridge, sae)]
    logits, seen = record(bridge, tokens, dict.fromkeys([*names, *sites]), hooks=hooks)
    return CleanPass(logits, seen, places_of(bridge, tokens, saes, list(seen)))


def untrained_in(bridge: TransformerBridge, tokens: Int[Tensor, "1 pos"], sae: HookedSAE) -> Bool[Tensor, " pos"]:
    """Mark the positions of a prompt that a dictionary was not trained on.

    Args:
        bridge: The model.
        tokens: The prompt.
        sae: The dictionary.
    """
    kinds = sae.cfg.untrained
    special = special_token_ids(bridge, chat_prefix="chat_prefix" in kinds)
    return untrained_positions(tokens, special, kinds)[0]


def places_of(
    bridge: TransformerBridge, tokens: Int[Tensor, "1 pos"], saes: Sequence[HookedSAE], fired: Sequence[str]
) -> list[Place]:
    """Put dictionaries into the order of the graph.

    Args:
        bridge: The model.
        tokens: The prompt.
        saes: The dictionaries.
        fired: Hook names in the order in which they fired in a forward pass, those of `hook_names` among them.

    Raises:
        ValueError: Two dictionaries write one site, one writes before it reads, or a site did not fire.
    """
    order = {name: number for number, name in enumerate(fired)}
    names = [hook_names(bridge, sae) for sae in saes]
    silent = sorted({name for pair in names for name in pair if name not in order})
    if silent:
        raise ValueError(f"{silent}, where dictionaries read or write, did not fire in a forward pass of this model.")
    by_write: dict[str, HookedSAE] = {}
    for sae, (reads, writes) in zip(saes, names, strict=True):
        if writes in by_write:
            other = by_write[writes].cfg
            raise ValueError(
                f"Two dictionaries write {sae.cfg.hook_out!r}: {other.release or 'unnamed'} {other.path} and "
                f"{sae.cfg.release or 'unnamed'} {sae.cfg.path}. A graph has one dictionary a site; pass one of them."
            )
        if order[reads] > order[writes]:
            raise ValueError(
                f"The dictionary that writes {sae.cfg.hook_out!r} reads {sae.cfg.hook_in!r}, which fires later. Check "
                "its hook names."
            )
        by_write[writes] = sae
    sites = attachments_of(bridge).sites
    places: list[Place] = []
    for reads, writes in sorted(names, key=lambda pair: order[pair[1]]):
        sae = by_write[writes]
        layer = layer_of(sae.cfg.hook_out)
        places.append(
            Place(
                sae=sae,
                stage=len(places),
                layer=-1 if layer is None else layer,
                reads=reads,
                writes=writes,
                passes=any(_RESIDUAL.fullmatch(name) for name in sites.names(sites.resolve(bridge, writes))),
                trained=~untrained_in(bridge, tokens, sae),
            )
        )
    return places
