"""Racing: who is clearly worse than a rival is measured no further.

On the same samples, in pairs, few of them tell most candidates from a good one (Birattari et al. 2002, "A racing
algorithm for configuring metaheuristics"; Maron & Moore 1994). Nothing here runs a network.
"""

from collections.abc import Iterator, Sequence
from typing import Final, TypeVar

from autoprune.evaluation.measure import Samples

__all__ = ["LOOKS", "clearly_worse", "legs"]

T = TypeVar("T")

LOOKS: Final = (0.1, 0.25, 0.5)
"""Shares of the samples after which a candidate is compared."""
_LEVEL = 0.001  # probability that one which is as good is stopped, at each look


def legs(batches: Sequence[T]) -> Iterator[Sequence[T]]:
    """Yield the batches up to each look, and what is left."""
    ends = [round(share * len(batches)) for share in LOOKS]
    for start, end in zip((0, *ends), (*ends, len(batches)), strict=True):
        if end > start:
            yield batches[start:end]


def clearly_worse(found: Samples, rival: Samples) -> bool:
    """Say whether the scores so far are lower than a rival's on the same samples, by more than chance.

    Wilcoxon's signed-rank test (Wilcoxon 1945), one-sided, at a level of 0.001; where scores are right or wrong it is
    McNemar's test of those that only one of the two decides.

    Args:
        found: The first samples of a candidate.
        rival: All samples of the rival, in the same order.
    """
    from scipy.stats import wilcoxon  # loads slowly

    differences = (found.scores - rival.scores[: len(found.scores)]).numpy()
    if not (differences < 0).any() or differences.mean() >= 0:
        return False
    return bool(wilcoxon(differences, alternative="less", method="asymptotic").pvalue < _LEVEL)
