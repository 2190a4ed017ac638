"""Events for each unit of exposure, documents drawn: both vary from document to document, and together."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from evalkit.stats.intervals import Interval
from evalkit.stats.means import FEWEST_DIFFERING, FEWEST_DOCUMENTS

RESAMPLES = 9_999
AT_ONCE = 4_000_000  # drawn values held in memory


def rate_interval(events: Sequence[int], exposure: Sequence[int], seed: int = 0) -> Interval | None:
    """Two-sided 95 % interval of sum of events over sum of exposure [documents]: scipy's BCa bootstrap by document.

    None below 40 documents, or 10 with an event, or where all are alike.

    Raises:
        ValueError: lengths differ, or an exposure is not positive.
    """
    if len(events) != len(exposure) or min(exposure, default=1) <= 0:
        raise ValueError(f"{len(events)} counts of {len(exposure)} exposures: want one each, above 0")
    if len(events) < FEWEST_DOCUMENTS or sum(count > 0 for count in events) < FEWEST_DIFFERING:
        return None
    if len(set(zip(events, exposure, strict=True))) == 1:
        return None  # each resample has the same rate
    found = bootstrap(
        (np.asarray(events, dtype=np.float64), np.asarray(exposure, dtype=np.float64)),
        _rate,
        paired=True,
        vectorized=True,
        method="BCa",
        n_resamples=RESAMPLES,
        batch=max(1, AT_ONCE // len(events)),
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    interval = Interval(float(found.low), float(found.high))
    return interval if np.isfinite(interval).all() else None


def _rate(events: NDArray[np.float64], exposure: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    return np.asarray(events.sum(axis=axis) / exposure.sum(axis=axis))
