"""Experiments on the verdict: stages that are run in this order, each of which goes on where it was stopped.

    python -m benchmarks.decisions pilot     --out DIR    flips of bf16 against bf16, speed
    python -m benchmarks.decisions titrate   --out DIR    what noises cost
    python -m benchmarks.decisions plan      --out DIR    writes the plan and the policies' damage: commit both
    python -m benchmarks.decisions controls  --out DIR    scores bf16 against bf16
    python -m benchmarks.decisions doses     --out DIR    scores planted damage
    python -m benchmarks.decisions formats   --out DIR    runs and judges real formats
    python -m benchmarks.decisions summarise --out DIR --json FILE --page docs/validation.md

Only `plan` and `summarise` need no GPU: bring DIR back for them. docs/validation.md says what is shown and how.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from math import ceil
from pathlib import Path
from typing import Any

from benchmarks.decisions import cells, plan, runs, scoring, summary, tables
from benchmarks.decisions.cells import Wanted
from benchmarks.decisions.choosing import DOSES, DoseCurve, Loss, dose_curve, loss_between
from benchmarks.decisions.plan import FEWEST_DOCUMENTS, FEWEST_SEEDS, FIRST_SEED, Plan
from benchmarks.decisions.scoring import Where
from evalkit.config import RunConfig
from evalkit.errors import InputError
from evalkit.gate.planning import plan as plan_documents
from evalkit.gate.policy import Policy
from evalkit.gate.policy import load as load_policy
from evalkit.gate.verdict import judge, store
from evalkit.records import RunDirectory, write_whole

ROOT = Path(__file__).parents[2]
PLAN = Path("benchmarks/decisions/plan.toml")
POLICY = Path("tasks/policies/validation-bf16.toml")
FORMATS = Path("tasks/policies/validation-formats.toml")
GENERATED = "evalkit_registers_576"  # the documents of the policy's task, answered by generation
NOISE = (0.03, 0.04, 0.05, 0.06, 0.07, 0.085, 0.1, 0.13)
PROFILES = ("native", "glm-5.2")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one stage."""
    given = _parser().parse_args(arguments)
    try:
        found = STAGES[given.stage](given)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 64
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        write_whole(given.json, json.dumps(found, indent=1) + "\n")
    return 0


def pilot(given: argparse.Namespace) -> dict[str, Any]:
    """How often bf16 differs from bf16: on another kernel, and in batches of another size."""
    policy = plan.single(load_policy(given.policy), str(given.policy))
    (endpoint,), (baseline,), (candidate,) = policy.endpoints, policy.baselines, policy.decide
    seeds = range(FIRST_SEED["pilot"], FIRST_SEED["pilot"] + given.seeds)
    half = max(1, given.batch_size // 2)
    arms = {
        "baseline": (baseline, given.batch_size),
        "other kernel": (candidate, given.batch_size),
        "other batches": (baseline, half),
    }
    wanted = {
        name: [cells.of(endpoint, who, 0.0, size, seed, given.documents) for seed in seeds]
        for name, (who, size) in arms.items()
    }
    speed = scoring.score(_by_seed(wanted.values()), _where(given))
    scored = {name: [cells.load(one, given.out) for one in cells_] for name, cells_ in wanted.items()}
    found: dict[str, Any] = {"policy": policy.name, "batch_size": given.batch_size}
    for name in ("other kernel", "other batches"):
        loss = loss_between(scored["baseline"], scored[name])
        (planned,) = plan_documents(policy, discordance=max(loss.discordance, 1 / loss.n))
        found[name] = _loss_values(loss) | {"documents_planned": planned.documents}
        print(
            f"{name}: {loss.discordance:.2%} of {loss.n:,} documents differ, loss {100 * loss.loss:+.2f} points, baseline "
            f"{loss.before:.1%} right: {planned.documents} documents a sample",
            flush=True,
        )
    if given.generated:
        found["generated"] = _compared_with_generation(given, cells_of_task=wanted["baseline"][0])
    every = [one for some in scored.values() for one in some]
    found["speed"] = asdict(speed) | {
        "workers": given.workers,
        "process_s_per_document": sum(c.wall_s for c in every) / sum(c.wanted.n for c in every),
    }
    _keep(given.out, "pilot", found)
    return found


def _compared_with_generation(given: argparse.Namespace, cells_of_task: Wanted) -> dict[str, Any]:
    """Whether an answer found right in one pass is the one that is generated, document by document."""
    forced = replace(cells_of_task, n=given.generated)
    made = replace(forced, task=GENERATED, metric="exact_match", batch_size=given.generated)
    prompts = [
        [s.prompt_sha256 for s in cells.questions(one.task, one.n, one.seed)] for one in (forced, made)
    ]
    if prompts[0] != prompts[1]:
        raise InputError(f"{made.task} asks other documents than {forced.task}")
    scoring.score([forced, made], _where(given))
    one, other = (cells.load(wanted, given.out) for wanted in (forced, made))
    agreed = int((one.right == other.right).sum())
    print(
        f"{forced.task} and {made.task}: {one.right.mean():.1%} and {other.right.mean():.1%} right, "
        f"{agreed} of {forced.n} documents alike",
        flush=True,
    )
    return {
        "documents": forced.n,
        "alike": agreed,
        "forced_score": float(one.right.mean()),
        "generated_score": float(other.right.mean()),
        "forced_s": one.wall_s,
        "generated_s": other.wall_s,
    }


def titrate(given: argparse.Namespace) -> dict[str, Any]:
    """What noises of several sizes cost the baseline, and which would cost so many margins."""
    policy = load_policy(given.policy)
    endpoint, baseline = policy.endpoints[0], given.candidate or policy.baselines[0]
    seeds = range(FIRST_SEED["titration"], FIRST_SEED["titration"] + given.seeds)
    arms = [
        [cells.of(endpoint, baseline, x, given.batch_size, seed, given.documents) for seed in seeds]
        for x in (0.0, *given.noise)
    ]
    scoring.score(_by_seed(arms), _where(given))
    whole, *damaged = ([cells.load(one, given.out) for one in arm] for arm in arms)
    losses = [loss_between(whole, arm) for arm in damaged]
    curve = dose_curve(given.noise, losses)
    rows = [
        {"noise": x} | _loss_values(loss) | {"curve": float(curve.loss(x))}
        for x, loss in zip(given.noise, losses, strict=True)
    ]
    print("\n".join(tables.titration(rows)), flush=True)
    doses = _doses(curve, endpoint.margin)
    for multiple, noise in doses.items():
        print(f"{multiple:g} margins ({100 * multiple * endpoint.margin:.3g} points): noise {noise:.3g}")
    found = {
        "policy": policy.name,
        "task": endpoint.task,
        "margin": endpoint.margin,
        "curve": asdict(curve),
        "rows": rows,
        "noise_by_margins": {f"{multiple:g}": noise for multiple, noise in doses.items()},
    }
    _keep(given.out, f"titration-{policy.name}", found)
    return found


def write_plan(given: argparse.Namespace) -> dict[str, Any]:
    """Documents from the pilot, doses from the titration; the policies' damage costs twice the margin."""
    policy = plan.single(load_policy(given.policy), str(given.policy))
    piloted, titrated = _kept(given.out, "pilot"), _kept(given.out, f"titration-{policy.name}")
    discordance = float(piloted["other kernel"]["discordance"])
    # Of the noise that cost most nearly twice the margin: of what is planted to show sensitivity.
    near = min(titrated["rows"], key=lambda row: abs(row["loss"] - 2 * titrated["margin"]))
    (planned,) = plan_documents(
        policy,
        discordance=max(discordance, 1 / piloted["other kernel"]["documents"]),
        damaged=near["discordance"] * 2 * titrated["margin"] / near["loss"],
    )
    documents = given.documents or planned.documents
    if documents is None:
        raise InputError(f"{given.policy}: no number of documents shows this margin")
    curve = DoseCurve(**titrated["curve"])
    doses = {multiple: round(x, 5) for multiple, x in _doses(curve, titrated["margin"]).items()}
    made = Plan(
        policy=str(given.policy),
        discordance=discordance,
        documents=documents,
        seeds=max(FEWEST_SEEDS, ceil(given.total / documents)),
        controls=FEWEST_SEEDS,
        noise=(0.0, *doses.values()),
        expected_loss=(0.0, *(float(curve.loss(x)) for x in doses.values())),
        batch_size=piloted["batch_size"],
    )
    plan.write(given.plan, made)
    for path in (given.policy, *given.also):
        plan.plant(path, float(curve.noise(2 * titrated["margin"])))
    print(given.plan.read_text(encoding="utf-8"))
    arms = len(made.noise) + 2
    scored = made.documents * made.seeds * arms
    seconds = scored * piloted["speed"]["process_s_per_document"]
    workers = piloted["speed"]["workers"]
    print(
        f"{scored:,} documents on {arms} arms: {seconds / workers / 60:.1f} min on {workers} workers as in the pilot"
    )
    return asdict(made)


def controls(given: argparse.Namespace) -> dict[str, Any]:
    """Score bf16 against bf16, with the policy's damage, on the control samples."""
    return _score_planned(given, lambda made: made.control_seeds, with_doses=False)


def doses(given: argparse.Namespace) -> dict[str, Any]:
    """Score every dose on every sample, and what the controls have left."""
    return _score_planned(given, lambda made: made.all_seeds, with_doses=True)


def _score_planned(
    given: argparse.Namespace, seeds: Callable[[Plan], Sequence[int]], *, with_doses: bool
) -> dict[str, Any]:
    made = plan.load(given.plan)
    policy = plan.policy_of(made, ROOT)
    (endpoint,), (baseline,), (candidate,) = policy.endpoints, policy.baselines, policy.decide
    config = RunConfig(
        checkpoint=given.checkpoint,
        device=given.device,
        dtype=given.dtype,
        candidates=(baseline, candidate),
        layers_prompt_tokens=runs.LAYERS_TOKENS,
        layers_decode_tokens=4,
        layers_frozen=False,
        phase_tokens=0,
        batch_size=made.batch_size,
        policy=ROOT / made.policy,
    )
    shared = runs.frame(given.out, policy, config)
    arms = [
        (baseline, 0.0),
        (candidate, 0.0),
        (baseline, policy.damage.noise),
        *((candidate, x) for x in made.noise[1:] if with_doses),
    ]
    wanted = [
        cells.of(endpoint, who, x, made.batch_size, seed, made.documents)
        for seed in seeds(made)
        for who, x in arms
    ]
    facts = {"plan_sha256": plan.sha256(given.plan), "policy_sha256": policy.sha256}
    speed = scoring.score(wanted, _where(given, facts))
    for noise in dict.fromkeys(x for who, x in arms if who == candidate):
        before, after = (
            summary.arm(made, policy, who, x, seeds(made), given.out)
            for who, x in ((baseline, 0.0), (candidate, noise))
        )
        loss = loss_between(before, after)
        print(
            f"noise {noise:g}: {100 * loss.loss:+.2f} points lost of {loss.n:,}, {loss.discordance:.2%} differ"
        )
    return {"frame": shared.path.name, "speed": asdict(speed)}


def formats(given: argparse.Namespace) -> dict[str, Any]:
    """A run of evalkit for each range profile, and the gate's verdict on it."""
    policy = load_policy(given.policy)
    documents = given.documents or plan.load(given.plan).documents
    for profile in given.profiles:
        config = RunConfig(
            name=profile,
            checkpoint=given.checkpoint,
            device=given.device,
            dtype=given.dtype,
            candidates=(*policy.baselines, *policy.decide),
            profile=profile,
            layers_prompt_tokens=1024,
            layers_decode_tokens=8,
            layers_frozen=False,
            phase_tokens=0,
            tasks=tuple(given.tasks or (e.task for e in policy.endpoints)),
            task_documents=documents,
            batch_size=given.batch_size,
            policy=given.policy,
            seed=FIRST_SEED["formats"],
            out=given.out / "formats",
        )
        judgement = _run_and_judge(config, policy)
        for judged in judgement.candidates:
            print(f"{profile}: {judged.candidate}: {judged.verdict}: {judged.deciding[0].reason}", flush=True)
    return {"formats": summary.formats(given.out)}


def _run_and_judge(config: RunConfig, policy: Policy) -> Any:
    from evalkit import pipeline

    begun = sorted(config.out.glob(f"*-{config.name}/run.json"))
    resume = begun[-1].parent if begun else None
    if resume is not None and RunDirectory(resume).config != config.to_json():
        raise InputError(f"{resume} was asked for something else: give another --out")
    directory = pipeline.run(config, resume=resume)
    judgement = judge(directory, policy)
    store(directory, judgement)
    return judgement


def summarise(given: argparse.Namespace) -> dict[str, Any]:
    """Judge every sample, from the cells alone, and write the tables into a page."""
    made = plan.load(given.plan)
    policy = plan.policy_of(made, ROOT)
    (first,) = summary.arm(made, policy, policy.baselines[0], 0.0, made.all_seeds[:1], given.out)
    for name, now in {"plan_sha256": plan.sha256(given.plan), "policy_sha256": policy.sha256}.items():
        if first.facts.get(name) != now:
            raise InputError(
                f"the cells were scored under another {name.removesuffix('_sha256')} than {now[:12]}"
            )
    found = summary.summarise(made, policy, given.out)
    found["formats"] = [one for folder in (given.out, *given.formats) for one in summary.formats(folder)]
    for stage in ("pilot", f"titration-{found['policy']}"):
        if (given.out / f"{stage}.json").exists():
            found[stage.partition("-")[0]] = _kept(given.out, stage)
    for table in (tables.controls, tables.doses):
        print("\n".join(table(found)), flush=True)
    if given.page is not None:
        tables.write(given.page, found)
    return found


def _doses(curve: DoseCurve, margin: float) -> dict[float, float]:
    return {multiple: curve.noise(multiple * margin) for multiple in DOSES}


def _by_seed(arms: Any) -> list[Wanted]:
    """Every arm's cells, a seed's together: its documents are then made once."""
    return [one for same in zip(*arms, strict=True) for one in same]


def _loss_values(loss: Loss) -> dict[str, Any]:
    return {
        "documents": loss.n,
        "baseline_score": loss.before,
        "score": loss.after,
        "loss": loss.loss,
        "loss_lower": loss.interval.lower,
        "loss_upper": loss.interval.upper,
        "discordance": loss.discordance,
    }


def _where(given: argparse.Namespace, facts: dict[str, Any] | None = None) -> Where:
    import torch

    from evalkit import environment

    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Where(
        checkpoint=given.checkpoint,
        device=device,
        dtype=given.dtype,
        out=given.out,
        workers=given.workers,
        facts={
            "checkpoint": given.checkpoint,
            "gpu": environment.gpu_name(device),
            "torch": torch.__version__,
            **(facts or {}),
        },
    )


def _keep(out: Path, name: str, found: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / f"{name}.json", json.dumps(found, indent=1) + "\n")


def _kept(out: Path, name: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no {name}.json in {out}: that stage comes first") from None
    return found


STAGES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "pilot": pilot,
    "titrate": titrate,
    "plan": write_plan,
    "controls": controls,
    "doses": doses,
    "formats": formats,
    "summarise": summarise,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decisions", description=(__doc__ or "").partition("\n")[0]
    )
    stages = parser.add_subparsers(dest="stage", required=True)
    for name, stage in STAGES.items():
        one = stages.add_parser(name, help=(stage.__doc__ or "").partition("\n")[0])
        one.add_argument("--out", type=Path, required=True, help="the folder that all stages share")
        one.add_argument("--json", type=Path, help="also write what was found to this file")
        if name in ("plan", "controls", "doses", "formats", "summarise"):
            one.add_argument("--plan", type=Path, default=ROOT / PLAN, help=f"default {PLAN}")
        if name in ("pilot", "titrate", "plan"):
            one.add_argument("--policy", type=Path, default=POLICY, help=f"default {POLICY}")
        if name not in ("plan", "summarise"):
            one.add_argument("--checkpoint", default="dsa-nano")
            one.add_argument("--device", help="cpu, cuda or cuda:N; the GPU where there is one")
            one.add_argument("--dtype", help="bfloat16 or float32; by default what a run takes there")
        if name in ("pilot", "titrate", "controls", "doses"):
            one.add_argument("--workers", type=int, default=1, help="processes that share the device")
        if name in ("pilot", "titrate", "formats"):
            one.add_argument("--batch-size", type=int, default=64)
        if name in ("pilot", "titrate"):
            one.add_argument("--documents", type=int, default=512, help="of a seed (default 512)")
    sub = stages.choices
    sub["pilot"].add_argument("--seeds", type=int, default=8, help="samples (default 8)")
    sub["pilot"].add_argument(
        "--generated",
        type=int,
        default=0,
        help=f"documents to generate the answers to as well, by {GENERATED}",
    )
    sub["titrate"].add_argument("--seeds", type=int, default=4, help="samples (default 4)")
    sub["titrate"].add_argument("--noise", type=float, nargs="+", default=list(NOISE))
    sub["titrate"].add_argument("--candidate", help="whose rows; by default the policy's first baseline")
    sub["plan"].add_argument("--documents", type=int, help="of a sample; by default as the pilot asks")
    sub["plan"].add_argument("--total", type=int, default=FEWEST_DOCUMENTS, help="documents of a dose")
    sub["plan"].add_argument(
        "--also", type=Path, nargs="*", default=[FORMATS], help=f"other policies to plant it in ({FORMATS})"
    )
    sub["formats"].add_argument("--policy", type=Path, default=FORMATS, help=f"default {FORMATS}")
    sub["formats"].add_argument("--profiles", nargs="+", default=list(PROFILES))
    sub["formats"].add_argument("--tasks", nargs="+", help="by default the policy's")
    sub["formats"].add_argument("--documents", type=int, help="by default as planned")
    sub["summarise"].add_argument(
        "--formats", type=Path, nargs="*", default=[], help="other folders of the stage formats"
    )
    sub["summarise"].add_argument("--page", type=Path, help="a page to write the tables into")
    return parser


if __name__ == "__main__":
    sys.exit(main())
