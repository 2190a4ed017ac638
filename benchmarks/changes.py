"""How often the dashboard's change points are false, and how soon true ones are found, by simulation.

    python -m benchmarks.changes [--series 2000] [--seed 0] [--limit]

False alarms: series that do not change, watched for 365 nights, by kind of noise. Detection: 120 nights with a drop
planted between night 60 and night 110, by its size over the night-to-night sd. `--limit` simulates LIMIT itself.
"""

import argparse
from collections.abc import Callable, Iterator

import numpy as np
from scipy.special import stdtr

from evalkit.report import changes

SD = 0.0025  # a quarter of a point from night to night
LEVEL = 0.9
Noise = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]


def normal(rng: np.random.Generator, nights: int) -> tuple[np.ndarray, np.ndarray]:
    return LEVEL + SD * rng.standard_normal(nights), np.full(nights, 10**6)


def counted(n: int) -> Noise:
    """Other documents every night: binomial."""
    return lambda rng, nights: (rng.binomial(n, LEVEL, nights) / n, np.full(nights, n))


def flips(rng: np.random.Generator, nights: int) -> tuple[np.ndarray, np.ndarray]:
    """The same 1,000 documents, of which a few flip now and then."""
    return LEVEL + (rng.poisson(0.3, nights) - rng.poisson(0.3, nights)) / 1000, np.full(nights, 1000)


def tailed(rng: np.random.Generator, nights: int) -> tuple[np.ndarray, np.ndarray]:
    """Student's t with 3 degrees of freedom: bad nights."""
    return LEVEL + SD * rng.standard_t(3, nights) / 3**0.5, np.full(nights, 10**6)


def drifting(rng: np.random.Generator, nights: int) -> tuple[np.ndarray, np.ndarray]:
    """Each night remembers 0.3 of the last: not what the limit is for."""
    e = rng.standard_normal(nights)
    for night in range(1, nights):
        e[night] = 0.3 * e[night - 1] + (1 - 0.3**2) ** 0.5 * e[night]
    return LEVEL + SD * e, np.full(nights, 10**6)


def resized(rng: np.random.Generator, nights: int) -> tuple[np.ndarray, np.ndarray]:
    """The first 100 of 1,000 documents until some night, then all of them; a document flips in 1 % of nights."""
    right = rng.random(1000) < LEVEL
    n = np.where(np.arange(nights) < rng.integers(30, nights - 30), 100, 1000)
    flipped = rng.random((nights, 1000)) < 0.01
    scores = (right ^ flipped).cumsum(1)[np.arange(nights), n - 1] / n
    return scores, n


NOISES: dict[str, Noise] = {
    "normal, sd 0.25 point": normal,
    "binomial, n = 24": counted(24),
    "binomial, n = 200": counted(200),
    "binomial, n = 1,000": counted(1000),
    "single flips in 1,000": flips,
    "n from 100 to 1,000": resized,
    "heavy tails (t, 3 df)": tailed,
    "correlated (0.3)": drifting,
}


def false_alarms(noise: Noise, series: int, rng: np.random.Generator) -> float:
    """Share of unchanging series with any change point in a year of nights."""
    alarmed = 0
    for _ in range(series):
        scores, n = noise(rng, changes.YEAR)
        alarmed += bool(changes.of_scores(scores.tolist(), n.tolist()))
    return alarmed / series


def detection(drop: float, series: int, rng: np.random.Generator) -> dict[str, float]:
    """Share of planted drops found at their own night within 3, 7 and 14 nights, and of series with any other."""
    within = {3: 0, 7: 0, 14: 0}
    other = 0
    for _ in range(series):
        scores, n = normal(rng, 120)
        night = int(rng.integers(60, 107))
        scores[night:] -= drop
        found = changes.of_scores(scores.tolist(), n.tolist())
        other += any(change.at != night for change in found)
        for nights in within:
            within[nights] += any(c.at == night and c.found < night + nights for c in found)
    return {
        **{f"{nights} nights": count / series for nights, count in within.items()},
        "other": other / series,
    }


def smallest_p(series: int, rng: np.random.Generator) -> np.ndarray:
    """The smallest p over all splits and nights of a year, of series of normal noise [series]."""
    y = rng.standard_normal((series, changes.YEAR))
    least, weights = np.ones(series), np.ones(changes.YEAR)
    for nights in range(changes.FEWEST + 2, changes.YEAR + 1):
        t, freedom = changes.statistics(y[:, :nights], weights[:nights], 0.0, (0.0, 0))
        most = np.abs(t[:, : nights - changes.AFTER]).max(1)
        least = np.minimum(least, 2 * stdtr(freedom, -most))
    return least


def lines(series: int, seed: int) -> Iterator[str]:
    yield f"| noise | series with a false alarm in {changes.YEAR} nights (of {series:,}) |"
    yield "|---|---:|"
    for name, noise in NOISES.items():
        yield f"| {name} | {false_alarms(noise, series, np.random.default_rng([seed, 1])):.2%} |"
    yield ""
    yield f"| drop in points (sd 0.25; {series:,} series of 120 nights) | found by its third night | seventh | fourteenth | at another night, or false |"
    yield "|---|---:|---:|---:|---:|"
    for drop in (0.25, 0.5, 0.75, 1.0, 1.5, 2.0):
        found = detection(drop / 100, series, np.random.default_rng([seed, 2])).values()
        yield f"| {drop:g} | {' | '.join(f'{share:.2%}' for share in found)} |"


def main() -> None:
    """Print the tables, or the limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--series", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", action="store_true", help="simulate LIMIT instead")
    asked = parser.parse_args()
    if asked.limit:
        least = smallest_p(asked.series, np.random.default_rng(asked.seed))
        print(f"{np.quantile(least, changes.FALSE_ALARMS):.2e} at {changes.FALSE_ALARMS:.0%}")
        return
    for line in lines(asked.series, asked.seed):
        print(line, flush=True)


if __name__ == "__main__":
    main()
