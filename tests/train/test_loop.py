"""A killed run goes on where it stood."""

import json
from dataclasses import replace

import pytest
import torch

from evalkit import environment
from evalkit.errors import InputError
from evalkit.train import __main__ as command
from evalkit.train import loop
from evalkit.train.config import TINY, Stage
from evalkit.train.data import Request, make_batch
from evalkit.train.loop import Trainer
from evalkit.train.tokenizer import Encoder, train

CONFIG = replace(
    TINY,
    model=replace(TINY.model, index_topk=32),
    stages=(Stage(length=96, tokens=192, share=0.5), Stage(length=128, tokens=256, share=1.0)),
    long_length=160,
    indexer_tokens=128,
    joint_tokens=128,
    steps=(8, 4, 4),
    check_steps=2,
    save_seconds=0.0,
)
CPU = torch.device("cpu")


class InProcessLoader:
    """The same batches without processes."""

    def __init__(self, config):
        self.config, self.encoder = config, Encoder(train())

    def next(self, stage, index):
        return make_batch(self.config, self.encoder, Request(stage, index))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class KilledError(Exception):
    pass


@pytest.mark.parametrize("saves", [2, 5, 7], ids=["dense", "indexer", "joint"])
def test_a_resumed_run_has_the_weights_of_one_never_stopped(tmp_path, monkeypatch, saves):
    monkeypatch.setattr(loop, "Loader", InProcessLoader)
    whole = Trainer(CONFIG, tmp_path / "whole", CPU)
    whole.run()

    killed = Trainer(CONFIG, tmp_path / "killed", CPU)
    save, left = killed.save, [saves]

    def save_then_die():
        save()
        left[0] -= 1
        if not left[0]:
            raise KilledError

    monkeypatch.setattr(killed, "save", save_then_die)
    with pytest.raises(KilledError):
        killed.run()
    resumed = Trainer(CONFIG, tmp_path / "killed", CPU)
    resumed.resume()
    resumed.run()
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], tensor, rtol=0, atol=0, msg=name)


def test_resuming_with_another_seed_is_refused(tmp_path):
    Trainer(CONFIG, tmp_path, CPU).save()
    with pytest.raises(InputError, match="its seed is 1, this run's 2"):
        Trainer(replace(CONFIG, seed=2), tmp_path, CPU).resume()


def test_resuming_where_there_is_no_state_is_refused_and_trains_nothing(tmp_path, capsys):
    out = tmp_path / "run"
    assert command.main(["run", "--out", str(out), "--resume", "--size", "tiny", "--minutes", "0.01"]) == 64
    (line,) = capsys.readouterr().err.splitlines()
    assert f"no {out / 'state.pt'} to resume from" in line
    assert not out.exists()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("place", ["loss", "lm_loss", "indexer_kl"])
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, place, value):
    trainer = Trainer(CONFIG, tmp_path, CPU)

    def check(added):
        meter = trainer.meter
        meter.sums += 1
        meter.kl += 1
        sums = {"loss": meter.sums[0, :1], "lm_loss": meter.sums[0, -1:], "indexer_kl": meter.kl[:1]}
        sums[place] += added
        trainer._check()

    check(1.0)
    with pytest.raises(FloatingPointError, match="not finite at step 0"):
        check(value)


def test_a_run_ends_with_a_card_that_tells_of_every_run_before_it(tmp_path, monkeypatch):
    """The first run has no origin; the second, which refines it, has."""
    monkeypatch.setattr(loop, "Loader", InProcessLoader)
    monkeypatch.setattr(command, "TINY", CONFIG)
    monkeypatch.setattr(environment, "commit", lambda: "a1b2c3")
    first, second = tmp_path / "first", tmp_path / "second"
    asked = ["run", "--size", "tiny", "--documents", "0", "--device", "cpu"]
    assert command.main([*asked, "--out", str(first)]) == 0
    monkeypatch.setattr(environment, "commit", lambda: None)
    assert command.main([*asked, "--out", str(second), "--refine", str(first / "export")]) == 0
    of_one, of_two = ((out / "export" / "README.md").read_text() for out in (first, second))
    assert "| 1: `python -m evalkit.train run --out RUN1` at commit a1b2c3 | dense | 8 |" in of_one
    assert "| 2: " not in of_one
    assert "| 1: `python -m evalkit.train run --out RUN1` at commit a1b2c3 | dense | 8 |" in of_two
    assert "| 2: `python -m evalkit.train run --out RUN2 --refine RUN1/export` | dense | 8 |" in of_two


def test_a_run_is_neither_mixed_with_another_nor_made_of_none(tmp_path, capsys):
    (tmp_path / "state.pt").touch()
    assert command.main(["run", "--out", str(tmp_path), "--size", "tiny", "--minutes", "0.01"]) == 64
    assert f"{tmp_path} is not empty: --resume goes on with a run" in capsys.readouterr().err
    asked = ["run", "--out", str(tmp_path / "new"), "--size", "tiny", "--minutes", "0.01"]
    assert command.main([*asked, "--refine", str(tmp_path)]) == 64
    assert f"{tmp_path} has no training.json" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_indexer_phase_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "Loader", InProcessLoader)
    trainer = Trainer(replace(CONFIG, steps=(0, 3, 0)), tmp_path, CPU)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.run()
    moved = {n for n, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert moved
    assert all(".indexer." in name for name in moved)
    assert [phase["step"] for phase in json.loads((tmp_path / "training.json").read_text())["phases"]] == [
        0,
        3,
        0,
    ]
