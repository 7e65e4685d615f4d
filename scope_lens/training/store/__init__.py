"""Activations of a language model, harvested once and read back as shuffled rows."""

from scope_lens.training.store.activation_store import ActivationStore as ActivationStore
