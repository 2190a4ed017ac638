"""Runs made of records alone: one endpoint, a baseline, one candidate, a control pair and planted damage."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from evalkit.arm_names import damage_arm
from evalkit.gate.policy import (
    Coverage,
    Damage,
    Limit,
    Policy,
    PrimaryEndpoint,
    Scope,
)
from evalkit.records import (
    CandidateRecord,
    EnvironmentRecord,
    PolicyRecord,
    Record,
    RunDirectory,
    SampleRecord,
    TaskRecord,
)
from tests.report.conftest import layer_record

BASELINE, CANDIDATE = "bf16@flashmla", "fp8_ds_mla@flashmla"
DAMAGED, CONTROL = damage_arm(BASELINE, 0.2), f"{BASELINE}, batches of 4"
SHA = "c" * 64
DOCUMENTS = 400


@pytest.fixture
def policy() -> Policy:
    """One endpoint at a margin of 5 points and one limit."""
    return Policy(
        name="made-up",
        decide=("fp8_ds_mla",),
        baselines=("bf16",),
        scope=Scope(checkpoints={"nano": SHA}, gpus=("NVIDIA H200",), kernels=("a kernel",), heads=(16,)),
        endpoints=(PrimaryEndpoint(task="needle", metric="exact_match", filter="answer", margin=0.05),),
        coverage=Coverage(over_topk=0.9, stored_rows=0.99, truncated=0.01),
        damage=Damage(noise=0.2, loss_at_most=0.2),
        limits=(
            Limit(
                name="attention",
                figure="layer.relative_l2",
                where={"probe": "attention", "rung": "total"},
                at_most=0.05,
            ),
        ),
    )


def scores(right: int, lost: int = 0, gained: int = 0, n: int = DOCUMENTS) -> list[float]:
    """Of a baseline right on the first `right` documents, with so many of those lost and of the others gained."""
    return [float(lost <= i < right or right <= i < right + gained) for i in range(n)]


def recounted(before: dict[int, float], after: dict[int, float]) -> dict[str, Any]:
    """What a run records of these scores by document."""
    pairs = [(before[document], score) for document, score in after.items() if document in before]
    binary = {*before.values(), *after.values()} <= {0.0, 1.0}
    return {
        "n": len(after),
        "score": fmean(after.values()),
        "baseline_score": fmean(before.values()) if before else 0.0,
        "loss": fmean(b - a for b, a in pairs) if pairs else 0.0,
        "lost": sum(b > a for b, a in pairs) if binary else None,
        "gained": sum(b < a for b, a in pairs) if binary else None,
    }


Answers = dict[str, list[float]]


@pytest.fixture
def make_run(tmp_path: Path, policy: Policy) -> Callable[..., Path]:
    """`make_run(lost=, gained=, …)`: a finished run under `policy`, sound but for what is changed.

    environment, candidate, baseline, task: changes of those records; answers: by arm, in place of its own; sample:
    changes a SampleRecord, or drops it with None; layers: (candidate's relative L2, its changes); written: records that
    are written with the layers; stored: the policy it stored.
    """

    def make(
        lost: int = 6,
        gained: int = 6,
        *,
        right: int = 320,
        environment: dict[str, Any] | None = None,
        candidate: dict[str, Any] | None = None,
        baseline: dict[str, Any] | None = None,
        task: dict[str, Any] | None = None,
        answers: Answers | None = None,
        sample: Callable[[SampleRecord], SampleRecord | None] = lambda sample: sample,
        layers: tuple[float, dict[str, Any]] = (0.02, {}),
        written: Sequence[Record] = (),
        documents: int = DOCUMENTS,
        stored: Policy | None = policy,
        config: dict[str, Any] | None = None,
        name: str = "made-up",
    ) -> Path:
        arms = {
            CONTROL: scores(right, 1, 1, documents),
            BASELINE: scores(right, n=documents),
            DAMAGED: scores(right, 40, 0, documents),
            CANDIDATE: scores(right, lost, gained, documents),
        } | (answers or {})
        made = RunDirectory.create(
            tmp_path, name, {"task_documents": documents, "batch_size": 8, **(config or {})}, "evalkit run"
        )
        with made.stage("environment") as write:
            write.write(
                EnvironmentRecord(
                    **{
                        "commit": "0123",
                        "python": "3.12.1",
                        "packages": {"torch": "2.11.0"},
                        "device": "Linux, cuda",
                        "gpu": "NVIDIA H200, SM90, CUDA 13.0",
                        "dtype": "bfloat16",
                        "checkpoint": "nano",
                        "checkpoint_sha256": SHA,
                        "flags": {"tf32": False},
                        "command": "evalkit run",
                        "started_utc": "2026-01-31T12:00:00+00:00",
                        **(environment or {}),
                    }
                )
            )
            if stored is not None:
                write.write(PolicyRecord(name=stored.name, sha256=stored.sha256, text=stored.to_json()))
            for full, size, changes in ((BASELINE, 1152, baseline or {}), (CANDIDATE, 656, candidate or {})):
                format_ = full.partition("@")[0]
                values = {
                    "format": format_,
                    "scales": "one",
                    "backend": "flashmla",
                    "kernel": "a kernel; index scores: torch",
                    "index": "model",
                    "read": "native",
                    "heads": 16,
                    "row_bytes_per_token": size,
                    "bytes_per_token_read_back": size,
                    "requested": format_,
                    "note": "",
                }
                write.write(CandidateRecord(candidate=full, **(values | changes)))
        with made.stage("layers") as write:
            relative_l2, changes = layers
            for layer in range(2):
                write.write(layer_record(BASELINE, layer, 0.003))
                write.write(layer_record(CANDIDATE, layer, relative_l2, **changes))
                write.write(layer_record(CANDIDATE, layer, relative_l2, rung="format", **changes))
            for record in written:
                write.write(record)
        kept_scores: dict[str, dict[int, float]] = {}
        for arm, answered in arms.items():
            own = kept_scores.setdefault(arm, {})
            with made.stage(f"tasks {arm}") as write:
                for doc_id, score in enumerate(answered):
                    kept = sample(
                        SampleRecord(
                            candidate=arm,
                            task="needle",
                            doc_id=doc_id,
                            prompt_sha256=f"{doc_id:064}",
                            target_sha256="b" * 64,
                            filter="answer",
                            metric="exact_match",
                            score=score,
                            generated_tokens=4,
                            truncated=False,
                            response="blue",
                        )
                    )
                    if kept is not None:
                        write.write(kept)
                        own[doc_id] = kept.score
                if own and arm in (BASELINE, CANDIDATE):
                    paired_with = CONTROL if arm == BASELINE else BASELINE
                    counted = recounted(kept_scores.get(paired_with, {}), own)
                    values = {
                        "baseline": paired_with,
                        "task": "needle",
                        "metric": "exact_match",
                        "filter": "answer",
                        "score_lower": 0.7,
                        "score_upper": 0.9,
                        "loss_lower": -0.1,
                        "loss_upper": 0.1,
                        "interval_method": "tango",
                        "mcnemar_p": 1.0,
                        "wall_s": 36.0,
                        "mean_context_tokens": 4096.0,
                        "share_over_topk": 1.0,
                        "share_stored_rows": 1.0,
                    }
                    write.write(TaskRecord(candidate=arm, **(values | counted | (task or {}))))
        return made.path

    return make


@pytest.fixture
def with_policy(policy: Policy) -> Callable[..., Policy]:
    """`with_policy(looks=2)`: the policy with changes."""
    return lambda **changes: replace(policy, **changes)
