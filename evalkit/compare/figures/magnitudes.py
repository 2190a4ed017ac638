"""How large the stored values are: their maximum or any percentile of |x|, exactly, in memory that does not grow."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from evalkit.errors import InputError

PATTERNS = 1 << 15  # a non-negative bf16 number is its bit pattern, and patterns are ordered as numbers are
INFINITY = 0x7F80  # from here on: infinity, then NaN


class Magnitudes:
    """Counts |x| of bf16 values, one count for each of the 2^15 that there are."""

    def __init__(self) -> None:
        self._counts = torch.zeros(PATTERNS, dtype=torch.int64)

    def add(self, values: Tensor) -> None:
        """Count values of any shape that bf16 holds, as bf16 rows read back do."""
        patterns = values.bfloat16().view(torch.int16).flatten().long() & (PATTERNS - 1)  # without its sign
        self._counts += torch.bincount(patterns, minlength=PATTERNS).cpu()

    def percentile(self, percent: float) -> float:
        """The smallest |x| that at least `percent` % of the values do not exceed; 100 is the maximum.

        Raises:
            InputError: a value is not finite, nothing was counted, or `percent` is outside (0, 100].
        """
        if not 0 < percent <= 100:
            raise InputError(f"percentile is {percent}: above 0 and at most 100 is right")
        total = int(self._counts.sum())
        if broken := int(self._counts[INFINITY:].sum()):
            raise InputError(f"{broken} of {total} values are not finite: no scale fits them")
        if not total:
            raise InputError("no values were counted: there must be a token at least")
        rank = max(1, math.ceil(total * percent / 100))
        pattern = int(torch.searchsorted(self._counts.cumsum(0), rank))
        return float(torch.tensor(pattern, dtype=torch.int16).view(torch.bfloat16))
