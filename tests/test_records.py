import dataclasses
import json
import math
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest

from evalkit import records
from evalkit.errors import InputError
from evalkit.files import locked, replacing, write_whole
from evalkit.records import Record, RunDirectory, SampleRecord, SelectionRecord, StageRecord, TaskRecord
from evalkit.schema import HINTS, KINDS, to_line


def example(cls: type[Record], **changes: Any) -> Record:
    """A record of any kind, every number different and every optional one absent."""
    values: dict[str, Any] = {}
    for place, (name, hint) in enumerate(HINTS[cls.kind].items()):
        if get_origin(hint) is dict:
            values[name] = {"torch": "2.13.0"}
        elif get_origin(hint) is list:
            (item,) = get_args(hint)
            item = (get_args(item) or (item,))[0]
            values[name] = [item(place + 1), item(place + 2)]
        elif hint is bool:
            values[name] = True
        elif hint in (int, float, str):
            values[name] = hint(place + 1)
        else:
            values[name] = None
    return cls(**(values | changes))


SELECTION = example(SelectionRecord)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "runs", "test", {"seed": 3}, "evalkit run")


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_reads_back_as_it_was_written(kind: str, tmp_path: Path):
    path = tmp_path / "records.jsonl"
    written = example(KINDS[kind])
    with records.RecordWriter(path) as writer:
        writer.write(written)
    assert records.read(path) == [written]
    assert list(json.loads(path.read_text()))[:2] == ["schema", "kind"]


def test_text_with_any_character_stays_one_line(tmp_path: Path):
    path = tmp_path / "records.jsonl"
    written = example(SampleRecord, response='two\nlines\u2028"quoted"\x85\ud800')
    path.write_text(to_line(written) * 2, encoding="utf-8")
    assert records.read(path) == [written, written]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_refused_by_field_and_record(value: float):
    with pytest.raises(ValueError, match=r"SelectionRecord.recall_mean is .*candidate='1'"):
        to_line(dataclasses.replace(SELECTION, recall_mean=value))


@pytest.mark.parametrize("value", ["0.5", True, [0.5]])
def test_a_value_of_another_type_is_refused_when_written(value: object):
    with pytest.raises(TypeError, match="recall_mean"):
        to_line(dataclasses.replace(SELECTION, recall_mean=value))


LINE = json.loads(to_line(SELECTION))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (json.dumps(LINE | {"schema": 99}), "schema 99 is unknown"),
        (json.dumps(LINE | {"kind": "horoscope"}), "kind 'horoscope' is unknown"),
        (json.dumps(LINE | {"mood": 1}), r"unknown \['mood'\]"),
        (json.dumps({key: value for key, value in LINE.items() if key != "n"}), r"lacks \['n'\]"),
        (json.dumps(LINE | {"n": "many"}), "n is 'many'"),
        (json.dumps(LINE | {"n": 2**63}), "n is 9223372036854775808"),
        (json.dumps(LINE | {"recall_mean": math.nan}), "NaN"),
        (json.dumps(LINE | {"recall_mean": 10**400}), "recall_mean is 1000"),
        (json.dumps(LINE | {"recall_mean": 0}).replace('"recall_mean": 0', '"recall_mean": 1e999'), "is inf"),
        (json.dumps(LINE | {"recall_mean": 0}).replace(": 0,", f": {'9' * 5000},"), "5000 digits"),
        ("[" * 200_000, "brackets within brackets"),
        ("", "not a JSON object"),
        (to_line(example(TaskRecord)).replace('"n": 6', '"n": 0').strip(), r"task\.n is 0"),
        ("[1]", "not a JSON object"),
        ("hello", "not a JSON object"),
    ],
)
def test_a_line_that_is_not_a_record_is_refused_with_its_place(text: str, said: str, tmp_path: Path):
    path = tmp_path / "records.jsonl"
    path.write_text(to_line(SELECTION) + text + "\n")
    with pytest.raises(InputError, match=f"line 2 of 2: .*{said}"):
        records.read(path)


def test_a_cut_off_last_line_is_named_as_such(tmp_path: Path):
    path = tmp_path / "records.jsonl"
    path.write_text(to_line(SELECTION) + to_line(SELECTION)[:40])
    with pytest.raises(InputError, match=r"line 2 of 2: the line is cut off"):
        records.read(path)


def test_a_line_that_is_not_utf_8_is_named(tmp_path: Path):
    path = tmp_path / "records.jsonl"
    path.write_bytes((to_line(SELECTION) * 2).encode() + b'{"schema": 1, "kind": "\xff"}\n' + b"more\n")
    with pytest.raises(InputError, match=r"records\.jsonl, line 3 of 4: not UTF-8 text"):
        records.read(path)


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"no run at .*run\.json"):
        RunDirectory(tmp_path)
    with pytest.raises(InputError, match=r"no run at .*records\.jsonl"):
        records.read(tmp_path)


def test_a_run_of_another_schema_is_refused(run: RunDirectory):
    (run.path / "run.json").write_text('{"schema": 0}')
    with pytest.raises(InputError, match="schema 1"):
        RunDirectory(run.path)


@pytest.mark.parametrize("config", ["null", '"x"', "[]"])
def test_a_run_whose_configuration_is_none_is_refused(config: str, run: RunDirectory):
    path = run.path / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"config": json.loads(config)}))
    with pytest.raises(InputError, match=r"run\.json: config is .*: an object is right"):
        RunDirectory(run.path)


def test_a_run_opens_again_with_what_it_was_asked(run: RunDirectory):
    again = RunDirectory(run.path)
    assert (again.config, again.command) == ({"seed": 3}, "evalkit run")


def test_runs_started_in_one_second_do_not_share_a_directory(tmp_path: Path):
    paths = {RunDirectory.create(tmp_path, "same", {}, "evalkit run").path for _ in range(3)}
    assert len(paths) == 3
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_stage_counts_once_it_has_ended(run: RunDirectory):
    with run.stage("layers") as writer:
        writer.write(SELECTION)
        assert not run.done("layers")
        assert run.read() == []
    assert run.done("layers")
    assert run.read()[0] == SELECTION
    assert isinstance(run.read()[1], StageRecord)


def test_a_stage_that_fails_leaves_nothing(run: RunDirectory):
    before = sorted(run.path.rglob("*"))

    def fail() -> None:
        with run.stage("layers") as writer:
            writer.write(SELECTION)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert run.read() == []
    assert sorted(run.path.rglob("*")) == before


def test_what_a_killed_stage_left_is_dropped_when_it_runs_again(run: RunDirectory):
    (run.path / "layers.jsonl.tmp").write_text(to_line(SELECTION)[:30])
    with run.stage("layers") as writer:
        writer.write(SELECTION)
    assert records.only(run.read(), SelectionRecord) == [SELECTION]


def test_a_stage_that_is_done_is_not_written_twice(run: RunDirectory):
    with run.stage("layers") as writer:
        writer.write(SELECTION)
    before = sorted(run.path.rglob("*"))
    with pytest.raises(InputError, match="done already"), run.stage("layers"):
        pass
    assert sorted(run.path.rglob("*")) == before
    assert records.only(run.read(), SelectionRecord) == [SELECTION]


def test_samples_lie_by_candidate_and_a_repeated_stage_replaces_its_own(run: RunDirectory):
    samples = [
        example(SampleRecord, candidate=candidate, task=task, doc_id=doc_id)
        for candidate in ("bf16@reference", "fp8_e4m3:one@flashinfer")
        for task in ("a", "b")
        for doc_id in (0, 1)
    ]
    with run.stage("a") as writer:
        for sample in samples[:1] + samples[4:6]:
            writer.write(sample)
    with run.stage(
        "b"
    ) as writer:  # as after a kill between the samples and the commit: all of them once more
        for sample in samples:
            writer.write(sample)
    assert sorted(path.name for path in (run.path / "samples").iterdir()) == [
        "bf16@reference.jsonl",
        "fp8_e4m3-one@flashinfer.jsonl",
    ]
    assert sorted(records.read_samples(run.path), key=samples.index) == samples
    assert not records.only(run.read(), SampleRecord)


def test_one_candidates_samples_are_read_from_its_own_file(run: RunDirectory):
    """A run asks for them arm by arm; the other arms' files are read by what asks for all."""
    samples = [example(SampleRecord, candidate=name, doc_id=i) for name in ("a:one@b", "c@d") for i in (0, 1)]
    with run.stage("tasks") as writer:
        for sample in samples:
            writer.write(sample)
    (run.path / "samples" / "c@d.jsonl").write_text("no record\n")
    assert records.read_samples(run.path, "a:one@b") == samples[:2]
    assert records.read_samples(run.path, "e@f") == []
    with pytest.raises(InputError, match="not a JSON object"):
        records.read_samples(run.path)


def test_asking_whether_a_stage_is_done_checks_no_other_record(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
):
    """A run asks this more than twenty times, and checking 20,000 records takes a second."""
    with run.stage("layers") as writer:
        for _ in range(50):
            writer.write(SELECTION)
    checked: list[str] = []
    real = records.from_values
    monkeypatch.setattr(
        records, "from_values", lambda values, where: checked.append(where) or real(values, where)
    )
    assert run.done("layers")
    assert not run.done("tasks")
    assert len(checked) == 2


WRITER = """
import sys
from pathlib import Path
from evalkit.records import RunDirectory, SampleRecord
from tests.test_records import SELECTION, example
run, name = RunDirectory(Path(sys.argv[1])), sys.argv[2]
print(flush=True)
sys.stdin.readline()
for number in range(60):
    with run.stage(f"{name} {number}") as writer:
        writer.write(SELECTION)
        writer.write(example(SampleRecord, candidate="shared", task=name, doc_id=number))
"""


def test_two_processes_lose_no_stage_of_each_other(run: RunDirectory):
    """As a gate beside a run: both replace records.jsonl and one file of samples by what they read plus their own."""
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(run.path), name],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("gate", "tasks")
    ]
    for writer in writers:
        assert writer.stdout is not None
        writer.stdout.readline()
    ends = [threading.Thread(target=writer.communicate, args=("\n",)) for writer in writers]
    for end in ends:
        end.start()
    for end in ends:
        end.join()
    assert [writer.returncode for writer in writers] == [0, 0]
    stages = [record.stage for record in records.only(run.read(), StageRecord)]
    samples = [(sample.task, sample.doc_id) for sample in records.read_samples(run.path)]
    for name in ("gate", "tasks"):
        assert [stage for stage in stages if stage.startswith(name)] == [f"{name} {i}" for i in range(60)]
        assert [sample for sample in samples if sample[0] == name] == [(name, i) for i in range(60)]
    assert len(records.only(run.read(), SelectionRecord)) == 120
    assert sorted(path.name for path in run.path.iterdir()) == ["records.jsonl", "run.json", "samples"]


def test_a_stage_that_another_process_is_writing_is_refused(run: RunDirectory):
    """Two that go on with one run would write into one file, and the first to end would commit a part of both."""
    again = RunDirectory(run.path)
    with run.stage("layers") as writer:
        writer.write(SELECTION)
        with (
            pytest.raises(InputError, match="another process is writing its stage 'layers'"),
            again.stage("layers", goes_on_at=0),
        ):
            pass
        with again.stage("gate 1"):
            pass
    assert [r.stage for r in records.only(run.read(), StageRecord)] == ["gate 1", "layers"]
    assert records.only(run.read(), SelectionRecord) == [SELECTION]


def test_a_lock_is_of_the_file_that_stands_there(tmp_path: Path):
    """Who waited for one that was removed meanwhile would hold what no one else asks for."""
    path, held, end = tmp_path / "stage.tmp", threading.Event(), threading.Event()

    def wait() -> None:
        with locked(path):
            held.set()
            end.wait(60)

    waiting = threading.Thread(target=wait)
    with locked(path):
        waiting.start()
        assert not held.wait(0.2)
        path.unlink()
    assert held.wait(60)
    with pytest.raises(BlockingIOError), locked(path, wait=False):
        pass
    end.set()
    waiting.join()
    with locked(path, wait=False):
        pass


def test_a_stage_after_a_line_without_its_end_begins_a_line(run: RunDirectory):
    path = run.path / "records.jsonl"
    path.write_text(to_line(SELECTION).rstrip("\n"))
    with run.stage("layers"):
        pass
    assert [type(record) for record in run.read()] == [SelectionRecord, StageRecord]


def test_a_file_that_cannot_be_written_whole_stays_and_leaves_no_other(tmp_path: Path):
    path = tmp_path / "summary.md"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new \ud800")
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("summary.md", "old")]


def test_two_that_write_one_file_at_once_each_write_it_whole(tmp_path: Path):
    path = tmp_path / "report.html"
    with replacing(path) as partial:
        partial.write_text("of the first, " * 1000)
        write_whole(path, "of the second")
        assert path.read_text() == "of the second"
    assert path.read_text() == "of the first, " * 1000
    assert list(tmp_path.iterdir()) == [path]
