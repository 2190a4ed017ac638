"""A candidate's samples paired with a baseline's, of its own run or of another, and whether the pair can tell anything."""

from collections.abc import Iterator
from dataclasses import replace

from evalkit.gate import integrity
from evalkit.gate.endpoints import compare
from evalkit.gate.evidence import Evidence
from evalkit.gate.losses import Compared
from evalkit.gate.policy import Policy, PrimaryEndpoint
from evalkit.gate.scope import SAME_DOCUMENTS, check_baseline_scope, comparable, other_documents
from evalkit.gate.sensitivity import check_baseline, check_control, check_damage
from evalkit.gate.words import Check, Verdict
from evalkit.records import CandidateRecord
from evalkit.stats.paired import PairingError


def compare_with(
    run: Evidence,
    other: Evidence,
    candidate: CandidateRecord,
    baseline: CandidateRecord,
    policy: Policy,
    compared: list[Compared],
) -> Iterator[Check]:
    """Pair every endpoint's samples with a baseline's of `other`, which may be `run`, into `compared`.

    Yields what proves the baseline, as the candidate is proved, and what the samples' completeness and sensitivity show.
    """
    place = "" if other is run else f" in {other.path.name}"
    yield check_baseline_scope(baseline, policy, place)
    yield from integrity.baseline_checks(other, baseline, place)
    for endpoint in policy.endpoints:
        unfinished = [
            f"{arm}{where}"
            for evidence, arm, where in ((other, baseline.candidate, place), (run, candidate.candidate, ""))
            if f"tasks {arm}" not in evidence.stages
        ]
        if unfinished:
            yield Check(
                name=f"samples: {endpoint}",
                verdict=Verdict.INCONCLUSIVE,
                reason=f"Tasks were not scored to their end for {', '.join(unfinished)}.",
                needs="A run of the tasks, or `evalkit run --resume`.",
            )
            continue
        yield from integrity.sample_checks(other, baseline.candidate, endpoint, policy, place)
        if not (run.asked(endpoint) and other.asked(endpoint)):
            continue
        apart = (
            None
            if other is run
            else other_documents(run, candidate.candidate, other, baseline.candidate, endpoint)
        )
        if apart is not None:
            yield Check(
                name=f"documents{place}: {endpoint}",
                verdict=Verdict.INCONCLUSIVE,
                reason=apart,
                needs=SAME_DOCUMENTS,
            )
            continue
        yield from _pair(run, other, (candidate.candidate, baseline.candidate), endpoint, policy, compared)


def _pair(
    run: Evidence,
    other: Evidence,
    arms: tuple[str, str],
    endpoint: PrimaryEndpoint,
    policy: Policy,
    compared: list[Compared],
) -> Iterator[Check]:
    candidate, baseline = arms
    try:
        outcome = compare(other.scored(baseline, endpoint), run.scored(candidate, endpoint), endpoint, policy)
        sensitive = check_damage(other, baseline, endpoint, policy)
    except PairingError as error:
        yield Check(
            name=f"samples: {endpoint}",
            verdict=Verdict.ANOMALOUS,
            reason=f"Samples of the arms do not pair: {error}.",
            needs="The same documents, each once, in both arms.",
        )
        return
    place = "" if other is run else f" in {other.path.name}"
    in_range = check_baseline(baseline, endpoint, outcome, policy)
    for check in (check_control(other, baseline, endpoint, policy), in_range, sensitive):
        yield replace(check, name=f"{check.name}{place}")
    whose = f"{baseline}{place}"
    counts = comparable(run, other) and in_range.verdict is sensitive.verdict is Verdict.NON_INFERIOR
    compared.append(Compared(endpoint=endpoint, baseline=whose, outcome=outcome, counts=counts))
