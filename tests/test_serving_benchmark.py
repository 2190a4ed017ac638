"""`python -m benchmarks.serving`: which steps a command line runs. The steps themselves need a GPU and vLLM."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.serving import __main__ as serving
from benchmarks.serving import layers, native
from benchmarks.serving.plan import ARMS, FLOOR


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
    native.native_step(SimpleNamespace(at_once=2))
    assert {environment[native.ARM] for _, environment in started} == set(ARMS) - {FLOOR}
    for command, environment in started:
        assert command[:3] == [sys.executable, "-m", "benchmarks.serving"]
        monkeypatch.setenv(native.ARM, environment[native.ARM])
        assert run(*command[4:]) == ["native"]
        monkeypatch.delenv(native.ARM)


def test_the_native_step_leaves_vllm_out_and_keeps_a_folder_of_libraries(run, monkeypatch, tmp_path):
    for name in ("engine", "libraries"):
        (tmp_path / name / "vllm").mkdir(parents=True)
    (tmp_path / "engine" / "vllm" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'engine'}:{tmp_path / 'libraries'}")
    started = []
    monkeypatch.setattr(subprocess, "run", lambda command, env, check: started.append(env["PYTHONPATH"]))
    native.native_step(SimpleNamespace(at_once=1))
    assert set(started) == {str(tmp_path / "libraries")}


def test_a_document_shown_again_tells_order_from_choice_and_both_from_values(tmp_path):
    shown = {
        "0.latent": torch.ones(4, 2),
        "0.selection": torch.tensor([[0, -1], [0, 1], [1, 2], [3, 1]], dtype=torch.int32),
        "0.values": torch.tensor([[1.0, 1], [1, 1], [1, 1], [1, 1]]),
    }
    again = {name: tensor.clone() for name, tensor in shown.items()}
    again["0.selection"][1] = torch.tensor([1, 0])  # the same in another order
    again["0.selection"][3] = torch.tensor([3, 2])  # another key
    again["0.values"][3, 0] = 3
    (tmp_path / "layers").mkdir()
    for number, tensors in ((0, shown), (2, again)):
        save_file(tensors, tmp_path / "layers" / f"{number:04}.safetensors")
        (tmp_path / "layers" / f"{number:04}.json").write_text('{"process": 7}')
    (row,) = layers.repeated(tmp_path, 2)
    assert row == {
        "layer": 0, "latent": 0.0, "recall": 0.875, "in_order": 0.5, "values": pytest.approx(2 / 8**0.5), "equal": 7 / 8,
    }  # fmt: skip
    (tmp_path / "layers" / "0002.json").write_text('{"process": 8}')
    assert layers.repeated(tmp_path, 2) == []
