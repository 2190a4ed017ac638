"""The ratio of two errors on the same units (documents, or blocks of tokens), with a paired interval.

The interval is linearised on the logarithm: a unit's influence is how far its share of one sum is from its share of
the other, so what makes a unit hard for both cancels. Blocks stand in where documents are few; tokens of one
document are not apart, so such an interval holds for that document's text, not for text as such.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student

FEWEST_UNITS = 8
FEWEST_DOCUMENTS = 10


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A ratio with its two-sided 95 % interval, None where there is none, and in words what the interval is by."""

    value: float
    lower: float | None
    upper: float | None
    method: str


def ratio(got: ArrayLike, ref: ArrayLike, *, root: bool = False, method: str = "") -> Ratio | None:
    """Sum of got [U] over sum of ref [U], units paired; with `root` the square root of it, for sums of squares.

    None where the reference sums to zero: nothing is a multiple of it. Below `FEWEST_UNITS` there is no interval.

    Raises:
        ValueError: lengths differ, there is no unit, or a value is negative or not finite.
    """
    a, b = (np.asarray(x, dtype=np.float64) for x in (got, ref))
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"paired units [U] needed: got {list(a.shape)}, ref {list(b.shape)}")
    if not (np.isfinite(a).all() and np.isfinite(b).all() and (a >= 0).all() and (b >= 0).all()):
        raise ValueError("errors are finite and at least 0")
    if b.sum() == 0:
        return None
    power = 0.5 if root else 1.0
    value = float((a.sum() / b.sum()) ** power)
    if len(a) < FEWEST_UNITS or value == 0:
        few = "an error of zero" if value == 0 else f"{len(a)} units of {FEWEST_UNITS}"
        return Ratio(value=value, lower=None, upper=None, method=f"none ({few})")
    influence = power * (a / a.mean() - b / b.mean())
    half = float(student.ppf(0.975, len(a) - 1) * influence.std(ddof=1) / len(a) ** 0.5)
    # A wild unit makes exp overflow to inf, which no record holds: such an interval says nothing.
    if not half < 20:
        return Ratio(value=value, lower=None, upper=None, method="none (units differ too much)")
    lower, upper = value * float(np.exp(-half)), value * float(np.exp(half))
    return Ratio(
        value=value, lower=lower, upper=upper, method=f"linearised, paired, {len(a)} {method or 'units'}"
    )


def block_size(tokens: int) -> int:
    """Tokens of a block: at least 16 blocks a document where it is that long, of at most 64 tokens."""
    return max(1, min(64, tokens // 16))


def by_units(got: Sequence[ArrayLike], ref: Sequence[ArrayLike], *, root: bool = False) -> Ratio | None:
    """As `ratio`, of one array of tokens for each document: by document from 10 on, else by blocks of tokens."""
    pairs = [
        (np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64))
        for a, b in zip(got, ref, strict=True)
    ]
    kept = [(a[fine], b[fine]) for a, b in pairs for fine in [np.isfinite(a) & np.isfinite(b)] if fine.any()]
    if not kept:
        return None
    if len(kept) >= FEWEST_DOCUMENTS:
        return ratio([a.sum() for a, _ in kept], [b.sum() for _, b in kept], root=root, method="documents")
    size = block_size(max(len(a) for a, _ in kept))
    sums: tuple[list[float], list[float]] = ([], [])
    for pair in kept:
        for x, into in zip(pair, sums, strict=True):
            into += [float(x[start : start + size].sum()) for start in range(0, len(x), size)]
    return ratio(*sums, root=root, method=f"blocks of {size} tokens")
