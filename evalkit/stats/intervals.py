"""Intervals for one proportion."""

from typing import NamedTuple

from scipy.stats import binomtest


class Interval(NamedTuple):
    lower: float
    upper: float


def wilson(successes: int, n: int, alpha: float = 0.05) -> Interval | None:
    """Wilson's score interval for a proportion, two-sided at confidence 1 - alpha.

    None below two observations, where no interval says anything.

    Raises:
        ValueError: successes is not between 0 and n, or alpha not between 0 and 1.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} observations: want 0 <= successes <= observations")
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha {alpha}: want a number between 0 and 1")
    if n < 2:
        return None
    ci = binomtest(successes, n).proportion_ci(confidence_level=1.0 - alpha, method="wilson")
    return Interval(float(ci.low), float(ci.high))
