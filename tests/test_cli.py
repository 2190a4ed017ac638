import subprocess
import sys
import time
from pathlib import Path

import pytest

from evalkit import cli, kv
from evalkit.commands import runs

COMMANDS = ["run", "layers", "kld", "tasks", "report", "calibrate", "formats", "doctor", "lm-eval"]


def exit_code(*arguments: str) -> object:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    return caught.value.code


@pytest.mark.parametrize("command", COMMANDS)
def test_help_holds_an_example(command: str, capsys: pytest.CaptureFixture[str]):
    assert exit_code(command, "--help") == 0
    assert f"Example: evalkit {command}" in capsys.readouterr().out


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
        (["run", "--config", "nowhere.toml"], "no configuration file at nowhere.toml"),
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
