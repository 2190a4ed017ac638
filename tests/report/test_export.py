from pathlib import Path

import pandas as pd
import pytest

from evalkit import cli
from evalkit.errors import InputError
from evalkit.records import LayerRecord, RunDirectory, only, read_samples
from evalkit.report.export import LINE, export, read
from evalkit.schema import HINTS, KINDS, SCHEMA
from tests.report.nights import filled, write_run


def test_every_record_reads_back_equal_and_in_order(run: RunDirectory, tmp_path: Path):
    written = export(run.path, tmp_path / "parquet")
    expected = [*run.read(), *read_samples(run.path)]
    assert read(tmp_path / "parquet") == expected
    assert {path.stem for path in written} == {record.kind for record in expected}


def test_every_kind_reads_back_empty_and_full(tmp_path: Path):
    """Also kinds that no run of this test's fixtures has."""
    texts = ["", "<b>\u2028 ü\x00"]
    kinds = [cls for kind, cls in KINDS.items() if kind != "sample"]
    records = [
        filled(cls, **{name: text for name, hint in HINTS[cls.kind].items() if hint is str})
        for cls in kinds
        for text in texts
    ]
    records += [
        filled(
            cls,
            **{name: 0.1 + 0.2 for name, hint in HINTS[cls.kind].items() if hint in (float, float | None)},
        )
        for cls in kinds
    ]
    run = write_run(tmp_path / "runs", 0, records)
    export(run, tmp_path / "parquet")
    assert read(tmp_path / "parquet") == RunDirectory(run).read()


def test_pandas_reads_a_kind_in_one_line(run: RunDirectory, tmp_path: Path):
    export(run.path, tmp_path / "parquet")
    frame = pd.read_parquet(tmp_path / "parquet" / "layer.parquet")
    layers = only(run.read(), LayerRecord)
    assert frame["relative_l2"].tolist() == [record.relative_l2 for record in layers]
    assert frame["n"].dtype == "int64"
    assert list(frame.columns) == [LINE, *HINTS["layer"]]


def test_a_folder_that_holds_something_is_refused(run: RunDirectory, tmp_path: Path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "kept").touch()
    with pytest.raises(InputError, match="is not empty"):
        export(run.path, tmp_path / "there")
    with pytest.raises(InputError, match="no run at"):
        export(tmp_path / "nowhere", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_export_of_another_schema_is_refused(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    export(run.path, tmp_path / "parquet")
    monkeypatch.setattr("evalkit.report.export.SCHEMA", SCHEMA + 1)
    with pytest.raises(
        InputError, match=rf"is of schema {SCHEMA}; this version of evalkit reads schema {SCHEMA + 1}"
    ):
        read(tmp_path / "parquet")
    with pytest.raises(InputError, match="no export at"):
        read(tmp_path)


def test_the_command_prints_the_files(run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        cli.main(["export", str(run.path), "--out", str(tmp_path / "parquet")])
    assert caught.value.code == 0
    assert str(tmp_path / "parquet" / "task.parquet") in capsys.readouterr().out.splitlines()
