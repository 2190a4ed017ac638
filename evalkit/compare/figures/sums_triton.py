"""The Triton kernel of sums.py: all that one row's comparison needs, in one pass over it."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton takes an annotation for a type of its own.

import triton
import triton.language as tl


@triton.jit
def row_kernel(
    got,  # [T, V] any float, rows got_stride apart
    ref,  # [T, V] any float, rows ref_stride apart
    keep,  # [T, V] bool, contiguous, where MASKED
    sums,  # [T, 4] float64
    largest,  # [T] float64
    at,  # [T] int64
    histogram,  # [SIDE * SIDE] int64, added to
    width,  # V
    got_stride,
    ref_stride,
    first,  # the number of the first row's token, modulo `period`
    period,
    MASKED: tl.constexpr,
    SHIFT: tl.constexpr,
    SIDE: tl.constexpr,  # the square root of the histogram's size, a power of two
    BLOCK: tl.constexpr,
):
    """One program takes one row; see `sums.Sums` for what it writes.

    Errors are counted by a matrix product: column i of `high` says in which row of a square of bins error i is, row i
    of `low` in which column. Atomic additions to so few addresses would take several times as long.
    """
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    got_sq = tl.zeros([BLOCK], tl.float64)
    ref_sq = tl.zeros([BLOCK], tl.float64)
    dot = tl.zeros([BLOCK], tl.float64)
    error_sq = tl.zeros([BLOCK], tl.float64)
    best = tl.full([BLOCK], -1.0, tl.float64)
    place = tl.zeros([BLOCK], tl.int32)
    counts = tl.zeros([SIDE, SIDE], tl.float32)
    line = tl.arange(0, SIDE)
    start = 0
    while start < width:
        column = start + lane
        inside = column < width
        x = tl.load(got + row * got_stride + column, mask=inside, other=0.0).to(tl.float64)
        y = tl.load(ref + row * ref_stride + column, mask=inside, other=0.0).to(tl.float64)
        if MASKED:
            inside = inside & (tl.load(keep + row * width + column, mask=inside, other=0) != 0)
            x = tl.where(inside, x, 0.0)
            y = tl.where(inside, y, 0.0)
        error = tl.abs(x - y)
        got_sq += x * x
        ref_sq += y * y
        dot += x * y
        error_sq += error * error
        larger = inside & (error > best)
        best = tl.where(larger, error, best)
        place = tl.where(larger, column, place)
        if (start // BLOCK + first + row) % period == 0:
            # What the mask leaves out is in no bin.
            bits = tl.where(inside, error.to(tl.float32).to(tl.int32, bitcast=True) >> SHIFT, SIDE * SIDE)
            high = (line[:, None] == (bits // SIDE)[None, :]).to(tl.float16)  # [SIDE, BLOCK]
            low = ((bits % SIDE)[:, None] == line[None, :]).to(tl.float16)  # [BLOCK, SIDE]
            counts = tl.dot(high, low, counts)
        start += BLOCK
    bins = line[:, None] * SIDE + line[None, :]
    tl.atomic_add(histogram + bins, counts.to(tl.int64), mask=counts > 0)
    tl.store(sums + row * 4, tl.sum(got_sq))
    tl.store(sums + row * 4 + 1, tl.sum(ref_sq))
    tl.store(sums + row * 4 + 2, tl.sum(dot))
    tl.store(sums + row * 4 + 3, tl.sum(error_sq))
    most = tl.max(best)
    tl.store(largest + row, most)
    tl.store(at + row, tl.min(tl.where(best == most, place, width)).to(tl.int64))
