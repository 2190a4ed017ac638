"""Distances between two tensors, (got, ref), summed in float64 and added up chunk by chunk.

Percentiles of the absolute error come from a histogram over the bit patterns of float32: 16 bins an octave
over its whole range, so a percentile is within 3.2 % of the true one, is the same in every order of adding,
and an accumulator's memory does not grow with what it has seen. Of a long token (more than 7,936 values)
it counts some blocks only, about 4,096 values at least, other ones in each token: see `sums.period`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from evalkit.compare.figures.sums import BINS, MANTISSA_SHIFT, Sums, sums_of


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one comparison found. A number that does not exist is None, never 0 and never NaN.

    Attributes:
        cosine: of the two as single vectors; None when either is all zeros.
        relative_l2: norm of the error over the norm of the reference; None for an all-zero reference.
        symmetric_distance: 1 - 2<x,y>/(|x|^2 + |y|^2), which sees scale; None when both are all zeros.
        max_abs_error: largest |got - ref|, at token `max_abs_token`.
        max_abs_got, max_abs_ref: the two values there.
        sqnr_db: reference power over error power in decibels; None without an error or without a reference.
        abs_p50, abs_p99, abs_p999: percentiles of |got - ref|, each within 3.2 %; see above for long tokens.
        token_relative_l2_mean: over tokens whose reference is not all zeros.
        nonfinite: values of got that are NaN or infinite; they are in no other figure, and a gate must fail
            on them.
        tokens: rows seen. n: finite values compared.
    """

    cosine: float | None
    relative_l2: float | None
    symmetric_distance: float | None
    max_abs_error: float | None
    max_abs_token: int | None
    max_abs_got: float | None
    max_abs_ref: float | None
    sqnr_db: float | None
    abs_p50: float | None
    abs_p99: float | None
    abs_p999: float | None
    token_relative_l2_mean: float | None
    nonfinite: int
    tokens: int
    n: int


class Accumulator:
    """Adds chunks of (got, ref) and gives their `Figures`. Memory: one histogram of 4096 counts.

    With `keep_rows`, also each token's norms of error and reference since the last `take_rows`.
    """

    def __init__(self, keep_rows: bool = False) -> None:
        self.rows: list[Tensor] | None = [] if keep_rows else None
        self.got_sq = self.ref_sq = self.dot = self.error_sq = 0.0
        self.histogram = torch.zeros(BINS, dtype=torch.int64)
        self.worst: tuple[float, int, float, float] | None = None
        self.row_sum, self.row_count = 0.0, 0
        self.nonfinite = self.tokens = self.n = 0

    def add(self, got: Tensor, ref: Tensor, where: Tensor | None = None) -> None:
        """Add one chunk; the first dimension is tokens, the others are flattened.

        Args:
            got: [T, ...] of any float type.
            ref: [T, ...], same shape, finite.
            where: bool [T, ...], what to compare; None compares everything.

        Raises:
            ValueError: shapes differ, the chunk is empty, or the reference is not finite.
        """
        if got.shape != ref.shape or (where is not None and where.shape != ref.shape):
            shape = None if where is None else list(where.shape)
            raise ValueError(f"shapes differ: got {list(got.shape)}, ref {list(ref.shape)}, where {shape}")
        if ref.dim() == 0 or ref.numel() == 0 or (where is not None and not bool(where.any())):
            raise ValueError(
                f"nothing to compare in shape {list(ref.shape)}: need [tokens, ...] with a value"
            )
        got, ref = (x.detach().reshape(len(ref), -1) for x in (got, ref))
        where = None if where is None else where.reshape(len(ref), -1)
        self._add(got, ref, where)

    def _add(self, got: Tensor, ref: Tensor, keep: Tensor | None) -> None:
        """Rows [T, V]; what `keep` excludes counts nowhere."""
        for part, found in sums_of(got, ref, keep, self.tokens):
            # Sums of float64 squares of anything narrower cannot overflow: not finite means some value was not.
            if bool(torch.isfinite(found.sums).all()):
                values = got[part].numel() if keep is None else int(keep[part].sum())
                self._add_sums(found, got[part], ref[part], values)
            else:
                self._add_finite(got[part], ref[part], None if keep is None else keep[part])

    def _add_sums(self, found: Sums, got: Tensor, ref: Tensor, values: int) -> None:
        row = int(found.largest.argmax())
        at = int(found.at[row])
        # -1 in a part of which the mask leaves nothing.
        if float(found.largest[row]) > (-1.0 if self.worst is None else self.worst[0]):
            there = float(got[row, at]), float(ref[row, at])
            self.worst = (float(found.largest[row]), self.tokens + row, *there)
        got_sq, ref_sq, dot, error_sq = found.sums.sum(0).tolist()
        self.got_sq += got_sq
        self.ref_sq += ref_sq
        self.dot += dot
        self.error_sq += error_sq
        self.histogram += found.histogram
        norms = found.sums[:, [3, 1]].sqrt().cpu()  # of error and reference
        if self.rows is not None:
            self.rows.append(norms)
        defined = norms[:, 1] > 0
        relative = norms[defined, 0] / norms[defined, 1]
        if len(relative):
            self.row_sum += float(relative.sum())
            self.row_count += len(relative)
        self.tokens += len(ref)
        self.n += values

    def _add_finite(self, got: Tensor, ref: Tensor, keep: Tensor | None) -> None:
        """Count what is not finite in got, and add the rest."""
        bad = ~torch.isfinite(ref) if keep is None else ~torch.isfinite(ref) & keep
        if bool(bad.any()):
            token, position = (int(i) for i in bad.nonzero()[0])
            raise ValueError(
                f"the reference is not finite: {float(ref[token, position])} at token {self.tokens + token}, "
                f"position {position}; a comparison needs a finite reference"
            )
        finite = torch.isfinite(got)
        wanted = finite if keep is None else keep & finite
        broken = ~finite if keep is None else keep & ~finite
        self.nonfinite += int(broken.sum())
        kept = 0 if self.rows is None else len(self.rows)
        if bool(wanted.any()):
            self._add(got, ref, wanted)
        else:
            self.tokens += len(ref)
            if self.rows is not None:
                self.rows.append(torch.zeros(len(ref), 2, dtype=torch.float64))
        if self.rows is not None:
            norms = torch.cat(self.rows[kept:])
            self.rows[kept:] = [norms.masked_fill(broken.any(1).cpu()[:, None], torch.nan)]

    def take_rows(self) -> Tensor:
        """[T, 2] float64: norm of the error and of the reference, a token added since the last call.

        NaN for a token with a value that is not finite: it has no error, rather than that of its other values.
        """
        taken = torch.cat(self.rows or [torch.empty(0, 2, dtype=torch.float64)])
        self.rows = []
        return taken

    def _percentile(self, share: float) -> float | None:
        """The middle of the bin that holds the value at this rank, never beyond the largest error seen."""
        if self.worst is None or not bool(self.histogram.any()):
            return None
        rank = max(1, math.ceil(share * int(self.histogram.sum())))
        index = int(torch.searchsorted(self.histogram.cumsum(0), rank))
        if index == 0:
            return 0.0
        edges = (torch.tensor([index, index + 1], dtype=torch.int32) << MANTISSA_SHIFT).view(torch.float32)
        middle = float(edges.double().mean())
        return min(middle, self.worst[0]) if math.isfinite(middle) else self.worst[0]

    def result(self) -> Figures:
        """All figures of everything added.

        Raises:
            ValueError: nothing was added.
        """
        if self.n == 0 and self.nonfinite == 0:
            raise ValueError("nothing was compared: no chunk was added")
        measured, power = self.n > 0, self.got_sq * self.ref_sq
        worst = self.worst or (None, None, None, None)
        return Figures(
            cosine=max(-1.0, min(1.0, self.dot / math.sqrt(power))) if power > 0 else None,
            relative_l2=math.sqrt(self.error_sq / self.ref_sq) if self.ref_sq > 0 else None,
            # The same as 1 - 2<x,y>/(|x|^2 + |y|^2), without its cancellation.
            symmetric_distance=_ratio(self.error_sq, self.got_sq + self.ref_sq),
            max_abs_error=worst[0],
            max_abs_token=worst[1],
            max_abs_got=worst[2],
            max_abs_ref=worst[3],
            sqnr_db=_decibels(self.ref_sq, self.error_sq),
            abs_p50=self._percentile(0.5),
            abs_p99=self._percentile(0.99),
            abs_p999=self._percentile(0.999),
            token_relative_l2_mean=_ratio(self.row_sum, self.row_count) if measured else None,
            nonfinite=self.nonfinite,
            tokens=self.tokens,
            n=self.n,
        )


def compare(got: Tensor, ref: Tensor) -> Figures:
    """The figures of one pair of tensors [T, ...]; see `Accumulator.add` for the errors it raises."""
    accumulator = Accumulator()
    accumulator.add(got, ref)
    return accumulator.result()


def relative_l2(got: Tensor, ref: Tensor) -> float | None:
    """Norm of the error over the norm of the reference. Dimensionless, in [0, inf]; None for a zero
    reference.

    0 means identical, 1 no better than returning zeros. Unlike cosine it sees a wrong scale.
    """
    return compare(got, ref).relative_l2


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator > 0 else None


def _decibels(power: float, error_power: float) -> float | None:
    return 10 * math.log10(power / error_power) if power > 0 and error_power > 0 else None
