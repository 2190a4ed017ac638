"""Change points of a nightly series: where its level moved, and on which night that was known.

The series is watched as a dashboard watches it, night by night. On each night, every split of the nights since the last
change into before and after is tested by a t statistic of the two means, with a variance pooled from the nights within
each part, those before earlier changes included. What a score's n says enters three times:

    weights    a night's variance is inverse to its n
    floor      a score on n documents moves in steps of 1 / n, so its sd is no less than half a step
    documents  those of a smaller n are the first of a larger one's: across a change of n, sampling adds
               p (1 - p) |1/n - 1/n'|

A split counts if its statistic passes a limit that an unchanging series of normal noise, watched for a year of nights,
passes at any time in `FALSE_ALARMS` of cases, and passes it with the difference of the medians too, which one bad night
does not move. benchmarks/changes.py simulates both, and docs/dashboard.md has its results.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median
from typing import Any

# Two-sided p of one split: its smallest over a year of nights lies below this in FALSE_ALARMS of unchanging series.
LIMIT = 4.1e-6
FALSE_ALARMS = 0.01
YEAR = 365
# Nights after a change that show it: the median of three ignores one.
AFTER = 3
# Degrees of freedom without which a variance is not known well enough.
FEWEST = 8
# Errors and divergences repeat to the bit on one machine; what moves by less than this is not worth a night's look.
RELATIVE_FLOOR = 0.005


@dataclass(frozen=True, kw_only=True)
class Change:
    """A level that moved.

    at: index of the first night of the new level; found: of the night on which that was known.
    before, after: mean levels, between this change and its neighbours.
    """

    at: int
    found: int
    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What is known of a series' noise beforehand.

    weights: of each night, 1 for the best known; its variance is inverse to that.
    floor: the least sd of a night of weight 1.
    n: documents of each night where other documents are another sample, else empty.
    """

    weights: tuple[float, ...]
    floor: float
    n: tuple[int, ...] = ()


def of_scores(scores: Sequence[float], n: Sequence[int]) -> list[Change]:
    """Changes of a score in [0, 1], each night's over its n documents.

    Raises:
        ValueError: a night has no document.
    """
    if any(count < 1 for count in n):
        raise ValueError("a score over no documents is none")
    if not scores:
        return []
    most = max(n)
    noise = Noise(weights=tuple(count / most for count in n), floor=0.5 / most, n=tuple(n))
    return _found(scores, noise, scores)


def of_errors(values: Sequence[float]) -> list[Change]:
    """Changes of an error or a divergence, on its logarithm; a series with a zero has none."""
    import math

    if not values or not min(values) > 0:
        return []
    noise = Noise(weights=(1.0,) * len(values), floor=RELATIVE_FLOOR)
    return _found([math.log(value) for value in values], noise, values)


def statistics(
    y: Any, w: Any, floor: float, earlier: tuple[float, int], resampled: Any = 0.0
) -> tuple[Any, int]:
    """t of every split of one segment of nights, and its degrees of freedom.

    Args:
        y: values [..., T].
        w: weights [T].
        floor: the least sd of a night of weight 1.
        earlier: weighted sum of squares within the segments before this one, and its degrees of freedom.
        resampled: variance that other documents after than before add [T - 1].

    Returns:
        t [..., T - 1], after less before: element k splits before night k + 1.
    """
    import numpy as np

    y = y - y[..., :1]  # sums of squares of small differences from a large level would lose them
    total = w.sum()
    left = np.cumsum(w)[:-1]
    right = total - left
    sums, squares = np.cumsum(w * y, -1), np.cumsum(w * y * y, -1)
    mean_left = sums[..., :-1] / left
    mean_right = (sums[..., -1:] - sums[..., :-1]) / right
    within = squares[..., -1:] - left * mean_left**2 - right * mean_right**2
    freedom = earlier[1] + y.shape[-1] - 2
    variance = np.maximum((np.maximum(within, 0.0) + earlier[0]) / max(freedom, 1), floor**2)
    return (mean_right - mean_left) / np.sqrt(variance * (1 / left + 1 / right) + resampled), freedom


def _resampled(scores: Any, n: Any) -> Any:
    """p (1 - p) |1/n - 1/n'|, with the mean documents before and after each split [T - 1]."""
    import numpy as np

    count, summed = np.arange(1, len(n)), np.cumsum(n)[:-1]
    p = np.average(scores, weights=n)
    return p * (1 - p) * np.abs(count / summed - (len(n) - count) / (n.sum() - summed))


@lru_cache(maxsize=4096)
def critical(freedom: int) -> float:
    """|t| that a split must pass."""
    from scipy.special import stdtrit

    return float(-stdtrit(freedom, LIMIT / 2))


def _found(y: Sequence[float], noise: Noise, shown: Sequence[float]) -> list[Change]:
    import numpy as np

    values, weights = np.asarray(y, float), np.asarray(noise.weights)
    documents = np.asarray(noise.n, float) if noise.n else None
    alarms: list[tuple[int, int]] = []
    start, earlier = 0, (0.0, 0)
    for night in range(len(values)):
        here = slice(start, night + 1)
        split = _alarm(
            values[here], weights[here], noise.floor, earlier, None if documents is None else documents[here]
        )
        if split is None:
            continue
        before = values[start : start + split]
        w = weights[start : start + split]
        inner = float((w * (before - np.average(before, weights=w)) ** 2).sum())
        earlier = (earlier[0] + inner, earlier[1] + split - 1)
        start += split
        alarms.append((start, night))
    ends = [*(at for at, _ in alarms), len(values)]
    starts = [0, *(at for at, _ in alarms)]
    levels = [float(np.average(shown[a:b], weights=weights[a:b])) for a, b in zip(starts, ends, strict=True)]
    return [
        Change(at=at, found=found, before=levels[place], after=levels[place + 1])
        for place, (at, found) in enumerate(alarms)
    ]


def _alarm(y: Any, w: Any, floor: float, earlier: tuple[float, int], n: Any) -> int | None:
    """Nights before the change that the last night reveals; None where it reveals none."""
    if len(y) < AFTER + 1 or earlier[1] + len(y) - 2 < FEWEST:
        return None
    t, freedom = statistics(y, w, floor, earlier, 0.0 if n is None else _resampled(y, n))
    t, limit = abs(t), critical(freedom)
    if not t.max() > limit:
        return None
    for split in t.argsort()[::-1]:
        before, after = y[: split + 1], y[split + 1 :]
        # The best split may be a night or two old; one before it would pass too, with a good night among the bad.
        if not t[split] > limit or len(after) < AFTER:
            return None
        moved = (median(after) - median(before)) / (after.mean() - before.mean())
        if t[split] * moved > limit:
            return int(split) + 1
    return None
