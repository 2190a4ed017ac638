"""One endpoint of one candidate against one baseline: what the paired documents show."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import fsum, inf
from typing import NamedTuple

from evalkit.gate.policy import Policy, PrimaryEndpoint
from evalkit.records import SampleRecord
from evalkit.stats import exact, paired, power
from evalkit.stats.clusters import FEWEST_CLUSTERS, design_effect
from evalkit.stats.exact import NONINFERIOR, WORSE
from evalkit.stats.means import FEWEST_DOCUMENTS, bootstrap_mean, by_document
from evalkit.stats.tails import Tail, tail


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The loss, P(baseline right) - P(candidate right) or the difference of mean scores, and what is known of it.

    n: different questions; repeats: documents beside them that ask one of them again, and count once with it.
    lower, upper: one-sided bounds at the policy's level for one look, or None where the documents allow none;
        `unusable` then says why.
    p_noninferior: of the hypothesis that the loss is the margin or more; p_worse: that it is the margin or less;
        p_gain: that the candidate gains no more than the margin; p_lower: that nothing was lost (exact McNemar,
        two-sided, or the bootstrap, one-sided), 1 where more was gained than lost.
    discordance: share of documents whose outcome differs; of graded ones None.
    apart: lost, gained and all documents, divided by their design effect `effect`; of graded ones None.
    unseen: why the upper bound is at the margin or above where what differs would have it below; needs: what then
        would be right. Empty elsewhere.
    """

    n: int
    score: float
    baseline_score: float
    loss: float
    repeats: int = 0
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
    unseen: str = ""
    needs: str = ""

    @property
    def counted(self) -> str:
        """How many documents, and how many repeats were not counted."""
        said = f"{self.n} document{'s' * (self.n != 1)}"
        return said + (f" ({self.repeats} more repeat one of them and count once)" if self.repeats else "")


class _Question(NamedTuple):
    """One question: the cluster of its first document, and each arm's score, the mean where it is repeated."""

    cluster: int
    before: float
    after: float


def compare(
    baseline: Sequence[SampleRecord],
    candidate: Sequence[SampleRecord],
    endpoint: PrimaryEndpoint,
    policy: Policy,
) -> Outcome:
    """Judge the loss against the endpoint's margin.

    Raises:
        PairingError: samples do not pair one to one, or a score is missing or not finite.
    """
    joined = [
        (key, paired.finite(key, before), paired.finite(key, after))
        for key, before, after in paired.join(baseline, candidate)
    ]
    asked = _questions(joined, endpoint)
    difference, clusters = [q.before - q.after for q in asked], [q.cluster for q in asked]
    n, count = len(asked), len(set(clusters))
    seen = Outcome(
        n=n,
        repeats=len(joined) - n,
        score=fsum(q.after for q in asked) / n,
        baseline_score=fsum(q.before for q in asked) / n,
        loss=fsum(difference) / n,
    )
    if endpoint.documents_per_cluster > 1 and count < FEWEST_CLUSTERS:
        return replace(
            seen,
            unusable=f"{seen.counted} lie in {count} clusters, and under {FEWEST_CLUSTERS} say too little",
        )
    if n < 2:
        return replace(seen, unusable=seen.counted)
    scores = {score for _, before, after in joined for score in (before, after)}
    if scores <= {0.0, 1.0}:
        return _binary(difference, clusters, seen, endpoint, policy)
    return _graded(difference, clusters, seen, endpoint, policy, max(1.0, max(scores) - min(scores)))


def _questions(
    joined: Sequence[tuple[paired.Key, float, float]], endpoint: PrimaryEndpoint
) -> list[_Question]:
    """Documents of one prompt and target are one question, however often it is asked."""
    asked = defaultdict[tuple[str, str], list[tuple[int, float, float]]](list)
    for key, before, after in joined:
        asked[key.prompt_sha256, key.target_sha256].append((key.doc_id, before, after))
    return [
        _Question(
            cluster=same[0][0] // endpoint.documents_per_cluster,
            before=fsum(before for _, before, _ in same) / len(same),
            after=fsum(after for _, _, after in same) / len(same),
        )
        for same in asked.values()
    ]


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
    # Repeats of a question that were not answered alike leave fractions.
    lost, gained, n = (
        fsum(max(x, 0.0) for x in difference),
        fsum(max(-x, 0.0) for x in difference),
        len(difference),
    )
    clustered = endpoint.documents_per_cluster > 1
    effect = design_effect(difference, clusters) if clustered else 1.0
    a, b, size, margin = lost / effect, gained / effect, n / effect, endpoint.margin
    lower, upper = exact.bounds(a, b, size, margin, policy.look_alpha)
    found = replace(
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
    return (
        _with_tail(found, tail(by_document(clusters, difference)), endpoint, policy) if clustered else found
    )


def _graded(
    difference: list[float],
    clusters: list[int],
    seen: Outcome,
    endpoint: PrimaryEndpoint,
    policy: Policy,
    whole: float,
) -> Outcome:
    units = by_document(clusters, difference)
    found = bootstrap_mean(units)
    if found is None:
        return replace(
            seen,
            unusable=f"a bootstrap of {len(units)} graded documents needs {FEWEST_DOCUMENTS}, of which at least 10 differ",
        )
    outcome = replace(
        seen,
        lower=found.lower(policy.look_alpha),
        upper=found.upper(policy.look_alpha),
        p_noninferior=found.p_below(endpoint.margin),
        p_worse=found.p_above(endpoint.margin),
        p_gain=found.p_below(-endpoint.margin),
        p_lower=found.p_above(0.0),
    )
    return _with_tail(outcome, tail(units, whole), endpoint, policy)


def _with_tail(outcome: Outcome, rare: Tail, endpoint: PrimaryEndpoint, policy: Policy) -> Outcome:
    """The outcome, its noninferiority no surer than what its documents or clusters leave open of others like them."""
    assert outcome.upper is not None
    alpha, p = policy.look_alpha, rare.p(endpoint.margin)
    held = replace(
        outcome,
        upper=max(outcome.upper, rare.upper(endpoint.margin, alpha)),
        p_noninferior=max(outcome.p_noninferior, p),
    )
    if not outcome.p_noninferior <= alpha < p:
        return held
    units, each = "clusters", endpoint.documents_per_cluster
    if each == 1:
        units = "documents"
    needed = rare.needed(endpoint.margin, alpha)
    more = f"About {needed - rare.n:,.0f} more {units}" + (f" of {each}" if each > 1 else "")
    return replace(
        held,
        unseen=(
            f", for {rare.n} {units}, of which {rare.lost} lost and {rare.gained} gained more than half of what one can, "
            "leave room for rare ones that are lost whole"
        ),
        needs=f"{more}, if no larger share is lost."
        if needed < inf
        else f"Many more {units}, or a candidate that loses less.",
    )
