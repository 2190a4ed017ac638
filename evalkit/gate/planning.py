"""What a policy costs: documents and hours, before the run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from evalkit.errors import InputError
from evalkit.gate.endpoints import compare
from evalkit.gate.evidence import Evidence
from evalkit.gate.policy import Policy, PrimaryEndpoint
from evalkit.stats import power
from evalkit.stats.clusters import FEWEST_CLUSTERS
from evalkit.stats.means import FEWEST_DOCUMENTS
from evalkit.stats.tails import fewest


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One endpoint's plan.

    discordance: share of documents whose outcome differs, assumed.
    source: where that comes from.
    documents: how many are needed; None where no number will do.
    sensitive: how many of these the planted damage of twice the margin takes to be found.
    clusters: how many clusters they have to lie in at least; None where each document is its own.
    hours: to score them on every arm (control, baselines, planted damage, candidates); None without a run to
        measure by.
    carries: the smallest margin that the documents of the run given carry; None without one.
    """

    endpoint: PrimaryEndpoint
    discordance: float
    source: str
    documents: int | None
    sensitive: int | None
    clusters: int | None
    hours: float | None
    carries: float | None


def plan(
    policy: Policy,
    discordance: float | None = None,
    run: Path | None = None,
    damaged: float | None = None,
) -> list[Planned]:
    """Documents for every endpoint, each at the power with which all are shown at once.

    An endpoint has to show two things: that the loss is below the margin, and that planted damage of twice the margin
    is found on the same documents, without which it does not count.

    Args:
        discordance: share of documents that differ between bf16 and bf16.
        run: one that measured it, and what documents take.
        damaged: share of documents that planted damage of twice the margin changes; without it, twice its loss.

    Raises:
        InputError: neither a discordance nor a run is given, or the run has no control pair for an endpoint.
    """
    if discordance is None and run is None:
        raise InputError("give --discordance, or --run with a run whose control pair measures it")
    evidence = None if run is None else Evidence.read(run)
    return [_plan(endpoint, policy, discordance, evidence, damaged) for endpoint in policy.endpoints]


def words(policy: Policy, planned: Sequence[Planned]) -> Iterator[str]:
    """The plan, line by line."""
    yield (
        f"{policy.name}: alpha {policy.alpha:g} in {policy.looks} look{'s' * (policy.looks > 1)}, power {policy.power:g}"
        f", so {policy.each_power:.3g} for each loss and each planted damage, assumed true loss {100 * policy.true_loss:g} points"
    )
    for one in planned:
        wanted = "no number of documents will do" if one.documents is None else f"{one.documents:,} documents"
        hours = "" if one.hours is None else f", {one.hours:.1f} hours on every arm"
        yield (
            f"{one.endpoint}: margin {100 * one.endpoint.margin:g} points, {one.discordance:.2%} of documents differ "
            f"({one.source}): {wanted}{hours}"
        )
        if policy.documents is not None and one.documents is not None:
            enough = "enough" if policy.documents >= one.documents else "too few"
            yield f"    the policy plans {policy.documents:,}{' a look' * (policy.looks > 1)}: {enough}"
        if one.sensitive is not None:
            yield (
                f"    {one.sensitive:,} of them to find planted damage of {200 * one.endpoint.margin:g} points, which decides "
                "whether the rest counts"
            )
        if one.clusters is not None:
            yield (
                f"    in {one.clusters:,} clusters of {one.endpoint.documents_per_cluster} at least, or rare ones that are lost whole "
                "could go unseen; more where documents of one cluster are lost together"
            )
        if one.carries is not None:
            yield f"    the documents of that run carry a margin of {100 * one.carries:.1f} points"


def _plan(
    endpoint: PrimaryEndpoint,
    policy: Policy,
    discordance: float | None,
    run: Evidence | None,
    damaged: float | None,
) -> Planned:
    source = "given"
    if discordance is None:
        assert run is not None
        discordance, source = _control(run, endpoint, policy)
    design = power.Design(
        margin=endpoint.margin,
        alpha=policy.look_alpha,
        power=policy.each_power,
        discordance=max(discordance, abs(policy.true_loss)),
        loss=policy.true_loss,
    )
    planted = 2 * endpoint.margin
    damage = power.Damage(
        loss=planted,
        discordance=min(1.0, 2 * planted) if damaged is None else max(damaged, planted),
        at_most=policy.damage.loss_at_most,
        alpha=policy.alpha,
    )
    shown = power.planned_documents(design)
    sensitive = power.sensitive_documents(damage, policy.each_power)
    each, clusters = endpoint.documents_per_cluster, None
    if each > 1:
        clusters = fewest(endpoint.margin, policy.look_alpha, FEWEST_CLUSTERS)
    documents = None if shown is None or sensitive is None else max(shown, sensitive, (clusters or 0) * each)
    seconds, held = _measured(run, endpoint)
    arms = 2 + len(policy.baselines) + len(policy.decide)  # with the control and planted damage
    return Planned(
        endpoint=endpoint,
        discordance=discordance,
        source=source,
        documents=documents,
        sensitive=sensitive,
        clusters=clusters,
        hours=None if seconds is None or documents is None else seconds * documents * arms / 3600,
        carries=None if held is None else power.detectable_margin(held, design),
    )


def _control(run: Evidence, endpoint: PrimaryEndpoint, policy: Policy) -> tuple[float, str]:
    for name in policy.baselines:
        baseline = run.find(name)
        control = None if baseline is None else run.control(baseline.candidate)
        if baseline is None or control is None:
            continue
        before = run.scored(baseline.candidate, endpoint)
        if before:
            found = compare(before, run.scored(control, endpoint), endpoint, policy)
            if found.discordance is None:
                graded = fewest(endpoint.margin, policy.look_alpha, FEWEST_DOCUMENTS)
                raise InputError(
                    f"{endpoint} is graded: its documents are not planned by discordance; it takes {graded} at least, or rare ones "
                    "that are lost whole could go unseen"
                )
            # No flip in n documents leaves a discordance of a few in n open; one is assumed.
            least = 1 / found.n
            words = f"{baseline.candidate} against {control}, {found.n} documents"
            return max(found.discordance, least), words
    raise InputError(f"{run.path} has no control pair that scored {endpoint}: give --discordance")


def _measured(run: Evidence | None, endpoint: PrimaryEndpoint) -> tuple[float | None, int | None]:
    """Seconds a document and arm, mean over arms, and documents scored."""
    found = [] if run is None else [r for c in run.candidates if (r := run.task(c.candidate, endpoint))]
    if not found:
        return None, None
    return sum(r.wall_s / r.n for r in found) / len(found), found[0].n
