"""Whether an endpoint counts: documents on which a loss could have shown, and on which planted damage did."""

from collections.abc import Iterator

from evalkit.gate.endpoints import Outcome, compare
from evalkit.gate.evidence import Evidence
from evalkit.gate.policy import Policy, PrimaryEndpoint
from evalkit.gate.words import Check, Verdict
from evalkit.stats.intervals import wilson

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


def check_damage(run: Evidence, endpoint: PrimaryEndpoint, policy: Policy) -> Check:
    """Planted damage is found lower, and is no larger than the policy says it is to be."""
    name, dose = f"sensitivity: {endpoint}", policy.damage
    whole, arm = run.damaged(policy.damage.noise)
    before, planted = run.scored(whole, endpoint), run.scored(arm, endpoint)
    if not planted:
        return Check(
            name=name,
            verdict=Verdict.INCONCLUSIVE,
            reason="No damage was planted, so nothing shows that a loss would be seen on these documents.",
            needs="A run with --policy, which plants it.",
        )
    found = compare(before, planted, endpoint, policy)
    said = f"Planted damage ({dose.noise:g} of a value) cost {100 * found.loss:.1f} points"
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
