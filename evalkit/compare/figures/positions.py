"""Where in the text the loss lies: an error by query position and by generated length, its slope, and a cliff at top-k.

A query at position p sees p + 1 tokens, so that position stands for context length too. From position `topk` on, the
indexer has to choose: what drops keys that matter shows as a step exactly there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.stats import linregress
from scipy.stats import t as student

from evalkit.stats.ratios import block_size

BINS: Final = 16
FEWEST_DOCUMENTS: Final = 5
FEWEST_TOKENS: Final = 16
FEWEST_BLOCKS: Final = 8
WINDOW: Final = 128  # tokens on each side of top-k
CLIFF: Final = 1.5  # the step at top-k that has a name, as a ratio that the interval's lower end exceeds
RESAMPLES: Final = 999

Curve = tuple[NDArray[np.int64], NDArray[np.float64]]  # positions and errors of one document's tokens


@dataclass(frozen=True, kw_only=True)
class PositionFigures:
    """An error over positions.

    starts, means, counts: equal bins; a bin without a finite value has no mean. slope_per_1000_tokens: least squares,
    with its 95 % interval by `slope_method`. below_topk_mean, above_topk_mean: over at most `WINDOW` positions just
    below and from top-k on, None where the text does not reach there. cliff: whether the step between them is above
    `CLIFF`; None where it is not told. nonfinite: tokens left out.
    """

    starts: list[int]
    means: list[float | None]
    counts: list[int]
    slope_per_1000_tokens: float | None
    slope_lower: float | None
    slope_upper: float | None
    slope_method: str
    below_topk_mean: float | None
    above_topk_mean: float | None
    cliff: bool | None
    nonfinite: int
    n: int


def figures(curves: Sequence[Curve], topk: int | None) -> PositionFigures:
    """The figures of one curve a document; topk None looks for no cliff.

    Raises:
        ValueError: there is no token.
    """
    if not curves or not any(len(x) for x, _ in curves):
        raise ValueError("no position was compared: there is no token")
    nonfinite = sum(int((~np.isfinite(y)).sum()) for _, y in curves)
    kept = [(x[np.isfinite(y)], y[np.isfinite(y)]) for x, y in curves]
    longest = 1 + max(int(x.max()) for x, _ in curves if len(x))
    width = -(-longest // BINS)
    x, y = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    counts = np.bincount(x // width, minlength=-(-longest // width))
    sums = np.bincount(x // width, y, minlength=len(counts))
    slope, lower, upper, method = _slope(kept)
    below, above, cliff = (None, None, None) if topk is None else _cliff(kept, topk)
    return PositionFigures(
        starts=[width * number for number in range(len(counts))],
        means=[float(total / count) if count else None for total, count in zip(sums, counts, strict=True)],
        counts=[int(count) for count in counts],
        slope_per_1000_tokens=slope,
        slope_lower=lower,
        slope_upper=upper,
        slope_method=method,
        below_topk_mean=below,
        above_topk_mean=above,
        cliff=cliff,
        nonfinite=nonfinite,
        n=len(x),
    )


def _slope(curves: Sequence[Curve]) -> tuple[float | None, float | None, float | None, str]:
    """Slope per 1,000 tokens with its interval and how it was found."""
    long = [(x, y) for x, y in curves if len(x) >= FEWEST_TOKENS]
    if not long:
        return None, None, None, f"none (fewer than {FEWEST_TOKENS} tokens)"
    if len(long) >= FEWEST_DOCUMENTS:
        each = 1000 * np.array([linregress(x, y).slope for x, y in long])
        half = float(student.ppf(0.975, len(each) - 1) * each.std(ddof=1) / len(each) ** 0.5)
        mean = float(each.mean())
        return mean, mean - half, mean + half, f"by document, t, {len(each)} documents"
    x, y = (np.concatenate(parts).astype(np.float64) for parts in zip(*long, strict=True))
    centre = x.mean()
    slope = 1000 * float(linregress(x, y).slope)
    size = block_size(max(len(x) for x, _ in long))
    sums = []
    for places, errors in long:
        for start in range(0, len(places), size):
            u, v = places[start : start + size] - centre, errors[start : start + size]
            sums.append([len(u), u.sum(), v.sum(), (u * u).sum(), (u * v).sum()])
    if len(sums) < FEWEST_BLOCKS:
        return slope, None, None, f"none ({len(sums)} blocks of {FEWEST_BLOCKS})"
    rng = np.random.default_rng(0)
    drawn = np.asarray(sums)[rng.integers(len(sums), size=(RESAMPLES, len(sums)))].sum(1)  # [R, 5]
    n, u, v, uu, uv = drawn.T
    spread = n * uu - u * u
    slopes = 1000 * (n * uv - u * v)[spread > 0] / spread[spread > 0]
    lower, upper = np.quantile(slopes, [0.025, 0.975])
    return slope, float(lower), float(upper), f"block bootstrap, {len(sums)} blocks of {size} tokens"


def _cliff(curves: Sequence[Curve], topk: int) -> tuple[float | None, float | None, bool | None]:
    """Means just below and from top-k on, and whether they are a step apart."""
    sides: tuple[list[float], list[float]] = ([], [])
    for x, y in curves:
        for side, (first, end) in zip(sides, ((topk - WINDOW, topk), (topk, topk + WINDOW)), strict=True):
            side += y[(x >= first) & (x < end)].tolist()
    if min(map(len, sides)) < FEWEST_TOKENS:
        return None, None, None
    below, above = (float(np.mean(side)) for side in sides)
    if below == 0:
        return below, above, above > 0
    if above == 0:
        return below, above, False
    size = max(1, min(8, min(map(len, sides)) // FEWEST_BLOCKS))
    spread = 0.0
    for side, mean in zip(sides, (below, above), strict=True):
        blocks = np.array([np.mean(side[start : start + size]) for start in range(0, len(side), size)])
        spread += float(blocks.var(ddof=1)) / len(blocks) / mean**2
    return below, above, bool(np.log(above / below) - 2 * spread**0.5 > np.log(CLIFF))
