"""A store of runs: one directory with a SQLite database of what the dashboard shows, and each run's report.

    history.db    runs, and for each its candidates' results, attention errors by layer, and scores
    reports/      report.html of each run; plotly.js, which each has whole, lies there once

A run is known by what it was asked and where it ran, so that adding it again, from another path or after it has been
judged, replaces what was known of it. Every change is one transaction that waits for other writers.
"""

import hashlib
import json
import re
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from evalkit.errors import InputError
from evalkit.records import (
    CandidateRecord,
    EnvironmentRecord,
    LayerRecord,
    ProfileRecord,
    Record,
    RunDirectory,
    TaskRecord,
    TokenRecord,
    last_judgement,
    only,
    output_probe,
    to_line,
    write_whole,
)
from evalkit.report import html

SCHEMA = 1
BUSY_S = 60.0
PLOTLY = re.compile(r"<script>(/\*\*\s*\* plotly\.js v.*?)</script>", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """A run; `packages` is JSON, `report` a file in reports/; `gpu` names the engine too, where it is a serving one."""

    run: str
    name: str
    started_utc: str
    commit_sha: str | None
    packages: str
    checkpoint: str
    checkpoint_sha256: str
    profile: str
    gpu: str
    dtype: str
    command: str
    report: str


@dataclass(frozen=True, kw_only=True)
class StoredResult:
    """A candidate of a run; `verdict` is None where it was not judged, `kl_nats` over the phase with most tokens.

    A POST-HOC judgement decides nothing: its verdict is INCONCLUSIVE, and the reason says so before the checks' own.
    """

    run: str
    candidate: str
    format: str
    bytes_per_token: int
    verdict: str | None
    reason: str
    policy: str
    post_hoc: int
    kl_nats: float | None
    kl_lower_nats: float | None
    kl_upper_nats: float | None
    kl_n: int
    nonfinite: int


@dataclass(frozen=True, kw_only=True)
class StoredLayer:
    """Relative L2 of a candidate's attention output at one layer, in decode where there is one."""

    run: str
    candidate: str
    mode: str
    layer: int
    relative_l2: float | None


@dataclass(frozen=True, kw_only=True)
class StoredScore:
    """A candidate's score on a task, over n documents."""

    run: str
    candidate: str
    task: str
    metric: str
    filter: str
    n: int
    score: float
    score_lower: float | None
    score_upper: float | None
    loss: float
    loss_lower: float | None
    loss_upper: float | None


Row = TypeVar("Row", StoredRun, StoredResult, StoredLayer, StoredScore)
TABLES: dict[type[Any], tuple[str, str]] = {
    StoredRun: ("runs", "run"),
    StoredResult: ("results", "run, candidate"),
    StoredLayer: ("layers", "run, candidate, mode, layer"),
    StoredScore: ("scores", "run, candidate, task, metric, filter"),
}
SCORED = [field.name for field in fields(StoredScore) if field.name != "run"]


class History:
    """The store at `path`."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        """Open a store, or make one.

        Raises:
            InputError: there is none, or it is not one that this version reads.
        """
        self.path = path
        self.reports = path / "reports"
        self._database = path / "history.db"
        if not create and not self._database.is_file():
            raise InputError(f"no history at {path}: `evalkit history add RUN --store {path}` makes one")
        if create:
            try:
                self.reports.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"no history can be made at {path}: {error.strerror}") from None
            self._make()
        with self._connection() as db:
            (schema,) = db.execute("PRAGMA user_version").fetchone()
        if schema != SCHEMA:
            raise InputError(
                f"{self._database} is of schema {schema}; this version of evalkit reads schema {SCHEMA}"
            )

    def add(self, run: Path) -> StoredRun:
        """Store a run that has ended; again, where it is known.

        Raises:
            InputError: it is none, or has not ended.
        """
        directory = RunDirectory(run)
        records = directory.read()
        if not directory.done("report"):
            raise InputError(
                f"{run} has not ended, and a part would show as a change: `evalkit run --resume {run}` ends it"
            )
        stored, rows = _rows(directory, records)
        with self._transaction() as db:
            # Within the transaction: two that write one file at once would take it from each other.
            self._keep_report(run, stored.report)
            for table, _ in TABLES.values():
                db.execute(f"DELETE FROM {table} WHERE run = ?", (stored.run,))  # noqa: S608 - a name from above
            for kind, (table, _) in TABLES.items():
                marks = ", ".join("?" * len(fields(kind)))
                mine = [astuple(row) for row in rows if type(row) is kind]
                db.executemany(f"INSERT INTO {table} VALUES ({marks})", mine)  # noqa: S608 - see above
        return stored

    def read(self, kind: type[Row]) -> list[Row]:
        """All rows of a kind; runs by start, the others by their keys."""
        table, key = TABLES[kind]
        order = "started_utc, name, run" if kind is StoredRun else key
        with self._connection() as db:
            found = db.execute(f"SELECT * FROM {table} ORDER BY {order}")  # noqa: S608 - see above
            names = [field.name for field in fields(kind)]
            return [kind(**dict(zip(names, row, strict=True))) for row in found]

    def prune(self, keep: int) -> list[StoredRun]:
        """Remove all but the newest `keep` runs, with their reports; returns what was removed."""
        if keep < 1:
            raise InputError(f"--keep {keep}: at least 1 is right")
        removed = self.read(StoredRun)[:-keep]  # a run that is added meanwhile stays
        with self._transaction() as db:
            for table, _ in TABLES.values():
                db.executemany(f"DELETE FROM {table} WHERE run = ?", [(row.run,) for row in removed])  # noqa: S608 - see above
            for row in removed:
                (self.reports / row.report).unlink(missing_ok=True)
        return removed

    def _keep_report(self, run: Path, name: str) -> None:
        """Keep the report, its copy of plotly.js replaced by the one that all share."""
        page = run / "report.html"
        text = (page if page.is_file() else html.write(run)).read_text(encoding="utf-8")
        found = PLOTLY.search(text)
        if found is not None:
            library = f"plotly-{hashlib.sha256(found[1].encode()).hexdigest()[:12]}.js"
            if not (self.reports / library).is_file():
                write_whole(self.reports / library, found[1])
            text = text[: found.start()] + f'<script src="{library}"></script>' + text[found.end() :]
            text = text.replace("script-src 'unsafe-inline'", "script-src 'unsafe-inline' 'self' file:", 1)
        write_whole(self.reports / name, text)

    def _make(self) -> None:
        """Make the tables, unless something is there."""
        began = time.monotonic()
        while True:
            try:
                with closing(sqlite3.connect(self._database, timeout=BUSY_S)) as db:
                    db.execute("PRAGMA journal_mode = WAL")
                break
            except sqlite3.OperationalError as error:
                # Two that make a store at once: this statement alone does not wait for the other.
                if "locked" not in str(error) or time.monotonic() - began > BUSY_S:
                    raise InputError(f"{self._database} cannot be used: {error}") from None
                time.sleep(0.01)
            except sqlite3.DatabaseError as error:
                raise InputError(f"{self._database} cannot be used: {error}") from None
        with self._transaction() as db:
            if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                return
            for kind, (table, key) in TABLES.items():
                columns = ", ".join(field.name for field in fields(kind))
                db.execute(f"CREATE TABLE {table} ({columns}, PRIMARY KEY ({key})) WITHOUT ROWID")
            db.execute(f"PRAGMA user_version = {SCHEMA}")

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self._database, timeout=BUSY_S, isolation_level=None)) as db:
                yield db
        except sqlite3.DatabaseError as error:
            raise InputError(f"{self._database} cannot be used: {error}") from None

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """IMMEDIATE: a transaction that begins by reading could not wait for a writer later on."""
        with self._connection() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")


def _rows(directory: RunDirectory, records: Sequence[Record]) -> tuple[StoredRun, list[Any]]:
    """A run, and every row of it."""
    environments = only(records, EnvironmentRecord)
    if not environments:
        raise InputError(f"{directory.path} has recorded nothing: it stopped at its start; run it again")
    environment = environments[0]
    asked = json.dumps([directory.started_utc, directory.command, directory.config], sort_keys=True)
    key = hashlib.sha256((asked + to_line(environment)).encode()).hexdigest()[:16]
    profiles = only(records, ProfileRecord)
    engine = directory.config.get("engine", "native")
    stored = StoredRun(
        run=key,
        name=directory.path.resolve().name,
        started_utc=_utc(directory.started_utc, directory.path),
        commit_sha=environment.commit,
        packages=json.dumps(environment.packages, sort_keys=True),
        checkpoint=environment.checkpoint,
        checkpoint_sha256=environment.checkpoint_sha256,
        profile=profiles[0].profile if profiles else "native",
        # Another engine's errors are from another reference: its runs are no nights of the same series.
        gpu=(environment.gpu or "CPU").partition(",")[0]
        + ("" if engine == "native" else f" (engine {engine})"),
        dtype=environment.dtype,
        command=directory.command,
        report=f"{key}.html",
    )
    rows: list[Any] = [stored]
    for candidate in only(records, CandidateRecord):
        layers = _attention(records, candidate.candidate)
        rows.append(_result(key, candidate, records, sum(r.nonfinite for r in layers)))
        rows += [
            StoredLayer(run=key, candidate=r.candidate, mode=r.mode, layer=r.layer, relative_l2=r.relative_l2)
            for r in layers
            if r.layer is not None
        ]
        scores = {
            (r.task, r.metric, r.filter): r
            for r in reversed(only(records, TaskRecord))  # of several baselines, the first
            if r.candidate == candidate.candidate
        }
        rows += [StoredScore(run=key, **{name: getattr(r, name) for name in SCORED}) for r in scores.values()]
    return stored, rows


def _result(run: str, candidate: CandidateRecord, records: Sequence[Record], nonfinite: int) -> StoredResult:
    name = candidate.candidate
    tokens = [r for r in only(records, TokenRecord) if (r.candidate, r.frozen) == (name, "none")]
    token = max(tokens, key=lambda r: r.n, default=None)
    judged = last_judgement(records)
    last = next((r for r in judged if (r.candidate, r.check) == (name, "candidate")), None)
    if last is not None and last.post_hoc:
        overall = next((r.reason for r in judged if r.check == "overall"), "POST-HOC.")
        last = replace(
            last, verdict="INCONCLUSIVE", reason=f"{overall} Its checks: {last.verdict}. {last.reason}"
        )
    return StoredResult(
        run=run,
        candidate=name,
        format=candidate.format,
        bytes_per_token=candidate.row_bytes_per_token,
        verdict=None if last is None else last.verdict,
        reason="" if last is None else last.reason,
        policy="" if last is None else last.policy,
        post_hoc=int(last is not None and last.post_hoc),
        kl_nats=None if token is None else token.kl_mean_nats,
        kl_lower_nats=None if token is None else token.kl_mean_lower_nats,
        kl_upper_nats=None if token is None else token.kl_mean_upper_nats,
        kl_n=0 if token is None else token.n,
        nonfinite=nonfinite,
    )


def _attention(records: Sequence[Record], candidate: str) -> list[LayerRecord]:
    """One record for each mode and layer."""
    probe = output_probe(records)
    found = [
        r
        for r in only(records, LayerRecord)
        if (r.candidate, r.probe, r.rung, r.frozen) == (candidate, probe, "total", "none")
        and r.layer is not None
    ]
    ordered = sorted(found, key=lambda r: (r.phase != "decode", r.phase != "prefill"))
    return list({(r.mode, r.layer): r for r in reversed(ordered)}.values())


def _utc(text: str, where: Path) -> str:
    """A time in UTC to the second, so that starts sort as text."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise InputError(
            f"{where / 'run.json'}: started_utc is {text!r}: an ISO 8601 time is right"
        ) from None
    return moment.astimezone(UTC).isoformat(timespec="seconds")
