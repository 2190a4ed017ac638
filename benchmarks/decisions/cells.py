"""Outcomes of one arm on one sample of documents, one byte a document: small files that a stopped stage goes on from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalkit.arm_names import damage_arm
from evalkit.errors import InputError
from evalkit.gate.policy import PrimaryEndpoint
from evalkit.records import SampleRecord, file_name

RIGHT, TRUNCATED = 1, 2  # bits of an outcome


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What one cell is of: `n` documents of a seed, answered by a candidate whose rows carry noise."""

    task: str
    metric: str
    filter: str
    candidate: str
    noise: float
    batch_size: int
    seed: int
    n: int

    @property
    def arm(self) -> str:
        """The name that its samples carry in a run."""
        return damage_arm(self.candidate, self.noise) if self.noise else self.candidate

    def path(self, out: Path) -> Path:
        """The file that holds it."""
        arm = f"{self.candidate}-x{self.noise:g}-b{self.batch_size}"
        return out / "cells" / self.task / file_name(arm) / f"seed{self.seed}-n{self.n}.npz"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A scored cell.

    outcomes: [n] uint8, bit 0 where the answer is right, bit 1 where it was cut off.
    questions_sha256: of every document's prompt and target, so that cells of one sample can be shown to pair.
    facts: where and by what it was scored.
    """

    wanted: Wanted
    outcomes: NDArray[np.uint8]
    questions_sha256: str
    wall_s: float
    mean_context_tokens: float | None
    mean_scored_tokens: float | None
    share_over_topk: float | None
    share_stored_rows: float | None
    facts: dict[str, Any]

    @property
    def right(self) -> NDArray[np.bool_]:
        return (self.outcomes & RIGHT).astype(bool)

    def save(self, out: Path) -> None:
        """Write it whole or not at all."""
        path = self.wanted.path(out)
        path.parent.mkdir(parents=True, exist_ok=True)
        said = {key: value for key, value in vars(self).items() if key not in ("outcomes", "wanted")}
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez_compressed(
                file, outcomes=self.outcomes, said=json.dumps(said | {"wanted": asdict(self.wanted)})
            )
        partial.replace(path)


def load(wanted: Wanted, out: Path) -> Cell:
    """Read one cell.

    Raises:
        InputError: it has not been scored, or the file is of something else.
    """
    path = wanted.path(out)
    if not path.exists():
        raise InputError(f"no {path}: the stage that scores it has not come so far")
    with np.load(path) as file:
        outcomes, said = file["outcomes"], json.loads(str(file["said"]))
    if said.pop("wanted") != asdict(wanted) or outcomes.shape != (wanted.n,):
        raise InputError(f"{path} holds other documents than are wanted: score into another folder")
    return Cell(wanted=wanted, outcomes=outcomes, **said)


def outcomes_of(samples: Sequence[SampleRecord]) -> NDArray[np.uint8]:
    """[n] uint8 by document.

    Raises:
        InputError: a score is neither 0 nor 1.
    """
    if bad := [s for s in samples if s.score not in (0, 1)]:
        raise InputError(
            f"{bad[0].task} document {bad[0].doc_id} scores {bad[0].score}: right and wrong are kept"
        )
    ordered = sorted(samples, key=lambda s: s.doc_id)
    return np.array([RIGHT * (s.score == 1) + TRUNCATED * (s.truncated is True) for s in ordered], np.uint8)


def questions_sha256(samples: Sequence[SampleRecord]) -> str:
    """One hash over every document's number, prompt and target."""
    lines = sorted((s.doc_id, s.prompt_sha256, s.target_sha256) for s in samples)
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


@lru_cache(maxsize=64)  # every dose asks for every sample's
def questions(task: str, n: int, seed: int) -> tuple[SampleRecord, ...]:
    """The documents of a sample anew, with their hashes; the answers in them are no model's."""
    from lm_eval.api.registry import get_model

    from evalkit.evaluate.tasks import run_tasks

    (made,) = run_tasks(get_model("dummy")(), [task], n, seed, candidate="none")
    return made.samples


def samples(cell: Cell) -> list[SampleRecord]:
    """A cell as the samples of a run, its questions made anew and checked against those that were answered.

    Raises:
        InputError: the questions of this version are not those that were answered.
    """
    wanted = cell.wanted
    asked = [
        s
        for s in questions(wanted.task, wanted.n, wanted.seed)
        if (s.metric, s.filter) == (wanted.metric, wanted.filter)
    ]
    if not asked or questions_sha256(asked) != cell.questions_sha256:
        raise InputError(
            f"{wanted.task}, seed {wanted.seed}: these documents are not those that {wanted.arm} answered"
        )
    return [
        SampleRecord(
            candidate=wanted.arm,
            task=s.task,
            doc_id=s.doc_id,
            prompt_sha256=s.prompt_sha256,
            target_sha256=s.target_sha256,
            filter=s.filter,
            metric=s.metric,
            score=float(outcome & RIGHT),
            generated_tokens=None,
            truncated=bool(outcome & TRUNCATED),
            response="",
        )
        for s, outcome in zip(sorted(asked, key=lambda s: s.doc_id), cell.outcomes.tolist(), strict=True)
    ]


def of(endpoint: PrimaryEndpoint, candidate: str, noise: float, batch_size: int, seed: int, n: int) -> Wanted:
    """What a cell of a policy's endpoint is."""
    return Wanted(
        task=endpoint.task,
        metric=endpoint.metric,
        filter=endpoint.filter,
        candidate=candidate,
        noise=noise,
        batch_size=batch_size,
        seed=seed,
        n=n,
    )
