"""The passes over a run's documents: the baseline, what it is held against, and every candidate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from evalkit.arm_names import control_arm, damage_arm, later_start
from evalkit.candidate import Candidate


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One pass over the documents.

    name: what its samples carry. batch_size: sequences that decode together, at most. against: the arm that it is
    paired with. damage: see `evalkit.evaluate.damage`. start: which fresh start of its candidate it is, from 1; 0 of an
    arm that differs in more than that. shows_layers: whether a serving engine shows its layers; else its logits alone.
    tasks: names of the only tasks that it answers; empty where it answers all.
    """

    name: str
    candidate: Candidate
    batch_size: int
    against: str | None = None
    damage: float = 0.0
    start: int = 0
    shows_layers: bool = False
    tasks: tuple[str, ...] = ()


def arms_of(
    candidates: Sequence[Candidate],
    batch_size: int,
    documents: int,
    damage: float | None,
    endpoints: tuple[str, ...] = (),
) -> list[Arm]:
    """The baseline in batches of half the size, the baseline, planted damage where a policy asks for it, the others.

    endpoints: the tasks that damage has to show on; it is planted in no other.
    """
    baseline, *others = candidates
    size = max(1, min(batch_size, documents) // 2)  # of what is decoded together, documents permitting
    control = Arm(name=control_arm(str(baseline), size), candidate=baseline, batch_size=size)
    first = Arm(name=str(baseline), candidate=baseline, batch_size=batch_size, start=1, shows_layers=True)
    found = [control, replace(first, against=control.name)]
    if damage is not None:
        name = damage_arm(str(baseline), damage)
        found.append(
            Arm(name=name, candidate=baseline, batch_size=batch_size, damage=damage, tasks=endpoints)
        )
    return found + [replace(first, name=str(other), candidate=other, against=first.name) for other in others]


def starts_of(arms: Sequence[Arm], starts: int) -> list[Arm]:
    """What begins afresh for each candidate, from the second start on; each is paired with the first."""
    own = [arm for arm in arms if arm.start == 1]
    found = []
    for start in range(2, starts + 1):
        for arm in own:
            # A floor: the baseline once more.
            shows = start == 2 and arm is own[0]
            name = later_start(arm.name, start)
            found.append(replace(arm, name=name, against=arm.name, start=start, shows_layers=shows))
    return found
