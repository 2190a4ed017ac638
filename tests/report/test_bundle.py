import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from evalkit import cli
from evalkit.errors import InputError
from evalkit.records import PolicyRecord, RunDirectory, read_samples
from evalkit.report import bundle


@pytest.fixture
def signed(run: RunDirectory, tmp_path: Path) -> Path:
    file = tmp_path / "signed.zip"
    bundle.write(run.path, file)
    return file


def rewritten(file: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """The bundle with its files changed, as someone with a zip tool would."""
    with zipfile.ZipFile(file) as old:
        contents = {name: old.read(name) for name in old.namelist()}
    change(contents)
    made = file.with_name("changed.zip")
    with zipfile.ZipFile(made, "w") as new:
        for name, data in contents.items():
            new.writestr(name, data)
    return made


def test_the_same_run_gives_the_same_bytes(run: RunDirectory, tmp_path: Path):
    first = bundle.write(run.path, tmp_path / "a.zip")
    copied = shutil.copytree(run.path, tmp_path / "copy" / run.path.name)
    for path in copied.rglob("*"):
        os.utime(path, (10**9, 10**9))
    assert bundle.write(copied, tmp_path / "b.zip") == first
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as made:
        assert {entry.date_time for entry in made.infolist()} == {bundle.EPOCH}
    assert first == hashlib.sha256((tmp_path / "a.zip").read_bytes()).hexdigest()


def test_a_bundle_opens_as_the_run_it_was_made_of(run: RunDirectory, signed: Path):
    with bundle.opened(signed) as path:
        assert path.name == run.path.name
        opened = RunDirectory(path)
        assert opened.read() == run.read()
        assert read_samples(path) == read_samples(run.path)
        assert opened.config == run.config
        assert (path / "report.html").is_file()
        environment = json.loads((path / "environment.json").read_text())
        assert environment["checkpoint_sha256"] == "c" * 64
        assert not (path / "policy.json").exists()
    assert not path.exists()


def test_the_manifest_is_one_that_sha256sum_checks(signed: Path):
    with zipfile.ZipFile(signed) as file:
        lines = file.read(bundle.MANIFEST).decode().splitlines()
        assert len(lines) == len(file.namelist()) - 1
        for line in lines:
            digest, name = re.fullmatch(r"([0-9a-f]{64})  (.+)", line).groups()  # type: ignore[union-attr]
            assert hashlib.sha256(file.read(name)).hexdigest() == digest


def test_the_policy_of_the_run_is_in_it(run: RunDirectory, tmp_path: Path):
    with run.stage("policy") as write:
        write.write(PolicyRecord(name="default", sha256="d" * 64, text='{"alpha": 0.05}'))
    bundle.write(run.path, tmp_path / "a.zip")
    with bundle.opened(tmp_path / "a.zip") as path:
        assert json.loads((path / "policy.json").read_text()) == {"alpha": 0.05}


def test_a_policy_that_is_not_json_is_refused_by_its_line(run: RunDirectory, tmp_path: Path):
    line = len(run.read()) + 1
    with run.stage("policy") as write:
        write.write(PolicyRecord(name="default", sha256="d" * 64, text="X{}"))
    with pytest.raises(
        InputError, match=rf"records\.jsonl, line {line}: the text of policy 'default' is not JSON"
    ):
        bundle.write(run.path, tmp_path / "a.zip")
    assert list(tmp_path.glob("a.zip*")) == []


@pytest.mark.parametrize("name", ["records.jsonl", "report.html", "environment.json", "run.json"])
def test_a_changed_file_is_named(name: str, run: RunDirectory, signed: Path):
    inside = f"{run.path.name}/{name}"

    def change(contents: dict[str, bytes]) -> None:
        contents[inside] = contents[inside].replace(b"0", b"1", 1)

    with pytest.raises(InputError, match=rf"{re.escape(inside)} was changed"):
        bundle.verify(rewritten(signed, change))


def test_a_byte_changed_in_place_is_named(run: RunDirectory, signed: Path):
    data = bytearray(signed.read_bytes())
    place = data.index(b'"checkpoint": "dsa-nano"')
    data[place + 16] = ord("D")
    signed.write_bytes(data)
    with pytest.raises(InputError, match=rf"{re.escape(run.path.name)}/environment.json was changed"):
        bundle.verify(signed)


def test_a_missing_file_and_one_more_are_named(run: RunDirectory, signed: Path):
    def remove(contents: dict[str, bytes]) -> None:
        del contents[f"{run.path.name}/records.jsonl"]

    with pytest.raises(InputError, match=r"records.jsonl is missing"):
        bundle.verify(rewritten(signed, remove))

    def add(contents: dict[str, bytes]) -> None:
        contents[f"{run.path.name}/samples/more.jsonl"] = b""

    with pytest.raises(InputError, match=r"samples/more.jsonl was added"):
        bundle.verify(rewritten(signed, add))


def test_a_file_that_lies_outside_is_refused_and_not_written(signed: Path, tmp_path: Path):
    outside = "../outside.txt"

    def add(contents: dict[str, bytes]) -> None:
        contents[outside] = b"x"
        contents[bundle.MANIFEST] += f"{hashlib.sha256(b'x').hexdigest()}  {outside}\n".encode()

    with pytest.raises(InputError, match="lies outside"), bundle.opened(rewritten(signed, add)):
        pass


@pytest.mark.parametrize("data", [b"", b"not a zip", None])
def test_what_is_no_bundle_is_refused(data: bytes | None, tmp_path: Path):
    file = tmp_path / "x.zip"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(InputError, match="is not a bundle"):
        bundle.verify(file)
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("a", "b")
    with pytest.raises(InputError, match=bundle.MANIFEST):
        bundle.verify(file)


def test_the_command_prints_what_is_to_be_signed(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "new" / "signed.zip"
    with pytest.raises(SystemExit) as caught:
        cli.main(["report", str(run.path), "--bundle", str(file)])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"{bundle.sha256(file)}  {file}\n"
    with pytest.raises(SystemExit) as caught:
        cli.main(["report", str(tmp_path / "nowhere"), "--bundle", str(file)])
    assert caught.value.code == 64
