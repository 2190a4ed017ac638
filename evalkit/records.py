"""What a run leaves behind: typed records, one JSON object a line, in one directory.

A run directory holds everything its report needs:

    run.json        what was asked: configuration, command, start
    records.jsonl   every record but the samples
    samples/        one file a candidate: each document's response and score
    report.html, summary.md

A run proceeds in stages, and a stage counts whole or not at all. Its records go to `<stage>.jsonl.tmp`; when it
ends, its samples are merged into samples/ and then records.jsonl is replaced by itself plus the stage's records
plus one `StageRecord`. That replacement is the only commit: a run killed before it has lost the stage and nothing
else, and `done(stage)` says where to go on. A stage that keeps its own state (the layers' does, layer by layer) may
go on in its middle. Several processes may end stages of one run, as a gate does beside a run: each waits for the lock
of run.json, and a stage that one of them is writing is refused to the others.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, TypeVar

from evalkit.errors import InputError
from evalkit.files import locked, write_whole
from evalkit.schema import (
    SCHEMA,
    AnswerLengthRecord,
    AnswerShareRecord,
    AttributionRecord,
    CandidateRecord,
    ConfidenceRecord,
    DivergenceRecord,
    EnvironmentRecord,
    FirstDifferenceRecord,
    FloorRecord,
    LayerRecord,
    MissingScaleRecord,
    MultipleRecord,
    PhaseRecord,
    PolicyRecord,
    PositionRecord,
    ProfileRecord,
    RangeRecord,
    Record,
    SampleRecord,
    SelectionRecord,
    StageRecord,
    TaskRecord,
    TokenRecord,
    VerdictRecord,
    WorstTokenRecord,
    from_values,
    to_line,
)

__all__ = [
    "AnswerLengthRecord",
    "AnswerShareRecord",
    "AttributionRecord",
    "CandidateRecord",
    "ConfidenceRecord",
    "DivergenceRecord",
    "EnvironmentRecord",
    "FirstDifferenceRecord",
    "FloorRecord",
    "LayerRecord",
    "MissingScaleRecord",
    "MultipleRecord",
    "PhaseRecord",
    "PolicyRecord",
    "PositionRecord",
    "ProfileRecord",
    "RangeRecord",
    "Record",
    "RecordWriter",
    "RunDirectory",
    "SampleRecord",
    "SelectionRecord",
    "StageRecord",
    "TaskRecord",
    "TokenRecord",
    "VerdictRecord",
    "WorstTokenRecord",
    "file_name",
    "last_judgement",
    "only",
    "output_probe",
    "read",
    "read_samples",
    "to_line",
    "write_whole",
]

R = TypeVar("R", bound=Record)


def only(records: Sequence[Record], kind: type[R]) -> list[R]:
    """The records of one kind, in their order."""
    return [record for record in records if isinstance(record, kind)]


def last_judgement(records: Sequence[Record]) -> list[VerdictRecord]:
    """The records of the gate's last judgement of a run; empty where it was not judged."""
    judged = only(records, VerdictRecord)
    return [r for r in judged if r.judged_utc == judged[-1].judged_utc]


def output_probe(records: Sequence[Record]) -> str:
    """The probe that stands for a layer's attention output: `values`, after W_UV, where an engine shows none before."""
    probes = {record.probe for record in only(records, LayerRecord)}
    return "values" if "values" in probes and "attention" not in probes else "attention"


def read(run: Path) -> list[Record]:
    """Every record of a run directory (or of one .jsonl file), samples excepted.

    Raises:
        InputError: there is no such run, or a line is cut off, of an unknown schema or kind, or malformed.
    """
    path = run / "records.jsonl" if run.is_dir() else run
    return [from_values(_values(line, where), where) for line, where in _lines(path)]


def read_samples(run: Path, candidate: str | None = None) -> list[SampleRecord]:
    """Every sample of a run directory, candidate by candidate; or those of one, from its own file."""
    name = "*" if candidate is None else file_name(candidate)
    return [
        record
        for path in sorted((run / "samples").glob(f"{name}.jsonl"))
        for record in only(read(path), SampleRecord)
        if candidate in (None, record.candidate)
    ]


class RecordWriter:
    """Appends records to a file as JSON lines; what was written is on disk once it is closed."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Append one record; `to_line` says what it refuses."""
        self._file.write(to_line(record))

    def sync(self) -> int:
        """Put on disk what was written; returns the file's length in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Flush to disk and close."""
        self.sync()
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
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"no run at {path}: a run directory holds run.json") from None
        except OSError as error:
            raise InputError(f"{path / 'run.json'} cannot be read: {error.strerror}") from None
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InputError(f"{path / 'run.json'} is not JSON: {error}") from None
        if not isinstance(self._run, dict) or self._run.get("schema") != SCHEMA:
            raise InputError(f"{path / 'run.json'} is not of schema {SCHEMA}, the one this version reads")
        if lacking := {"config", "command", "started_utc"} - self._run.keys():
            raise InputError(f"{path / 'run.json'} lacks {', '.join(sorted(lacking))}: it is not a run's")
        if not isinstance(self._run["config"], dict):
            raise InputError(f"{path / 'run.json'}: config is {self._run['config']!r}: an object is right")
        self._alone = False

    @classmethod
    def create(cls, out: Path, name: str, config: dict[str, Any], command: str) -> Self:
        """Make `out/<UTC time>-<name>` whole, or not at all.

        Args:
            out: the directory of runs; made when missing.
            name: the run's name, as in its configuration.
            config: the configuration as JSON values, to resume from.
            command: what would repeat the run.

        Raises:
            InputError: no directory can be made there.
        """
        started = datetime.now(UTC)
        made = out / f".{name}-{os.getpid()}.tmp"
        run = {"schema": SCHEMA, "name": name, "started_utc": started.isoformat(timespec="seconds")}
        path = free = out / f"{started:%Y-%m-%dT%H-%M-%SZ}-{name}"
        try:
            made.mkdir(parents=True)
            write_whole(
                made / "run.json", json.dumps({**run, "command": command, "config": config}, indent=2) + "\n"
            )
            write_whole(made / "records.jsonl", "")
            for count in range(2, 1000):
                if not free.exists():
                    break
                free = path.with_name(f"{path.name}-{count}")
            made.rename(free)
        except OSError as error:
            raise InputError(f"no run directory can be made in {out}: {error.strerror}") from error
        finally:
            shutil.rmtree(made, ignore_errors=True)
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
        # A run asks often, and checking every record takes a second where there are 20,000.
        lines = (line for line in _lines(self.path / "records.jsonl") if '"stage"' in line[0])
        ended = [from_values(_values(line, where), where) for line, where in lines]
        return any(record.stage == stage for record in only(ended, StageRecord))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep every other process from ending a stage while the block lasts; reading takes no leave.

        Raises:
            OSError: the run cannot be written to.
        """
        if self._alone:
            yield
            return
        with locked(self.path / "run.json"):
            self._alone = True
            try:
                yield
            finally:
                self._alone = False

    @contextmanager
    def stage(self, name: str, goes_on_at: int | None = None) -> Iterator[RecordWriter]:
        """Write one stage's records and samples; they count when the block ends without an error.

        Args:
            name: of the stage.
            goes_on_at: of a stage that can be gone on with in its middle: the bytes of its records that a stopped
                one had done with, 0 where it begins. What is written then stays when the block ends in an error.

        Raises:
            InputError: the stage is done already, or another process is at it.
            OSError: the run cannot be written to.
        """
        pending = self.pending(name)
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(pending, wait=False))
            except BlockingIOError:
                raise InputError(
                    f"{self.path}: another process is writing its stage {name!r}: wait for it, or end it"
                ) from None
            if self.done(name):
                pending.unlink()
                raise InputError(f"stage {name!r} of {self.path} is done already")
            os.truncate(pending, goes_on_at or 0)
            began, ended = time.monotonic(), False
            try:
                with RecordWriter(pending) as writer:
                    yield writer
                self._commit(read(pending), StageRecord(stage=name, wall_s=time.monotonic() - began))
                ended = True
            finally:
                if ended or goes_on_at is None:
                    pending.unlink(missing_ok=True)

    def pending(self, stage: str) -> Path:
        """Where the records of a stage lie until it ends."""
        return self.path / f"{file_name(stage)}.jsonl.tmp"

    def _commit(self, written: list[Record], end: StageRecord) -> None:
        kept = [record for record in written if not isinstance(record, SampleRecord)]
        path = self.path / "records.jsonl"
        with self.alone():
            self._merge(only(written, SampleRecord))
            before = path.read_text(encoding="utf-8")
            joint = "" if before.endswith("\n") or not before else "\n"
            write_whole(path, before + joint + "".join(map(to_line, [*kept, end])))

    def _merge(self, samples: Sequence[SampleRecord]) -> None:
        for candidate in dict.fromkeys(sample.candidate for sample in samples):
            path = self.path / "samples" / f"{file_name(candidate)}.jsonl"
            path.parent.mkdir(exist_ok=True)
            before = only(read(path), SampleRecord) if path.exists() else []
            # A stage killed between this file and records.jsonl runs again: its samples replace their former selves.
            merged = {
                (sample.candidate, sample.task, sample.doc_id, sample.filter, sample.metric): sample
                for sample in [*before, *(sample for sample in samples if sample.candidate == candidate)]
            }
            write_whole(path, "".join(map(to_line, merged.values())))


def file_name(text: str) -> str:
    """A candidate's or stage's name as a file name that every file system and artifact store takes."""
    return re.sub(r"[^A-Za-z0-9_.+=@-]", "-", text)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Every line of a records' file, and where it stands in words.

    Raises:
        InputError: there is none, it cannot be read, a line is not UTF-8, or the last one is cut off.
    """
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        run = path.parent if path.name == "records.jsonl" else path
        raise InputError(f"no run at {run}: a run directory holds records.jsonl") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    ended = data.endswith(b"\n")
    lines = data.removesuffix(b"\n").split(b"\n") if data else []
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number} of {len(lines)}"
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: not UTF-8 text: {error}") from None
        if number == len(lines) and not ended and not _is_json(text):
            raise InputError(f"{where}: the line is cut off, so records are missing; run it again")
        yield text, where


def _values(line: str, where: str) -> object:
    try:
        return json.loads(line, parse_constant=_refuse_constant)
    except json.JSONDecodeError:
        raise InputError(f"{where}: not a JSON object") from None
    except RecursionError:
        raise InputError(f"{where}: brackets within brackets, deeper than any record's") from None
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number that a record may hold")
