"""A model with its dropout off for a block of code: what a clean forward pass is compared with must be one function."""

from collections.abc import Generator
from contextlib import contextmanager

from transformer_lens import TransformerBridge


@contextmanager
def in_eval_mode(bridge: TransformerBridge) -> Generator[None]:
    """Switch dropout off for a block of code; modules that were training train again afterwards."""
    # The bridge's modules and the wrapped model's overlap, and neither holds all of the other's.
    modules = {*bridge.modules(), *bridge.original_model.modules()}
    training = [module for module in modules if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
