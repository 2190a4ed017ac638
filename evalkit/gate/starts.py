"""How far fresh starts of one engine lie apart. A verdict counts the documents of the first start alone."""

from collections.abc import Iterator

from evalkit.gate.evidence import Evidence
from evalkit.gate.policy import PrimaryEndpoint
from evalkit.gate.words import Check, Verdict
from evalkit.records import TaskRecord, only


def check_starts(run: Evidence, candidate: str, endpoint: PrimaryEndpoint) -> Iterator[Check]:
    """The spread of one endpoint, where there were several starts; it is told and decides nothing."""
    first = run.task(candidate, endpoint)
    again = [
        r
        for r in only(run.records, TaskRecord)
        if r.again
        and (r.baseline, r.task, r.metric, r.filter)
        == (candidate, endpoint.task, endpoint.metric, endpoint.filter)
    ]
    if first is None or not again:
        return
    scores = [first.score, *(r.score for r in again)]
    otherwise = [r.lost + r.gained for r in again if r.lost is not None and r.gained is not None]
    apart = (
        f"at most {max(otherwise)} of {first.n} documents come out otherwise"
        if otherwise
        else f"{first.n} graded documents lie at most {100 * max(abs(r.loss) for r in again):.1f} points off on average"
    )
    yield Check(
        name=f"starts: {endpoint}",
        verdict=Verdict.NON_INFERIOR,
        reason=f"{len(scores)} starts score {100 * min(scores):.1f} to {100 * max(scores):.1f} %; from the first, which "
        f"counts, {apart}.",
    )
