"""Made-up nightly runs with a planted change, as run directories and as a store."""

import json
import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin

from evalkit.records import (
    CandidateRecord,
    EnvironmentRecord,
    Record,
    StageRecord,
    TaskRecord,
    TokenRecord,
    VerdictRecord,
    to_line,
)
from evalkit.report.history import History
from evalkit.schema import HINTS, SCHEMA
from tests.report.conftest import layer_record

FIRST = datetime(2026, 1, 1, 2, tzinfo=UTC)
BF16, DAMAGED, SOUND = "bf16@reference", "fp8_e4m3:one@flashinfer", "fp8_ds_mla@flashmla"
SIZES = {BF16: 1152, DAMAGED: 576, SOUND: 656}
ERRORS = {BF16: 0.0, DAMAGED: 0.03, SOUND: 0.025}
TASKS = ("needle", "registers")
GUILTY = 2
R = TypeVar("R", bound=Record)


def filled(kind: type[R], **values: Any) -> R:
    """A record with the given fields, the others empty."""
    least = {"n": 1} if kind.kind == TaskRecord.kind else {}  # a score is over one document at least
    return kind(**{name: _empty(hint) for name, hint in HINTS[kind.kind].items()} | least | values)


def _empty(hint: Any) -> Any:
    if isinstance(hint, UnionType) and NoneType in get_args(hint):
        return None
    return (get_origin(hint) or hint)()


def commit_of(night: int) -> str:
    return f"{night:04d}" + "c0ffee" * 6


def write_run(
    out: Path,
    night: int,
    records: Sequence[Record],
    *,
    name: str = "nightly",
    started: datetime | None = None,
    page: str | None = "<!doctype html><title>a report</title><section id='layers'><h2>Layers</h2></section>",
    engine: str | None = None,
) -> Path:
    """A run directory as an ended run leaves it."""
    when = started or FIRST + timedelta(days=night)
    run = out / f"{when:%Y-%m-%dT%H-%M-%SZ}-{name}"
    run.mkdir(parents=True)
    asked = {
        "schema": SCHEMA, "name": name, "started_utc": when.isoformat(timespec="seconds"), "command": f"evalkit run --config {name}.toml",
        "config": {"name": name} | ({} if engine is None else {"engine": engine}),
    }  # fmt: skip
    (run / "run.json").write_text(json.dumps(asked))
    ended = [*records, StageRecord(stage="report", wall_s=1.0)]
    (run / "records.jsonl").write_text("".join(map(to_line, ended)))
    if page is not None:
        (run / "report.html").write_text(page)
    return run


def night_records(
    night: int,
    rng: random.Random,
    *,
    drop_at: int | None = None,
    drop: float = 0.02,
    layers: int = 4,
    gpu: str | None = "NVIDIA H200, SM90, CUDA 13.0",
    verdict: str = "NON-INFERIOR",
    torch: str = "2.11.0",
) -> list[Record]:
    """One night: scores with an sd of 0.25 point; from `drop_at` on, `DAMAGED` scores less and its layer `GUILTY` errs twice as much."""
    hit = drop_at is not None and night >= drop_at
    records: list[Record] = [
        filled(
            EnvironmentRecord, commit=commit_of(night), packages={"torch": torch}, gpu=gpu, checkpoint="dsa-nano",
            checkpoint_sha256="c" * 64, dtype="bfloat16", started_utc=(FIRST + timedelta(days=night)).isoformat(),
        )
    ]  # fmt: skip
    for candidate, size in SIZES.items():
        bad = hit and candidate == DAMAGED
        error = ERRORS[candidate]
        records.append(
            filled(
                CandidateRecord,
                candidate=candidate,
                format=candidate.partition("@")[0].partition(":")[0],
                requested=candidate,
                backend=candidate.partition("@")[2],
                row_bytes_per_token=size,
                bytes_per_token_read_back=size,
            )
        )
        for mode in ("isolated", "propagated"):
            for layer in range(layers):
                wrong = 2.2 if bad and layer == GUILTY else 1.0
                value = error * (1 + 0.1 * layer) * wrong * rng.gauss(1, 0.002)
                records.append(layer_record(candidate, layer, value, mode=mode))
        records.append(
            filled(
                TokenRecord,
                candidate=candidate,
                phase="decode",
                frozen="none",
                kl_mean_nats=error / 10 * (1.8 if bad else 1) * rng.gauss(1, 0.01),
                n=2048,
            )
        )
        for place, task in enumerate(TASKS):
            score = 0.93 - 0.04 * place - (drop if bad and place == 0 else 0) + rng.gauss(0, 0.0025)
            records.append(
                filled(
                    TaskRecord,
                    candidate=candidate,
                    baseline=BF16,
                    task=task,
                    metric="exact_match",
                    filter="none",
                    n=1000,
                    score=score,
                    score_lower=score - 0.015,
                    score_upper=score + 0.015,
                )
            )
        if candidate != BF16:
            said = "WORSE" if bad else verdict
            records.append(
                filled(
                    VerdictRecord,
                    candidate=candidate,
                    check="candidate",
                    verdict=said,
                    reason=f"It is {said}.",
                    policy="default",
                )
            )
    return records


def make_store(
    path: Path,
    nights: int,
    *,
    drop_at: int | None = None,
    layers: int = 4,
    seed: int = 0,
    page: str | None = None,
    newest: datetime | None = None,
) -> History:
    """A store of that many nights, added as `evalkit history add` adds them."""
    first = FIRST if newest is None else newest - timedelta(days=nights - 1)
    rng = random.Random(seed)
    history = History(path / "store", create=True)
    given = {} if page is None else {"page": page}
    for night in range(nights):
        torch = "2.12.0" if drop_at is not None and night >= drop_at else "2.11.0"
        records = night_records(night, rng, drop_at=drop_at, layers=layers, torch=torch)
        history.add(write_run(path / "runs", night, records, started=first + timedelta(days=night), **given))
    return history
