"""The test of the loss against a margin, with a size that is enumerated and not assumed.

The statistic is Tango's z. Given m discordant documents of n, the lost ones are Binomial(m, (1 + loss/d) / 2) whatever
the documents, so that a test's rejection probability at true loss = margin is

    sum over m of Binomial(n, d)(m) * P(reject | m),

a function of one unknown, the discordance d. Its maximum over d from the margin to 1 is the size. `critical_value`
is raised from the normal quantile until the size is at most alpha; p-values are the size of the test that would just
reject, and no less than the normal one. Noninferiority is the lower tail (loss below the margin), "worse" the upper one.
"""

from functools import lru_cache
from heapq import nlargest
from math import asin, ceil, pi, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, norm

from evalkit.errors import InputError
from evalkit.stats.intervals import Interval
from evalkit.stats.score import tango_z

NONINFERIOR, WORSE = "noninferior", "worse"
# Steps of the discordance, in standard deviations of its estimate: mixing over m has smoothed the size to that scale.
FINE, COARSE = 0.5, 2.0
REACH = 6.5  # standard deviations of a binomial beyond which it is left out, 1e-10 of it
TOLERANCE = 1e-4  # of a critical value; the value returned is on the side where the size is held
# Of alpha, what the size may be on the grid, so that it is at most alpha between its points.
HELD = 1 - 1e-4
PEAKS = 8  # discordances that the search looks at before it looks at all of them again


def rejection_edge(n: int, margin: float, critical: float, tail: str) -> NDArray[np.int64]:
    """For every count m = 0..n of discordant documents, the last number of lost ones in the rejection region.

    Tail `noninferior` rejects at lost <= edge (-1: never), `worse` at lost >= edge (m + 1: never).
    """
    m = np.arange(n + 1)
    low, high = np.full(n + 1, -1), m.copy()
    while (open_ := low < high).any():
        middle = (low + high + 1) // 2
        z = tango_z(middle, m - middle, n, margin)
        # z rises with `lost`; the slack keeps a p-value's own observation inside.
        inside = z <= -critical + 1e-12 if tail == NONINFERIOR else z < critical - 1e-12
        low = np.where(open_ & inside, middle, low)
        high = np.where(open_ & ~inside, middle - 1, high)
    return low if tail == NONINFERIOR else low + 1


def rejects(n: int, discordance: float, loss: float, edge: NDArray[np.int64], tail: str) -> float:
    """Probability of rejection where documents differ with probability `discordance` and the true loss is `loss`."""
    spread = REACH * sqrt(n * discordance * (1 - discordance)) + 10
    first, last = max(0, int(n * discordance - spread)), min(n, ceil(n * discordance + spread))
    m = np.arange(first, last + 1)
    # loss / discordance may exceed 1 by rounding where the margin is the discordance.
    p, last_lost = min(1.0, (1 + loss / discordance) / 2), edge[first : last + 1]
    inside = binom.cdf(last_lost, m, p) if tail == NONINFERIOR else binom.sf(last_lost - 1, m, p)
    return float(binom.pmf(m, n, discordance) @ inside)


def discordances(n: int, margin: float, step: float) -> NDArray[np.float64]:
    """From |margin| to 1, evenly spaced in units of the estimate's own standard deviation."""
    start = asin(sqrt(max(abs(margin), 1e-9)))
    return np.sin(np.linspace(start, pi / 2, ceil((pi / 2 - start) * 2 * sqrt(n) / step) + 2)) ** 2


def size(n: int, margin: float, critical: float, tail: str = NONINFERIOR, step: float = FINE) -> float:
    """The largest probability of rejecting a true loss of exactly the margin, over every discordance."""
    edge = rejection_edge(n, margin, critical, tail)
    return max(rejects(n, float(d), margin, edge, tail) for d in discordances(n, margin, step))


@lru_cache(maxsize=4096)
def critical_value(n: int, margin: float, alpha: float, tail: str = NONINFERIOR) -> float:
    """The least critical value, from the normal quantile up, at which the size is at most alpha.

    Raises:
        InputError: n, margin or alpha is not one that a test can have.
    """
    check(n, margin, alpha)
    found, worst = float(norm.isf(alpha)), list[float]()
    for step in (COARSE, FINE):
        grid = discordances(n, margin, step).tolist()
        while True:
            edge = rejection_edge(n, margin, found, tail)
            sizes = {d: rejects(n, d, margin, edge, tail) for d in grid}
            if max(sizes.values()) <= HELD * alpha:
                break
            # Raised only as far as the worst discordances ask; then every one is looked at again.
            worst += nlargest(PEAKS, sizes, key=sizes.__getitem__)
            found = _raised(n, margin, alpha, tail, found, worst)
    return found


def p_value(lost: float, gained: float, n: float, margin: float, tail: str = NONINFERIOR) -> float:
    """p of the test that the loss is not below (`noninferior`) or not above (`worse`) the margin.

    Counts divided by a design effect are taken as they are for z; the enumeration rounds n down. A critical value is no
    less than the normal one, and neither is p.
    """
    z = float(tango_z(lost, gained, n, margin)) * (-1 if tail == NONINFERIOR else 1)
    return max(_size_at(int(n), margin, z, tail), float(norm.sf(z)))


def bounds(lost: float, gained: float, n: float, margin: float, alpha: float) -> Interval:
    """One-sided bounds of the loss, each at confidence 1 - alpha, that agree with the tests at `margin`.

    The upper bound is below the margin where noninferiority is shown, the lower above it where the candidate is worse,
    but for z within TOLERANCE of a critical value.
    """
    return Interval(
        score_edge(lost, gained, n, critical_value(int(n), margin, alpha, WORSE), -1.0),
        score_edge(lost, gained, n, critical_value(int(n), margin, alpha, NONINFERIOR), 1.0),
    )


def score_edge(lost: float, gained: float, n: float, critical: float, outside: float) -> float:
    """The loss farthest towards `outside` (-1 or 1) whose |z| is at most `critical`."""
    inside = (lost - gained) / n
    while (middle := (inside + outside) / 2) not in (inside, outside):
        if abs(tango_z(lost, gained, n, middle)) <= critical:
            inside = middle
        else:
            outside = middle
    return inside


def check(n: float, margin: float, alpha: float) -> None:
    """Raise InputError unless a test of n documents at this margin and level exists."""
    if not (n >= 2 and 0 < margin < 1 and 0 < alpha < 0.5):
        raise InputError(
            f"{n} documents, margin {margin}, alpha {alpha}: want at least 2, a margin between 0 and 1, and an alpha "
            "between 0 and 0.5"
        )


@lru_cache(maxsize=4096)
def _size_at(n: int, margin: float, critical: float, tail: str) -> float:
    return min(1.0, size(n, margin, critical, tail))


def _raised(n: int, margin: float, alpha: float, tail: str, critical: float, at: list[float]) -> float:
    """The least critical value above this one with which the size is held at these discordances."""

    def held(value: float) -> bool:
        edge = rejection_edge(n, margin, value, tail)
        return all(rejects(n, d, margin, edge, tail) <= HELD * alpha for d in at)

    low, high = critical, critical + 0.1
    while not held(high):
        low, high = high, high + 0.4
    while high - low > TOLERANCE:
        middle = (low + high) / 2
        low, high = (low, middle) if held(middle) else (middle, high)
    return high
