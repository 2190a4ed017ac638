"""Triton kernels that hand a call's operands to a kernel, and its results back, in one pass over each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 4  # of 576 values, in a program


def take_slots(indices: Tensor, slots: Tensor) -> Tensor:
    """Copy indices [T, K], integers, row after row into the int32 `slots`, at least T x K of them.

    Returns:
        [T] int32: how many of each row are not -1.
    """
    counts = torch.empty(len(indices), dtype=torch.int32, device=indices.device)
    columns = indices.shape[1]
    indices = indices if indices.stride(1) == 1 else indices.contiguous()
    if indices.numel():
        block = min(2048, triton.next_power_of_2(columns))
        with torch.cuda.device_of(indices):
            _take_slots[(len(indices),)](
                *(indices, slots, counts, columns, indices.stride(0)),
                BLOCK=block,
                BLOCKS=triton.next_power_of_2(triton.cdiv(columns, block)),
                num_warps=8,
            )
    return counts


def query(q_latent: Tensor, q_rope: Tensor, queries: int, heads: int) -> Tensor:
    """Latent [t, h, C] and rope [t, h, R] side by side, [queries, heads, C + R]; what is added is 0.

    They may be views whose last dimension alone is contiguous; C, R and `heads` are powers of two.
    """
    width, rope_width = q_latent.shape[2], q_rope.shape[2]
    q_latent, q_rope = (q if q.stride(2) == 1 else q.contiguous() for q in (q_latent, q_rope))
    whole = q_latent.new_empty(queries, heads, width + rope_width)
    with torch.cuda.device_of(whole):
        _query[(triton.cdiv(queries * heads, ROWS),)](
            q_latent,
            q_rope,
            whole,
            *(len(q_latent), q_latent.shape[1]),
            *(q_latent.stride(0), q_latent.stride(1), q_rope.stride(0), q_rope.stride(1)),
            HEADS=heads,
            WIDTH=width,
            ROPE_WIDTH=rope_width,
            ROWS=ROWS,
            num_warps=4,
        )
    return whole


def results(out: Tensor, lse: Tensor, queries: int, heads: int) -> tuple[Tensor, Tensor]:
    """The first queries and heads of out [T, H, C] and lse [T, H], contiguous; an lse of +inf becomes -inf.

    `out` is contiguous, C a power of two.
    """
    kept = lse.new_empty(queries, heads)
    copies = heads != out.shape[1]
    answer = out.new_empty(queries, heads, out.shape[2]) if copies else out[:queries]
    rows = ROWS if copies else 128
    if kept.numel():
        with torch.cuda.device_of(out):
            _results[(triton.cdiv(kept.numel(), rows),)](
                *(out, lse, answer, kept),
                *(kept.numel(), heads, out.shape[1], lse.stride(0), lse.stride(1)),
                COPIES=copies,
                WIDTH=out.shape[2],
                ROWS=rows,
                num_warps=4,
            )
    return answer, kept


@triton.jit
def _take_slots(
    indices: tl.tensor,  # [T, columns]
    slots: tl.tensor,  # [T * columns or more] int32
    counts: tl.tensor,  # [T] int32
    columns: tl.tensor,
    stride: tl.tensor,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    valid = tl.zeros([BLOCK], tl.int32)
    for block in range(BLOCKS):
        column = block * BLOCK + tl.arange(0, BLOCK)
        inside = column < columns
        slot = tl.load(indices + row * stride + column, mask=inside, other=-1)
        tl.store(slots + row * columns + column, slot.to(tl.int32), mask=inside)
        valid += (slot >= 0).to(tl.int32)
    tl.store(counts + row, tl.sum(valid, 0))


@triton.jit
def _query(
    q_latent: tl.tensor,
    q_rope: tl.tensor,
    whole: tl.tensor,  # [queries, HEADS, WIDTH + ROPE_WIDTH], contiguous
    queries: tl.tensor,  # t and h, of what is given
    heads: tl.tensor,
    latent_query_stride: tl.tensor,
    latent_head_stride: tl.tensor,
    rope_query_stride: tl.tensor,
    rope_head_stride: tl.tensor,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROPE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,  # divides HEADS
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    token, head = row // HEADS, row % HEADS
    given = (token < queries) & (head < heads)
    answer = whole + row * (WIDTH + ROPE_WIDTH)
    dims, rope_dims = tl.arange(0, WIDTH)[None, :], tl.arange(0, ROPE_WIDTH)[None, :]
    latent = q_latent + token * latent_query_stride + head * latent_head_stride + dims
    tl.store(answer + dims, tl.load(latent, mask=given, other=0))
    rope = q_rope + token * rope_query_stride + head * rope_head_stride + rope_dims
    tl.store(answer + WIDTH + rope_dims, tl.load(rope, mask=given, other=0))


@triton.jit
def _results(
    out: tl.tensor,  # [T, width, WIDTH], contiguous
    lse: tl.tensor,
    answer: tl.tensor,  # [queries, heads, WIDTH] where COPIES
    kept: tl.tensor,  # [queries, heads]
    count: tl.tensor,  # queries * heads
    heads: tl.tensor,
    width: tl.tensor,
    query_stride: tl.tensor,
    head_stride: tl.tensor,
    COPIES: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < count
    token, head = row // heads, row % heads
    found = tl.load(lse + token * query_stride + head * head_stride, mask=live)
    tl.store(kept + row, tl.where(found == float("inf"), float("-inf"), found), mask=live)
    if COPIES:
        dims = tl.arange(0, WIDTH)[None, :]
        from_row = (token * width + head)[:, None] * WIDTH
        values = tl.load(out + from_row + dims, mask=live[:, None])
        tl.store(answer + row[:, None] * WIDTH + dims, values, mask=live[:, None])
