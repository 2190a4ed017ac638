"""What was recorded of an endpoint, counted again from its samples."""

from dataclasses import asdict
from math import isclose

from evalkit.gate.evidence import Evidence
from evalkit.gate.policy import PrimaryEndpoint
from evalkit.records import TaskRecord
from evalkit.stats import paired


def recount(run: Evidence, arm: str, endpoint: PrimaryEndpoint) -> str | None:
    """How an arm's task record differs from the samples of the two arms that it is about; None where it does not.

    What it is paired with may have no samples: that is missing evidence, and told where it is looked for.
    """
    found = run.tasks(arm, endpoint)
    if len(found) > 1:
        return f"{endpoint} was recorded {len(found)} times, so which of these holds cannot be told."
    if not found or not run.scored(found[0].baseline, endpoint):
        return None
    try:
        counted = _counted(run, found[0], endpoint)
    except paired.PairingError as error:
        return f"its samples do not pair with those of {found[0].baseline}, as its record says: {error}."
    apart = [
        f"{name} {_said(getattr(found[0], name))}, its samples {_said(value)}"
        for name, value in counted.items()
        if not _same(getattr(found[0], name), value)
    ]
    return f"the record of {endpoint} says {'; '.join(apart)}." if apart else None


def _counted(run: Evidence, record: TaskRecord, endpoint: PrimaryEndpoint) -> dict[str, float | None]:
    """Counts and means alone: intervals follow from them, and those of graded scores take a bootstrap."""
    joined = paired.join(run.scored(record.baseline, endpoint), run.scored(record.candidate, endpoint))
    return asdict(paired.count([(paired.finite(key, b), paired.finite(key, a)) for key, b, a in joined]))


def _same(said: float | None, counted: float | None) -> bool:
    if said is None or counted is None:
        return said is counted
    return isclose(said, counted, rel_tol=1e-9, abs_tol=1e-9)


def _said(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
