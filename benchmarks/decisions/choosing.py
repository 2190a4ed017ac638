"""What pilot and titration say: documents of a sample, and the doses that cost so many margins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import curve_fit

from benchmarks.decisions.cells import Cell
from evalkit.errors import InputError
from evalkit.stats.intervals import Interval
from evalkit.stats.paired import tango_interval

# In margins: from none over one and two to three.
DOSES = (0.5, 1.0, 1.5, 2.1, 3.0)


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Documents of several samples together: P(before right) - P(after right), and how many differ."""

    n: int
    before: float
    after: float
    lost: int
    gained: int

    @property
    def loss(self) -> float:
        return (self.lost - self.gained) / self.n

    @property
    def discordance(self) -> float:
        return (self.lost + self.gained) / self.n

    @property
    def interval(self) -> Interval:
        """Tango's, 95 %."""
        found = tango_interval(self.lost, self.gained, self.n)
        assert found is not None
        return found


def loss_between(before: Sequence[Cell], after: Sequence[Cell]) -> Loss:
    """Two arms on the same documents.

    Raises:
        InputError: they were not asked the same questions.
    """
    for one, other in zip(before, after, strict=True):
        if one.questions_sha256 != other.questions_sha256:
            raise InputError(f"{one.wanted.arm} and {other.wanted.arm} were asked other questions")
    a, b = (np.concatenate([cell.right for cell in side]) for side in (before, after))
    return Loss(
        n=len(a),
        before=float(a.mean()),
        after=float(b.mean()),
        lost=int((a & ~b).sum()),
        gained=int((b & ~a).sum()),
    )


@dataclass(frozen=True, kw_only=True)
class DoseCurve:
    """Loss by noise: score * (1 - exp(-(noise / scale)^shape)), which ends where nothing is right any more."""

    score: float
    scale: float
    shape: float

    def loss(self, noise: float | NDArray[np.float64]) -> NDArray[np.float64]:
        """What this noise costs."""
        return np.asarray(self.score * -np.expm1(-((np.asarray(noise) / self.scale) ** self.shape)))

    def noise(self, loss: float) -> float:
        """What costs this loss.

        Raises:
            InputError: more than the score.
        """
        if not 0 < loss < self.score:
            raise InputError(f"a loss of {loss:g} of a score of {self.score:g}: no noise costs that")
        return float(self.scale * (-log(1 - loss / self.score)) ** (1 / self.shape))


def dose_curve(noise: Sequence[float], found: Sequence[Loss]) -> DoseCurve:
    """Fit a curve to what several noises cost, each weighted by its standard error.

    Raises:
        InputError: too few noises cost anything for a curve.
    """
    losses = np.array([one.loss for one in found])
    score = float(np.mean([one.before for one in found]))
    if (losses > 0).sum() < 3:
        raise InputError(f"{(losses > 0).sum()} of {len(losses)} noises cost anything: try larger ones")
    # A flip more on either side, so that none looks certain.
    spread = np.sqrt([(one.lost + one.gained + 1) / one.n**2 for one in found])

    def curve(x: NDArray[np.float64], scale: float, shape: float) -> NDArray[np.float64]:
        return DoseCurve(score=score, scale=scale, shape=shape).loss(x)

    try:
        (scale, shape), _ = curve_fit(
            curve,
            np.array(noise),
            losses,
            p0=(float(np.max(noise)), 2.0),
            sigma=spread,
            bounds=((1e-6, 0.2), (1e3, 20.0)),
        )
    except RuntimeError as error:
        raise InputError(f"no curve fits these losses: {error}") from None
    return DoseCurve(score=score, scale=float(scale), shape=float(shape))
