"""Engines side by side: which failure is told, and that none starts when all are ended."""

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Event

import pytest

from evalkit.config import RunConfig
from evalkit.errors import EngineDiedError, InputError
from evalkit.evaluate.engines.arms import Arm
from evalkit.evaluate.engines.at_once import Running, at_once
from evalkit.evaluate.engines.on_vllm import VllmScorer
from tests.evaluate.test_served import TASK, small_checkpoint


class Waiting:
    """An engine whose answers come when it is closed, and then do not."""

    stop_ids, proof = (), {}

    def __init__(self, takes_s=0.0):
        self.asked, self.closed, self.takes_s = Event(), Event(), takes_s

    def generate(self, prompts):
        self.asked.set()
        assert self.closed.wait(20), "nobody closed it"
        time.sleep(self.takes_s)
        raise EngineDiedError("it ended with signal SIGKILL")

    def close(self):
        self.closed.set()


def test_an_engine_that_is_made_while_others_are_ended_is_not_started():
    """Its thread was making it when another arm failed, and would ask all its documents."""
    running, making, started = Running(), Event(), []

    def fail():
        assert making.wait(20)
        raise InputError("no room")

    def make():
        making.set()
        with pytest.raises(EngineDiedError):
            first.generate(())  # until all are ended
        running.take([Waiting()])
        started.append(True)

    first = Waiting()
    running.take([first])
    with pytest.raises(InputError, match="no room"):
        at_once(2, [fail, make], running.end)
    assert not started


def test_what_waits_for_room_is_not_begun_after_a_failure():
    begun = []

    def fail():
        raise InputError("no room")

    def begin(number):
        begun.append(number)
        time.sleep(0.05)

    with pytest.raises(InputError):
        at_once(2, [fail, *(partial(begin, number) for number in range(100))], list)
    assert len(begun) < 100


def test_who_is_interrupted_while_it_waits_ends_all_engines(monkeypatch):
    """As by Ctrl-C: the waiting itself fails, and the threads that it waits for end with their engines."""
    running, engines = Running(), [Waiting(), Waiting()]
    running.take(engines)

    def interrupted(futures):
        for engine in engines:
            assert engine.asked.wait(20)
        raise KeyboardInterrupt

    monkeypatch.setattr("evalkit.evaluate.engines.at_once.as_completed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        at_once(2, [partial(engine.generate, ()) for engine in engines], running.end)
    assert all(engine.closed.is_set() for engine in engines)


class Failing(Waiting):
    """One that cannot start, once all others wait for answers."""

    def __init__(self, others):
        super().__init__()
        self.others = others

    def generate(self, prompts):
        for other in self.others:
            assert other.asked.wait(20)
        raise InputError("too little GPU memory")


def test_the_failure_that_is_told_is_the_one_that_ended_the_others(tmp_path):
    """The other share of the failing arm takes a while to end, and the other arm ends at once."""
    config = RunConfig(
        engine="vllm", stages=("tasks",), tasks=(TASK,), task_documents=2, gpus=("0", "1", "2", "3"), data_parallel=2
    )  # fmt: skip
    scorer = VllmScorer(config, small_checkpoint(tmp_path / "small", 1), ["bf16"])
    arms = [
        Arm(name=name, candidate=scorer.candidates[0], batch_size=2, start=start)
        for start, name in enumerate("ab", 1)
    ]
    slow, other = Waiting(takes_s=0.5), [Waiting(), Waiting()]
    made = {"a": iter([Failing([slow, *other]), slow]), "b": iter(other)}
    scorer.arms = lambda damage: arms
    scorer.engine = lambda arm, folder, gpus: next(made[arm.name])
    with ThreadPoolExecutor(1) as pool, pytest.raises(InputError, match="too little GPU memory"):
        pool.submit(scorer.fetch, arms, tmp_path / "run").result(30)
    assert all(engine.closed.is_set() for engine in (slow, *other))
