"""The loss of one candidate on every endpoint against every baseline, and its verdicts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf

from evalkit.gate.endpoints import Outcome, still_needed
from evalkit.gate.policy import Policy, PrimaryEndpoint
from evalkit.gate.words import Check, Verdict
from evalkit.stats.multiple import holm


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One endpoint against one baseline; `counts` is whether a loss would have shown there, and would be the candidate's."""

    endpoint: PrimaryEndpoint
    baseline: str
    outcome: Outcome
    counts: bool


def check_losses(compared: Sequence[Compared], policy: Policy) -> Iterator[Check]:
    """One check for each, in its order, and the gains that no format brings.

    Noninferiority is asked of every endpoint at alpha (intersection-union). "Worse" and "implausible gain" are asked
    of any, so Holm's adjustment holds their level over the endpoints that count. "Measurably lower" decides nothing.
    """
    counting = [c for c in compared if c.counts and not c.outcome.unusable]
    adjusted = {
        name: dict(
            zip(map(id, counting), holm([getattr(c.outcome, f"p_{name}") for c in counting]), strict=True)
        )
        for name in ("worse", "gain", "lower")
    }
    for one in compared:
        p = {name: adjusted[name].get(id(one), 1.0) for name in adjusted}
        yield _check(one, p, policy)


def _check(one: Compared, p: dict[str, float], policy: Policy) -> Check:
    outcome, margin = one.outcome, one.endpoint.margin
    name = f"{one.endpoint} against {one.baseline}"
    if outcome.unusable:
        return Check(
            name=name,
            verdict=Verdict.INCONCLUSIVE,
            reason=f"{_points(outcome.loss)} lost, and no interval: {outcome.unusable}.",
            needs="More documents, one question each.",
        )
    assert outcome.lower is not None
    assert outcome.upper is not None
    said = (
        f"{_points(outcome.loss)} lost of {outcome.counted}, between {_points(outcome.lower)} and "
        f"{_points(outcome.upper)} (margin {100 * margin:g})"
    )
    if p["lower"] <= policy.look_alpha:
        said += f", measurably lower (p = {p['lower']:.2g})"
    if not one.counts:
        return Check(
            name=name,
            verdict=Verdict.INCONCLUSIVE,
            reason=f"{said}, on documents that do not count here.",
            needs="Documents on which a loss can show, in runs that compare.",
        )
    if p["gain"] <= policy.look_alpha:
        return Check(
            name=name,
            verdict=Verdict.ANOMALOUS,
            reason=f"{said}: a gain above the margin (p = {p['gain']:.2g}), which storing fewer bits does not bring.",
            needs="An explanation, or both arms run again.",
        )
    if policy.planned and outcome.n not in policy.planned:
        planned = f"{policy.documents:,}"
        if policy.looks > 1:
            planned += f", or a multiple of it up to {policy.planned[-1]:,},"
        return Check(
            name=name,
            verdict=Verdict.INCONCLUSIVE,
            reason=f"{said}: {planned} were planned, and a loss seen at another number decides nothing, since it may have "
            "been asked for until it pleased.",
            needs=f"As many documents as the policy plans, {planned.rstrip(',')}.",
        )
    if p["worse"] <= policy.look_alpha:
        return Check(
            name=name,
            verdict=Verdict.WORSE,
            reason=f"{said}: above the margin (p = {p['worse']:.2g}).",
            needs="A candidate that loses less.",
        )
    if outcome.p_noninferior <= policy.look_alpha:
        return Check(name=name, verdict=Verdict.NON_INFERIOR, reason=f"{said}.")
    return Check(
        name=name,
        verdict=Verdict.INCONCLUSIVE,
        reason=f"{said}: the margin lies within{outcome.unseen}.",
        needs=_needs(one, policy),
    )


def _needs(one: Compared, policy: Policy) -> str:
    outcome = one.outcome
    if outcome.needs:
        return outcome.needs
    needed = still_needed(outcome, one.endpoint, policy)
    if needed is None:
        return "More documents."
    if needed == inf:
        return "None will do while the loss seen is at the margin or above."
    assumed = f"if the true loss is {100 * policy.true_loss:g} points and {outcome.discordance:.1%} of documents differ"
    if needed < 1:
        return f"As many documents once more in a new run, {assumed}: these had the power and missed."
    more = f"About {needed:,.0f} more documents {assumed}."
    if not policy.planned:
        return more
    look = next((n for n in policy.planned if n > outcome.n), None)
    return f"{more} " + (
        "They take a new run, under a policy that plans them."
        if look is None
        else f"The policy's next look is at {look:,}."
    )


def _points(loss: float) -> str:
    return f"{100 * loss:+.1f} points"
