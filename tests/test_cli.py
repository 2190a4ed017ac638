import errno
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from evalkit import __version__, cli, kv, shipped
from evalkit.commands import runs
from evalkit.gate import policy, verdict
from evalkit.records import EnvironmentRecord, RunDirectory, StageRecord, VerdictRecord, only

COMMANDS = [
    "run",
    "layers",
    "kld",
    "tasks",
    "gate",
    "plan",
    "report",
    "calibrate",
    "formats",
    "doctor",
    "lm-eval",
]


def exit_code(*arguments: str) -> object:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    return caught.value.code


@pytest.mark.parametrize("command", COMMANDS)
def test_help_holds_an_example(command: str, capsys: pytest.CaptureFixture[str]):
    assert exit_code(command, "--help") == 0
    assert f"Example: evalkit {command}" in capsys.readouterr().out


def test_the_version_is_said_with_the_name(capsys: pytest.CaptureFixture[str]):
    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"evalkit {__version__}\n"


def test_help_names_every_configuration_that_evalkit_ships(capsys: pytest.CaptureFixture[str]):
    for command in ("run", "layers", "kld", "tasks"):
        assert exit_code(command, "--help") == 0
        said = " ".join(capsys.readouterr().out.split())
        assert f"or {' or '.join(shipped.names('configuration'))}, which evalkit ships" in said


def test_a_policy_is_named_from_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    said = []
    monkeypatch.chdir(tmp_path)
    for given in (str(DEFAULT), "default", "default.toml"):
        assert exit_code("plan", given, "--discordance", "0.02") == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2] != ""


def test_help_answers_at_once():
    """Heavy imports stand inside the commands; torch alone takes two seconds."""
    took = []
    for _ in range(3):
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", "evalkit.cli", "--help"], check=True, capture_output=True)
        took.append(time.monotonic() - began)
    assert min(took) < 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--config", "nowhere.toml"], "no configuration 'nowhere.toml', neither a file nor a name"),
        (["run", "--config", "eval-fp9"], "did you mean 'eval-fp8'? Give eval-fp8, nightly, or a TOML file"),
        (["layers", "--config", "configs/eval-fp8.toml"], "did you mean 'eval-fp8'?"),
        (["run", "--policy", "defualt"], "did you mean 'default'?"),
        (["tasks", "--set", "policy=defualt"], "did you mean 'default'?"),
        (["plan", "defualt", "--discordance", "0.02"], "did you mean 'default'?"),
        (["gate", "nowhere", "--policy", "./default.toml"], "did you mean 'default'?"),
        (["gate", "nowhere", "--policy", "default"], "no run at nowhere"),
        (
            ["run", "--policy", "default"],
            "policy default: endpoints[0]: task evalkit_registers_2048 is not scored",
        ),
        (["layers", "--set", "sead=1"], "did you mean 'seed'"),
        (["tasks", "--set", "checkpoint=nowhere"], "no checkpoint at nowhere"),
        (["kld"], "give --text FILE or --transcripts RUN"),
        (["kld", "--text", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["kld", "--transcripts", "nowhere"], "no run at nowhere"),
        (["run", "--resume", "nowhere"], "no run at nowhere"),
        (["run", "--resume", "nowhere", "--set", "seed=1"], "give neither --config nor --set"),
        (["report", "nowhere"], "no run at nowhere"),
        (["report"], "no run under runs/"),
    ],
)
def test_bad_input_ends_in_one_line_and_64(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    assert exit_code(*arguments) == 64
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert said in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["runn"], ["run", "--confg", "x"], ["doctor", "--heads", "many"]])
def test_a_command_line_that_cannot_be_read_exits_64(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
):
    assert exit_code(*arguments) == 64
    assert "Error" in capsys.readouterr().err


def test_a_crash_shows_its_trace_and_exits_70(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def crash(path: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(runs, "_newest", crash)
    assert exit_code("report") == 70
    assert "Traceback" in (err := capsys.readouterr().err)
    assert "ZeroDivisionError: planted" in err


def test_what_the_machine_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def full(path: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/a/summary.md")

    monkeypatch.setattr(runs, "_newest", full)
    assert exit_code("report") == 64
    assert capsys.readouterr().err == "evalkit: runs/a/summary.md: No space left on device\n"


def test_an_interrupt_exits_130(monkeypatch: pytest.MonkeyPatch):
    def interrupt(path: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "_newest", interrupt)
    assert exit_code("report") == 130


def test_formats_lists_every_format_with_its_bytes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "160")
    assert exit_code("formats") == 0
    lines = capsys.readouterr().out.splitlines()
    end = lines.index("")
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:end]}
    keys = {line.split()[0]: line.split()[1:] for line in lines[end + 2 : lines.index("", end + 1)]}
    assert list(rows) == kv.names()
    assert list(keys) == kv.index.names()
    assert rows["bf16"][:4] == ["1152", "100%", "1284", "none"]
    assert rows["fp8_e4m3"][:4] == ["576", "50%", "708", "given"]
    assert rows["fp8_ds_mla"][:4] == ["656", "57%", "788", "none"]
    assert keys["indexer_fp8_ue8m0"][:2] == ["132", "fp8"]
    assert keys["bf16"][:2] == ["256", "bf16"]
    assert all(len(row) > 4 for row in rows.values()), "each format says in a phrase what it is"
    assert all(len(key) > 2 for key in keys.values()), "each format says in a phrase what it is"


def test_doctor_says_what_runs_here(capsys: pytest.CaptureFixture[str]):
    assert exit_code("doctor", "--heads", "16", "--topk", "512", "--index-heads", "8") == 0
    out = capsys.readouterr().out
    assert "with 16 attention heads, top-512 and 8 indexer heads" in out
    assert "relative L2" in out
    assert exit_code("doctor", "--no-check") == 0
    assert "relative L2" not in capsys.readouterr().out


def test_version_is_printed(capsys: pytest.CaptureFixture[str]):
    assert exit_code("--version") == 0
    assert capsys.readouterr().out.startswith("evalkit 0.")


def test_lm_eval_receives_its_arguments_untouched(monkeypatch: pytest.MonkeyPatch):
    from evalkit.evaluate import lm

    received: list[list[str]] = []
    monkeypatch.setattr(lm, "lm_eval_main", received.append)
    assert exit_code("lm-eval", "run", "--model", "evalkit", "--tasks", "gsm8k", "--help") == 0
    assert exit_code("lm-eval", "--model", "evalkit", "--limit", "8") == 0
    assert received == [
        ["run", "--model", "evalkit", "--tasks", "gsm8k", "--help"],
        ["--model", "evalkit", "--limit", "8"],
    ]


# The gate, beside others

DEFAULT = Path(cli.__file__).parents[1] / "tasks/policies/default.toml"
OTHERS = 65534  # nobody's


@pytest.fixture
def small() -> Iterator[Path]:
    """A run that holds where it ran and nothing else, in a place that every user may enter."""
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        made = RunDirectory.create(Path(place), "small", {}, "evalkit run")
        with made.stage("environment") as write:
            write.write(
                EnvironmentRecord(
                    commit=None, python="3.12.1", packages={}, device="cpu", gpu=None, dtype="float32", checkpoint="nano",
                    checkpoint_sha256="c" * 64, flags={}, command="evalkit run", started_utc="2026-01-31T12:00:00+00:00",
                )
            )  # fmt: skip
        yield made.path


@contextmanager
def as_one_who_only_reads(run: Path) -> Iterator[None]:
    """Take a run's permissions away; root, who needs none, becomes another user meanwhile."""
    run.chmod(0o555)
    for path in run.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    root = os.geteuid() == 0
    if root:
        try:
            os.seteuid(OTHERS)
        except OSError as error:
            pytest.skip(f"root cannot become another user here: {error}")
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        run.chmod(0o755)


def test_a_run_that_cannot_be_written_to_is_judged(small: Path, capsys: pytest.CaptureFixture[str]):
    """As an archived one: the verdict is printed, the exit code is its own, and a line says what is missing."""
    file = small.parent / "policy.toml"
    file.write_text(DEFAULT.read_text())
    # Once as who may write: it imports all that another user may have no right to read.
    assert exit_code("gate", str(small), "--policy", str(DEFAULT)) == 11
    before = {path: path.read_bytes() for path in small.iterdir()}
    capsys.readouterr()
    with as_one_who_only_reads(small):
        assert exit_code("gate", str(small), "--policy", str(file)) == 11
    out, err = capsys.readouterr()
    assert out.startswith("INCONCLUSIVE  all that decide")
    assert (
        err == f"evalkit: the run could not store this judgement: {small / 'run.json'}: Permission denied\n"
    )
    assert {path: path.read_bytes() for path in small.iterdir()} == before


def test_a_gate_says_what_it_judged_whatever_is_stored_after_it(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Two gates of a matrix end in either order; neither may print, or report to CI, what the other found."""
    other = verdict.judge(small, replace(policy.load(DEFAULT), name="of another gate"))
    real = verdict.store

    def store_then_another(run: Path, judgement: verdict.Judgement) -> None:
        real(run, judgement)
        real(run, other)

    monkeypatch.setattr(verdict, "store", store_then_another)
    assert exit_code("gate", str(small), "--policy", str(DEFAULT)) == 11
    mine = policy.load(DEFAULT).name
    assert f"Policy {mine} (" in capsys.readouterr().out
    assert ET.parse(small / "junit.xml").getroot().get("name") == mine
    overall = [r.policy for r in only(RunDirectory(small).read(), VerdictRecord) if r.check == "overall"]
    assert overall == [mine, "of another gate"]


def test_gates_at_once_each_store_their_own(small: Path, monkeypatch: pytest.MonkeyPatch):
    """Both would read that the run was never judged and be its first gate: the second begins when the first has read."""
    first, second = (
        verdict.judge(small, replace(policy.load(DEFAULT), name=name)) for name in ("first", "second")
    )
    beside = threading.Thread(target=verdict.store, args=(small, second))
    real = verdict.verdict_records

    def begin_the_second(judgement: verdict.Judgement, now: datetime) -> list[VerdictRecord]:
        if judgement is first:
            beside.start()
            beside.join(1)
        return real(judgement, now)

    monkeypatch.setattr(verdict, "verdict_records", begin_the_second)
    verdict.store(small, first)
    beside.join()
    records = RunDirectory(small).read()
    assert [r.stage for r in only(records, StageRecord)] == ["environment", "gate 1", "gate 2"]
    overall = [r.policy for r in only(records, VerdictRecord) if r.check == "overall"]
    assert overall == ["first", "second"]


def test_a_judgement_follows_two_that_were_made_in_one_second(small: Path):
    """Times to the second are one time; the stages are two."""
    first, second = (replace(policy.load(DEFAULT), name=name) for name in ("first", "second"))
    for one in (first, second):
        verdict.store(small, verdict.judge(small, one))
    path = small / "records.jsonl"
    path.write_text(
        re.sub('"judged_utc": "[^"]*"', '"judged_utc": "2026-01-31T12:00:00+00:00"', path.read_text())
    )
    verdict.store(small, verdict.judge(small, replace(first, name="third", alpha=0.01)))
    assert [r.stage for r in only(RunDirectory(small).read(), StageRecord)][1:] == [
        "gate 1",
        "gate 2",
        "gate 3",
    ]
