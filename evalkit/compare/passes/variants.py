"""What runs against the reference: a subject (a candidate, or bf16 disturbed to find a floor) in one mode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from evalkit.candidate import Candidate
from evalkit.kv import Scales

REFERENCE: Final = Candidate(format="bf16", backend="reference")
PREFILL, DECODE = "prefill", "decode"
ISOLATED, PROPAGATED = "isolated", "propagated"
FROZEN: Final = "selection+routing"


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A candidate as it is run.

    rung: `total`, or `floor:<kind>` for bf16 against itself.
    prefill_chunks: in how many equal pieces the prompt is processed; with more than one, decode tokens go at
        once.
    noise: half-width of the multiplicative noise on latent and rope before they are stored; 0 is none.
    splits: its kernel splits each query's keys, and is compared with the `floor:kernel` subject, which does not.
    runs_frozen: whether it also runs with selection and routing frozen to the reference's.
    """

    candidate: Candidate
    scales: Mapping[int, Scales] = field(default_factory=dict)
    rung: str = "total"
    prefill_chunks: int = 1
    noise: float = 0.0
    splits: bool = False
    runs_frozen: bool = True

    @property
    def is_floor(self) -> bool:
        return self.rung != "total"

    def spans(self, prefill: int, total: int) -> list[slice]:
        """The steps in which `total` tokens are processed, the first `prefill` of them as the prompt."""
        size = -(-prefill // self.prefill_chunks)
        steps = [slice(start, min(start + size, prefill)) for start in range(0, prefill, size)]
        width = 1 if self.prefill_chunks == 1 else max(1, total - prefill)
        return steps + [slice(start, min(start + width, total)) for start in range(prefill, total, width)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Arm:
    """A subject in one mode: isolated (layers get the reference's input) or propagated, free or frozen."""

    subject: Subject
    mode: str
    frozen: bool = False

    @property
    def frozen_name(self) -> str:
        return FROZEN if self.frozen else "none"


def phase_spans(prefill: int, total: int) -> dict[str, slice]:
    """Which of a document's `total` tokens are its prompt, and which were decoded, where some were."""
    return {PREFILL: slice(0, prefill)} | ({DECODE: slice(prefill, total)} if total > prefill else {})


def arms_of(subject: Subject) -> list[Arm]:
    """The ways a subject runs, isolated first."""
    frozen = [Arm(subject=subject, mode=PROPAGATED, frozen=True)] if subject.runs_frozen else []
    return [Arm(subject=subject, mode=ISOLATED), Arm(subject=subject, mode=PROPAGATED), *frozen]
