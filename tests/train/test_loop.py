"""A killed run goes on where it stood."""

import json
from dataclasses import replace

import pytest
import torch

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
    with pytest.raises(ValueError, match="its seed is 1, this run's 2"):
        Trainer(replace(CONFIG, seed=2), tmp_path, CPU).resume()


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
