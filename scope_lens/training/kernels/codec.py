"""A trained dictionary through the training kernels: encode to the active latents alone, decode from them.

`HookedSAE.encode` gives every latent of every row; in a trained dictionary one in some hundred is active. Here

1. `encode` decides on float32 accumulators which latents are active and keeps those: `Entries`. No tensor with an entry
   for every row and latent is made. A row with more of them than there is room for makes the room grow, and the batch
   is done again.
2. `decode` sums the active latents' rows of `W_dec`.

For TopK a floor under the k-th largest pre-activation is estimated from a few rows, and the latents above it are the
candidates among which each row's k largest are chosen. A row for which the floor was too high or too low is encoded
densely, so the result is exact.

It is meant for inference: no gradient, no hook. docs/benchmarks/cuda_step.md has what it saves, once that is measured.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from scope_lens.sae import HookedSAE
from scope_lens.training.kernels.choice import KernelChoice, resolve
from scope_lens.training.kernels.entries import Entries
from scope_lens.training.kernels.kernel_set import eager_kernels, triton_kernels
from scope_lens.training.kernels.topk_blocks import topk_by_blocks

_ROOM = 256  # entries of a row at first
_SAMPLE = 32  # rows from which TopK's floor is estimated
_CANDIDATES = 2  # times k: the rank of the floor in a sampled row
_TOPK_ROOM = 8  # times k: candidates for which a row has room
_DENSE_ROWS = 512  # rows encoded densely at a time: 128 MiB of pre-activations at 65k latents


class SparseCodec:
    """Encodes and decodes with the active latents alone, exactly as a dictionary does with all of them.

    The weights are taken as they are now; a dictionary that changes afterwards needs a new codec. The encoder's are
    copied latent by latent, the decoder's only where their dtype changes.

    Args:
        sae: A ReLU, JumpReLU or TopK dictionary, in its inference or its training form.
        kernels: "auto" takes Triton's kernels on CUDA and torch's own operations elsewhere.
        operands: Dtype of what is multiplied, bfloat16 or float32; sums and the decision are float32 in both. None
            takes the dictionary's.

    Raises:
        ValueError: Another kind of dictionary or dtype, or kernels that cannot run where the dictionary is.
    """

    @torch.no_grad()
    def __init__(self, sae: HookedSAE, *, kernels: KernelChoice = "auto", operands: torch.dtype | None = None) -> None:
        if sae.cfg.activation == "batchtopk":
            raise ValueError(
                "SparseCodec encodes row by row, for the activations relu, jumprelu and topk; found batchtopk, whose "
                "latents depend on the other rows. A trained one is exported as JumpReLU: Trainer.result()."
            )
        operands = operands or sae.dtype
        if operands not in (torch.bfloat16, torch.float32):
            raise ValueError(
                f"SparseCodec multiplies in bfloat16 or float32; found {operands}. Pass operands=torch.float32."
            )
        self.sae = sae
        self._kernels = triton_kernels() if resolve(kernels, sae.device) == "triton" else eager_kernels()
        self._capacity = min(_ROOM, sae.cfg.d_sae)
        self._W_enc = sae.W_enc.detach().to(operands).T.contiguous()
        self._W_dec = sae.W_dec.detach().to(operands)
        self._b_enc, self._b_dec = sae.b_enc.detach().float(), sae.b_dec.detach().float()
        threshold = torch.zeros_like(sae.b_enc) if sae.threshold is None else sae.threshold
        self._threshold = threshold.detach().float()

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Entries:
        """Give the active latents of each row, the batch axes flattened into one.

        Waits for the device once, to see whether every row had room.

        Raises:
            ValueError: The last axis of `x` is not `d_in`.
        """
        cfg = self.sae.cfg
        if x.shape[-1] != cfg.d_in:
            raise ValueError(
                f"The dictionary for {cfg.hook_in!r} reads activations of width d_in={cfg.d_in}; found shape "
                f"{tuple(x.shape)}. Pass the activation of its own site (hook_z flattened over heads)."
            )
        rows = x.reshape(-1, cfg.d_in).to(self.sae.dtype)
        if cfg.pre_encoder_bias:
            rows = rows - self.sae.b_dec
        rows = rows.to(self._W_enc.dtype)
        # Triton launches on the current device, whichever device its arguments are on.
        with torch.cuda.device_of(rows):
            return self._encode(rows) if cfg.k is None else self._encode_topk(rows, cfg.k)

    @torch.no_grad()
    def decode(self, entries: Entries, x: Float[Tensor, "*batch d_in"] | None = None) -> Float[Tensor, "rows d_out"]:
        """Give `x_hat = f @ W_dec + b_dec (+ x @ W_skip)` for each row of `entries`.

        Args:
            entries: What `encode` gave.
            x: The encoder's input; needed when the dictionary has a skip term.

        Raises:
            ValueError: The dictionary has a skip term and `x` is missing.
        """
        with torch.cuda.device_of(self._W_dec):
            recons = self._kernels.decode(entries, self._W_dec, self._b_dec).to(self.sae.dtype)
        W_skip = self.sae.W_skip
        if W_skip is None:
            return recons
        if x is None:
            raise ValueError(
                f"The dictionary for {self.sae.cfg.hook_out!r} has a skip term x @ W_skip, so decode needs the "
                "encoder's input too: call decode(entries, x), or forward(x)."
            )
        return recons + x.reshape(-1, x.shape[-1]).to(W_skip.dtype) @ W_skip

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Give `x_hat` of the activation `x`, the skip term included.

        Raises:
            ValueError: The last axis of `x` is not `d_in`.
        """
        return self.decode(self.encode(x), x).reshape(*x.shape[:-1], self.sae.cfg.d_out)

    # ---- JumpReLU and ReLU ----

    def _encode(self, rows: Tensor) -> Entries:
        while True:
            entries = self._kernels.encode(
                rows, self._W_enc, self._b_enc, self._threshold, half_window=0.0, capacity=self._capacity
            )
            most = int(entries.count.max()) if len(rows) else 0
            if most <= self._capacity:
                return entries
            # A power of two, so that few sizes are ever compiled and allocated.
            self._capacity = min(1 << (most - 1).bit_length(), self.sae.cfg.d_sae)

    # ---- TopK ----

    def _encode_topk(self, rows: Tensor, k: int) -> Entries:
        capacity = min(_TOPK_ROOM * k, self.sae.cfg.d_sae)
        floor = self._floor(rows, k)
        entries = self._kernels.topk_encode(rows, self._W_enc, self._b_enc, k=k, floor=floor, capacity=capacity)
        wrong = ((entries.count < k) | (entries.count > capacity)).nonzero().flatten()
        for chunk in wrong.split(_DENSE_ROWS):
            found, _ = topk_by_blocks(
                rows[chunk],
                self._W_enc,
                self._b_enc,
                k=k,
                floor=floor,
                block=self.sae.cfg.d_sae,
                product=self._kernels.product,
            )
            for column, exact in zip(entries, found, strict=True):
                column[chunk] = exact
        return entries

    def _floor(self, rows: Tensor, k: int) -> Tensor:
        """A pre-activation that more than k, but not many more, latents of a row exceed."""
        sample = rows[:: max(1, len(rows) // _SAMPLE)]
        rank = min(_CANDIDATES * k, self.sae.cfg.d_sae)
        floors = self._pre(sample).topk(rank, dim=-1).values[:, -1]
        lowest = floors.new_full((1,), torch.inf)
        return torch.minimum(lowest, floors.nan_to_num(nan=torch.inf).amin()) if len(rows) else lowest

    def _pre(self, rows: Tensor) -> Tensor:
        return self._kernels.product(rows, self._W_enc.T) + self._b_enc
