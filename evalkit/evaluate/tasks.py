"""Run lm-eval tasks on a candidate and keep every document's score under a key that pairs it with its baseline's."""

from __future__ import annotations

import hashlib
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval.api.task
from lm_eval.api.metrics import mean
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from evalkit.errors import InputError
from evalkit.evaluate.engines.timing import Call, StepTime, step_time
from evalkit.evaluate.lm import Coverage, EvalkitLM
from evalkit.evaluate.transcripts import transcript
from evalkit.gate.beforehand import Scored
from evalkit.progress import progress
from evalkit.records import SampleRecord, TaskRecord
from evalkit.shipped import tasks_dir
from evalkit.stats import paired

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task

# Names that begin so are in tasks/ or nowhere.
PREFIX = "evalkit"
# Groups of tasks/ whose names end so hold lm-eval's own tasks.
HUB = "_hub"


@dataclass(frozen=True, kw_only=True)
class TaskRun:
    """One task on one candidate. `coverage` is empty for an LM that does not keep it.

    `step` is what a decode step took: None where nothing was generated, or by an engine that does not tell.
    """

    task: str
    samples: tuple[SampleRecord, ...]
    coverage: tuple[Coverage, ...]
    wall_s: float
    step: StepTime | None = None

    @property
    def mean_context_tokens(self) -> float | None:
        """Tokens before the first scored one, mean over requests."""
        if not self.coverage:
            return None
        return sum(span.context_tokens for span in self.coverage) / len(self.coverage)

    def share_over(self, topk: int) -> float | None:
        """Share of scored tokens with more context than topk: those for which the indexer had to choose."""
        scored = sum(span.scored_tokens for span in self.coverage)
        return sum(span.over(topk) for span in self.coverage) / scored if scored else None

    @property
    def share_stored(self) -> float | None:
        """Share of scored tokens whose attention read stored rows."""
        scored = sum(span.scored_tokens for span in self.coverage)
        return sum(span.scored_tokens for span in self.coverage if span.stored) / scored if scored else None


def task_records(
    candidate: str,
    baseline: str,
    before: Sequence[SampleRecord],
    scored: Sequence[SampleRecord],
    *,
    wall_s: float,
    mean_context_tokens: float | None,
    share_over_topk: float | None,
    share_stored_rows: float | None,
    step: StepTime | None = None,
) -> Iterator[TaskRecord]:
    """One task's samples against the baseline's on the same documents: a record for each metric and filter.

    Raises:
        PairingError: a document is on one side only, or twice.
    """
    for found in paired.compare(before, scored):
        score, loss = found.score_interval, found.loss_interval
        yield TaskRecord(
            candidate=candidate,
            baseline=baseline,
            task=found.endpoint.task,
            metric=found.endpoint.metric,
            filter=found.endpoint.filter,
            n=found.n,
            score=found.score,
            score_lower=None if score is None else score.lower,
            score_upper=None if score is None else score.upper,
            baseline_score=found.baseline_score,
            loss=found.loss,
            loss_lower=None if loss is None else loss.lower,
            loss_upper=None if loss is None else loss.upper,
            interval_method=found.interval_method,
            lost=found.lost,
            gained=found.gained,
            mcnemar_p=found.mcnemar_p,
            wall_s=wall_s,
            mean_context_tokens=mean_context_tokens,
            share_over_topk=share_over_topk,
            share_stored_rows=share_stored_rows,
            decode_step_ms=None if step is None else step.ms,
            decode_step_lower_ms=None if step is None else step.lower_ms,
            decode_step_upper_ms=None if step is None else step.upper_ms,
            decode_sequences=None if step is None else step.sequences,
            decode_columns=None if step is None else step.columns,
            decode_steps=None if step is None else step.steps,
            decode_graph=None if step is None else step.graph,
        )


def run_tasks(
    lm: LM,
    names: Sequence[str],
    documents: int,
    seed: int,
    *,
    candidate: str,
    data: Path | None = None,
    only: Sequence[str] = (),
) -> list[TaskRun]:
    """Score `documents` documents of each task (groups and tags count as their tasks), one task after the other.

    Documents depend on the task, `documents` and `seed` alone, and so do the batches: each candidate is asked the
    same questions in the same company. lm-eval's caches stay off.

    Args:
        lm: an `EvalkitLM`, or any other lm-eval model.
        names: tasks in tasks/ or lm-eval's own.
        documents: how many of each, the first ones where a task has a fixed set.
        seed: for generated documents.
        candidate: the name its samples carry.
        data: the folder of tasks that read files.
        only: of the tasks that `names` stand for, those to score; empty scores all.

    Raises:
        InputError: an unknown task, fewer documents than asked for, or a metric that is no number for a document.
        RuntimeError: samples came back short; lm-eval only warns.
    """
    if documents < 1:
        raise InputError(f"{documents} documents: want at least 1")
    tasks = load_tasks(tuple(names), documents, seed, data)
    for task in tasks:
        task.set_fewshot_seed(seed=seed)  # drawn examples, too, are the same for every candidate
    return [_run(lm, task, documents, candidate) for task in tasks if not only or task.task_name in only]


@lru_cache(maxsize=4)
def load_tasks(
    names: tuple[str, ...], documents: int, seed: int, data: Path | None = None
) -> tuple[Task, ...]:
    """The tasks that the names stand for, with their documents.

    Raises:
        InputError: an unknown task, one asked for twice, one with fewer documents, or without a metric to pair.
    """
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"task {name} is asked for {names.count(name)} times: once is right")
    with _quiet_lm_eval():
        folder = {} if data is None else {"data": str(data)}
        manager = _manager(names, {"documents": documents, "seed": seed} | folder)
        try:
            tasks: list[Task] = list(manager.load(list(names))["tasks"].values())
        except ValueError as error:
            raise InputError(f"tasks {', '.join(names)}: {error}") from error
    for task in tasks:
        if len(task.eval_docs) < documents:
            raise InputError(
                f"{task.task_name} has {len(task.eval_docs)} documents, {documents} were asked for"
            )
        if task.config.num_fewshot is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
        _refuse_unpaired(task)
    return tuple(tasks)


def scored(tasks: Sequence[Task]) -> dict[str, Scored]:
    """What samples of each task will name."""
    found = {}
    for task in tasks:
        own = (
            callable(task.config.process_results)
            or type(task).process_results is not lm_eval.api.task.ConfigurableTask.process_results
        )
        found[task.task_name] = Scored(
            metrics=None if own else [metric for metric in task.aggregation() if _paired(task, metric)],
            filters=[one.name for one in task._filters],
        )
    return found


def _manager(names: Sequence[str], metadata: dict[str, Any]) -> TaskManager:
    """Knows lm-eval's thousands of tasks only if needed: reading them takes seconds."""
    ours = TaskManager(include_path=str(tasks_dir()), include_defaults=False, metadata=metadata)
    if all(name in ours.all_tasks and not name.endswith(HUB) for name in names):
        return ours
    for name in names:
        if name.startswith(PREFIX):
            _refuse_unknown(name, ours.all_tasks, ours)
    every = TaskManager(include_path=str(tasks_dir()), metadata=metadata)
    for name in names:
        _refuse_unknown(name, every.all_tasks, ours)
    return every


def _paired(task: Task, metric: str) -> bool:
    """Whether a metric is the mean of its documents' scores, of which more is better: of others no pair tells anything."""
    # What a task scores and does not declare, lm-eval takes the mean of.
    return task.aggregation().get(metric, mean) is mean and bool(task.higher_is_better().get(metric, True))


def _refuse_unpaired(task: Task) -> None:
    metrics = task.aggregation()
    left_out = [metric for metric in metrics if not _paired(task, metric)]
    if left_out and len(left_out) == len(metrics):
        raise InputError(
            f"{task.task_name}: {', '.join(left_out)}: no mean over documents of which more is better, so nothing can be "
            "paired (evalkit lm-eval runs such tasks)"
        )
    for metric in left_out:
        print(
            f"{task.task_name}: {metric} is left out: it is no mean over documents of which more is better",
            file=sys.stderr,
        )


def _refuse_unknown(name: str, known: Sequence[str], ours: TaskManager) -> None:
    if name not in known:
        close = get_close_matches(name, known, 1) or [n for n in ours.all_tasks if name in n]
        hint = f"did you mean {close[0]}?" if close else f"tasks here: {', '.join(ours.all_subtasks)}"
        raise InputError(f"unknown task {name}; {hint}")


def _run(lm: LM, task: Task, documents: int, candidate: str) -> TaskRun:
    name = task.task_name
    coverage: list[Coverage] = getattr(lm, "coverage", [])
    engine = getattr(lm, "engine", None)
    timed: list[Call] = getattr(engine, "timed", [])
    before, untimed, aside_s = len(coverage), len(timed), getattr(engine, "aside_s", 0.0)
    started = time.perf_counter()
    with _quiet_lm_eval():
        results = evaluate(lm, {"tasks": {name: task}}, limit=documents, bootstrap_iters=0)
    wall_s = time.perf_counter() - started - (getattr(engine, "aside_s", 0.0) - aside_s)
    rows = results["samples"][name]
    covered = tuple(coverage[before:])
    said = any(span.ids is not None for span in covered)
    # An LM that keeps no tokens may have to fetch its tokenizer.
    samples = tuple(_samples(candidate, task, rows, covered, lm.tokenizer if said else None))
    # Counted, since lm-eval itself only warns when it loses one.
    for kept in {row["filter"] for row in rows} or {"any"}:
        seen = {row["doc_id"] for row in rows if row["filter"] == kept}
        if len(seen) != documents or sum(row["filter"] == kept for row in rows) != documents:
            raise RuntimeError(
                f"{name}, filter {kept}: {len(seen)} documents came back, {documents} were asked for"
            )
    return TaskRun(
        task=name, samples=samples, coverage=covered, wall_s=wall_s, step=step_time(timed[untimed:])
    )


def _samples(
    candidate: str, task: Task, rows: list[dict[str, Any]], coverage: Sequence[Coverage], tokenizer: Any
) -> Iterator[SampleRecord]:
    name = task.task_name
    generated = {span.doc_id: span for span in coverage if span.truncated is not None}
    for row in rows:
        span = generated.get(row["doc_id"])
        said = transcript(row, None if span is None else span.ids, tokenizer)
        for metric in row["metrics"]:
            if not _paired(task, metric):
                continue
            try:
                score = float(row[metric])
            except (TypeError, ValueError):
                raise InputError(
                    f"{name}: {metric} of document {row['doc_id']} is {row[metric]!r}; pairing needs one number "
                    "(evalkit lm-eval runs such tasks)"
                ) from None
            yield SampleRecord(
                candidate=candidate,
                task=name,
                doc_id=row["doc_id"],
                prompt_sha256=_prompt_sha256(row["arguments"]),
                target_sha256=row["target_hash"],
                filter=row["filter"],
                metric=metric,
                score=score,
                generated_tokens=None if span is None else span.scored_tokens,
                truncated=None if span is None else span.truncated,
                response=str(row["filtered_resps"][0]),
                **said,
            )


def _prompt_sha256(arguments: list[tuple[Any, ...]]) -> str:
    """Of what was sent: the prompt, or, where a document has several requests, every text that was scored."""
    texts = [arguments[0][0]] if len(arguments) == 1 else [str(text) for args in arguments for text in args]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


@contextmanager
def _quiet_lm_eval() -> Iterator[None]:
    """lm-eval warns of each generated data set and of each limit, and shows a bar for rendering prompts."""
    logger = logging.getLogger("lm_eval")
    level, bar = logger.level, lm_eval.api.task.tqdm
    logger.setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = lambda documents, **_: documents
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm = bar


def refuse_long_prompts(lm: EvalkitLM, tasks: Sequence[Task], documents: int) -> None:
    """Raise InputError where a prompt and what it may generate do not fit the model; nothing is scored."""
    with progress("reading tasks", len(tasks)) as advance:
        for task in tasks:
            with _quiet_lm_eval():
                task.build_all_requests(limit=documents, rank=0, world_size=1)
            lm.check([request for request in task.instances if request.request_type == "generate_until"])
            advance()


def ask(lm: EvalkitLM, tasks: Sequence[Task], documents: int, seed: int) -> None:
    """Send what `run_tasks` will send, task after task, and score nothing."""
    for task in tasks:
        task.set_fewshot_seed(seed=seed)
        with _quiet_lm_eval():
            task.build_all_requests(limit=documents, rank=0, world_size=1)
        kinds = dict.fromkeys(request.request_type for request in task.instances)
        for kind in kinds:
            getattr(lm, kind)([one for one in task.instances if one.request_type == kind], disable_tqdm=True)
