"""The verdict on every candidate of a run, and the one over those that a policy decides on.

ANOMALOUS precedes WORSE, that INCONCLUSIVE, that NON-INFERIOR: a candidate's verdict is the first that any of its
checks has. Reads records only, so that any run can be judged again without a GPU.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path

from evalkit.gate import integrity
from evalkit.gate.evidence import Evidence
from evalkit.gate.limits import check_limits
from evalkit.gate.losses import Compared, check_losses
from evalkit.gate.pairs import compare_with
from evalkit.gate.policy import Policy
from evalkit.gate.scope import check_comparable, check_scope
from evalkit.gate.sensitivity import check_coverage
from evalkit.gate.starts import check_starts
from evalkit.gate.versions import check_itself
from evalkit.gate.words import Check, Verdict, overall
from evalkit.records import CandidateRecord, RunDirectory, StageRecord, VerdictRecord, last_judgement, only


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One candidate with every check that was made."""

    candidate: str
    checks: tuple[Check, ...]

    @property
    def verdict(self) -> Verdict:
        return overall(check.verdict for check in self.checks)

    @property
    def deciding(self) -> list[Check]:
        """The checks that gave the verdict: every one where everything passed."""
        return [check for check in self.checks if check.verdict is self.verdict]


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A run under a policy.

    post_hoc: the run did not store this policy before it scored anything: whatever the candidates show, the overall
        verdict is INCONCLUSIVE.
    """

    policy: Policy
    candidates: tuple[Judged, ...]
    post_hoc: bool
    against: str | None

    @property
    def verdict(self) -> Verdict:
        if self.post_hoc:
            return Verdict.INCONCLUSIVE
        return overall(judged.verdict for judged in self.candidates)

    @property
    def exit_code(self) -> int:
        return self.verdict.exit_code


def judge(run: Path, policy: Policy, against: Path | None = None, today: date | None = None) -> Judgement:
    """Judge the policy's candidates.

    Args:
        run: a run directory.
        policy: what to judge by.
        against: another run: its baselines are compared with as well as this run's own, and each candidate with itself.
            It can only add a reason to refuse where this run has the policy's baselines.
        today: for exceptions that end; by default this day, UTC.

    Raises:
        InputError: a run cannot be read, or the policy selects records by what none of them has.
    """
    here = Evidence.read(run)
    there = None if against is None else Evidence.read(against)
    day = today or datetime.now(UTC).date()
    return Judgement(
        policy=policy,
        candidates=tuple(_judge(here, there, name, policy, day) for name in policy.decide),
        post_hoc=here.policy_sha256 != policy.sha256,
        against=None if there is None else there.path.name,
    )


def _judge(run: Evidence, other: Evidence | None, name: str, policy: Policy, today: date) -> Judged:
    candidate = run.find(name)
    if candidate is None:
        missing = Check(
            name="ran",
            verdict=Verdict.INCONCLUSIVE,
            reason=f"{name} is not in this run, which has {', '.join(one.candidate for one in run.candidates)}.",
            needs="A run with it among its candidates.",
        )
        return Judged(candidate=name, checks=(missing,))
    return Judged(candidate=candidate.candidate, checks=tuple(_checks(run, other, candidate, policy, today)))


def _checks(
    run: Evidence, other: Evidence | None, candidate: CandidateRecord, policy: Policy, today: date
) -> Iterator[Check]:
    places = [run] if other is None else [run, other]
    yield check_scope(run, candidate, policy)
    if other is not None:
        yield check_comparable(run, other)
    found = {id(place): [b for n in policy.baselines if (b := place.find(n))] for place in places}
    yield from integrity.layer_checks(run, candidate, found[id(run)])
    yield from check_limits(run.records, candidate, policy, today)
    scored = f"tasks {candidate.candidate}" in run.stages
    for endpoint in policy.endpoints:
        yield from check_coverage(run, candidate.candidate, endpoint, policy)
        yield from check_starts(run, candidate.candidate, endpoint)
        if scored:
            yield from integrity.sample_checks(run, candidate.candidate, endpoint, policy)
    for name in policy.baselines:
        yield from _unfit(name, candidate, places)
    for place in places:
        # Apart, so that what another run adds does not weaken Holm's adjustment of what this one shows.
        compared: list[Compared] = []
        for baseline in found[id(place)]:
            yield from compare_with(run, place, candidate, baseline, policy, compared)
        yield from check_losses(compared, policy)
    if other is not None:
        yield from check_itself(run, other, candidate, policy)


def _unfit(name: str, candidate: CandidateRecord, places: Sequence[Evidence]) -> Iterator[Check]:
    """A baseline that is not there, of the other run where there is one, or that is the candidate."""
    baseline = places[-1].find(name)
    if baseline is None:
        yield Check(
            name=f"baseline {name}",
            verdict=Verdict.INCONCLUSIVE,
            reason=f"The baseline {name} is not in {places[-1].path.name}.",
            needs="A run with it among its candidates.",
        )
    elif any(b is not None and b.candidate == candidate.candidate for b in (p.find(name) for p in places)):
        yield Check(
            name=f"baseline {name}",
            verdict=Verdict.INCONCLUSIVE,
            reason=f"The baseline {name} is the candidate itself, {candidate.candidate}: it cannot lose against itself.",
            needs="A policy whose baselines are other candidates.",
        )


def verdict_records(judgement: Judgement, now: datetime) -> list[VerdictRecord]:
    """A record for the overall verdict, each candidate's, and each check."""

    def record(candidate: str, check: str, verdict: Verdict, reason: str, needs: str) -> VerdictRecord:
        return VerdictRecord(
            candidate=candidate,
            check=check,
            verdict=verdict.value,
            reason=reason,
            needs=needs,
            policy=judgement.policy.name,
            policy_sha256=judgement.policy.sha256,
            post_hoc=judgement.post_hoc,
            against=judgement.against,
            judged_utc=now.isoformat(timespec="microseconds"),  # what tells two judgements apart
        )

    made = [record("all that decide", "overall", judgement.verdict, *_overall_words(judgement))]
    for judged in judgement.candidates:
        reason = " ".join(check.reason for check in judged.deciding[:2])
        needs = " ".join(dict.fromkeys(check.needs for check in judged.deciding if check.needs))
        if judged.verdict is Verdict.NON_INFERIOR:
            reason = " ".join(check.reason for check in judged.checks if " against " in check.name)
        made.append(record(judged.candidate, "candidate", judged.verdict, reason, needs))
        made += [record(judged.candidate, c.name, c.verdict, c.reason, c.needs) for c in judged.checks]
    return made


def store(run: Path, judgement: Judgement) -> None:
    """Append a judgement to the run, unless it says what the last one said.

    Raises:
        OSError: the run cannot be written to.
    """
    directory = RunDirectory(run)
    with directory.alone():  # two gates of one run judge one after the other, each by a number of its own
        earlier, records = directory.read(), verdict_records(judgement, datetime.now(UTC))
        if [_said(r) for r in last_judgement(earlier)] == [_said(r) for r in records]:
            return
        gates = sum(record.stage.startswith("gate ") for record in only(earlier, StageRecord))
        with directory.stage(f"gate {gates + 1}") as write:
            for record in records:
                write.write(record)


def _said(record: VerdictRecord) -> tuple[object, ...]:
    return record.candidate, record.check, record.verdict, record.reason, record.policy_sha256, record.against


def _overall_words(judgement: Judgement) -> tuple[str, str]:
    if judgement.post_hoc:
        return (
            "POST-HOC: the run did not store this policy before it scored anything: its limits may come from the numbers.",
            "A new run with --policy.",
        )
    named = [j for j in judgement.candidates if j.verdict is judgement.verdict]
    needs = dict.fromkeys(check.needs for j in named for check in j.deciding if check.needs)
    return f"{judgement.verdict.value} for {', '.join(j.candidate for j in named)}.", " ".join(needs)
