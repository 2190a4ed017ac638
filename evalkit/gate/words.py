"""The four verdicts, and one check with its reason."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """Highest precedence first."""

    ANOMALOUS = "ANOMALOUS"
    WORSE = "WORSE"
    INCONCLUSIVE = "INCONCLUSIVE"
    NON_INFERIOR = "NON-INFERIOR"

    @property
    def exit_code(self) -> int:
        """What a command exits with."""
        return {"ANOMALOUS": 12, "WORSE": 10, "INCONCLUSIVE": 11, "NON-INFERIOR": 0}[self.value]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at.

    name: what, in few words; a check of that name is made for every candidate.
    reason: what was found, in one sentence.
    needs: what it would take for this check to pass; empty where it has.
    """

    name: str
    verdict: Verdict
    reason: str
    needs: str = ""


def overall(verdicts: Iterable[Verdict]) -> Verdict:
    """The one of highest precedence; INCONCLUSIVE where nothing was judged."""
    given = set(verdicts)
    return next((verdict for verdict in Verdict if verdict in given), Verdict.INCONCLUSIVE)
