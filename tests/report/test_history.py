import json
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from evalkit import cli
from evalkit.errors import InputError
from evalkit.records import (
    EnvironmentRecord,
    LayerRecord,
    Record,
    RunDirectory,
    TaskRecord,
    TokenRecord,
    VerdictRecord,
    only,
)
from evalkit.report import history
from evalkit.report.history import History, StoredLayer, StoredResult, StoredRun, StoredScore
from evalkit.report.trends import tiles
from tests.report.nights import BF16, DAMAGED, FIRST, commit_of, make_store, night_records, write_run


def one_run(path: Path, night: int = 0, **options: object) -> Path:
    return write_run(path, night, night_records(night, random.Random(night), **options))  # type: ignore[arg-type]


def test_the_store_holds_what_the_records_say(tmp_path: Path):
    run = one_run(tmp_path / "runs")
    records = RunDirectory(run).read()
    store = History(tmp_path / "store", create=True)
    store.add(run)
    (stored,) = store.read(StoredRun)
    (environment,) = only(records, EnvironmentRecord)
    assert (stored.name, stored.commit_sha, stored.gpu) == (run.name, environment.commit, "NVIDIA H200")
    assert stored.started_utc == FIRST.isoformat()
    assert json.loads(stored.packages) == environment.packages
    results = {r.candidate: r for r in store.read(StoredResult)}
    assert results[DAMAGED].verdict == "NON-INFERIOR"
    assert results[BF16].verdict is None
    assert {c: r.bytes_per_token for c, r in results.items()}[DAMAGED] == 576
    assert [results[r.candidate].kl_nats for r in only(records, TokenRecord)] == [
        r.kl_mean_nats for r in only(records, TokenRecord)
    ]
    assert {(r.candidate, r.mode, r.layer): r.relative_l2 for r in store.read(StoredLayer)} == {
        (r.candidate, r.mode, r.layer): r.relative_l2 for r in only(records, LayerRecord)
    }
    assert {(r.candidate, r.task): (r.score, r.n) for r in store.read(StoredScore)} == {
        (r.candidate, r.task): (r.score, r.n) for r in only(records, TaskRecord)
    }


def test_a_run_added_twice_is_one_run_wherever_it_lies(tmp_path: Path):
    run = one_run(tmp_path / "runs")
    store = History(tmp_path / "store", create=True)
    first = store.add(run)
    moved = shutil.copytree(run, tmp_path / "elsewhere" / run.name)
    assert store.add(moved) == first
    assert len(store.read(StoredRun)) == 1
    assert len(store.read(StoredScore)) == 6


def test_adding_again_replaces_what_was_known(tmp_path: Path):
    run = one_run(tmp_path / "runs")
    store = History(tmp_path / "store", create=True)
    store.add(run)
    text = (run / "records.jsonl").read_text().replace("NON-INFERIOR", "ANOMALOUS")
    (run / "records.jsonl").write_text(text)
    store.add(run)
    verdicts = {r.candidate: r.verdict for r in store.read(StoredResult)}
    assert verdicts[DAMAGED] == "ANOMALOUS"


def test_a_judgement_by_limits_that_came_afterwards_is_inconclusive(tmp_path: Path):
    """Its exit code is that of INCONCLUSIVE, and a history must not turn it into what its checks alone say."""
    records: list[Record] = []
    for record in night_records(0, random.Random(0)):
        if isinstance(record, VerdictRecord):
            record = replace(record, post_hoc=True)
        records.append(record)
    overall = next(
        replace(r, check="overall", reason="POST-HOC: it may.") for r in only(records, VerdictRecord)
    )
    store = History(tmp_path / "store", create=True)
    store.add(write_run(tmp_path / "runs", 0, [*records, overall]))
    stored = {r.candidate: r for r in store.read(StoredResult)}
    assert (stored[DAMAGED].verdict, stored[DAMAGED].post_hoc) == ("INCONCLUSIVE", 1)
    assert stored[DAMAGED].reason == "POST-HOC: it may. Its checks: NON-INFERIOR. It is NON-INFERIOR."
    assert stored[BF16].verdict is None


def test_of_several_baselines_the_first_is_kept(tmp_path: Path):
    records = night_records(0, random.Random(0))
    others = [replace(r, baseline="another", loss=0.5) for r in records if isinstance(r, TaskRecord)]
    store = History(tmp_path / "store", create=True)
    store.add(write_run(tmp_path / "runs", 0, [*records, *others]))
    assert {r.loss for r in store.read(StoredScore)} == {0.0}


def test_two_gpus_on_one_night_are_two_runs(tmp_path: Path):
    store = History(tmp_path / "store", create=True)
    for place, gpu in enumerate(("NVIDIA H200, SM90", "NVIDIA B200, SM100")):
        store.add(one_run(tmp_path / str(place), gpu=gpu))
    assert len(store.read(StoredRun)) == 2


def test_a_serving_engines_runs_are_no_nights_of_this_projects_own(tmp_path: Path):
    """The same candidate on the same GPU: their errors are from another reference, and their scores another engine's."""
    store = History(tmp_path / "store", create=True)
    for night, engine in enumerate((None, "native", "vllm", "native", "vllm")):
        run = write_run(tmp_path / "runs", night, night_records(night, random.Random(night)), engine=engine)
        store.add(run)
    nights = {(tile.gpu, tile.candidate): len(tile.nights) for tile in tiles(store)}
    assert {gpu for gpu, _ in nights} == {"NVIDIA H200", "NVIDIA H200 (engine vllm)"}
    assert (nights["NVIDIA H200", DAMAGED], nights["NVIDIA H200 (engine vllm)", DAMAGED]) == (3, 2)


def test_two_writers_at_once_lose_nothing(tmp_path: Path):
    """They begin with the store's making, which both do."""
    runs = [one_run(tmp_path / "runs", night) for night in range(16)]
    code = (
        "import sys; from pathlib import Path; from evalkit.report.history import History\n"
        "sys.stdin.readline()\n"
        "for run in sys.argv[2:]: History(Path(sys.argv[1]), create=True).add(Path(run))"
    )
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "store"), *map(str, runs[part::2] + runs[:2])],
            stdin=subprocess.PIPE,
        )
        for part in (0, 1)
    ]
    for writer in writers:
        writer.stdin.write(b"\n")  # type: ignore[union-attr]
        writer.stdin.flush()  # type: ignore[union-attr]
    for writer in writers:
        writer.communicate()
    assert [writer.returncode for writer in writers] == [0, 0]
    store = History(tmp_path / "store")
    assert [run.name for run in store.read(StoredRun)] == [run.name for run in runs]
    assert len(store.read(StoredScore)) == 16 * 6
    assert len(list(store.reports.glob("*.html"))) == 16


def test_a_writer_that_fails_leaves_the_store_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It had removed what was known of the run already."""
    store = make_store(tmp_path, 2)
    before = store.read(StoredRun), store.read(StoredResult), store.read(StoredLayer), store.read(StoredScore)
    rows_of = history._rows

    def twice(directory: RunDirectory, records: Sequence[Record]) -> tuple[StoredRun, list[object]]:
        stored, rows = rows_of(directory, records)
        return stored, [*rows[:2], rows[1], *rows[2:]]

    monkeypatch.setattr(history, "_rows", twice)
    with pytest.raises(InputError, match="cannot be used"):
        store.add(next((tmp_path / "runs").iterdir()))
    assert (
        store.read(StoredRun),
        store.read(StoredResult),
        store.read(StoredLayer),
        store.read(StoredScore),
    ) == before


def test_reports_share_one_plotly(run: RunDirectory, tmp_path: Path):
    from evalkit.report import html, plots

    html.write(run.path)
    with run.stage("report"):
        pass
    store = History(tmp_path / "store", create=True)
    stored = store.add(run.path)
    (library,) = store.reports.glob("plotly-*.js")
    assert library.read_text(encoding="utf-8") == plots.library()
    text = (store.reports / stored.report).read_text(encoding="utf-8")
    whole = (run.path / "report.html").read_text(encoding="utf-8")
    assert "plotly.js v" not in text
    assert len(text) < len(whole) - len(plots.library()) + 200
    assert f'<script src="{library.name}"></script>' in text


def test_a_run_without_its_report_gets_one(tmp_path: Path):
    rng = random.Random(0)
    run = write_run(tmp_path / "runs", 0, night_records(0, rng), page=None)
    store = History(tmp_path / "store", create=True)
    assert DAMAGED.partition("@")[0] in (store.reports / store.add(run).report).read_text(encoding="utf-8")


def test_prune_keeps_the_newest(tmp_path: Path):
    store = make_store(tmp_path, 5)
    removed = store.prune(2)
    assert [run.commit_sha for run in removed] == [commit_of(night) for night in (0, 1, 2)]
    assert [run.commit_sha for run in store.read(StoredRun)] == [commit_of(3), commit_of(4)]
    assert len(store.read(StoredLayer)) == 2 * 3 * 2 * 4
    assert len(list(store.reports.glob("*.html"))) == 2
    with pytest.raises(InputError, match="at least 1"):
        store.prune(0)


def test_a_store_of_another_schema_is_refused(tmp_path: Path):
    store = make_store(tmp_path, 1)
    with sqlite3.connect(store.path / "history.db") as db:
        db.execute("PRAGMA user_version = 2")
    db.close()
    for create in (False, True):
        with pytest.raises(InputError, match=r"schema 2; this version of evalkit reads schema 1"):
            History(store.path, create=create)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("nothing", "no run at"),
        ("unended", "has not ended"),
        ("empty", "has not ended"),
        ("time", "started_utc is 'yesterday'"),
    ],
)
def test_what_is_no_ended_run_is_refused_in_one_line(
    what: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = one_run(tmp_path / "runs")
    lines = (run / "records.jsonl").read_text().splitlines(keepends=True)
    if what == "nothing":
        shutil.rmtree(run)
    elif what == "unended":
        (run / "records.jsonl").write_text("".join(lines[:-1]))
    elif what == "empty":
        (run / "records.jsonl").write_text("")
    else:
        text = (run / "run.json").read_text()
        (run / "run.json").write_text(text.replace(FIRST.isoformat(), "yesterday"))
    with pytest.raises(SystemExit) as caught:
        cli.main(["history", "add", str(run), "--store", str(tmp_path / "store")])
    assert caught.value.code == 64
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert said in err


def test_a_file_that_is_no_database_is_refused(tmp_path: Path):
    (tmp_path / "history.db").write_text(
        "a file that says nothing to SQLite, and is long enough to be looked at" * 20
    )
    with pytest.raises(InputError, match="cannot be used"):
        History(tmp_path)
    with pytest.raises(InputError, match="no history can be made"):
        History(tmp_path / "history.db" / "below", create=True)


def test_the_commands_add_list_and_prune(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    runs = [one_run(tmp_path / "runs", night) for night in range(2)]
    store = str(tmp_path / "store")
    for arguments in (["add", str(runs[1])], ["add", str(runs[0])], ["prune", "--keep", "1"], ["list"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(["history", *arguments, "--store", store])
        assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "removed 1 runs" in out
    assert out.splitlines()[-1].startswith((FIRST + timedelta(days=1)).isoformat())
    assert out.splitlines()[-1].endswith(runs[1].name)
