"""What the distances of metrics.py are made of: each row's float64 sums, largest error, and a histogram of errors.

In torch a chunk of rows at a time, which passes over it a dozen times; on an NVIDIA GPU by a Triton kernel, once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final, NamedTuple

import torch
from torch import Tensor

from evalkit.environment import has_triton

MANTISSA_SHIFT: Final = 19  # keeps a float32's exponent and the first four bits of its mantissa
BINS: Final = 1 << (31 - MANTISSA_SHIFT)
CHUNK_CPU: Final = 1 << 17  # values: what stays in a core's cache through the dozen passes over it
CHUNK_GPU: Final = 1 << 24
BLOCK: Final = 256  # neighbouring values of a row
COUNTED: Final = 16  # blocks of a row that are counted in the histogram at least


class Sums(NamedTuple):
    """Of rows (got, ref) [t, V]; values left out by a mask count nowhere.

    sums: [t, 4] float64, of got², ref², got·ref and error².
    largest: [t] float64, the largest |error|, -1 where all is left out.
    at: [t] int64, its first position.
    histogram: [BINS] int64 on the host, errors by the leading bits of |error| in float32; of a row of twice `COUNTED`
        blocks or more, in every so many blocks only, another one first in each row (see `period`).

    A row whose values are not all finite has sums that are not, and nothing else of it means anything.
    """

    sums: Tensor
    largest: Tensor
    at: Tensor
    histogram: Tensor


def period(width: int) -> int:
    """Of a row's blocks, every so many is counted: block b of token t where (b + t) is a multiple of it.

    A row as long as 128 heads of 512 would otherwise spend most of its time on percentiles.
    """
    return max(1, -(-width // BLOCK) // COUNTED)


def sums_of(got: Tensor, ref: Tensor, keep: Tensor | None, first: int) -> Iterator[tuple[slice, Sums]]:
    """The sums of all rows of [T, V], in parts.

    Args:
        got, ref: any float type. keep: bool [T, V], what counts; None is everything.
        first: the number of the first row's token.
    """
    if got.is_cuda and has_triton():
        with torch.cuda.device_of(got):
            yield slice(0, len(ref)), launch(got, ref, keep, first)
        return
    limit = CHUNK_GPU if ref.is_cuda else CHUNK_CPU
    rows = max(1, limit // ref.shape[1])
    for start in range(0, len(ref), rows):
        part = slice(start, start + rows)
        mask = None if keep is None else keep[part]
        yield part, _in_torch(got[part].double(), ref[part].double(), mask, first + start)


def _in_torch(got: Tensor, ref: Tensor, keep: Tensor | None, first: int) -> Sums:
    """One chunk in float64."""
    if keep is not None:
        got, ref = torch.where(keep, got, 0.0), torch.where(keep, ref, 0.0)
    error = got - ref
    pairs = ((got, got), (ref, ref), (got, ref), (error, error))
    sums = torch.stack([torch.linalg.vecdot(a, b) for a, b in pairs], 1)
    error.abs_()
    every, (rows, width) = period(error.shape[1]), error.shape
    counted, kept = error, keep
    if every > 1:
        block = torch.arange(width, device=error.device) // BLOCK
        token = first + torch.arange(rows, device=error.device)
        here = (block + token[:, None]) % every == 0  # [t, V]
        counted, kept = error[here], None if keep is None else keep[here]
    bits = counted.float().view(torch.int32) >> MANTISSA_SHIFT
    histogram = torch.bincount(bits.flatten(), minlength=BINS).cpu()
    if keep is not None and kept is not None:
        histogram[0] -= kept.numel() - int(kept.sum())  # they stand as zero errors
        error = torch.where(keep, error, -1.0)
    largest, at = error.max(1)
    return Sums(sums, largest, at, histogram)


def launch(got: Tensor, ref: Tensor, keep: Tensor | None, first: int) -> Sums:
    """As `sums_of`, by the kernel, on the current device."""
    from evalkit.compare.figures.sums_triton import row_kernel

    got, ref = (x if x.stride(1) == 1 else x.contiguous() for x in (got, ref))
    rows, width = ref.shape
    sums = torch.empty(rows, 4, dtype=torch.float64, device=ref.device)
    largest = torch.empty(rows, dtype=torch.float64, device=ref.device)
    at = torch.empty(rows, dtype=torch.int64, device=ref.device)
    histogram = torch.zeros(BINS, dtype=torch.int64, device=ref.device)
    row_kernel[(rows,)](
        got,
        ref,
        ref if keep is None else keep.contiguous(),  # without a mask, a pointer that nothing follows
        sums,
        largest,
        at,
        histogram,
        width,
        got.stride(0),
        ref.stride(0),
        first % period(width),
        period(width),
        MASKED=keep is not None,
        SHIFT=MANTISSA_SHIFT,
        SIDE=math.isqrt(BINS),
        BLOCK=BLOCK,
    )
    return Sums(sums, largest, at, histogram.cpu())
