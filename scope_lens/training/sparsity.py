"""The sparsity term of a JumpReLU dictionary: a price on L0, or a target for it, and a price on frequent latents.

1. Linear:     `coefficient * mean_b L0_b`                                      (Gemma Scope, arXiv 2408.05147, Eq. 4)
2. Quadratic:  `coefficient * quadratic_factor * mean_b (L0_b - target_l0)^2`   (Gemma Scope 2, Eq. 5)
3. Frequency:  `frequency * sum_i p_i^2 / limit`, with p_i the fraction of the batch in which latent i fires

The square of 2 is that of each row's L0, as the equation is printed, so rows are also drawn together. The paper's
factor is 2 / target_l0; its text says that the gradient at twice the target is the linear term's, which holds for
1 / (2 * target_l0). The factor is therefore a number of its own.

The published frequency penalty is `sum_i p_i (1 + p_i / limit)`. Its first half, `sum_i p_i`, is L0 and stands in 1 or
2 already; 3 adds the second half alone.
"""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from scope_lens.training.ranks import ALONE, Ranks


class SparsityTerm(NamedTuple):
    """The coefficients of the sparsity term at one update.

    Attributes:
        coefficient: Of L0, or of its squared distance from the target.
        target_l0: The target; None for the linear term.
        quadratic_factor: What the coefficient is multiplied with where there is a target.
        frequency: Coefficient of the frequency penalty.
        limit: The frequency p0 at which the penalty of a latent is that of L0.
    """

    coefficient: float
    target_l0: float | None = None
    quadratic_factor: float = 1.0
    frequency: float = 0.0
    limit: float = 0.1

    def value(
        self, l0: Float[Tensor, " batch"], frequency: Float[Tensor, " d_sae"], *, ranks: Ranks = ALONE
    ) -> Float[Tensor, ""]:
        """Give the term, differentiable in what it is given; on several ranks, this one's share of it.

        Args:
            l0: Number of active latents of each row.
            frequency: Fraction of the rows in which each latent is active; on several ranks, of all rows.
            ranks: Whose rows and latents these are.
        """
        if self.target_l0 is None:
            term = self.coefficient * ranks.part(l0.mean())
        else:
            term = self.coefficient * self.quadratic_factor * ranks.part((l0 - self.target_l0).pow(2).mean())
        if self.frequency:
            term = term + self.frequency / self.limit * ranks.part(ranks.join(frequency.pow(2).sum()))
        return term
