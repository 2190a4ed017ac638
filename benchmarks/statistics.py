"""What the statistics of evalkit hold, by enumeration and simulation: writes the tables of docs/statistics.md.

    python -m benchmarks.statistics docs/statistics.md [TABLE ...]

Each is printed, too, as its rows are found; without names, all are made.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain
from math import ceil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, norm

from benchmarks.pages import write_tables
from evalkit.errors import InputError
from evalkit.stats.exact import (
    NONINFERIOR,
    WORSE,
    critical_value,
    discordances,
    rejection_edge,
    rejects,
)
from evalkit.stats.means import bootstrap_mean
from evalkit.stats.power import Design, planned_documents, power
from evalkit.stats.score import tango_z
from evalkit.stats.tails import Tail
from evalkit.stats.tails import tail as rare_losses

MARGIN, ALPHA, RUNS = 0.02, 0.05, 100_000
SIZES = (50, 100, 250, 500, 1_000, 2_000, 5_000)
DISCORDANCES = (0.01, 0.02, 0.04, 0.08, 0.16)
LOSSES = (0.0, 0.005, 0.01)
Rows = Iterator[tuple[str, ...]]


def main(page: Path, names: Sequence[str] = ()) -> None:
    """Write tables into the page, all of them without names.

    Raises:
        InputError: the page lacks a place for one, or there is none of a name.
    """
    if unknown := set(names) - TABLES.keys():
        raise InputError(f"no table {', '.join(sorted(unknown))}: there are {', '.join(TABLES)}")
    write_tables(page, {name: _shown(*TABLES[name]) for name in names or TABLES})


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


# clusters, questions in each, ICC, discordance, margin; an ICC of None: questions differ apart, and clusters are lost whole
CLUSTERED: tuple[tuple[int, int, float | None, float, float], ...] = (
    (100, 4, 0.0, 0.13, 0.05),
    (100, 2, 0.3, 0.13, 0.05),
    (100, 4, 0.3, 0.13, 0.05),
    (200, 4, 0.3, 0.13, 0.05),
    (100, 4, 1.0, 0.05, 0.05),
    (100, 4, 1.0, 0.02, 0.02),
    (100, 10, 1.0, 0.02, 0.02),
    (100, 4, 0.5, 0.02, 0.02),
    (100, 10, 0.5, 0.02, 0.02),
    (100, 4, 0.5, 0.03, 0.02),
    (120, 10, 0.3, 0.02, 0.02),
    (200, 10, 0.5, 0.02, 0.02),
    (200, 10, 0.3, 0.04, 0.02),
    (400, 4, 0.3, 0.02, 0.02),
    (400, 2, 0.5, 0.16, 0.05),
    (100, 10, None, 0.04, 0.02),
    (200, 10, None, 0.04, 0.02),
    (100, 10, None, 0.08, 0.05),
)


def clusters() -> Rows:
    """False NON-INFERIOR at a true loss of the margin, questions in clusters."""
    for count, each, icc, d, margin in CLUSTERED:
        found = cluster_errors(count, each, icc, RUNS // 5, d, margin)
        yield (
            f"{count} x {each}",
            "whole" if icc is None else f"{icc:g}",
            f"{100 * d:g} %",
            f"{100 * margin:g}",
            *(f"{100 * x:.1f} %" for x in found),
        )


def cluster_errors(
    count: int,
    each: int,
    icc: float | None,
    runs: int,
    discordance: float = 0.13,
    margin: float = 0.05,
    seed: int = 0,
) -> tuple[float, float, float]:
    """How often documents taken as apart, divided by their design effect, and held to their tail show what is not so.

    A cluster has one outcome, which each of its documents takes with a chance of sqrt(icc), and else its own: `icc` is
    the correlation of two of them. Without one, documents differ on their own, as often for better as for worse, and
    so many clusters are lost whole that the loss is the margin.
    """
    rng, n = np.random.default_rng(seed), count * each
    shown = np.zeros(3, dtype=np.int64)
    for start in range(0, runs, 1_000):
        shape = (min(1_000, runs - start), count, each)
        if icc is None:
            outcome = _outcomes(rng, shape, discordance, 0.0)
            outcome[rng.random(shape[:2]) < margin] = 1
        else:
            shared = rng.random(shape) < icc**0.5
            common = _outcomes(rng, (*shape[:2], 1), discordance, margin)
            outcome = np.where(shared, common, _outcomes(rng, shape, discordance, margin))
        difference = outcome.sum(2, dtype=np.int64)  # [runs, clusters]
        lost, gained = (outcome == 1).sum((1, 2)), (outcome == -1).sum((1, 2))
        plain = tango_z(lost, gained, n, margin) <= -critical_value(n, margin, ALPHA)
        effect = _effects(difference, lost, gained, each)
        left = n / effect
        needed = np.array([critical_value(size, margin, ALPHA) for size in left.astype(int).tolist()])
        adjusted = tango_z(lost / effect, gained / effect, left, margin) <= -needed
        held = [
            bool(one) and _held(rare_losses(row / each), margin)
            for one, row in zip(adjusted, difference, strict=True)
        ]
        shown += [plain.sum(), adjusted.sum(), sum(held)]
    plain_, adjusted_, held_ = (shown / runs).tolist()
    return plain_, adjusted_, held_


def _outcomes(
    rng: np.random.Generator, shape: tuple[int, ...], discordance: float, loss: float
) -> NDArray[np.int8]:
    """1 lost, -1 gained, 0 alike."""
    drawn = rng.random(shape)
    lost, differs = drawn < (discordance + loss) / 2, drawn < discordance
    return lost.astype(np.int8) - (differs & ~lost).astype(np.int8)


def _held(rare: Tail, margin: float) -> bool:
    # Sums of one loss in another order differ in their last digit, and would be enumerated twice.
    return _tail_p(replace(rare, rest=round(rare.rest, 6)), margin) <= ALPHA


@cache
def _tail_p(rare: Tail, margin: float) -> float:
    return rare.p(margin)


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


# documents, share lost, by how much, what all others lose on average; margin 2 points
GRADED = (
    (40, 0.025, 0.8, 0.0),
    (100, 0.025, 0.8, 0.0),
    (200, 0.025, 0.8, 0.0),
    (400, 0.025, 0.8, 0.0),
    (100, 0.05, 0.4, 0.0),
    (200, 0.05, 0.4, 0.0),
    (100, 0.01, 1.0, 0.01),
    (200, 0.01, 1.0, 0.01),
)


def graded() -> Rows:
    """False NON-INFERIOR of graded scores at a true loss of the margin, 2 points."""
    for n, share, lost, others in GRADED:
        found = graded_errors(n, share, lost, others, RUNS // 100)
        yield (
            f"{n}",
            f"{100 * share:g} % lose {lost:g}",
            f"{others:g} ± 0.02",
            *(f"{100 * x:.1f} %" for x in found),
        )


def graded_errors(
    n: int, share: float, lost: float, others: float, runs: int, seed: int = 0
) -> tuple[float, float]:
    """How often the bootstrap, and the bootstrap held to the tail, show what is not so.

    Half of the others differ by 0.02 in either direction, beside what they lose.
    """
    rng = np.random.default_rng(seed)
    plain = held = 0
    for run in range(runs):
        x = others + 0.02 * rng.choice([-1, 0, 0, 1], size=n)
        x[rng.random(n) < share] = lost
        found = bootstrap_mean(x, run)
        if found is not None and found.p_below(MARGIN) <= ALPHA:
            plain += 1
            held += rare_losses(x).p(MARGIN) <= ALPHA
    return plain / runs, held / runs


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
    "clusters": (
        (
            "clusters x questions",
            "ICC",
            "d",
            "margin",
            "taken as apart",
            "by design effect",
            "and unseen losses",
        ),
        clusters,
    ),
    "graded": (
        ("documents", "of them", "the others lose", "bootstrap", "and unseen losses"),
        graded,
    ),
    "looks": (("looks", "each at alpha", "each at alpha / looks"), looks),
}

if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
