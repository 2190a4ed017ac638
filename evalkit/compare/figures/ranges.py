"""Where a layer's values lie in the range of e4m3 once divided by their scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from evalkit.kv.numerics.e4m3 import E4M3_MAX, TILE
from evalkit.records import MissingScaleRecord

# A scale of max|x| / 448 is rounded to float32 at best: the largest value must not count as beyond it.
BEYOND: Final = E4M3_MAX * (1 + 2.0**-22)
E4M3_SMALLEST_NORMAL: Final = 2.0**-6
# Half the smallest subnormal, 2^-9; the tie goes to even, which is zero.
E4M3_ROUNDS_TO_ZERO: Final = 2.0**-10


@dataclass(frozen=True, kw_only=True)
class RangeFigures:
    """Shares are of all `n` values, by |x| / scale, and exclude one another.

    saturated: above 448. subnormal: below the smallest normal, 2^-6, and not rounded to zero. zero: not zero,
    but stored as zero. headroom: 448 * scale / max|x|, below 1 where values saturate; None if every value is
    zero.
    """

    max_abs: float
    saturated_share: float
    subnormal_share: float
    zero_share: float
    headroom: float | None
    n: int


class RangeAccumulator:
    """Adds chunks of values that share one scale."""

    def __init__(self, scale: float) -> None:
        if not scale > 0:
            raise ValueError(f"a scale is above 0, not {scale}")
        self.scale = scale
        self.max_abs = 0.0
        self.saturated = self.subnormal = self.zero = self.n = 0

    def add(self, values: Tensor) -> None:
        """Add values of any shape.

        Raises:
            ValueError: there are none, or one is not finite.
        """
        if values.numel() == 0:
            raise ValueError(f"no value to take the range of, in shape {list(values.shape)}")
        size = values.detach().float().abs()
        largest = float(size.max())
        if not largest < float("inf"):
            raise ValueError(f"a range needs finite values; the largest is {largest}")
        self.max_abs = max(self.max_abs, largest)
        scaled = size.double() / self.scale
        nonzero, small = size > 0, scaled < E4M3_SMALLEST_NORMAL
        to_zero = nonzero & (scaled <= E4M3_ROUNDS_TO_ZERO)
        self.saturated += int((scaled > BEYOND).sum())
        self.zero += int(to_zero.sum())
        self.subnormal += int((nonzero & small & ~to_zero).sum())
        self.n += values.numel()

    def result(self) -> RangeFigures:
        """The figures of everything added.

        Raises:
            ValueError: nothing was added.
        """
        if self.n == 0:
            raise ValueError("no range was measured: no value was added")
        return RangeFigures(
            max_abs=self.max_abs,
            saturated_share=self.saturated / self.n,
            subnormal_share=self.subnormal / self.n,
            zero_share=self.zero / self.n,
            headroom=E4M3_MAX * self.scale / self.max_abs if self.max_abs > 0 else None,
            n=self.n,
        )


def tiles(part: str, channels: int) -> tuple[str, ...]:
    """The names of the 128-channel tiles of a latent of so many channels; a rope has none.

    One per-tensor scale has to fit them all: a tile whose values are much smaller than another's is where it does not.
    """
    ends = ((start, min(start + TILE, channels) - 1) for start in range(0, channels, TILE))
    return tuple(f"{part} {first}-{last}" for first, last in ends) if part == "latent" else ()


def within(values: Tensor, part: str) -> Tensor:
    """Of values [T, C], the channels that a part's name ends in; all of them where it ends in none."""
    _, _, span = part.partition(" ")
    if not span:
        return values
    first, last = map(int, span.split("-"))
    return values[:, first : last + 1]


def missing_scales(candidate: str, layers: int, carried: Mapping[int, float]) -> list[MissingScaleRecord]:
    """A candidate's layers that are stored at 1.0, with the scale that the checkpoint has for each, if any."""
    return [
        MissingScaleRecord(candidate=candidate, layer=layer, carried=carried.get(layer))
        for layer in range(layers)
    ]
