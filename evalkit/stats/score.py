"""Tango's score statistic for the loss between two candidates on the same documents.

Statistics in Medicine 17, 891-908 (1998). The variance is that of the hypothesis, with P(gained) at its most likely
value under it, so the statistic stays honest where few documents differ, where a Wald statistic collapses.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def tango_z(lost: ArrayLike, gained: ArrayLike, n: ArrayLike, loss: ArrayLike) -> Any:
    """Tango's z for the hypothesis that the true loss is `loss`; it falls as `loss` rises.

    At loss 0 its square is McNemar's (lost - gained)^2 / (lost + gained), without correction. Arguments broadcast;
    counts may be divided by a design effect.
    """
    lost, gained, n, loss = (np.asarray(x, dtype=np.float64) for x in (lost, gained, n, loss))
    difference = lost - gained - n * loss
    # Most likely P(gained) given the loss: the root >= 0 of 2n q^2 + b q + c = 0.
    b = (2 * n - lost + gained) * loss - lost - gained
    c = -gained * loss * (1 - loss)
    root = np.sqrt(np.maximum(b * b - 8 * n * c, 0.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        # root - b cancels for b > 0; the other form of the same root does not.
        gain = np.where(b > 0, -2 * c / (b + root), (root - b) / (4 * n))
        variance = n * (2 * gain + loss * (1 - loss))
        z = np.where(variance > 0, difference / np.sqrt(variance), np.copysign(np.inf, difference))
    return np.where(difference == 0, 0.0, z)[()]
