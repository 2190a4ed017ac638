"""Scores the cells that are wanted and not there yet, in one process or in several on one GPU."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from multiprocessing import current_process, get_context
from pathlib import Path
from typing import Any

from benchmarks.decisions import cells
from benchmarks.decisions.cells import Cell, Wanted


@dataclass(frozen=True, kw_only=True)
class Where:
    """What scores: a checkpoint on a device, in so many processes; and what every cell says of it."""

    checkpoint: str
    device: str | None
    dtype: str | None
    out: Path
    workers: int
    facts: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Documents that a stage scored, and the seconds from its start to its end."""

    documents: int
    wall_s: float


def score(wanted: Iterable[Wanted], where: Where) -> Speed:
    """Score what is missing, a seed after the other, every arm on a seed's documents in turn."""
    missing = [w for w in wanted if not w.path(where.out).exists()]
    jobs = [list(same) for _, same in groupby(missing, key=lambda w: (w.task, w.seed, w.n))]
    started = time.perf_counter()
    print(f"{len(missing)} cells of {len(jobs)} samples to score", flush=True)
    if not jobs:
        return Speed(documents=0, wall_s=0.0)
    if where.workers <= 1:
        for job in jobs:
            _score_job(job, _loaded(where), where)
    else:
        # Threads of several processes would wait for each other.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // where.workers)))
        with get_context("spawn").Pool(min(where.workers, len(jobs)), _begin, (where,)) as pool:
            for _ in pool.imap_unordered(_work, jobs):
                pass
            pool.close()
            pool.join()
    documents, wall_s = sum(w.n for w in missing), time.perf_counter() - started
    print(f"{documents:,} documents in {wall_s:.0f} s, {documents / wall_s:.0f} a second", flush=True)
    return Speed(documents=documents, wall_s=wall_s)


_worker: tuple[Any, Where] | None = None


def _begin(where: Where) -> None:
    """What a process does once: it takes the next GPU, where there are several, and loads the model."""
    import torch

    global _worker
    if (where.device or "").startswith("cuda") and torch.cuda.device_count() > 1:
        (number,) = current_process()._identity
        where = replace(where, device=f"cuda:{number % torch.cuda.device_count()}")
        torch.cuda.set_device(where.device)
    _worker = (_loaded(where), where)


def _work(job: Sequence[Wanted]) -> None:
    assert _worker is not None
    _score_job(job, *_worker)


_models: dict[tuple[str, str | None, str | None], Any] = {}


def _loaded(where: Where) -> Any:
    """The model, loaded once a process, with the numerics of a run."""
    import torch

    from evalkit.model.load import load_reference

    key = (where.checkpoint, where.device, where.dtype)
    if key not in _models:
        dtype = None if where.dtype is None else getattr(torch, where.dtype)
        _models[key] = load_reference(where.checkpoint, where.device, dtype)
    return _models[key]


def _score_job(job: Sequence[Wanted], model: Any, where: Where) -> None:
    for wanted in job:
        cell = score_cell(wanted, model, where.facts)
        cell.save(where.out)
        print(
            f"{wanted.task} seed {wanted.seed}: {wanted.arm} in {wanted.batch_size}s: {wanted.n} documents, "
            f"{cell.right.mean():.1%} right, {cell.wall_s:.1f} s, {wanted.n / cell.wall_s:.0f} a second",
            flush=True,
        )


def score_cell(wanted: Wanted, model: Any, facts: dict[str, Any]) -> Cell:
    """Ask the model a sample's documents, as `evalkit run` would."""
    from evalkit.evaluate.lm import EvalkitLM
    from evalkit.evaluate.tasks import run_tasks

    candidate = model.evalkit.resolve(wanted.candidate)
    lm = EvalkitLM(model, candidate=candidate, batch_size=wanted.batch_size, damage=wanted.noise)
    (scored,) = run_tasks(lm, [wanted.task], wanted.n, wanted.seed, candidate=wanted.arm)
    kept = [s for s in scored.samples if (s.metric, s.filter) == (wanted.metric, wanted.filter)]
    tokens = [span.scored_tokens for span in scored.coverage]
    return Cell(
        wanted=wanted,
        outcomes=cells.outcomes_of(kept),
        questions_sha256=cells.questions_sha256(kept),
        wall_s=scored.wall_s,
        mean_context_tokens=scored.mean_context_tokens,
        mean_scored_tokens=sum(tokens) / len(tokens) if tokens else None,
        share_over_topk=scored.share_over(model.config.index_topk),
        share_stored_rows=scored.share_stored,
        facts={**facts, "resolved": str(candidate)},
    )
