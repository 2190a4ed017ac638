"""`python -m benchmarks.serving`: which steps a command line runs. The steps themselves need a GPU and vLLM."""

import json
import subprocess
import sys

import pytest

from benchmarks.serving import __main__ as serving
from benchmarks.serving import native


@pytest.fixture
def run(tmp_path, monkeypatch):
    """What a command line runs, step by step."""
    done = []
    for step in ("vllm", "native", "report", "two_gpus"):
        monkeypatch.setattr(serving, f"{step}_step", lambda plan, step=step: done.append(step) or {step: 1})

    def of(*arguments):
        done.clear()
        monkeypatch.setattr(sys, "argv", ["serving", str(tmp_path), *arguments])
        serving.main()
        return list(done)

    return of


def test_every_step_that_is_named_runs_and_without_one_the_first_three(run, tmp_path):
    figures = tmp_path / "serving.json"
    assert run("--step", "two-gpus", "--step", "report", "--json", str(figures)) == ["two_gpus", "report"]
    assert json.loads(figures.read_text()) == {"two_gpus": {"two_gpus": 1}, "report": 1}
    assert run("--step", "native") == ["native"]
    assert run() == ["vllm", "native", "report"]


@pytest.mark.parametrize("steps", [(), ("--step", "vllm", "--step", "native")], ids=["all", "named"])
def test_the_process_that_the_native_step_starts_runs_that_step_alone(run, monkeypatch, steps):
    started = []
    monkeypatch.setattr(subprocess, "run", lambda command, env, check: started.append((command, env)))
    run(*steps)
    native.native_step(plan=None)
    ((command, environment),) = started
    assert command[:3] == [sys.executable, "-m", "benchmarks.serving"]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run(*command[4:]) == ["native"]
