"""How many documents a decision needs, by enumeration before the run.

Power is that of the exact test (`exact.critical_value`) at a discordance, measured on the control pair (bf16 against
itself) or given, and at the true loss that a policy assumes. It is not monotone in n, since counts are whole.
"""

from dataclasses import dataclass, replace
from math import ceil, inf

import numpy as np
from scipy.stats import binom, norm

from evalkit.errors import InputError
from evalkit.stats.exact import NONINFERIOR, check, critical_value, rejection_edge, rejects

MOST_DOCUMENTS = 200_000


@dataclass(frozen=True, kw_only=True)
class Design:
    """What an endpoint is planned with.

    margin: the loss that must be excluded.
    alpha: one-sided, of one look.
    power: of this endpoint; see `each_power`.
    discordance: P(a document's outcome differs), either way.
    loss: the true loss assumed.
    """

    margin: float
    alpha: float
    power: float
    discordance: float
    loss: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what cannot be planned."""
        check(2, self.margin, self.alpha)
        if not 0 < self.power < 1:
            raise InputError(f"power {self.power}: want a number between 0 and 1")
        if not 0 < self.discordance <= 1 or abs(self.loss) > self.discordance:
            raise InputError(
                f"a true loss of {self.loss:g} at discordance {self.discordance:g}: documents that differ cannot be "
                "fewer than those lost; want 0 < discordance <= 1 and |loss| <= discordance"
            )


def each_power(power: float, endpoints: int) -> float:
    """Power of each of several endpoints with which all are shown at once with probability `power` at least."""
    return 1 - (1 - power) / endpoints


def power(n: int, design: Design) -> float:
    """Probability that n documents show noninferiority."""
    critical = critical_value(n, design.margin, design.alpha)
    edge = rejection_edge(n, design.margin, critical, NONINFERIOR)
    return rejects(n, design.discordance, design.loss, edge, NONINFERIOR)


def planned_documents(design: Design) -> int | None:
    """Documents with which noninferiority is shown with the design's power; None where no number will do.

    The number is one at which the power is reached while a few documents fewer miss it.
    """
    if design.loss >= design.margin:
        return None
    low = high = _guess(design)
    if high > MOST_DOCUMENTS:
        return None
    if power(high, design) >= design.power:
        while high > 4 and power(low, design) >= design.power:
            low, high = int(low * 0.99) - 1, low
    else:
        while power(high, design) < design.power:
            low, high = high, ceil(high * 1.01) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle, design) >= design.power else (middle, high)
    return high


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A planted loss that is to be found.

    loss: what it truly costs. discordance: P(a document's outcome differs). at_most: the loss seen above which it does
    not count. alpha: of the exact two-sided McNemar test.
    """

    loss: float
    discordance: float
    at_most: float
    alpha: float

    def __post_init__(self) -> None:
        """Refuse what cannot be found."""
        if not 0 < self.loss <= self.discordance <= 1 or not self.loss < self.at_most:
            raise InputError(
                f"planted damage of {self.loss:g} at discordance {self.discordance:g}, counted up to {self.at_most:g}: "
                "want 0 < loss <= discordance <= 1 and the loss below what counts"
            )


def sensitivity(n: int, damage: Damage) -> float:
    """Probability that n documents find planted damage lower, and no larger than what counts."""
    differ = np.arange(n + 1)
    # The most documents gained with which as many that differ are still found lower: two-sided, so at alpha / 2.
    gained = binom.ppf(damage.alpha / 2, differ, 0.5)
    gained = np.where(binom.cdf(gained, differ, 0.5) > damage.alpha / 2, gained - 1, gained)
    fewest_gained = np.ceil((differ - n * damage.at_most) / 2 - 1e-9)  # fewer, and the loss seen is too large
    chance = (damage.discordance - damage.loss) / (2 * damage.discordance)  # that one that differs was gained
    found = binom.cdf(gained, differ, chance) - binom.cdf(fewest_gained - 1, differ, chance)
    return float((binom.pmf(differ, n, damage.discordance) * np.clip(found, 0.0, 1.0)).sum())


def sensitive_documents(damage: Damage, power: float) -> int | None:
    """Documents with which planted damage is found with this power; None where no number up to the most will do."""
    low = high = 4
    while sensitivity(high, damage) < power:
        if high > MOST_DOCUMENTS:
            return None
        low, high = high, ceil(high * 1.2) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if sensitivity(middle, damage) >= power else (middle, high)
    return high


def documents_still_needed(n: int, lost: float, gained: float, design: Design) -> float:
    """Documents to add for the design's power at the discordance seen, not the design's; inf where none will do.

    It assumes the design's true loss, unless the loss seen is at the margin or above: then the documents speak
    against that assumption, and no number is named.
    """
    if (lost - gained) / n >= design.margin:
        return inf
    seen = max((lost + gained) / n, abs(design.loss), 1 / n)
    total = planned_documents(replace(design, discordance=min(1.0, seen)))
    return inf if total is None else max(0, total - n)


def detectable_margin(n: int, design: Design) -> float:
    """The smallest margin that n documents carry with the design's power, to 1e-4; the design's own is not used."""
    low, high = max(design.loss, 0.0), 0.999
    while high - low > 1e-4:
        middle = (low + high) / 2
        tried = replace(design, margin=middle)
        if power(n, tried) >= design.power:
            high = middle
        else:
            low = middle
    return high


def _guess(design: Design) -> int:
    """Documents with which the test at the unraised critical value has the power, to 1 %: a start that costs little."""
    critical = float(norm.isf(design.alpha))

    def enough(n: int) -> bool:
        edge = rejection_edge(n, design.margin, critical, NONINFERIOR)
        return rejects(n, design.discordance, design.loss, edge, NONINFERIOR) >= design.power

    low = high = 4
    while not enough(high) and high <= MOST_DOCUMENTS:
        low, high = high, 2 * high
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
