"""Reconstruction error, variance and activity at one site, as sums that add over batches.

The variance is about the mean of the whole data. Sums of squares about zero would cancel where the mean is large
against the spread, as it is in a residual stream. So each batch is centred at its own mean, and two batches merge by
the update of Chan, Golub and LeVeque (1979):

    centred = centred_a + centred_b + |mean_b - mean_a|^2 n_a n_b / (n_a + n_b)
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from scope_lens.sae import HookedSAE


@dataclass(frozen=True, kw_only=True)
class SiteSums:
    """Sums over the counted positions of one site.

    Attributes:
        n: Counted positions.
        mean: Mean of y.
        centred: `sum |y - mean(y)|^2`.
        error: `sum |y - y_hat|^2`.
        active: Active latents, summed over positions.
        fired: Which latents were active anywhere.
    """

    n: int
    mean: Float[Tensor, " d_out"]
    centred: Float[Tensor, ""]
    error: Float[Tensor, ""]
    active: Int[Tensor, ""]
    fired: Bool[Tensor, " d_sae"]

    @classmethod
    def of(cls, sae: HookedSAE, x: Float[Tensor, "row d_in"], y: Float[Tensor, "row d_out"]) -> "SiteSums":
        """Encode and reconstruct counted positions once, and sum; the dictionary's hooks do not fire."""
        n = y.shape[0]
        exact = y.double()
        mean = exact.sum(0) / max(n, 1)
        acts = sae.activate(sae.pre_activation(x))
        return cls(
            n=n,
            mean=mean,
            centred=(exact - mean).square_().sum(),
            error=(exact - sae.reconstruct(acts, x)).square_().sum(),
            active=torch.count_nonzero(acts),
            fired=acts.any(0),
        )

    def __add__(self, other: "SiteSums") -> "SiteSums":
        n = self.n + other.n
        share = other.n / max(n, 1)
        shift = other.mean - self.mean
        return SiteSums(
            n=n,
            mean=self.mean + shift * share,
            centred=self.centred + other.centred + shift.square().sum() * (self.n * share),
            error=self.error + other.error,
            active=self.active + other.active,
            fired=self.fired | other.fired,
        )

    @property
    def fvu(self) -> float:
        """`error / centred`; without variance infinity, or NaN where nothing is missed."""
        error, centred = float(self.error), float(self.centred)
        if centred == 0:
            return math.inf if error > 0 else math.nan
        return error / centred

    @property
    def l0(self) -> float:
        """Active latents per position."""
        return int(self.active) / self.n if self.n else math.nan

    @property
    def dead(self) -> float:
        """Fraction of latents that never fired."""
        return float((~self.fired).double().mean())
