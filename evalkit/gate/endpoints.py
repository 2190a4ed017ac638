"""One endpoint of one candidate against one baseline: what the paired documents show."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

from evalkit.gate.policy import Policy, PrimaryEndpoint
from evalkit.records import SampleRecord
from evalkit.stats import exact, paired, power
from evalkit.stats.clusters import FEWEST_CLUSTERS, design_effect
from evalkit.stats.exact import NONINFERIOR, WORSE
from evalkit.stats.means import FEWEST_DOCUMENTS, bootstrap_mean, by_document


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The loss, P(baseline right) - P(candidate right) or the difference of mean scores, and what is known of it.

    lower, upper: one-sided bounds at the policy's level for one look, or None where the documents allow none;
        `unusable` then says why.
    p_noninferior: of the hypothesis that the loss is the margin or more; p_worse: that it is the margin or less;
        p_gain: that the candidate gains no more than the margin; p_lower: that nothing was lost (exact McNemar,
        two-sided, or the bootstrap, one-sided), 1 where more was gained than lost.
    discordance: share of documents whose outcome differs; of graded ones None.
    apart: lost, gained and all documents, divided by their design effect `effect`; of graded ones None.
    """

    n: int
    score: float
    baseline_score: float
    loss: float
    lower: float | None = None
    upper: float | None = None
    p_noninferior: float = 1.0
    p_worse: float = 1.0
    p_gain: float = 1.0
    p_lower: float = 1.0
    discordance: float | None = None
    apart: tuple[float, float, float] | None = None
    effect: float = 1.0
    unusable: str = ""


def compare(
    baseline: Sequence[SampleRecord],
    candidate: Sequence[SampleRecord],
    endpoint: PrimaryEndpoint,
    policy: Policy,
) -> Outcome:
    """Judge the loss against the endpoint's margin.

    Raises:
        PairingError: samples do not pair one to one.
    """
    joined = paired.join(baseline, candidate)
    before = [float(score) if score is not None else inf for _, score, _ in joined]
    after = [float(score) if score is not None else inf for _, _, score in joined]
    clusters = [key.doc_id // endpoint.documents_per_cluster for key, _, _ in joined]
    difference = [b - a for b, a in zip(before, after, strict=True)]
    n = len(joined)
    seen = Outcome(n=n, score=sum(after) / n, baseline_score=sum(before) / n, loss=sum(difference) / n)
    count = len(set(clusters))
    if endpoint.documents_per_cluster > 1 and count < FEWEST_CLUSTERS:
        return replace(
            seen,
            unusable=f"{n} documents lie in {count} clusters, and under {FEWEST_CLUSTERS} say too little",
        )
    if n < 2:
        return replace(seen, unusable=f"{n} document")
    if set(before) | set(after) <= {0.0, 1.0}:
        return _binary(difference, clusters, seen, endpoint, policy)
    return _graded(difference, clusters, seen, endpoint, policy)


def still_needed(outcome: Outcome, endpoint: PrimaryEndpoint, policy: Policy) -> float | None:
    """Documents to add at the discordance seen and the true loss assumed; inf where none will do, None if unknown."""
    if outcome.apart is None or outcome.discordance is None:
        return None
    lost, gained, n = outcome.apart
    design = power.Design(
        margin=endpoint.margin,
        alpha=policy.look_alpha,
        power=policy.each_power,
        discordance=max(outcome.discordance, abs(policy.true_loss), 1 / n),
        loss=policy.true_loss,
    )
    return power.documents_still_needed(int(n), lost, gained, design) * outcome.effect


def _binary(
    difference: list[float],
    clusters: list[int],
    seen: Outcome,
    endpoint: PrimaryEndpoint,
    policy: Policy,
) -> Outcome:
    lost, gained, n = difference.count(1.0), difference.count(-1.0), len(difference)
    effect = design_effect(difference, clusters) if endpoint.documents_per_cluster > 1 else 1.0
    a, b, size, margin = lost / effect, gained / effect, n / effect, endpoint.margin
    lower, upper = exact.bounds(a, b, size, margin, policy.look_alpha)
    return replace(
        seen,
        lower=lower,
        upper=upper,
        p_noninferior=exact.p_value(a, b, size, margin, NONINFERIOR),
        p_worse=exact.p_value(a, b, size, margin, WORSE),
        p_gain=exact.p_value(b, a, size, margin, WORSE),
        p_lower=paired.mcnemar_p(round(a), round(b)) if lost > gained else 1.0,
        discordance=(lost + gained) / n,
        apart=(a, b, size),
        effect=effect,
    )


def _graded(
    difference: list[float],
    clusters: list[int],
    seen: Outcome,
    endpoint: PrimaryEndpoint,
    policy: Policy,
) -> Outcome:
    if not all(abs(x) < inf for x in difference):
        raise paired.PairingError(f"{endpoint}: a score is missing or not finite")
    units = by_document(clusters, difference)
    found = bootstrap_mean(units)
    if found is None:
        return replace(
            seen,
            unusable=f"a bootstrap of {len(units)} graded documents needs {FEWEST_DOCUMENTS}, of which at least 10 differ",
        )
    return replace(
        seen,
        lower=found.lower(policy.look_alpha),
        upper=found.upper(policy.look_alpha),
        p_noninferior=found.p_below(endpoint.margin),
        p_worse=found.p_above(endpoint.margin),
        p_gain=found.p_below(-endpoint.margin),
        p_lower=found.p_above(0.0),
    )
