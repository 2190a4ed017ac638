"""Batches of training documents, made by worker processes; batch i of a stage depends on the seed alone."""

from __future__ import annotations

import multiprocessing
import queue
from dataclasses import dataclass
from random import Random
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from evalkit.train.config import TrainConfig
from evalkit.train.tokenizer import Encoder, train
from tasks import documents

TASKS = ("needle", "multi_key", "siblings", "variables", "walk", "registers", "copy")
COEFFICIENTS = {"needle": 0.5, "copy": 0.5, "registers": 1.5}
LM_SHARE = 0.25
BOS_SHARE = 0.75


@dataclass(frozen=True)
class Batch:
    """One step's rows, and which of their positions are scored.

    tokens [B, T] int16; scored [M] flat positions whose next token is predicted; labels [M]; weights [M], already
    divided so that their sum over a task is its coefficient; answers [M], which answer a position belongs to (the
    number of answers where it is none); answer_tasks [A]; rows [B, Q] query rows for the indexer's loss.
    """

    tokens: NDArray[np.int16]
    scored: NDArray[np.int32]
    labels: NDArray[np.int16]
    weights: NDArray[np.float32]
    answers: NDArray[np.int32]
    answer_tasks: NDArray[np.int16]
    rows: NDArray[np.int16]

    def to(self, device: torch.device) -> dict[str, Tensor]:
        tensors = {}
        for name, array in vars(self).items():
            tensor = torch.from_numpy(array)
            if device.type == "cuda":
                tensor = tensor.pin_memory().to(device, non_blocking=True)
            tensors[name] = tensor if tensor.is_floating_point() else tensor.long()
        return tensors


@dataclass(frozen=True, order=True)
class Request:
    """Which batch: `stage` indexes the curriculum, or is `indexer` or `joint`'s number behind its end."""

    stage: int
    index: int


def row_length(config: TrainConfig, stage: int, rng: Random) -> int:
    """Tokens a row of this batch: mostly the stage's own, some shorter, at the end some longer."""
    last = len(config.stages) - 1
    if stage == last + 1:
        return config.stages[last].length
    stage = min(stage, last)
    draw = rng.random()
    if stage == last and draw < config.long_share:
        return config.long_length
    if stage > 0 and draw > 1 - config.shorter_share:
        return config.stages[rng.randrange(stage)].length
    return config.stages[stage].length


def make_batch(config: TrainConfig, encoder: Encoder, request: Request) -> Batch:
    rng = Random(f"train/{config.seed}/{request.stage}/{request.index}")
    stages = len(config.stages)
    tokens_a_step = (*(stage.tokens for stage in config.stages), config.indexer_tokens, config.joint_tokens)
    length = row_length(config, request.stage, rng)
    count = max(1, tokens_a_step[request.stage] // length)
    needs_rows = request.stage >= stages

    tokens = np.full((count, length), encoder.pad, dtype=np.int16)
    answer_of = np.full((count, length), -1, dtype=np.int32)
    answer_tasks: list[int] = []
    ends = []
    for row in range(count):
        document = documents.training_document(rng, length - 2, dict(config.mixture))
        ids = [encoder.bos] if rng.random() < BOS_SHARE else []
        ids += encoder(document.context)
        for exchange in document.exchanges:
            ids += encoder(documents.QUESTION + exchange.question)
            start = len(ids)
            ids += encoder(exchange.answer)
            # A position is scored on the token that follows it.
            answer_of[row, start - 1 : len(ids) - 1] = len(answer_tasks)
            answer_tasks.append(TASKS.index(exchange.task))
        ids.append(encoder.eos)
        tokens[row, : len(ids)] = ids
        ends.append(len(ids))

    generator = np.random.default_rng(rng.getrandbits(64))
    end = np.array(ends)
    inside = np.arange(length) < end[:, None] - 1
    others = inside & (answer_of < 0) & (generator.random((count, length)) < LM_SHARE)
    scored = np.flatnonzero((answer_of >= 0) | others)
    answers = answer_of.reshape(-1)[scored]
    tasks_of_answers = np.array(answer_tasks, dtype=np.int16)
    task = np.where(answers >= 0, tasks_of_answers[np.maximum(answers, 0)], len(TASKS))
    labels = np.roll(tokens.reshape(-1), -1)[scored]
    is_value = (task == TASKS.index("registers")) & encoder.is_value[labels]
    emphasis = np.where(is_value, config.value_weight, 1.0)
    per_task = np.bincount(task, weights=emphasis, minlength=len(TASKS) + 1)
    coefficients = np.array([*(COEFFICIENTS.get(name, 1.0) for name in TASKS), config.lm_coefficient])
    weights = emphasis * (coefficients / np.maximum(per_task, 1))[task]
    return Batch(
        tokens=tokens,
        scored=scored.astype(np.int32),
        labels=labels,
        weights=weights.astype(np.float32),
        answers=np.where(answers >= 0, answers, len(answer_tasks)).astype(np.int32),
        answer_tasks=tasks_of_answers,
        rows=_query_rows(config, answer_of, end, generator)
        if needs_rows
        else np.zeros((0, 0), dtype=np.int16),
    )


def _query_rows(
    config: TrainConfig, answer_of: NDArray[np.int32], end: NDArray[np.int64], generator: np.random.Generator
) -> NDArray[np.int16]:
    """Half of them anywhere in the text, half where an answer is being given."""
    count = config.query_rows // 2
    rows = np.empty((len(end), 2 * count), dtype=np.int16)
    for row, stop in enumerate(end):
        rows[row, :count] = generator.integers(0, stop, count)
        rows[row, count:] = generator.choice(np.flatnonzero(answer_of[row] >= 0), count)
    return rows


def _work(config: TrainConfig, serialised: str, requests, results) -> None:  # type: ignore[no-untyped-def]
    encoder = Encoder(Tokenizer.from_str(serialised))
    parent = multiprocessing.parent_process()
    # A killed parent closes no pipe that its workers hold too, so they must look for it.
    while parent is not None and parent.is_alive():
        try:
            request = requests.get(timeout=5)
        except queue.Empty:
            continue
        results.put((request, make_batch(config, encoder, request)))


class Loader:
    """Batches in order, made ahead by `config.workers` processes.

    `next(stage, index)` may skip to another stage at any time: what was made ahead for the old one is dropped.
    """

    def __init__(self, config: TrainConfig, ahead: int = 3) -> None:
        self.config = config
        context = multiprocessing.get_context("spawn")
        self._requests, self._results = context.Queue(), context.Queue()
        arguments = (config, train().to_str(), self._requests, self._results)
        self._workers = [
            context.Process(target=_work, args=arguments, daemon=True) for _ in range(config.workers)
        ]
        for worker in self._workers:
            worker.start()
        self._ahead = ahead * config.workers
        self._asked: set[Request] = set()
        self._ready: dict[Request, Batch] = {}

    def next(self, stage: int, index: int) -> Batch:
        wanted = [Request(stage, index + offset) for offset in range(self._ahead)]
        self._ready = {request: batch for request, batch in self._ready.items() if request in set(wanted)}
        for request in wanted:
            if request not in self._asked:
                self._asked.add(request)
                self._requests.put(request)
        while wanted[0] not in self._ready:
            if not all(worker.is_alive() for worker in self._workers):
                raise RuntimeError("a data worker has ended; its message is above")
            try:
                request, batch = self._results.get(timeout=10)
            except queue.Empty:
                continue
            if request in set(wanted):
                self._ready[request] = batch
        self._asked.discard(wanted[0])
        return self._ready.pop(wanted[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.terminate()
        for worker in self._workers:
            worker.join()
