"""How well batches are mixed, measured against a full shuffle.

Rows of one text resemble each other, and a batch of them says less than its size. Two numbers tell how far a reader is
from drawing at random from the whole text:

1. How many documents a batch holds, beside the number expected of rows drawn at random.
2. How far apart the rows of a batch stood in the text, beside the distance of rows drawn at random.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scope_lens.training.store.corpus import Origin


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Mixing of some batches.

    Attributes:
        size: Rows of a batch.
        documents: Distinct documents in a batch, the mean over batches.
        documents_shuffled: Distinct documents expected of `size` rows drawn at random from all rows.
        distance: Mean distance of two rows of a batch in the text, in rows, over the one of two rows drawn at random.
        pass_rows: Rows that were drawn from: of the store, or of one pass over the text.
    """

    size: int
    documents: float
    documents_shuffled: float
    distance: float
    pass_rows: int

    @property
    def documents_ratio(self) -> float:
        """Distinct documents over those of a full shuffle; 1 where the batches are mixed as well."""
        return self.documents / self.documents_shuffled


def measure_mixing(population: Origin, batches: Sequence[Origin]) -> Mixing:
    """Compare batches with random draws from the rows they are taken from.

    Args:
        population: Where all rows came from.
        batches: Where the rows of each batch came from, as many in each.
    """
    size, total = len(batches[0].doc), len(population.doc)
    key = _key(population)
    ordered = key.sort().values
    distances = torch.stack([_mean_distance(torch.searchsorted(ordered, _key(batch))) for batch in batches])
    of_document = population.doc.unique(return_counts=True)[1].double()
    return Mixing(
        size=size,
        documents=sum(len(batch.doc.unique()) for batch in batches) / len(batches),
        documents_shuffled=float((1 - _never_drawn(of_document, total, size)).sum()),
        distance=float(distances.mean()) / ((total + 1) / 3),
        pass_rows=total,
    )


def _key(origin: Origin) -> Int[Tensor, " row"]:
    """A number that orders rows as the text does."""
    return origin.doc.long() * (1 << 32) + origin.pos.long()


def _mean_distance(ranks: Int[Tensor, " row"]) -> Float[Tensor, ""]:
    """Mean |a - b| over pairs of rows."""
    n = len(ranks)
    weights = 2 * torch.arange(n, dtype=torch.float64) - n + 1
    return (weights * ranks.sort().values.double()).sum() / (n * (n - 1) / 2)


def _never_drawn(of_document: Float[Tensor, " document"], total: int, size: int) -> Float[Tensor, " document"]:
    """Probability that none of a document's rows is among `size` of `total`, drawn without replacement."""

    def ways(n: Tensor) -> Tensor:
        """Natural logarithm of n! / (n - size)!; minus infinity where there are fewer than `size`."""
        left = n - size
        return torch.where(left < 0, -torch.inf, torch.lgamma(n + 1) - torch.lgamma(left.clamp(min=0) + 1))

    return (ways(total - of_document) - ways(torch.tensor(float(total), dtype=torch.float64))).exp()
