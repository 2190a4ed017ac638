"""Documents that share something (questions on one haystack): how much less they say than so many apart."""

from collections.abc import Hashable, Sequence

import numpy as np

from evalkit.errors import InputError

FEWEST_CLUSTERS = 100


def design_effect(differences: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Variance of the mean difference with documents in clusters over that with documents apart; at least 1.

    Counts divided by it are those of as many documents apart. The variance between clusters is that of the ratio
    estimator, with its usual correction of C / (C - 1).

    Raises:
        InputError: there are fewer than two clusters, or lengths differ.
    """
    x = np.asarray(differences, dtype=np.float64)
    if len(x) != len(clusters):
        raise InputError(f"{len(x)} differences of {len(clusters)} documents: want one each")
    names = {name: place for place, name in enumerate(dict.fromkeys(clusters))}
    if len(names) < 2:
        raise InputError(f"{len(names)} cluster of {len(x)} documents: want at least 2")
    if len(names) == len(x):
        return 1.0
    deviation = x - x.mean()
    sums = np.bincount([names[name] for name in clusters], deviation)
    apart = float(deviation @ deviation) * len(x) / (len(x) - 1)
    if apart == 0:
        return 1.0
    together = float(sums @ sums) * len(names) / (len(names) - 1)
    return max(1.0, together / apart)
