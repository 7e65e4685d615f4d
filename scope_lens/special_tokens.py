"""Which positions a dictionary was never trained on.

Gemma Scope was trained on no BOS, EOS or padding activations (arXiv 2408.05147, section 3.1), and its instruction-tuned
dictionaries not on the chat prefix either (section 4.5). BOS activations are outliers: spliced there, a dictionary
destroys the model. So the package passes these positions through and does not count them.

1. `special_token_ids` asks the tokenizer, then the model's config, which ids are BOS, EOS and PAD, and renders the chat
   template up to the user's text for the prefix.
2. `untrained_positions` marks them in a batch of token ids; positions masked out by the attention mask are padding.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens import TransformerBridge

_USER_TEXT = "scope-lens-user-text"


class SpecialTokens(NamedTuple):
    """Ids of the special tokens of one model.

    Attributes:
        bos: Beginning-of-sequence ids.
        eos: End-of-sequence ids; some configs name several.
        pad: Padding ids.
        chat_prefix: The chat template's ids before the user's text, in order; empty without a chat template, and where
            it was not asked for.
    """

    bos: tuple[int, ...]
    eos: tuple[int, ...]
    pad: tuple[int, ...]
    chat_prefix: tuple[int, ...]


def special_token_ids(bridge: TransformerBridge, *, chat_prefix: bool = False) -> SpecialTokens:
    """Find the special ids of a model: the tokenizer's, else the ones of the Hugging Face config.

    Args:
        bridge: The model.
        chat_prefix: Whether the chat template is rendered for the prefix; it is empty otherwise.

    Raises:
        ValueError: A chat template that cannot render a single user turn.
    """
    tokenizer = bridge.tokenizer
    config: Any = getattr(bridge.original_model, "config", None)
    owners = (tokenizer, config, getattr(config, "text_config", config))
    return SpecialTokens(
        bos=_ids(owners, "bos"),
        eos=_ids(owners, "eos"),
        pad=_ids(owners, "pad"),
        chat_prefix=_chat_prefix(tokenizer) if chat_prefix else (),
    )


def _ids(owners: Iterable[Any], kind: str) -> tuple[int, ...]:
    """The ids of one kind of special token, as the first owner that has any gives them."""
    for owner in owners:
        found: int | Sequence[int] | None = getattr(owner, f"{kind}_token_id", None)
        if found is not None:
            return (found,) if isinstance(found, int) else tuple(found)
    return ()


def untrained_positions(
    tokens: Int[Tensor, "batch pos"],
    special: SpecialTokens,
    kinds: Collection[str],
    *,
    attention_mask: Tensor | None = None,
    offset: int = 0,
) -> Bool[Tensor, "batch pos"]:
    """Mark the positions of `tokens` that are of one of the `kinds`.

    Args:
        tokens: Token ids of this forward pass.
        special: The model's special ids.
        kinds: Any of "bos", "eos", "pad", "chat_prefix".
        attention_mask: (batch, offset + pos), 0 where padded; None when nothing is masked.
        offset: Tokens already in the KV cache, so that position counts from the start of the sequence.

    Raises:
        ValueError: "chat_prefix" asked for and the tokenizer has no chat template.
    """
    wanted = [i for kind in ("bos", "eos", "pad") if kind in kinds for i in getattr(special, kind)]
    marked = torch.isin(tokens, torch.tensor(wanted, device=tokens.device, dtype=tokens.dtype))
    padded = None
    if attention_mask is not None and attention_mask.ndim == 2:
        padded = attention_mask.to(tokens.device) == 0
        if "pad" in kinds:
            marked = marked | padded[:, -tokens.shape[1] :]
    if "chat_prefix" in kinds:
        if not special.chat_prefix:
            raise ValueError(
                "The dictionary was not trained on the chat prefix, but the model's tokenizer has no chat template to "
                "render one. Load the instruction-tuned model with its tokenizer, or attach with positions='all'."
            )
        marked = marked | _in_chat_prefix(tokens, special, padded, offset)
    return marked


def _in_chat_prefix(
    tokens: Int[Tensor, "batch pos"], special: SpecialTokens, padded: Tensor | None, offset: int
) -> Bool[Tensor, "batch pos"]:
    """Where the sequence, counted from its first real token, still spells the prefix.

    What lies in the KV cache is taken to have spelt it.
    """
    if padded is None:
        # Without a mask, leading padding is recognised by its ids; behind a KV cache there is none.
        is_pad = torch.isin(tokens, torch.tensor(special.pad, device=tokens.device, dtype=tokens.dtype))
        leading = is_pad.long().cumprod(dim=1).sum(dim=1, keepdim=True) if offset == 0 else 0
        position = torch.arange(tokens.shape[1], device=tokens.device) + offset - leading
    else:
        position = (~padded).long().cumsum(dim=1)[:, -tokens.shape[1] :] - 1
    prefix = torch.tensor(special.chat_prefix, device=tokens.device, dtype=tokens.dtype)
    inside = (position >= 0) & (position < len(prefix))
    same = inside & (tokens == prefix[position.clamp(0, len(prefix) - 1)])
    # A prefix that breaks off has no second part: everything before this position must match too.
    before = same | (position < 0)
    return same & before.long().cumprod(dim=1).bool()


def _chat_prefix(tokenizer: Any) -> tuple[int, ...]:
    if tokenizer is None or getattr(tokenizer, "chat_template", None) is None:
        return ()
    message = [{"role": "user", "content": _USER_TEXT}]
    try:
        rendered: str = tokenizer.apply_chat_template(message, tokenize=False)
    except Exception as error:  # templates are programs and raise what they like
        raise ValueError(
            f"The tokenizer's chat template cannot render one user turn ({type(error).__name__}: {error}), so the chat "
            "prefix that the dictionary was not trained on is unknown. Set tokenizer.chat_template, or attach with "
            "positions='all'."
        ) from error
    prefix = rendered.partition(_USER_TEXT)[0]
    return tuple(tokenizer(prefix, add_special_tokens=False)["input_ids"])
