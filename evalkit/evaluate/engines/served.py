"""A run on serving engines: which engine an arm gets, several side by side, and what they prove of themselves.

Answers, and where they are asked for layers and logits, are fetched first, one engine for each arm, as many at once as
GPUs have room for, each kept in `engines/<arm>/` of the run as it comes. Layers are compared and tasks scored from
there, so that a run which was killed asks nothing twice.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from evalkit.candidate import Candidate
from evalkit.config import RunConfig
from evalkit.errors import InputError
from evalkit.evaluate.engines.arms import Arm, arms_of
from evalkit.evaluate.engines.asked import Asked
from evalkit.evaluate.engines.at_once import Running, at_once
from evalkit.evaluate.engines.shown import Shown
from evalkit.evaluate.lm import EvalkitLM
from evalkit.evaluate.tasks import ask, load_tasks
from evalkit.model.checkpoint import read_json
from evalkit.records import CandidateRecord, file_name

FOLDER = "engines"
AT_ONCE = {"vllm": 64, "endpoint": 16}  # requests, where batch_size is auto

Gpus = tuple[str, ...]


class Served(ABC):
    """A scorer whose arms are engines of their own.

    Args:
        config: with a batch_size or "auto".
        checkpoint: its directory.
        requested: candidates as asked for, the baseline first.

    Raises:
        InputError: an engine cannot do what is asked, as far as can be known before it starts.
    """

    def __init__(self, config: RunConfig, checkpoint: Path, requested: Sequence[str]) -> None:
        refuse_unserved(config)
        self.checkpoint, self.requested = checkpoint, tuple(requested)
        size = AT_ONCE[config.engine] if config.batch_size == "auto" else config.batch_size
        self.config = config.with_values(batch_size=size)
        self.batch_size: int = size
        about = read_json(checkpoint / "config.json")
        self.topk, self.heads = int(about["index_topk"]), int(about["num_attention_heads"])
        self.asked = Asked(checkpoint, self.longest(int(about["max_position_embeddings"])))
        named = config.tasks if "tasks" in config.stages else ()
        tasks = load_tasks(named, config.task_documents, config.seed, config.data)
        ask(EvalkitLM(engine=self.asked), tasks, config.task_documents, config.seed)
        self.candidates = tuple(self.resolve(Candidate.parse(text)) for text in requested)
        self.rooms()
        self._seconds: dict[tuple[str, str], float] = {}

    @property
    @abstractmethod
    def place(self) -> tuple[str, str]:
        """Device and dtype, in words."""

    @abstractmethod
    def longest(self, most: int) -> int:
        """The longest request that is taken, of a checkpoint that was made for `most` positions."""

    @abstractmethod
    def resolve(self, candidate: Candidate) -> Candidate:
        """With the names of what it gets."""

    @abstractmethod
    def rooms(self) -> list[list[Gpus]]:
        """Where arms run at once: for each room the GPUs of each of an arm's engines."""

    @abstractmethod
    def engine(self, arm: Arm, folder: Path, gpus: Gpus = ()) -> Any:
        """An engine of this arm that keeps its answers in a folder."""

    @abstractmethod
    def record(self, arm: Arm, requested: str, proof: dict[str, Any]) -> CandidateRecord:
        """What ran, by the engine's own account."""

    @abstractmethod
    def refuse_mixed(self, folder: Path) -> None:
        """Refuse, whenever an arm's engines have ended, engines in a run's folder whose numbers would not compare."""

    def arms(self, damage: float | None, endpoints: tuple[str, ...] = ()) -> list[Arm]:
        """As of this project's own engine; but rows of a serving engine cannot be damaged."""
        if damage is not None:
            print(
                f"engine {self.config.engine}: no damage can be planted in its rows, so the gate will find sensitivity "
                "INCONCLUSIVE",
                file=sys.stderr,
            )
        return arms_of(self.candidates, self.batch_size, self.config.task_documents, None)

    @contextmanager
    def lm(self, arm: Arm, run: Path) -> Iterator[EvalkitLM]:
        with closing(self.engine(arm, _folder(run, arm))) as engine:
            yield EvalkitLM(engine=engine)

    def proof(self, arm: Arm, run: Path) -> Iterator[CandidateRecord]:
        if arm.name == str(arm.candidate):
            requested = self.requested[self.candidates.index(arm.candidate)]
            yield self.record(arm, requested, self.engine(arm, _folder(run, arm)).proof)

    def seconds(self, arm: Arm, task: str) -> float:
        """Of the share that took longest; what was answered before a run was stopped counts."""
        return self._seconds.get((arm.name, task), 0.0)

    def fetch(self, arms: Sequence[Arm], run: Path, layers: bool = False) -> Shown:
        """Ask the engines all that tasks will ask of these arms, and with `layers` to show every start's documents."""
        documents = self.asked.documents if layers else ()
        shown = Shown(documents, self.config.layers_decode_tokens, run / FOLDER)
        if layers:
            shown.refuse_others()
        unasked = {arm.name for arm in arms}
        free: SimpleQueue[list[Gpus]] = SimpleQueue()
        for room in self.rooms():
            free.put(room)

        running = Running()

        def fetch(arm: Arm) -> None:
            room = free.get()
            try:
                asked = self.asked.tasks if arm.name in unasked else []
                self._fetch(arm, _folder(run, arm), room, running, asked, shown)
                self.refuse_mixed(run / FOLDER)
            finally:
                free.put(room)

        every = [arm for arm in self.arms(None) if arm.name in unasked or shown.wants(arm)]
        at_once(free.qsize(), [partial(fetch, arm) for arm in every], running.end)
        return shown

    def _fetch(
        self,
        arm: Arm,
        folder: Path,
        room: Sequence[Gpus],
        running: Running,
        tasks: Sequence[str],
        shown: Shown,
    ) -> None:
        engines = [
            self.engine(arm, folder if not share else folder / f"share-{share}", gpus)
            for share, gpus in enumerate(room)
        ]

        def close() -> None:
            for engine in engines:
                engine.close()

        running.take(engines)
        try:
            if shown.wants(arm):
                shown.keep(arm, engines[0])
            for task in tasks:
                shares = [
                    partial(self._ask, engine, task, slice(share, None, len(engines)))
                    for share, engine in enumerate(engines)
                ]
                # Its own alone: what failed here is to be told, and not what ended with it.
                at_once(len(shares), shares, close)
                asked = [*self.asked.prompts.get(task, []), *self.asked.spans.get(task, [])]
                self._seconds[arm.name, task] = max(engine.seconds(asked) for engine in engines)
            for other in engines[1:]:
                engines[0].adopt(other)
        finally:
            close()

    def _ask(self, engine: Any, task: str, share: slice) -> None:
        """Which documents are whose does not depend on what is answered."""
        for _ in engine.generate(self.asked.prompts.get(task, [])[share]):
            pass
        for _ in engine.score(self.asked.spans.get(task, [])[share]):
            pass


def refuse_unserved(config: RunConfig) -> None:
    """Refuse what a serving engine cannot do.

    Raises:
        InputError: something is asked for that only this project's own path has, or of a server what only vLLM shows.
    """
    place = f"engine is {config.engine}"
    if config.engine == "endpoint" and config.stages != ("tasks",):
        raise InputError(
            f"{place}, which scores tasks and nothing else: run `evalkit tasks`, or set stages=tasks; layers are "
            "engine=native's and engine=vllm's"
        )
    if "kld" in config.stages and (config.kld_texts or config.kld_run or config.stages == ("kld",)):
        raise InputError(
            f"{place}: kld_texts and kld_run are engine=native's; with the stage layers, a vLLM run has the KL divergence "
            "of its layer documents"
        )
    if "layers" in config.stages:
        _refuse_unshown(config, place)
    for key in ("profile", "device", "dtype"):
        if getattr(config, key) != getattr(RunConfig(), key):
            raise InputError(f"{place}: {key}={getattr(config, key)} is engine=native's; leave it out")
    if config.batch_size != "auto" and config.batch_size < 2:
        raise InputError(f"{place}: batch_size is 1, and half of it is for the control; give at least 2")


def _refuse_unshown(config: RunConfig, place: str) -> None:
    """Refuse layers that an engine cannot show."""
    if not config.eager:
        raise InputError(
            f"{place}: layers are seen without CUDA graphs only, and eager is false: set eager=true, or run `evalkit tasks`"
        )
    for key in ("tensor_parallel", "pipeline_parallel"):
        if getattr(config, key) > 1:
            raise InputError(
                f"{place}: layers are seen in one process, and {key} is {getattr(config, key)}: set it to 1, or run "
                "`evalkit tasks`"
            )
    for key in ("attribution", "layers_frozen"):
        if getattr(config, key):
            raise InputError(f"{place}: {key} is engine=native's; leave it out")


def _folder(run: Path, arm: Arm) -> Path:
    return run / FOLDER / file_name(arm.name)
