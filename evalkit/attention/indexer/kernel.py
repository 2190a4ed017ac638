"""The Triton kernel of fused.py. One program scores KEYS keys of one sequence for QUERIES queries, one at a time."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton takes an annotation for a type of its own.

import triton
import triton.language as tl


@triton.jit
def score_kernel(
    query,  # [B, T, I, WIDTH]
    keys,  # [B, S, WIDTH]
    weights,  # [B, T, I] float32
    scale,  # [B, S] float32, where SCALED
    scores,  # [B, T, S] float32, contiguous
    length,  # T
    cached,  # S
    heads,  # I
    query_stride,
    keys_stride,
    weights_stride,
    scale_stride,
    SCALED: tl.constexpr,
    OPERAND: tl.constexpr,  # dtype of the matrix product's operands, which holds every key and query
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,  # I, padded
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """scores[b, t, s] = scale[b, s] · Σ_i weights[b, t, i] · relu(query[b, t, i] · keys[b, s]); -inf after a query."""
    batch = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * KEYS
    columns = first + tl.arange(0, KEYS)
    inside = columns < cached
    width = tl.arange(0, WIDTH)
    head = tl.arange(0, HEADS)
    real = head < heads
    key = tl.load(
        keys + batch * keys_stride + columns[:, None] * WIDTH + width[None, :], mask=inside[:, None]
    ).to(OPERAND)  # [KEYS, WIDTH]
    if SCALED:
        factor = tl.load(scale + batch * scale_stride + columns, mask=inside)
    for step in range(QUERIES):
        t = tl.program_id(1) * QUERIES + step
        if t < length:
            own = cached - length + t  # the query's own column
            total = tl.full([KEYS], -float("inf"), tl.float32)
            if first <= own:
                asked = tl.load(
                    query
                    + batch * query_stride
                    + (t.to(tl.int64) * heads + head[:, None]) * WIDTH
                    + width[None, :],
                    mask=real[:, None],
                ).to(OPERAND)  # [HEADS, WIDTH]
                weight = tl.load(
                    weights + batch * weights_stride + t.to(tl.int64) * heads + head, mask=real, other=0.0
                )
                dots = tl.dot(key, tl.trans(asked), input_precision="ieee")  # [KEYS, HEADS] float32
                # A comparison, since tl.maximum may drop a NaN; padded heads hold anything.
                dots = tl.where((dots < 0) | (head[None, :] >= heads), 0.0, dots)
                total = tl.sum(dots * weight[None, :], axis=1)
                if SCALED:
                    total = total * factor
                total = tl.where(columns <= own, total, -float("inf"))
            tl.store(scores + (batch * length + t) * cached + columns, total, mask=inside)
