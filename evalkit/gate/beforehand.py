"""What a policy asks of a run, held against what the run will do, before anything is computed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from evalkit.config import RunConfig
from evalkit.errors import InputError
from evalkit.gate.policy import Policy

# Kinds of record that no stage but `layers` writes.
OF_LAYERS = (
    "layer", "selection", "range", "multiple", "divergence", "position", "phase", "confidence", "worst_token",
    "attribution",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What a task's samples will name. `metrics` is None where only the task's own code knows them."""

    metrics: Sequence[str] | None
    filters: Sequence[str]


def refuse_unscored(policy: Policy, where: str, tasks: Mapping[str, Scored]) -> None:
    """Refuse a policy of whose endpoints a run would score none, or not all.

    Args:
        policy: what the run is for.
        where: begins the message, such as `policy.toml`.
        tasks: what is scored, each group as its tasks.

    Raises:
        InputError: a task is not among them, or has not the metric or filter.
    """
    for number, endpoint in enumerate(policy.endpoints):
        place = f"{where}: endpoints[{number}]"
        if endpoint.task not in tasks:
            scores = f"scores {', '.join(tasks)}" if tasks else "scores no tasks"
            raise InputError(
                f"{place}: task {endpoint.task} is not scored{_meant(endpoint.task, list(tasks))}; this run {scores}: add it "
                "to tasks, or leave --policy out"
            )
        held = tasks[endpoint.task]
        for key, wanted, there in (
            ("metric", endpoint.metric, held.metrics),
            ("filter", endpoint.filter, held.filters),
        ):
            if there is not None and wanted not in there:
                raise InputError(
                    f"{place}: {endpoint.task} has no {key} {wanted!r}{_meant(wanted, there)}; there are {', '.join(there)}"
                )


def refuse_unmeasured(policy: Policy, where: str, config: RunConfig) -> None:
    """Refuse a policy that limits what a run would not record.

    Raises:
        InputError: a limit is on what a stage records that is left out.
    """
    layers, texts = "layers" in config.stages, bool(config.kld_texts or config.kld_run)
    missing = dict.fromkeys(OF_LAYERS, "add layers to stages") if not layers else {}
    if layers and not config.attribution:
        missing["attribution"] = "set attribution=true"
    if layers and not config.phase_tokens:
        missing["phase"] = "set phase_tokens"
    if not layers and not ("kld" in config.stages and texts):
        missing["kld"] = "add layers to stages"
    for number, limit in enumerate(policy.limits):
        if limit.kind in missing:
            raise InputError(
                f"{where}: limits[{number}] ({limit.name}) is on {limit.figure}, which this run does not record: "
                f"{missing[limit.kind]}, or leave --policy out"
            )


def refuse_absent(policy: Policy, where: str, candidates: Mapping[str, str]) -> None:
    """Refuse a policy whose candidates a run has not, or has as one.

    Args:
        policy: what the run is for.
        where: begins the message, such as `policy.toml`.
        candidates: what each resolved to, by what was asked for.

    Raises:
        InputError: one that decides or is a baseline is not among them, or two that are compared resolved to one.
    """
    full = {name: resolved for asked, resolved in candidates.items() for name in (asked, resolved)}
    for key in ("decide", "baselines"):
        for number, name in enumerate(getattr(policy, key)):
            if name not in full:
                there = ", ".join(f"{asked} ({resolved})" for asked, resolved in candidates.items())
                raise InputError(
                    f"{where}: {key}[{number}]: {name} is no candidate of this run{_meant(name, list(full))}; there are "
                    f"{there}: add it to candidates, or leave --policy out"
                )
    decided = {full[name]: name for name in policy.decide}
    for number, name in enumerate(policy.baselines):
        if full[name] in decided:
            raise InputError(
                f"{where}: baselines[{number}]: {name} and {decided[full[name]]}, which is in decide, are both "
                f"{full[name]} here: nothing is lost against itself"
            )


def unplanned(policy: Policy, documents: int) -> str:
    """What to say of a number of documents at which the policy's verdict will be INCONCLUSIVE; empty where it is one."""
    if not policy.planned or documents in policy.planned:
        return ""
    looks = "" if policy.looks == 1 else f" a look, up to {policy.planned[-1]:,}"
    return (
        f"policy {policy.name} plans {policy.documents:,} documents{looks}, and task_documents is {documents:,}: the gate "
        "will find that INCONCLUSIVE"
    )


def _meant(word: str, known: Sequence[str]) -> str:
    close = get_close_matches(word, known, 1)
    return f", did you mean {close[0]}?" if close else ""
