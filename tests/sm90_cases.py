"""What the compile test launches: every function with a kernel, at the sizes of docs/benchmarks/cuda_step.md.

    python tests/sm90_cases.py [--json] [--operands float32] [--ragged] [name ...]

prints what each launch occupies on sm_90; without names, all of them.
"""

import argparse
import json
from collections.abc import Callable

import torch
from sm90 import Launch, compiled_launches, meta, table

D, M, B, CAPACITY = 2304, 65_536, 4096, 256  # width of the activations, latents, rows, entries of a row
BLOCK = 16_384  # latents of a dense block
HALF_WINDOW = 0.0005
INT = torch.int32


def _entries():
    from scope_lens.training.kernels.entries import Entries

    return Entries(
        meta(B, CAPACITY, dtype=INT), meta(B, CAPACITY), meta(B, CAPACITY), meta(B, dtype=INT), meta(B, dtype=INT)
    )


def _columns():
    from scope_lens.training.kernels.entries import columns_of

    return columns_of(_entries(), M)


def encode(operands: torch.dtype) -> None:
    from scope_lens.training.kernels.encode_triton import encode

    x, weight = meta(B, D, dtype=operands), meta(M, D, dtype=operands)
    encode(x, weight, meta(M), meta(M), half_window=HALF_WINDOW, capacity=CAPACITY)


def topk_encode(operands: torch.dtype) -> None:
    from scope_lens.training.kernels.encode_triton import topk_encode

    x, weight = meta(B, D, dtype=operands), meta(M, D, dtype=operands)
    topk_encode(x, weight, meta(M), k=20, floor=meta(1), capacity=2 * CAPACITY)


def decode(operands: torch.dtype) -> None:
    from scope_lens.training.kernels.decode_triton import decode

    decode(_entries(), meta(M, D, dtype=operands), meta(D))


def residual(operands: torch.dtype) -> None:
    from scope_lens.training.kernels.decode_triton import residual

    residual(_entries(), meta(M, D, dtype=operands), meta(D), meta(B, D), rows=B)


def latent_gradients(operands: torch.dtype) -> None:
    from scope_lens.training.kernels.decode_triton import latent_gradients

    latent_gradients(_entries(), meta(M, D, dtype=operands), meta(B, D, dtype=operands))


def latent_sums(operands: torch.dtype) -> None:
    from scope_lens.training.kernels.sums_triton import latent_sums

    latent_sums(_entries(), meta(B, CAPACITY), _columns(), meta(M), meta(B), half_window=HALF_WINDOW)


def _update(gradient, operands: torch.dtype, *, unit_rows: bool, betas: tuple[float, float], latents=None) -> None:
    from scope_lens.training.kernels.update import RowAdam
    from scope_lens.training.kernels.update_triton import update_rows

    state = RowAdam(second=meta(M, D), first=None if betas[0] == 0 else meta(M, D), last=meta(M, dtype=INT))
    update_rows(
        meta(M, D), state, gradient, shadow=meta(M, D, dtype=operands), unit_rows=unit_rows, step=7, lr=1e-4,
        betas=betas, eps=1e-8, halted=meta(1, dtype=INT), latents=latents,
    )  # fmt: skip


def _from_entries(operands: torch.dtype):
    from scope_lens.training.kernels.update import FromEntries

    return FromEntries(_columns(), meta(B, CAPACITY), meta(B, D, dtype=operands))


def update_decoder(operands: torch.dtype) -> None:
    _update(_from_entries(operands), operands, unit_rows=True, betas=(0.0, 0.999))


def update_encoder(operands: torch.dtype) -> None:
    _update(_from_entries(operands), operands, unit_rows=False, betas=(0.0, 0.999))


def update_with_momentum(operands: torch.dtype) -> None:
    _update(_from_entries(operands), operands, unit_rows=True, betas=(0.9, 0.999))


def update_dense(operands: torch.dtype) -> None:
    _update(meta(BLOCK, D), operands, unit_rows=True, betas=(0.0, 0.999), latents=slice(BLOCK, 2 * BLOCK))


def weight_gradients(operands: torch.dtype) -> None:
    from scope_lens.training.kernels.update_triton import weight_gradients

    weight_gradients(_from_entries(operands), M)


def dense(operands: torch.dtype) -> None:
    from scope_lens.training.kernels.dense_triton import dense_gradients, dense_residual, encode_dense

    x, weight = meta(B, D, dtype=operands), meta(BLOCK, D, dtype=operands)
    acts = encode_dense(x, weight, meta(BLOCK), meta(BLOCK), half_window=HALF_WINDOW)
    d_recons, _ = dense_residual(meta(B, D), meta(D), meta(B, D), rows=B, operands=operands)
    dense_gradients(d_recons, meta(BLOCK, D, dtype=operands), acts, meta(B))


CASES: dict[str, Callable[[torch.dtype], None]] = {
    case.__name__: case
    for case in (
        encode, topk_encode, decode, residual, latent_gradients, latent_sums, update_decoder, update_encoder,
        update_with_momentum, update_dense, weight_gradients, dense,
    )
}  # fmt: skip


def compiled(name: str, operands: torch.dtype = torch.bfloat16) -> list[Launch]:
    """What one case launches."""
    with compiled_launches() as launches:
        CASES[name](operands)
    return launches


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(CASES))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--operands", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--ragged", action="store_true", help="sizes that nothing divides")
    options = parser.parse_args()
    if options.ragged:
        D, M, B, CAPACITY, BLOCK = 333, 1001, 77, 21, 333
    found = {name: compiled(name, getattr(torch, options.operands)) for name in options.names}
    if options.json:
        print(json.dumps({name: [launch._asdict() for launch in launches] for name, launches in found.items()}))
    else:
        for name, launches in found.items():
            print(f"{name}, {options.operands} operands\n{table(launches)}\n")
