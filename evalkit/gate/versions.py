"""A candidate against itself in another run: what another version of the code, of packages or of a kernel made of it.

Comparability comes first: the same checkpoint, ranges, GPU and numerics (gate/scope.py), the same seed, and each
document asked in the same words. What else differs, the candidate's own record included, is said and then judged on
the same documents: a loss above the margin is WORSE. A gain is no anomaly here, since a newer version may mend.
"""

from collections.abc import Iterator
from dataclasses import fields, replace

from evalkit.gate.endpoints import compare
from evalkit.gate.evidence import Evidence
from evalkit.gate.losses import Compared, check_losses
from evalkit.gate.policy import Policy, PrimaryEndpoint
from evalkit.gate.scope import SAME_DOCUMENTS, comparable, other_documents
from evalkit.gate.sensitivity import check_baseline, check_damage
from evalkit.gate.words import Check, Verdict
from evalkit.records import CandidateRecord
from evalkit.stats.paired import PairingError

# How a candidate was asked for, and what was seen of its rows, are no property of its version.
NOT_COMPARED = ("candidate", "requested", "bytes_per_token_read_back")


def check_itself(
    run: Evidence, other: Evidence, candidate: CandidateRecord, policy: Policy
) -> Iterator[Check]:
    """Pair a candidate with itself in `other`; nothing where it is not there, for then it is new."""
    theirs = next((c for c in other.candidates if c.candidate == candidate.candidate), None)
    if theirs is None or f"tasks {candidate.candidate}" not in run.stages:
        return  # that its tasks are missing is said where it meets its baselines
    yield _version(other, candidate, theirs)
    if f"tasks {candidate.candidate}" not in other.stages:
        yield Check(
            name="version: tasks",
            verdict=Verdict.INCONCLUSIVE,
            reason=f"Tasks were not scored to their end for {candidate.candidate} in {other.path.name}.",
            needs="A run of the tasks there, or `evalkit run --resume`.",
        )
        return
    if run.config.get("seed") != other.config.get("seed"):
        yield Check(
            name="version: seed",
            verdict=Verdict.INCONCLUSIVE,
            reason=f"seed: {other.config.get('seed')} in {other.path.name}, {run.config.get('seed')} here: other documents.",
            needs="Two runs of one seed.",
        )
        return
    compared: list[Compared] = []
    for endpoint in policy.endpoints:
        apart = other_documents(run, candidate.candidate, other, candidate.candidate, endpoint)
        if apart is not None:
            yield Check(
                name=f"version: {endpoint}",
                verdict=Verdict.INCONCLUSIVE,
                reason=apart,
                needs=SAME_DOCUMENTS,
            )
            continue
        yield from _pair(run, other, candidate.candidate, endpoint, policy, compared)
    yield from check_losses(compared, policy)


def _version(other: Evidence, candidate: CandidateRecord, theirs: CandidateRecord) -> Check:
    changed = [
        f"{field.name}: {getattr(theirs, field.name)} there, {getattr(candidate, field.name)} here"
        for field in fields(candidate)
        if field.name not in NOT_COMPARED and getattr(theirs, field.name) != getattr(candidate, field.name)
    ]
    said = (
        f"differs in {'; '.join(changed)}" if changed else "has the same format, scales, kernel and options"
    )
    return Check(
        name="version",
        verdict=Verdict.NON_INFERIOR,
        reason=f"{candidate.candidate} in {other.path.name} {said}.",
    )


def _pair(
    run: Evidence,
    other: Evidence,
    name: str,
    endpoint: PrimaryEndpoint,
    policy: Policy,
    compared: list[Compared],
) -> Iterator[Check]:
    before, after = other.scored(name, endpoint), run.scored(name, endpoint)
    try:
        outcome = replace(compare(before, after, endpoint, policy), p_gain=1.0)
        sensitive = check_damage(other, name, endpoint, policy)
    except PairingError as error:
        yield Check(
            name=f"version: {endpoint}",
            verdict=Verdict.ANOMALOUS,
            reason=f"Samples of the two runs do not pair: {error}.",
            needs="The same documents, each once, in both runs.",
        )
        return
    itself = f"itself in {other.path.name}"
    in_range = check_baseline(f"{name} in {other.path.name}", endpoint, outcome, policy)
    yield replace(in_range, name=f"version: {in_range.name}")
    counts = comparable(run, other) and in_range.verdict is sensitive.verdict is Verdict.NON_INFERIOR
    compared.append(Compared(endpoint=endpoint, baseline=itself, outcome=outcome, counts=counts))
