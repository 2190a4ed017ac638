"""What a run left behind, as the checks ask for it."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from evalkit.arm_names import damage_arm, is_control_arm
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
        """Hash of the policy that was stored before the first stage ended; None where its text is not of that hash."""
        ended = next(
            (place for place, r in enumerate(self.records) if isinstance(r, StageRecord)), len(self.records)
        )
        stored = only(self.records[:ended], PolicyRecord)
        if not stored or hashlib.sha256(stored[0].text.encode()).hexdigest() != stored[0].sha256:
            return None
        return stored[0].sha256

    @property
    def documents(self) -> int | None:
        wanted = self.config.get("task_documents")
        return wanted if isinstance(wanted, int) else None

    @cached_property
    def candidates(self) -> list[CandidateRecord]:
        return only(self.records, CandidateRecord)

    @property
    def lead(self) -> str:
        """The bf16 that every run begins with: it alone has a control, and damage planted into it."""
        return self.candidates[0].candidate if self.candidates else ""

    @cached_property
    def stages(self) -> set[str]:
        return {record.stage for record in only(self.records, StageRecord)}

    def find(self, name: str) -> CandidateRecord | None:
        """A candidate by the name it was asked for or the one it resolved to."""
        return next((c for c in self.candidates if name in (c.candidate, c.requested)), None)

    def scored(self, arm: str, endpoint: PrimaryEndpoint) -> list[SampleRecord]:
        """An arm's samples of one endpoint."""
        return self._scored.get((arm, endpoint.task, endpoint.metric, endpoint.filter), [])

    def asked(self, endpoint: PrimaryEndpoint) -> bool:
        """Whether anything is left of any arm's answers to it."""
        wanted = (endpoint.task, endpoint.metric, endpoint.filter)
        left = [key[1:] for key in self._scored]
        left += [(r.task, r.metric, r.filter) for r in only(self.records, TaskRecord)]
        return wanted in left

    def tasks(self, arm: str, endpoint: PrimaryEndpoint) -> list[TaskRecord]:
        """What was recorded of an arm's endpoint: one, where nothing was changed."""
        wanted = (arm, endpoint.task, endpoint.metric, endpoint.filter)
        return [
            r for r in only(self.records, TaskRecord) if (r.candidate, r.task, r.metric, r.filter) == wanted
        ]

    def task(self, arm: str, endpoint: PrimaryEndpoint) -> TaskRecord | None:
        return next(iter(self.tasks(arm, endpoint)), None)

    @property
    def scored_itself(self) -> bool:
        """Whether the run was asked for tasks, rather than that answers scored elsewhere were put into it."""
        stages = self.config.get("stages", ["tasks"])
        return not isinstance(stages, list) or "tasks" in stages

    def control(self, baseline: str) -> str | None:
        """The arm that is the baseline once more, in batches of another size."""
        return next((arm for arm in self._arms if is_control_arm(arm, baseline)), None)

    def damaged(self, baseline: str, noise: float) -> tuple[str, str]:
        """The baseline with damage of this size, and its arm: itself, else the run's lead; empty names where neither has.

        Damage is planted into the lead alone: what it shows of the documents holds for an incumbent on them too.
        """
        planted = ((whole, damage_arm(whole, noise)) for whole in (baseline, self.lead))
        return next(((whole, arm) for whole, arm in planted if arm in self._arms), ("", ""))

    @cached_property
    def _arms(self) -> list[str]:
        return list(dict.fromkeys(arm for arm, *_ in self._scored))

    @cached_property
    def _scored(self) -> dict[tuple[str, str, str, str], list[SampleRecord]]:
        found: dict[tuple[str, str, str, str], list[SampleRecord]] = defaultdict(list)
        for s in self.samples:
            found[s.candidate, s.task, s.metric, s.filter].append(s)
        return dict(found)
