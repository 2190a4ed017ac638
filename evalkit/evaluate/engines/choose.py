"""Which engine scores a run's tasks: this project's own, vLLM, or servers that run already.

A scorer is what a run asks; each scores the same arms on the same documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from evalkit.candidate import Candidate
from evalkit.config import RunConfig
from evalkit.evaluate.engines.arms import Arm, arms_of
from evalkit.evaluate.engines.on_endpoints import EndpointScorer
from evalkit.evaluate.engines.on_vllm import VllmScorer
from evalkit.evaluate.engines.served import Served
from evalkit.evaluate.lm import EvalkitLM
from evalkit.kv import Scales
from evalkit.records import CandidateRecord

# vLLM takes no scales that it was not given, and a server has what it has.
DEFAULT_CANDIDATES = {
    "native": ("bf16", "fp8_e4m3:one", "fp8_e4m3:calibrated", "fp8_ds_mla"),
    "vllm": ("bf16", "fp8_e4m3:one", "fp8_ds_mla"),
    "endpoint": ("bf16",),
}


class Scorer(Protocol):
    """What scores a run's tasks."""

    @property
    def place(self) -> tuple[str, str]:
        """Device and dtype, in words."""

    @property
    def topk(self) -> int:
        """Keys that the indexer selects."""

    def arms(self, damage: float | None, endpoints: tuple[str, ...] = ()) -> list[Arm]:
        """Every pass, in an order in which each comes after what it is paired with.

        damage: what a policy plants, on the tasks of its `endpoints`; None plants none.
        """

    def lm(self, arm: Arm, run: Path) -> AbstractContextManager[EvalkitLM]:
        """What `run_tasks` asks."""

    def proof(self, arm: Arm, run: Path) -> Iterator[CandidateRecord]:
        """What ran, where that is known only now."""

    def seconds(self, arm: Arm, task: str) -> float:
        """What asking it took before; 0 where it is asked as it is scored."""


@dataclass(frozen=True, kw_only=True)
class NativeScorer:
    """A loaded model of this project's path, which every candidate shares; what ran was recorded when it was loaded."""

    model: Any
    candidates: Sequence[Candidate]
    scales: Mapping[Candidate, Mapping[int, Scales]]
    batch_size: int
    documents: int

    @property
    def place(self) -> tuple[str, str]:
        dtype = str(self.model.dtype).removeprefix("torch.")
        if self.model.evalkit.rounding is not None:
            dtype += " (query, rows and attention output rounded to bfloat16)"
        return str(self.model.device), dtype

    @property
    def topk(self) -> int:
        return int(self.model.config.index_topk)

    def arms(self, damage: float | None, endpoints: tuple[str, ...] = ()) -> list[Arm]:
        return arms_of(self.candidates, self.batch_size, self.documents, damage, endpoints)

    @contextmanager
    def lm(self, arm: Arm, run: Path) -> Iterator[EvalkitLM]:
        yield EvalkitLM(
            self.model,
            candidate=arm.candidate,
            scales=self.scales[arm.candidate],
            batch_size=arm.batch_size,
            damage=arm.damage,
        )

    def proof(self, arm: Arm, run: Path) -> Iterator[CandidateRecord]:
        yield from ()

    def seconds(self, arm: Arm, task: str) -> float:
        return 0.0


def serve(config: RunConfig, checkpoint: Path, requested: Sequence[str]) -> Served:
    """The scorer of a serving engine.

    Raises:
        InputError: see `Served`.
    """
    return {"vllm": VllmScorer, "endpoint": EndpointScorer}[config.engine](config, checkpoint, requested)
