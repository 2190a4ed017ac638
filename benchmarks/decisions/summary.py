"""What the cells of a finished experiment show, as JSON values: real verdicts, beside what theory predicts of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.decisions import cells, runs
from benchmarks.decisions.cells import Cell
from benchmarks.decisions.choosing import Loss, loss_between
from benchmarks.decisions.plan import Plan
from evalkit.errors import InputError
from evalkit.gate.policy import Policy
from evalkit.gate.words import Verdict
from evalkit.records import (
    CandidateRecord,
    EnvironmentRecord,
    RunDirectory,
    TaskRecord,
    last_judgement,
    only,
)
from evalkit.stats.exact import NONINFERIOR, WORSE, critical_value, rejection_edge, rejects

LEAST_NONINFERIOR = (
    0.75  # of the controls, 15 of 20; at the planned power of .9 fewer are seen once in 90 times
)


def arm(plan: Plan, policy: Policy, who: str, noise: float, seeds: Sequence[int], out: Path) -> list[Cell]:
    """An arm's cells of these samples."""
    (endpoint,) = policy.endpoints
    return [
        cells.load(cells.of(endpoint, who, noise, plan.batch_size, seed, plan.documents), out)
        for seed in seeds
    ]


def verdicts(
    plan: Plan, policy: Policy, shared: RunDirectory, noise: float, seeds: Sequence[int], out: Path
) -> Iterator[dict[str, Any]]:
    """The gate's verdict on each sample of one dose."""
    (candidate,), (baseline,) = policy.decide, policy.baselines
    arms = zip(
        seeds,
        arm(plan, policy, baseline, 0.0, seeds, out),
        arm(plan, policy, candidate, noise, seeds, out),
        arm(plan, policy, baseline, policy.damage.noise, seeds, out),
        strict=True,
    )
    for seed, before, after, planted in arms:
        judgement, judged = runs.verdict(shared, policy, before, after, planted)
        found = loss_between([before], [after])
        yield {
            "seed": seed,
            "verdict": judgement.verdict.value,
            "n": found.n,
            "lost": found.lost,
            "gained": found.gained,
            "reason": " ".join(check.reason for check in judged.deciding[:2])
            if judged.verdict is not Verdict.NON_INFERIOR
            else "",
        }


def dose(
    plan: Plan, policy: Policy, shared: RunDirectory, noise: float, expected: float, out: Path
) -> dict[str, Any]:
    """One dose: its true loss over all samples, the verdicts on each, and how often theory gives them."""
    seeds = list(plan.all_seeds)
    before = arm(plan, policy, policy.baselines[0], 0.0, seeds, out)
    after = arm(plan, policy, policy.decide[0], noise, seeds, out)
    found = loss_between(before, after)
    given = list(verdicts(plan, policy, shared, noise, seeds, out))
    return {
        "noise": noise,
        "expected_loss": expected,
        "documents": found.n,
        "baseline_score": found.before,
        "score": found.after,
        "loss": found.loss,
        "loss_lower": found.interval.lower,
        "loss_upper": found.interval.upper,
        "discordance": found.discordance,
        "verdicts": dict(Counter(one["verdict"] for one in given)),
        "predicted": predicted(plan.documents, found, policy),
        "samples": given,
    }


def predicted(n: int, found: Loss, policy: Policy) -> dict[str, float]:
    """Chance of each verdict on n documents at this loss and discordance, where every other check passes."""
    (endpoint,) = policy.endpoints
    alpha, margin, d = policy.look_alpha, endpoint.margin, found.discordance
    if not d:
        edge = rejection_edge(n, margin, critical_value(n, margin, alpha), NONINFERIOR)
        shown = float(edge[0] >= 0)
        return {"NON-INFERIOR": shown, "WORSE": 0.0, "ANOMALOUS": 0.0, "INCONCLUSIVE": 1.0 - shown}
    chance = {}
    for verdict, tail, loss in (
        (Verdict.NON_INFERIOR, NONINFERIOR, found.loss),
        (Verdict.WORSE, WORSE, found.loss),
        (Verdict.ANOMALOUS, WORSE, -found.loss),  # a gain above the margin
    ):
        edge = rejection_edge(n, margin, critical_value(n, margin, alpha, tail), tail)
        chance[verdict.value] = rejects(n, d, loss, edge, tail)
    return chance | {"INCONCLUSIVE": max(0.0, 1.0 - sum(chance.values()))}


def summarise(plan: Plan, policy: Policy, out: Path) -> dict[str, Any]:
    """Controls and doses of a folder of cells, with what was asked of them."""
    shared = runs.find_frame(out)
    (endpoint,) = policy.endpoints
    every = [
        one
        for who, noises in (
            (policy.baselines[0], (0.0, policy.damage.noise)),
            (policy.decide[0], plan.noise),
        )
        for noise in noises
        for one in arm(plan, policy, who, noise, plan.all_seeds, out)
    ]
    for name in ("plan_sha256", "policy_sha256"):
        if len(found := {str(one.facts.get(name)) for one in every}) > 1:
            raise InputError(
                f"the cells were scored under {len(found)} versions of the {name.removesuffix('_sha256')}: one is right"
            )
    doses = []
    for noise, expected in zip(plan.noise, plan.expected_loss, strict=True):
        doses.append(dose(plan, policy, shared, noise, expected, out))
        print(
            f"noise {noise:g}: loss {100 * doses[-1]['loss']:+.2f} points: {doses[-1]['verdicts']}",
            flush=True,
        )
    controls = [one for one in doses[0]["samples"] if one["seed"] in plan.control_seeds]
    given = Counter(one["verdict"] for one in controls)
    return {
        "policy": policy.name,
        "policy_sha256": policy.sha256,
        "plan": asdict(plan),
        "baseline": policy.baselines[0],
        "candidate": policy.decide[0],
        "endpoint": str(endpoint),
        "margin": endpoint.margin,
        "alpha": policy.alpha,
        "power": policy.power,
        "damage_noise": policy.damage.noise,
        "facts": every[0].facts,
        "mean_context_tokens": every[0].mean_context_tokens,
        "mean_scored_tokens": every[0].mean_scored_tokens,
        "share_over_topk": min(one.share_over_topk or 0.0 for one in every),
        "documents_scored": sum(one.wanted.n for one in every),
        "scoring_s": sum(one.wall_s for one in every),
        "controls": {
            "samples": len(controls),
            "verdicts": dict(given),
            "asked": "at least three quarters NON-INFERIOR, none WORSE",
            "passed": given["NON-INFERIOR"] >= LEAST_NONINFERIOR * len(controls) and not given["WORSE"],
        },
        "doses": doses,
        "damage": {
            "asked": "no NON-INFERIOR where the true loss is twice the margin or more, no WORSE at dose 0",
            "passed": not doses[0]["verdicts"].get("WORSE")
            and not any(
                one["verdicts"].get("NON-INFERIOR") for one in doses if one["loss"] >= 2 * endpoint.margin
            ),
            "doses_at_twice_the_margin": sum(one["loss"] >= 2 * endpoint.margin for one in doses),
        },
    }


def formats(out: Path) -> list[dict[str, Any]]:
    """Every candidate's losses and verdict in the runs of real formats, as they were found."""
    found = []
    for path in sorted((out / "formats").glob("*/run.json")):
        run = RunDirectory(path.parent)
        records = run.read()
        last = last_judgement(records)
        said = {r.candidate: r for r in last if r.check == "candidate"}
        for candidate in only(records, CandidateRecord):
            tasks = [r for r in only(records, TaskRecord) if r.candidate == candidate.candidate]
            verdict = said.get(candidate.candidate)
            found.append(
                {
                    "run": run.path.name,
                    "profile": run.config.get("profile", "native"),
                    "gpu": only(records, EnvironmentRecord)[0].gpu,
                    "candidate": candidate.candidate,
                    "bytes_per_token": candidate.row_bytes_per_token,
                    "tasks": [
                        {
                            "task": r.task,
                            "n": r.n,
                            "score": r.score,
                            "loss": r.loss,
                            "loss_lower": r.loss_lower,
                            "loss_upper": r.loss_upper,
                            "lost": r.lost,
                            "gained": r.gained,
                            "wall_s": r.wall_s,
                        }
                        for r in tasks
                    ],
                    "verdict": None if verdict is None else verdict.verdict,
                    "reason": None if verdict is None else verdict.reason,
                    "overall": next((r.verdict for r in last if r.check == "overall"), None),
                    "policy": None if not last else last[0].policy,
                }
            )
    return found
