import dataclasses
import json
import math
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest

from evalkit import records
from evalkit.errors import InputError
from evalkit.records import Record, RunDirectory, SampleRecord, SelectionRecord, StageRecord
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
        (json.dumps(LINE | {"recall_mean": math.nan}), "NaN"),
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


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"no run at .*run\.json"):
        RunDirectory(tmp_path)
    with pytest.raises(InputError, match=r"no run at .*records\.jsonl"):
        records.read(tmp_path)


def test_a_run_of_another_schema_is_refused(run: RunDirectory):
    (run.path / "run.json").write_text('{"schema": 0}')
    with pytest.raises(InputError, match="schema 1"):
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
    with pytest.raises(ValueError, match="done already"), run.stage("layers"):
        pass


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
