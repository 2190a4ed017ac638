"""Documents or clusters that fail whole, of which a sample may hold none: what it leaves open of them.

A bootstrap and a design effect know the spread that a sample showed. Where few units fail, and whole, a sample without
any shows hardly a spread, and one in (1 - share)^n holds none. So those that differ by more than half are tested
exactly, each as lost or gained whole, against what the others' loss leaves of the margin.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

from evalkit.stats.exact import NONINFERIOR, critical_value, p_value, score_edge


@dataclass(frozen=True, kw_only=True)
class Tail:
    """Units that differ by more than half of `whole`, beside the others.

    n: all units; lost, gained: those that differ by more than half, by their sign.
    rest: loss by the others, mean over all units; a gain of theirs counts for nothing.
    whole: what one unit can lose at most.
    """

    n: int
    lost: int
    gained: int
    rest: float
    whole: float

    def p(self, margin: float) -> float:
        """p of the test that the loss is not below the margin."""
        left = self._left(margin)
        return p_value(self.lost, self.gained, self.n, left, NONINFERIOR) if left > 0 else 1.0

    def upper(self, margin: float, alpha: float) -> float:
        """Upper bound of the loss at confidence 1 - alpha, below the margin where `p` is below alpha."""
        left = self._left(margin)
        if not left > 0:
            return max(self.rest, margin)
        critical = critical_value(self.n, left, alpha, NONINFERIOR)
        return self.rest + self.whole * score_edge(self.lost, self.gained, self.n, critical, 1.0)

    def needed(self, margin: float, alpha: float) -> float:
        """Units with which `p` would be at most alpha if as large shares of them differed, to half a percent.

        inf where none will do, or none below a hundred times as many.
        """
        left = self._left(margin)
        if (self.lost - self.gained) / self.n >= left:
            return inf

        def shown(n: int) -> bool:
            return p_value(self.lost * n / self.n, self.gained * n / self.n, n, left) <= alpha

        low, high = self.n - 1, self.n
        while not shown(high):
            low, high = high, 2 * high
            if high > 100 * self.n:
                return inf
        while high - low > max(1, high // 200):
            middle = (low + high) // 2
            low, high = (low, middle) if shown(middle) else (middle, high)
        return high

    def _left(self, margin: float) -> float:
        return (margin - self.rest) / self.whole


def fewest(margin: float, alpha: float, least: int) -> int:
    """Units, `least` or more, of which none may differ, so that the loss is shown to be below the margin."""
    return int(Tail(n=least, lost=0, gained=0, rest=0.0, whole=1.0).needed(margin, alpha))


def tail(units: Sequence[float] | NDArray[np.float64], whole: float = 1.0) -> Tail:
    """The tail of one difference a document, or of one mean difference a cluster."""
    x = np.asarray(units, dtype=np.float64)
    many = 2 * np.abs(x) > whole
    return Tail(
        n=len(x),
        lost=int((many & (x > 0)).sum()),
        gained=int((many & (x < 0)).sum()),
        rest=max(0.0, float(x[~many].sum()) / len(x)),
        whole=whole,
    )
