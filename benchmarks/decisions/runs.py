"""Cells as run directories, judged by evalkit's own gate.

Environment, policy, candidates and layers come from one run of evalkit's pipeline, the frame, which was made before
anything was scored and is the same for all samples. What differs between the samples are the answers. Damage is planted
into the candidate's rows without the gate being told: it meets them under the candidate's name.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.decisions import cells
from benchmarks.decisions.cells import Cell
from evalkit.config import RunConfig
from evalkit.errors import InputError
from evalkit.evaluate.tasks import task_records
from evalkit.gate.policy import Policy
from evalkit.gate.verdict import Judged, Judgement, judge
from evalkit.records import (
    CandidateRecord,
    PolicyRecord,
    RunDirectory,
    SampleRecord,
    StageRecord,
    only,
)

LAYERS_TOKENS = 600


def frame(out: Path, policy: Policy, config: RunConfig) -> RunDirectory:
    """The run that all samples share: made where there is none, gone on with where it was stopped.

    Raises:
        InputError: the one that is there stored another policy.
    """
    from evalkit import pipeline, prepare

    folder = out / "frame"
    there = sorted(folder.glob("*/run.json"))
    directory = RunDirectory(there[-1].parent) if there else None
    if directory is None or not directory.done("layers"):
        # Its tasks are scored elsewhere; a policy is refused for a run without them.
        scored = tuple(dict.fromkeys(endpoint.task for endpoint in policy.endpoints))
        prepared = prepare.prepare(config.with_values(out=folder, stages=("layers", "tasks"), tasks=scored))
        if directory is None:
            written = prepared.config.with_values(stages=("layers",), tasks=())
            directory = RunDirectory.create(folder, "decisions", written.to_json(), "decisions")
        pipeline.describe(directory, prepared)
        pipeline.compare_layers(directory, prepared)
    stored = only(directory.read(), PolicyRecord)
    if [record.sha256 for record in stored] != [policy.sha256]:
        raise InputError(f"{directory.path} was begun under another policy: score into another folder")
    return directory


def find_frame(out: Path) -> RunDirectory:
    """The frame of a folder of cells.

    Raises:
        InputError: there is none.
    """
    there = sorted((out / "frame").glob("*/run.json"))
    if not there:
        raise InputError(f"no frame in {out}: the stage `controls` or `doses` makes it first")
    return RunDirectory(there[-1].parent)


def verdict(
    shared: RunDirectory, policy: Policy, baseline: Cell, candidate: Cell, planted: Cell
) -> tuple[Judgement, Judged]:
    """Judge one sample.

    Args:
        shared: the frame.
        policy: of one candidate, baseline and endpoint.
        baseline: the baseline's answers.
        candidate: the candidate's, whatever was done to its rows.
        planted: those of the baseline with the policy's own damage, for assay sensitivity.

    Raises:
        InputError: the cells are not of one sample, or not what they are given as.
    """
    if planted.wanted.noise != policy.damage.noise:
        raise InputError(f"{planted.wanted.arm}: the policy plants {policy.damage.noise:g}")
    names = {
        record.requested: record.candidate for record in only(shared.read(), CandidateRecord)
    }  # cells are of candidates as they are asked for
    answered = [
        (_named(baseline, names), baseline),
        (_named(planted, names), planted),
        (_named(replace(candidate, wanted=replace(candidate.wanted, noise=0.0)), names), candidate),
    ]
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory.create(Path(folder), "sample", _config(shared, baseline), shared.command)
        with run.stage("environment") as write:
            for record in shared.read():
                if not isinstance(record, StageRecord):
                    write.write(record)
        with run.stage("layers"):
            pass
        for samples, cell in answered:
            with run.stage(f"tasks {samples[0].candidate}") as write:
                for sample in samples:
                    write.write(sample)
                for record in task_records(
                    samples[0].candidate,
                    answered[0][0][0].candidate,
                    answered[0][0],
                    samples,
                    wall_s=cell.wall_s,
                    mean_context_tokens=cell.mean_context_tokens,
                    share_over_topk=cell.share_over_topk,
                    share_stored_rows=cell.share_stored_rows,
                ):
                    write.write(record)
        judgement = judge(run.path, policy)
    (judged,) = judgement.candidates
    return judgement, judged


def _named(cell: Cell, names: dict[str, str]) -> list[SampleRecord]:
    """A cell's samples under the name that the frame resolved its candidate to."""
    resolved = names.get(cell.wanted.candidate)
    if resolved is None:
        raise InputError(f"{cell.wanted.candidate} is not in the frame, which has {', '.join(names)}")
    if cell.facts["resolved"] != resolved:
        raise InputError(f"{cell.wanted.arm} ran as {cell.facts['resolved']}, the frame has {resolved}")
    arm = replace(cell.wanted, candidate=resolved).arm
    return [replace(sample, candidate=arm) for sample in cells.samples(cell)]


def _config(shared: RunDirectory, cell: Cell) -> dict[str, object]:
    wanted = cell.wanted
    return shared.config | {
        "tasks": [wanted.task],
        "task_documents": wanted.n,
        "batch_size": wanted.batch_size,
        "seed": wanted.seed,
    }
