"""Whether an endpoint counts: documents on which a loss could have shown, and on which planted damage did."""

from collections.abc import Iterator

from evalkit.gate.endpoints import Outcome, compare
from evalkit.gate.evidence import Evidence
from evalkit.gate.policy import Policy, PrimaryEndpoint
from evalkit.gate.words import Check, Verdict
from evalkit.stats.intervals import wilson
from evalkit.stats.paired import PairingError

LEAST_SCORE, MOST_SCORE = 0.20, 0.98


def check_baseline(baseline: str, endpoint: PrimaryEndpoint, outcome: Outcome, policy: Policy) -> Check:
    """The baseline's score leaves room on both sides, and is no guess."""
    name, score = f"range: {endpoint}", outcome.baseline_score
    right = wilson(round(score * outcome.n), outcome.n, 2 * policy.alpha)
    if not LEAST_SCORE <= score <= MOST_SCORE:
        reason = f"{baseline} scores {score:.1%}, and outside {LEAST_SCORE:.0%} to {MOST_SCORE:.0%} a loss can hardly show."
        needs = "Harder documents." if score > MOST_SCORE else "Easier documents."
    elif right is None or not right.lower > endpoint.chance:
        reason = f"{baseline} scores {score:.1%} of {outcome.n}, not surely above the {endpoint.chance:.1%} of guessing."
        needs = "Easier documents, or more."
    else:
        return Check(name=name, verdict=Verdict.NON_INFERIOR, reason=f"{baseline} scores {score:.1%}.")
    return Check(name=name, verdict=Verdict.INCONCLUSIVE, reason=reason, needs=needs)


def check_damage(run: Evidence, baseline: str, endpoint: PrimaryEndpoint, policy: Policy) -> Check:
    """Damage planted into the baseline is found lower, and is no larger than the policy says it is to be.

    Raises:
        PairingError: samples do not pair one to one.
    """
    name, dose = f"sensitivity: {endpoint}", policy.damage
    whole, arm = run.damaged(baseline, dose.noise)
    before, planted = run.scored(whole, endpoint), run.scored(arm, endpoint)
    if not planted or f"tasks {arm}" not in run.stages:
        return Check(
            name=name,
            verdict=Verdict.INCONCLUSIVE,
            reason=f"No damage was planted into {run.lead}, so nothing shows that a loss would be seen on these documents.",
            needs="A run with --policy, which plants it.",
        )
    found = compare(before, planted, endpoint, policy)
    of = "" if whole == baseline else f" of {whole}"
    said = f"Planted damage ({dose.noise:g} of a value{of}) cost {100 * found.loss:.1f} points"
    if found.loss > dose.loss_at_most:
        return Check(
            name=name,
            verdict=Verdict.INCONCLUSIVE,
            reason=f"{said}, more than the {100 * dose.loss_at_most:g} for which sensitivity is to be shown.",
            needs="A smaller damage.noise in the policy.",
        )
    if not (found.loss > 0 and found.p_lower <= policy.alpha):
        return Check(
            name=name,
            verdict=Verdict.INCONCLUSIVE,
            reason=f"{said} and was not found lower (p = {found.p_lower:.2g}): these documents would not tell.",
            needs="More documents, harder ones, or a larger damage.noise in the policy.",
        )
    return Check(
        name=name,
        verdict=Verdict.NON_INFERIOR,
        reason=f"{said} and was found lower (p = {found.p_lower:.2g}).",
    )


def check_control(run: Evidence, baseline: str, endpoint: PrimaryEndpoint, policy: Policy) -> Check:
    """The baseline once more, in other batches, scores what it scored; every run has that arm of its lead."""
    name, arm = f"control: {endpoint}", run.control(baseline)
    if arm is None and baseline != run.lead:
        return Check(
            name=name,
            verdict=Verdict.NON_INFERIOR,
            reason=f"{baseline} has no control, which a run has of its first bf16 alone, {run.lead}: this decides nothing.",
        )
    if arm is None and not run.scored_itself:
        return Check(
            name=name,
            verdict=Verdict.NON_INFERIOR,
            reason=f"{baseline} has no control: the run did not score its own tasks, so this decides nothing.",
        )
    again = [] if arm is None else run.scored(arm, endpoint)
    if not again or f"tasks {arm}" not in run.stages:
        return Check(
            name=name,
            verdict=Verdict.INCONCLUSIVE,
            reason=f"{baseline} was not scored a second time, in other batches, so nothing shows that it agrees with itself.",
            needs="A run of the tasks with that arm, or `evalkit run --resume`.",
        )
    try:
        found = compare(run.scored(baseline, endpoint), again, endpoint, policy)
    except PairingError as error:
        return Check(
            name=name,
            verdict=Verdict.ANOMALOUS,
            reason=f"Samples of {arm} do not pair with {baseline}'s: {error}.",
            needs="The same documents, each once, in both arms.",
        )
    said = f"{baseline} in other batches loses {100 * found.loss:+.1f} points against itself"
    if min(found.p_worse, found.p_gain) <= policy.alpha:
        return Check(
            name=name,
            verdict=Verdict.ANOMALOUS,
            reason=f"{said}, beyond the margin of {100 * endpoint.margin:g}.",
            needs="A baseline that agrees with itself.",
        )
    # Too few graded documents differ for an interval where it agrees.
    if found.unusable and not abs(found.loss) <= endpoint.margin:
        return Check(
            name=name,
            verdict=Verdict.INCONCLUSIVE,
            reason=f"{said}, beyond the margin of {100 * endpoint.margin:g}, and no interval: {found.unusable}.",
            needs="More documents.",
        )
    return Check(name=name, verdict=Verdict.NON_INFERIOR, reason=f"{said}.")


def check_coverage(
    run: Evidence, candidate: str, endpoint: PrimaryEndpoint, policy: Policy
) -> Iterator[Check]:
    """The share of scored tokens on which the candidate could differ at all."""
    task = run.task(candidate, endpoint)
    for what, words in (
        ("share_over_topk", "had more context than top-k"),
        ("share_stored_rows", "attended stored rows"),
    ):
        wanted = policy.coverage.over_topk if what == "share_over_topk" else policy.coverage.stored_rows
        share: float | None = None if task is None else getattr(task, what)
        name = f"coverage: {endpoint}, {words}"
        if share is not None and share >= wanted:
            yield Check(
                name=name, verdict=Verdict.NON_INFERIOR, reason=f"{share:.1%} of scored tokens {words}."
            )
            continue
        seen = "It was not recorded how many" if share is None else f"Only {share:.1%}"
        yield Check(
            name=name,
            verdict=Verdict.INCONCLUSIVE,
            reason=f"{seen} of the scored tokens {words}; the policy asks for {wanted:.0%}: the rest cannot tell formats apart.",
            needs="Longer prompts or generations, or a cached prefix.",
        )
