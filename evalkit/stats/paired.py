"""Two candidates on the same documents: joined one to one, and the loss between them.

Of right and wrong the interval is Tango's (Statistics in Medicine 17, 891-908, 1998): it inverts the score test, so
at margin 0 it agrees with McNemar's, and it stays honest where few documents differ, where a Wald interval collapses.
Of graded scores it is `evalkit.stats.means`' bootstrap.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import fsum, isfinite, nan
from typing import NamedTuple, Protocol

from scipy.stats import binomtest, norm

from evalkit.stats.exact import score_edge
from evalkit.stats.intervals import Interval, wilson
from evalkit.stats.means import bootstrap_mean


class Scored(Protocol):
    """One document's score; `evalkit.records.SampleRecord` is one."""

    @property
    def task(self) -> str: ...
    @property
    def doc_id(self) -> int: ...
    @property
    def prompt_sha256(self) -> str: ...
    @property
    def target_sha256(self) -> str: ...
    @property
    def filter(self) -> str: ...
    @property
    def metric(self) -> str: ...
    @property
    def score(self) -> float | None: ...


class Endpoint(NamedTuple):
    """What one comparison is about."""

    task: str
    metric: str
    filter: str


class Key(NamedTuple):
    """What makes two samples the same question; a document whose text changed is another document."""

    task: str
    doc_id: int
    prompt_sha256: str
    target_sha256: str
    filter: str
    metric: str

    def __str__(self) -> str:
        return (
            f"{self.task} document {self.doc_id} (prompt {self.prompt_sha256[:8]}, target {self.target_sha256[:8]}, "
            f"{self.filter}, {self.metric})"
        )


class PairingError(ValueError):
    """Samples of two candidates do not stand for the same questions: the comparison itself is suspect."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What one endpoint's pairs come to.

    loss is the mean of baseline's score - candidate's score: of right and wrong, P(baseline right) - P(candidate
    right). lost counts documents that only the baseline got right, gained those that only the candidate did; both are
    None of graded scores.
    """

    n: int
    score: float
    baseline_score: float
    loss: float
    lost: int | None
    gained: int | None


@dataclass(frozen=True, kw_only=True)
class Paired(Counts):
    """One endpoint of one candidate against its baseline.

    McNemar's p is None of graded scores. Intervals are None below two documents, of graded scores below 40, or 10 that
    differ.
    """

    endpoint: Endpoint
    score_interval: Interval | None
    loss_interval: Interval | None
    mcnemar_p: float | None
    interval_method: str


def compare(baseline: Iterable[Scored], candidate: Iterable[Scored], alpha: float = 0.05) -> list[Paired]:
    """Every endpoint of two candidates' samples, in the order the baseline first names them.

    Raises:
        PairingError: there is no sample, a key comes twice or on one side only, or a score is missing or not finite.
    """
    pairs: dict[Endpoint, list[tuple[float, float]]] = defaultdict(list)
    for key, before, after in join(baseline, candidate):
        pairs[Endpoint(key.task, key.metric, key.filter)].append((finite(key, before), finite(key, after)))
    return [_paired(endpoint, scores, alpha) for endpoint, scores in pairs.items()]


def count(scores: Sequence[tuple[float, float]]) -> Counts:
    """What (baseline's score, candidate's score) of every document come to; graded where one is neither 0 nor 1."""
    n = len(scores)
    before, after = (fsum(side) for side in zip(*scores, strict=True))
    binary = {score for pair in scores for score in pair} <= {0.0, 1.0}
    return Counts(
        n=n,
        score=after / n,
        baseline_score=before / n,
        loss=fsum(b - a for b, a in scores) / n,
        lost=sum(b > a for b, a in scores) if binary else None,
        gained=sum(a > b for b, a in scores) if binary else None,
    )


def join(
    baseline: Iterable[Scored], candidate: Iterable[Scored]
) -> list[tuple[Key, float | None, float | None]]:
    """(key, baseline's score, candidate's score) for every sample, in the baseline's order.

    Raises:
        PairingError: there is no sample, or a key comes twice or on one side only; the message names the first.
    """
    before, after = _by_key(baseline, "baseline"), _by_key(candidate, "candidate")
    if not before and not after:
        raise PairingError("no samples to compare: both sides are empty")
    for side, present, other in (("candidate", after, before), ("baseline", before, after)):
        missing = [key for key in other if key not in present]
        if missing:
            raise PairingError(
                f"{len(missing)} of {len(other)} samples missing from the {side}: {_some(missing)}"
            )
    return [(key, score, after[key]) for key, score in before.items()]


def finite(key: Key, score: float | None) -> float:
    """The score as a float.

    Raises:
        PairingError: it is missing, not finite, or an integer beyond any float; the message names the document.
    """
    try:
        value = nan if score is None else float(score)
    except OverflowError:
        raise PairingError(f"{key}: its score is larger than any float") from None
    if not isfinite(value):
        raise PairingError(f"{key}: its score is {'missing' if score is None else value}")
    return value


def mcnemar_p(lost: int, gained: int) -> float:
    """Two-sided p of the exact McNemar test; 1 when no document differs."""
    return float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def tango_interval(lost: int, gained: int, n: int, alpha: float = 0.05) -> Interval | None:
    """Tango's score interval for the loss, two-sided at confidence 1 - alpha; None below two documents.

    Raises:
        ValueError: counts are negative or exceed n, or alpha is not between 0 and 1.
    """
    if min(lost, gained) < 0 or lost + gained > n:
        raise ValueError(f"{lost} lost and {gained} gained of {n}: want both >= 0 and their sum <= {n}")
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha {alpha}: want a number between 0 and 1")
    if n < 2:
        return None
    critical = float(norm.isf(alpha / 2))
    return Interval(score_edge(lost, gained, n, critical, -1.0), score_edge(lost, gained, n, critical, 1.0))


def _paired(endpoint: Endpoint, scores: list[tuple[float, float]], alpha: float) -> Paired:
    counts = count(scores)
    after, difference = [a for _, a in scores], [b - a for b, a in scores]
    if counts.lost is None or counts.gained is None:
        own, loss = bootstrap_mean(after), bootstrap_mean(difference)
        return Paired(
            **asdict(counts),
            endpoint=endpoint,
            score_interval=None if own is None else own.interval(alpha),
            loss_interval=None if loss is None else loss.interval(alpha),
            mcnemar_p=None,
            interval_method="studentised bootstrap",
        )
    return Paired(
        **asdict(counts),
        endpoint=endpoint,
        score_interval=wilson(after.count(1.0), counts.n, alpha),
        loss_interval=tango_interval(counts.lost, counts.gained, counts.n, alpha),
        mcnemar_p=mcnemar_p(counts.lost, counts.gained),
        interval_method="tango",
    )


def _by_key(samples: Iterable[Scored], side: str) -> dict[Key, float | None]:
    keyed = [
        (Key(s.task, s.doc_id, s.prompt_sha256, s.target_sha256, s.filter, s.metric), s.score)
        for s in samples
    ]
    twice = [key for key, count in Counter(key for key, _ in keyed).items() if count > 1]
    if twice:
        raise PairingError(f"{len(twice)} samples come more than once in the {side}: {_some(twice)}")
    return dict(keyed)


def _some(keys: list[Key]) -> str:
    return "; ".join(map(str, keys[:3])) + (f"; and {len(keys) - 3} more" if len(keys) > 3 else "")
