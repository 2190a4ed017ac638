"""What the statistics of evalkit hold, by enumeration and simulation: writes the tables of docs/statistics.md.

    python -m benchmarks.statistics docs/statistics.md

Each is printed, too, as its rows are found.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from math import ceil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, norm

from benchmarks.pages import write_tables
from evalkit.stats.exact import (
    NONINFERIOR,
    WORSE,
    critical_value,
    discordances,
    rejection_edge,
    rejects,
)
from evalkit.stats.power import Design, planned_documents, power
from evalkit.stats.score import tango_z

MARGIN, ALPHA, RUNS = 0.02, 0.05, 100_000
SIZES = (50, 100, 250, 500, 1_000, 2_000, 5_000)
DISCORDANCES = (0.01, 0.02, 0.04, 0.08, 0.16)
LOSSES = (0.0, 0.005, 0.01)
Rows = Iterator[tuple[str, ...]]


def main(page: Path) -> None:
    """Write every table into the page.

    Raises:
        InputError: the page lacks a place for one.
    """
    write_tables(page, {name: _shown(header, rows) for name, (header, rows) in TABLES.items()})


def _shown(header: Sequence[str], rows: Callable[[], Rows]) -> Iterator[str]:
    """The lines of a table, each printed as soon as it is known."""
    for cells in chain([header, ["---:"] * len(header)], rows()):
        print(line := f"| {' | '.join(cells)} |", flush=True)
        yield line


def sizes(documents: Sequence[int] = SIZES) -> Rows:
    """The size of the test of 2 points, at the normal critical value and at the raised one."""
    for n in documents:
        for tail in (NONINFERIOR, WORSE):
            critical = critical_value(n, MARGIN, ALPHA, tail)
            grid = np.concatenate([discordances(n, MARGIN, 0.3), np.linspace(MARGIN, 0.3, 150)])
            found = []
            for c in (float(norm.isf(ALPHA)), critical):
                edge = rejection_edge(n, MARGIN, c, tail)
                at = np.array([rejects(n, float(d), MARGIN, edge, tail) for d in grid])
                found += [at[grid <= 0.3].max(), at.max()]
            yield f"{n:,}", tail, f"{critical:.3f}", *(f"{_up(100 * x, 2):.2f} %" for x in found)


def plans(discordances_: Sequence[float] = DISCORDANCES, losses: Sequence[float] = LOSSES) -> Rows:
    """Documents for a decision at a margin of 2 points, with the power that they have."""
    for d in discordances_:
        row = [f"{100 * d:g} %"]
        for loss in losses:
            for target in (0.8, 0.9):
                design = Design(margin=MARGIN, alpha=ALPHA, power=target, discordance=d, loss=loss)
                n = planned_documents(design)
                assert n is not None
                row.append(f"{n:,} ({power(n, design):.3f})")
        yield tuple(row)


def coverage(documents: Sequence[int] = SIZES) -> Rows:
    """Coverage of the two-sided 95 % interval: at its least over discordances from 2 to 30 %, by true loss."""
    for n in documents:
        row = [f"{n:,}"]
        for loss in (0.0, 0.01, 0.02):
            grid = np.linspace(MARGIN, 0.3, 57)
            row.append(f"{100 * min(covered(n, float(d), loss) for d in grid):.2f} %")
        yield tuple(row)


def covered(n: int, discordance: float, loss: float) -> float:
    """Probability that Tango's two-sided 95 % interval of n documents holds the true loss."""
    critical = float(norm.isf(0.025))
    m = np.arange(n + 1)
    first, last = rejection_edge_two_sided(n, loss, critical)
    p = (1 + loss / discordance) / 2
    inside = binom.cdf(last, m, p) - binom.cdf(first - 1, m, p)
    return float(binom.pmf(m, n, discordance) @ inside)


def rejection_edge_two_sided(
    n: int, loss: float, critical: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each m, the first and last number of lost documents whose |z| is at most `critical`."""
    return (
        rejection_edge(n, loss, critical + 1e-9, NONINFERIOR) + 1,
        rejection_edge(n, loss, critical + 1e-9, WORSE) - 1,
    )


def clusters() -> Rows:
    """False NON-INFERIOR at a true loss of the margin, questions in clusters."""
    for count, each, icc in ((100, 2, 0.3), (100, 4, 0.3), (200, 4, 0.3), (100, 4, 0.0)):
        plain, adjusted = cluster_errors(count, each, icc, RUNS)
        yield f"{count} x {each}", f"{icc:g}", f"{100 * plain:.1f} %", f"{100 * adjusted:.1f} %"


def cluster_errors(count: int, each: int, icc: float, runs: int, seed: int = 0) -> tuple[float, float]:
    """How often documents taken as apart, and divided by their design effect, show what is not so.

    Outcomes of a cluster are Dirichlet-multinomial, so that `icc` is the correlation of two of its documents.
    """
    rng, margin = np.random.default_rng(seed), 0.05
    p = np.array([0.09, 0.04, 0.87])  # lost, gained, alike
    n, at_once = count * each, 5_000
    plain = adjusted = 0
    for start in range(0, runs, at_once):
        shape = (min(at_once, runs - start), count)
        chance = rng.dirichlet(p * (1 - icc) / icc, size=shape) if icc else np.broadcast_to(p, (*shape, 3))
        drawn = rng.multinomial(each, chance)  # [runs, clusters, 3]
        lost, gained = drawn[..., 0].sum(1), drawn[..., 1].sum(1)
        plain += int((tango_z(lost, gained, n, margin) <= -critical_value(n, margin, ALPHA)).sum())
        effect = _effects(drawn[..., 0] - drawn[..., 1], lost, gained, each)
        left = n / effect
        criticals = {
            size: critical_value(size, margin, ALPHA) for size in np.unique(left.astype(int)).tolist()
        }
        needed = np.array([criticals[size] for size in left.astype(int).tolist()])
        adjusted += int((tango_z(lost / effect, gained / effect, left, margin) <= -needed).sum())
    return plain / runs, adjusted / runs


def _effects(
    difference: NDArray[np.int64], lost: NDArray[np.int64], gained: NDArray[np.int64], each: int
) -> NDArray[np.float64]:
    """`clusters.design_effect` of many runs: difference [runs, clusters] sums over each cluster."""
    count = difference.shape[1]
    n = count * each
    mean = difference.sum(1) / n
    apart = (lost + gained - n * mean**2) * n / (n - 1)
    together = ((difference - each * mean[:, None]) ** 2).sum(1) * count / (count - 1)
    return np.maximum(1.0, together / np.maximum(apart, 1e-12))


def looks(counts: Sequence[int] = (1, 3, 10, 20)) -> Rows:
    """False NON-INFERIOR at a true loss of the margin, with documents added after each look."""
    for count in counts:
        plain, declared = look_errors(count, RUNS)
        yield f"{count}", f"{100 * plain:.1f} %", f"{100 * declared:.1f} %"


def look_errors(count: int, runs: int, seed: int = 0) -> tuple[float, float]:
    """How often any of several looks shows what is not so, each at alpha or at alpha / looks; 200 documents a look."""
    drawn = np.random.default_rng(seed).multinomial(200, [0.05, 0.03, 0.92], size=(runs, count)).cumsum(1)
    ever = {"plain": np.zeros(runs, bool), "declared": np.zeros(runs, bool)}
    for look in range(count):
        n = 200 * (look + 1)
        z = tango_z(drawn[:, look, 0], drawn[:, look, 1], n, MARGIN)
        ever["plain"] |= z <= -critical_value(n, MARGIN, ALPHA)
        ever["declared"] |= z <= -critical_value(n, MARGIN, ALPHA / count)
    return float(ever["plain"].mean()), float(ever["declared"].mean())


def _up(x: float, digits: int) -> float:
    """Rounded up, so that a size of 5.001 % does not read as 5.00 %."""
    return ceil(x * 10**digits - 1e-9) / 10**digits


TABLES: dict[str, tuple[tuple[str, ...], Callable[[], Rows]]] = {
    "sizes": (
        (
            "documents",
            "test",
            "raised to",
            "size at 1.645, d ≤ 30 %",
            "any d",
            "size, raised, d ≤ 30 %",
            "any d",
        ),
        sizes,
    ),
    "plans": (
        ("d", *(f"loss {100 * loss:g}, power {p:g}" for loss in LOSSES for p in (0.8, 0.9))),
        plans,
    ),
    "coverage": (("documents", "true loss 0", "1 point", "2 points"), coverage),
    "clusters": (("clusters x questions", "ICC", "taken as apart", "by design effect"), clusters),
    "looks": (("looks", "each at alpha", "each at alpha / looks"), looks),
}

if __name__ == "__main__":
    main(Path(sys.argv[1]))
