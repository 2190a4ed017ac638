"""What a run leaves behind: typed records, one JSON object a line, in one directory.

A run directory holds everything its report needs:

    run.json        what was asked: configuration, command, start
    records.jsonl   every record but the samples
    samples/        one file a candidate: each document's response and score
    report.html, summary.md

A run proceeds in stages, and a stage counts whole or not at all. Its records go to `<stage>.jsonl.tmp`; when it
ends, its samples are merged into samples/ and then records.jsonl is replaced by itself plus the stage's records
plus one `StageRecord`. That replacement is the only commit: a run killed before it has lost the stage and nothing
else, and `done(stage)` says where to go on.
"""

import json
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Self, TypeVar, get_args, get_origin, get_type_hints

from evalkit.errors import InputError

SCHEMA = 1

R = TypeVar("R", bound="Record")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line of records.jsonl. A number that does not exist is None, never 0 or NaN."""

    kind: ClassVar[str]


@dataclass(frozen=True, kw_only=True)
class EnvironmentRecord(Record):
    """Where and with what the run was made; `flags` are the numerics switches as they were set."""

    kind: ClassVar[str] = "environment"
    commit: str | None
    python: str
    packages: dict[str, str]
    device: str
    gpu: str | None
    dtype: str
    checkpoint: str
    checkpoint_sha256: str
    flags: dict[str, bool | str]
    command: str
    started_utc: str


@dataclass(frozen=True, kw_only=True)
class CandidateRecord(Record):
    """Proof of what ran: the resolved format and kernel, and the bytes read back for each token."""

    kind: ClassVar[str] = "candidate"
    candidate: str
    format: str
    scales: str
    backend: str
    kernel: str
    index: str
    read: str
    row_bytes_per_token: int
    bytes_per_token_read_back: int | None
    requested: str
    note: str


@dataclass(frozen=True, kw_only=True)
class LayerRecord(Record):
    """One probe at one layer against the reference; `rung` is format, kernel, total or `floor:<kind>`."""

    kind: ClassVar[str] = "layer"
    candidate: str
    layer: int | None
    phase: str
    mode: str
    probe: str
    rung: str
    cosine: float | None
    relative_l2: float | None
    symmetric_distance: float | None
    max_abs_error: float | None
    max_abs_token: int | None
    max_abs_got: float | None
    max_abs_ref: float | None
    sqnr_db: float | None
    abs_p50: float | None
    abs_p99: float | None
    abs_p999: float | None
    token_relative_l2_mean: float | None
    nonfinite: int
    frozen: str
    n: int


@dataclass(frozen=True, kw_only=True)
class SelectionRecord(Record):
    """Which of the reference's top-k keys a candidate kept, over n query tokens."""

    kind: ClassVar[str] = "selection"
    candidate: str
    layer: int
    phase: str
    mode: str
    recall_mean: float | None
    recall_min: float | None
    margin_p50: float | None
    mass_lost_mean: float | None
    n: int


@dataclass(frozen=True, kw_only=True)
class RangeRecord(Record):
    """How one part of a layer's rows fills its format; shares are of n values."""

    kind: ClassVar[str] = "range"
    candidate: str
    layer: int
    part: str
    max_abs: float | None
    saturated_share: float | None
    subnormal_share: float | None
    zero_share: float | None
    headroom: float | None
    scale: float | None
    n: int


@dataclass(frozen=True, kw_only=True)
class TokenRecord(Record):
    """KL divergence of the candidate's next-token distribution from the reference's, in nats."""

    kind: ClassVar[str] = "kld"
    candidate: str
    phase: str
    frozen: str
    kl_mean_nats: float | None
    kl_p50_nats: float | None
    kl_p90_nats: float | None
    kl_p99_nats: float | None
    kl_max_nats: float | None
    top1_agreement: float | None
    n: int


@dataclass(frozen=True, kw_only=True)
class TaskRecord(Record):
    """A task's score and its loss against the baseline on the same documents, with intervals."""

    kind: ClassVar[str] = "task"
    candidate: str
    baseline: str
    task: str
    metric: str
    filter: str
    n: int
    score: float
    score_lower: float | None
    score_upper: float | None
    baseline_score: float
    loss: float
    loss_lower: float | None
    loss_upper: float | None
    interval_method: str
    lost: int | None
    gained: int | None
    mcnemar_p: float | None
    wall_s: float
    mean_context_tokens: float | None
    share_over_topk: float | None


@dataclass(frozen=True, kw_only=True)
class SampleRecord(Record):
    """One document's answer; it lies in samples/, not in records.jsonl."""

    kind: ClassVar[str] = "sample"
    candidate: str
    task: str
    doc_id: int
    prompt_sha256: str
    target_sha256: str
    filter: str
    metric: str
    score: float
    response: str


@dataclass(frozen=True, kw_only=True)
class StageRecord(Record):
    """A stage ended; everything it wrote precedes this line."""

    kind: ClassVar[str] = "stage"
    stage: str
    wall_s: float


KINDS: dict[str, type[Record]] = {cls.kind: cls for cls in Record.__subclasses__()}


def only(records: Sequence[Record], kind: type[R]) -> list[R]:
    """The records of one kind, in their order."""
    return [record for record in records if isinstance(record, kind)]


def read(run: Path) -> list[Record]:
    """Every record of a run directory (or of one .jsonl file), samples excepted.

    Raises:
        InputError: there is no such run, or a line is cut off, of an unknown schema or kind, or malformed.
    """
    path = run / "records.jsonl" if run.is_dir() else run
    if not path.is_file():
        raise InputError(f"no run at {run}: a run directory holds records.jsonl")
    return list(_parse(path))


def read_samples(run: Path) -> list[SampleRecord]:
    """Every sample of a run directory, candidate by candidate."""
    return [
        record
        for path in sorted((run / "samples").glob("*.jsonl"))
        for record in only(read(path), SampleRecord)
    ]


def to_line(record: Record) -> str:
    """A record as its JSON line.

    Raises:
        ValueError: a number is NaN or infinite.
        TypeError: a value is not of its field's type (a tensor or numpy scalar is not a number here).
    """
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    for name, value in values.items():
        where = f"{type(record).__name__}.{name} is {value!r}"
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(
                f"{where}: count what is not finite in a field of its own and write None ({_label(record)})"
            )
        if not _fits(value, _hints(type(record))[name]):
            raise TypeError(f"{where}, not {_hints(type(record))[name]} ({_label(record)})")
    return json.dumps({"schema": SCHEMA, "kind": record.kind, **values}, allow_nan=False) + "\n"


class RecordWriter:
    """Appends records to a file as JSON lines; what was written is on disk once it is closed."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Append one record; `to_line` says what it refuses."""
        self._file.write(to_line(record))

    def close(self) -> None:
        """Flush to disk and close."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class RunDirectory:
    """A run on disk: what was asked for, which stages are done, and the way to add one."""

    def __init__(self, path: Path) -> None:
        """Open an existing run.

        Raises:
            InputError: `path` is not a run directory, or one that this version cannot read.
        """
        self.path = path
        try:
            self._run = json.loads((path / "run.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"no run at {path}: a run directory holds run.json") from None
        except json.JSONDecodeError as error:
            raise InputError(f"{path / 'run.json'} is not JSON: {error}") from None
        if not isinstance(self._run, dict) or self._run.get("schema") != SCHEMA:
            raise InputError(f"{path / 'run.json'} is not of schema {SCHEMA}, the one this version reads")

    @classmethod
    def create(cls, out: Path, name: str, config: dict[str, Any], command: str) -> Self:
        """Make `out/<UTC time>-<name>` whole, or not at all.

        Args:
            out: the directory of runs; made when missing.
            name: the run's name, as in its configuration.
            config: the configuration as JSON values, to resume from.
            command: what would repeat the run.
        """
        started = datetime.now(UTC)
        made = out / f".{name}-{os.getpid()}.tmp"
        made.mkdir(parents=True)
        run = {"schema": SCHEMA, "name": name, "started_utc": started.isoformat(timespec="seconds")}
        _replace(
            made / "run.json", json.dumps({**run, "command": command, "config": config}, indent=2) + "\n"
        )
        _replace(made / "records.jsonl", "")
        path = free = out / f"{started:%Y-%m-%dT%H-%M-%SZ}-{name}"
        for count in range(2, 1000):
            if not free.exists():
                break
            free = path.with_name(f"{path.name}-{count}")
        made.rename(free)
        return cls(free)

    @property
    def config(self) -> dict[str, Any]:
        """The configuration the run was started with, as JSON values."""
        return dict(self._run["config"])

    @property
    def command(self) -> str:
        """The command that started the run."""
        return str(self._run["command"])

    @property
    def started_utc(self) -> str:
        """When the run started, ISO 8601."""
        return str(self._run["started_utc"])

    def read(self) -> list[Record]:
        """The records of the stages that are done."""
        return read(self.path)

    def done(self, stage: str) -> bool:
        """Whether a stage has ended; its records are then all there."""
        return any(record.stage == stage for record in only(self.read(), StageRecord))

    @contextmanager
    def stage(self, name: str) -> Iterator[RecordWriter]:
        """Write one stage's records and samples; they count when the block ends without an error.

        Raises:
            ValueError: the stage is done already.
        """
        if self.done(name):
            raise ValueError(f"stage {name!r} of {self.path} is done already")
        pending = self.path / f"{file_name(name)}.jsonl.tmp"
        pending.unlink(missing_ok=True)
        began = time.monotonic()
        try:
            with RecordWriter(pending) as writer:
                yield writer
            self._commit(list(_parse(pending)), StageRecord(stage=name, wall_s=time.monotonic() - began))
        finally:
            pending.unlink(missing_ok=True)

    def _commit(self, written: list[Record], end: StageRecord) -> None:
        samples = only(written, SampleRecord)
        for candidate in dict.fromkeys(sample.candidate for sample in samples):
            path = self.path / "samples" / f"{file_name(candidate)}.jsonl"
            path.parent.mkdir(exist_ok=True)
            before = only(read(path), SampleRecord) if path.exists() else []
            # A stage killed between this file and records.jsonl runs again: its samples replace their former selves.
            merged = {
                (sample.task, sample.doc_id, sample.filter, sample.metric): sample
                for sample in [*before, *(sample for sample in samples if sample.candidate == candidate)]
            }
            _replace(path, "".join(map(to_line, merged.values())))
        kept = [record for record in written if not isinstance(record, SampleRecord)]
        path = self.path / "records.jsonl"
        _replace(path, path.read_text(encoding="utf-8") + "".join(map(to_line, [*kept, end])))


def file_name(text: str) -> str:
    """A candidate's or stage's name as a file name that every file system and artifact store takes."""
    return re.sub(r"[^A-Za-z0-9_.+=@-]", "-", text)


def _replace(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _parse(path: Path) -> Iterator[Record]:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number} of {len(lines)}"
        try:
            values = json.loads(line, parse_constant=_refuse_constant)
        except json.JSONDecodeError:
            if number == len(lines) and not text.endswith("\n"):
                raise InputError(
                    f"{where}: the line is cut off, so records are missing; run it again"
                ) from None
            raise InputError(f"{where}: not a JSON object") from None
        except ValueError as error:
            raise InputError(f"{where}: {error}") from None
        yield _record(values, where)


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number that a record may hold")


def _record(values: object, where: str) -> Record:
    if not isinstance(values, dict):
        raise InputError(f"{where}: not a JSON object")
    schema, kind = values.pop("schema", None), values.pop("kind", None)
    if schema != SCHEMA:
        raise InputError(
            f"{where}: schema {schema!r} is unknown; this version of evalkit reads schema {SCHEMA}"
        )
    if kind not in KINDS:
        raise InputError(f"{where}: kind {kind!r} is unknown; known are {', '.join(sorted(KINDS))}")
    cls = KINDS[kind]
    hints = _hints(cls)
    if values.keys() != hints.keys():
        missing, unknown = sorted(hints.keys() - values.keys()), sorted(values.keys() - hints.keys())
        raise InputError(
            f"{where}: a {kind} record lacks {missing or 'nothing'} and has unknown {unknown or 'nothing'}"
        )
    for name, hint in hints.items():
        if not _fits(values[name], hint):
            raise InputError(f"{where}: {kind}.{name} is {values[name]!r}, not {hint}")
    return cls(**values)


@cache
def _hints(cls: type[Record]) -> dict[str, Any]:
    return {name: hint for name, hint in get_type_hints(cls).items() if get_origin(hint) is not ClassVar}


def _fits(value: object, hint: Any) -> bool:
    if isinstance(hint, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is dict:
        key, item = get_args(hint)
        return isinstance(value, dict) and all(_fits(k, key) and _fits(v, item) for k, v in value.items())
    if hint in (int, float):  # bool is an int to Python, and JSON writes 2.0 and 2 alike
        return type(value) in ((int,) if hint is int else (int, float))
    return isinstance(value, hint)


def _label(record: Record) -> str:
    """The fields that say which record it is, for messages."""
    return ", ".join(f"{name}={value!r}" for name, value in asdict(record).items() if isinstance(value, str))
