"""Which weights a stored result or activation came from.

A name or a path stays when the weights under it change. These hashes change with the weights, so that what is kept in a
file is given back for the same dictionary and the same model only.
"""

import hashlib

import torch
from torch import nn

from scope_lens.sae import HookedSAE

_HEAD = 64


def sae_fingerprint(sae: HookedSAE) -> str:
    """Hash a dictionary's configuration and every byte of its weights; about a second for 300 MB."""
    digest = hashlib.sha256(repr(sae.cfg).encode())
    for name, parameter in sorted(sae.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def model_fingerprint(model: nn.Module) -> str:
    """Hash the first weights of each parameter, which tell one checkpoint of a model from another."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().flatten()[:_HEAD].cpu().float().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"
