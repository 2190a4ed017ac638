"""Names of the arms that a run scores beside its candidates: what makes them, and what knows them by."""

import re

CONTROL = re.compile(r", batches of \d+$")
LATER_START = re.compile(r", start \d+$")


def control_arm(baseline: str, size: int) -> str:
    """The baseline once more, in batches of another size."""
    return f"{baseline}, batches of {size}"


def is_control_arm(arm: str, baseline: str | None = None) -> bool:
    """Whether an arm is a control, of any baseline or of this one."""
    return CONTROL.search(arm) is not None and baseline in (None, CONTROL.sub("", arm))


def damage_arm(baseline: str, noise: float) -> str:
    """The baseline with damage planted into its rows."""
    return f"{baseline}, rows times 1 + {noise:g} N(0, 1)"


def later_start(candidate: str, start: int) -> str:
    """A candidate on an engine that was started afresh, from the second start on."""
    return f"{candidate}, start {start}"


def is_later_start(arm: str) -> bool:
    """Whether an arm is a later fresh start of a candidate."""
    return LATER_START.search(arm) is not None
