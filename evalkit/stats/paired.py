"""Two candidates on the same documents: joined one to one, and the loss between them.

The interval is Tango's (Statistics in Medicine 17, 891-908, 1998): it inverts the score test, so at margin 0 it
agrees with McNemar's, and it stays honest where few documents differ, where a Wald interval collapses.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from scipy.stats import binomtest, norm

from evalkit.stats.exact import score_edge
from evalkit.stats.intervals import Interval, wilson


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
class Paired:
    """One endpoint of one candidate against its baseline.

    loss is P(baseline right) - P(candidate right); lost counts documents that only the baseline got right,
    gained those that only the candidate did. Intervals are None below two documents.
    """

    endpoint: Endpoint
    n: int
    score: float
    score_interval: Interval | None
    baseline_score: float
    loss: float
    loss_interval: Interval | None
    lost: int
    gained: int
    mcnemar_p: float
    interval_method: str = "tango"


def compare(baseline: Iterable[Scored], candidate: Iterable[Scored], alpha: float = 0.05) -> list[Paired]:
    """Every endpoint of two candidates' samples, in the order the baseline first names them.

    Raises:
        PairingError: there is no sample, a key comes twice or on one side only, or a score is neither 0 nor 1.
    """
    pairs: dict[Endpoint, list[tuple[bool, bool]]] = defaultdict(list)
    for key, before, after in join(baseline, candidate):
        pairs[Endpoint(key.task, key.metric, key.filter)].append((_right(key, before), _right(key, after)))
    return [_paired(endpoint, outcomes, alpha) for endpoint, outcomes in pairs.items()]


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


def _paired(endpoint: Endpoint, outcomes: list[tuple[bool, bool]], alpha: float) -> Paired:
    n = len(outcomes)
    lost = sum(before and not after for before, after in outcomes)
    gained = sum(after and not before for before, after in outcomes)
    right = sum(after for _, after in outcomes)
    return Paired(
        endpoint=endpoint,
        n=n,
        score=right / n,
        score_interval=wilson(right, n, alpha),
        baseline_score=sum(before for before, _ in outcomes) / n,
        loss=(lost - gained) / n,
        loss_interval=tango_interval(lost, gained, n, alpha),
        lost=lost,
        gained=gained,
        mcnemar_p=mcnemar_p(lost, gained),
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


def _right(key: Key, score: float | None) -> bool:
    if score not in (0, 1):
        raise PairingError(
            f"{key}: score {score} is neither 0 nor 1, and this comparison is of right and wrong"
        )
    return score == 1


def _some(keys: list[Key]) -> str:
    return "; ".join(map(str, keys[:3])) + (f"; and {len(keys) - 3} more" if len(keys) > 3 else "")
