"""What a run left behind, as the checks ask for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from evalkit.errors import InputError
from evalkit.gate.policy import PrimaryEndpoint
from evalkit.records import (
    CandidateRecord,
    EnvironmentRecord,
    PolicyRecord,
    Record,
    RunDirectory,
    SampleRecord,
    StageRecord,
    TaskRecord,
    only,
    read_samples,
)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One run, read once.

    samples: every document's score; `candidate` there names the arm, which may be a control or planted damage.
    documents: how many of each task were asked for.
    """

    path: Path
    config: dict[str, object]
    records: Sequence[Record]
    samples: Sequence[SampleRecord]

    @classmethod
    def read(cls, run: Path) -> "Evidence":
        """Read a run directory.

        Raises:
            InputError: it is none, or no stage of it has ended.
        """
        directory = RunDirectory(run)
        records = directory.read()
        if not only(records, EnvironmentRecord):
            raise InputError(f"{run} has recorded nothing: it stopped at its start; run it again")
        return cls(path=run, config=directory.config, records=records, samples=read_samples(run))

    @property
    def environment(self) -> EnvironmentRecord:
        return only(self.records, EnvironmentRecord)[0]

    @property
    def policy_sha256(self) -> str | None:
        """Hash of the policy that was stored before anything was scored."""
        stored = only(self.records, PolicyRecord)
        return stored[0].sha256 if stored else None

    @property
    def documents(self) -> int | None:
        wanted = self.config.get("task_documents")
        return wanted if isinstance(wanted, int) else None

    @cached_property
    def candidates(self) -> list[CandidateRecord]:
        return only(self.records, CandidateRecord)

    @cached_property
    def stages(self) -> set[str]:
        return {record.stage for record in only(self.records, StageRecord)}

    def find(self, name: str) -> CandidateRecord | None:
        """A candidate by the name it was asked for or the one it resolved to."""
        return next((c for c in self.candidates if name in (c.candidate, c.requested)), None)

    def scored(self, arm: str, endpoint: PrimaryEndpoint) -> list[SampleRecord]:
        """An arm's samples of one endpoint."""
        wanted = (arm, endpoint.task, endpoint.metric, endpoint.filter)
        return [s for s in self.samples if (s.candidate, s.task, s.metric, s.filter) == wanted]

    def task(self, arm: str, endpoint: PrimaryEndpoint) -> TaskRecord | None:
        wanted = (arm, endpoint.task, endpoint.metric, endpoint.filter)
        found = (
            r for r in only(self.records, TaskRecord) if (r.candidate, r.task, r.metric, r.filter) == wanted
        )
        return next(found, None)

    def control(self, baseline: str) -> str | None:
        """The arm that is the baseline once more, in batches of another size."""
        return self._arm(f"{baseline}, batches of ")

    def damaged(self, noise: float) -> tuple[str, str]:
        """The baseline that damage of this size was planted into, and its arm; two empty names where there is none."""
        arms = {s.candidate for s in self.samples}
        planted = ((c.candidate, damage_arm(c.candidate, noise)) for c in self.candidates)
        return next(((whole, arm) for whole, arm in planted if arm in arms), ("", ""))

    def _arm(self, start: str) -> str | None:
        return next((s.candidate for s in self.samples if s.candidate.startswith(start)), None)


def damage_arm(baseline: str, noise: float) -> str:
    """The name that samples of planted damage carry."""
    return f"{baseline}, rows times 1 + {noise:g} N(0, 1)"
