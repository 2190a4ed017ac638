"""`arithmetic.attend` as one Triton kernel: the same tiles in the same order, rounded at the same points.

A program takes one query, up to 64 of its heads and one half of the output, and walks over the selected slots, so a
row of the batch never depends on its neighbours. e4m3 codes are multiplied as float16, which holds each exactly, and summed in float32:
Hopper's own fp8 products are summed with fewer bits. Codes are decoded and P is rounded by integer arithmetic, which
is the same on every GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from evalkit.attention.backends.sm100.arithmetic import LATENT, LOG2_E, Operands, ProbModel

OPERANDS = {torch.uint8: tl.float16, torch.bfloat16: tl.bfloat16}
HALF = 256


def attend(given: Operands, indices: Tensor, prob: ProbModel, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `arithmetic.attend`, with out [T, H, C] in `dtype`. The tensors are on one CUDA device."""
    length, heads = given.query.shape[:2]
    out = given.query.new_empty((length, heads, LATENT), dtype=dtype)
    lse = given.query.new_empty((length, heads), dtype=torch.float32)
    query, rows = given.query.contiguous(), given.rows
    if given.is_fp8:
        query, rows = query.view(torch.uint8), rows.view(torch.uint8)
    block = min(_most_heads(query.device), max(16, triton.next_power_of_2(heads)))
    if length:
        with torch.cuda.device_of(query):
            _attend[(length, triton.cdiv(heads, block), LATENT // HALF)](
                query,
                rows,
                indices.contiguous(),
                out,
                lse,
                heads,
                indices.shape[1],
                given.score_scale * LOG2_E,
                given.value_scale,
                prob.scale if given.is_fp8 else 1.0,
                LOG2_E=LOG2_E,
                HEADS=block,
                TILE=prob.tile,
                # A power of two, so that a growing context compiles few kernels; tiles beyond the slots add zeros.
                TILES=triton.next_power_of_2(triton.cdiv(indices.shape[1], prob.tile)),
                IS_FP8=given.is_fp8,
                OPERAND=OPERANDS[rows.dtype],
                num_warps=4,
                num_stages=1,  # a second stage of gathered tiles would not fit beside the query
            )
    return out, lse


def _most_heads(device: torch.device) -> int:
    """A program for 64 heads takes 104 KiB of shared memory, which GPUs for graphics do not have."""
    if device.type != "cuda":  # Triton's interpreter
        return 64
    return 64 if torch.cuda.get_device_capability(device) in ((8, 0), (9, 0), (10, 0), (10, 3)) else 16


@triton.jit
def _attend(
    query: tl.tensor,  # [T, H, 576] uint8 codes or bf16
    rows: tl.tensor,  # [N, 576] of the same dtype
    slots: tl.tensor,  # [T, K] int32
    out: tl.tensor,  # [T, H, 512]
    lse: tl.tensor,  # [T, H] float32
    heads: tl.tensor,
    selected: tl.tensor,
    score_scale: tl.tensor,
    value_scale: tl.tensor,
    prob_scale: tl.tensor,
    LOG2_E: tl.constexpr,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    IS_FP8: tl.constexpr,
    OPERAND: tl.constexpr,  # dtype of the matrix products' operands, which holds every code
) -> None:
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    live = head < heads
    place = (token * heads + head)[:, None]  # [HEADS, 1]
    first = tl.program_id(2) * 256  # of the output's dimensions
    dims = tl.arange(0, 128)[None, :]
    rope_dims = 512 + tl.arange(0, 64)[None, :]
    asked = query + place * 576
    q0 = _load(asked + dims, live[:, None], OPERAND)
    q1 = _load(asked + 128 + dims, live[:, None], OPERAND)
    q2 = _load(asked + 256 + dims, live[:, None], OPERAND)
    q3 = _load(asked + 384 + dims, live[:, None], OPERAND)
    q_rope = _load(asked + rope_dims, live[:, None], OPERAND)
    highest = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    out0 = tl.zeros([HEADS, 128], tl.float32)
    out1 = tl.zeros([HEADS, 128], tl.float32)
    for tile in range(TILES):
        column = tile * TILE + tl.arange(0, TILE)
        slot = tl.load(slots + token * selected + column, mask=column < selected, other=-1)
        valid = slot >= 0
        row = rows + slot.to(tl.int64)[:, None] * 576
        scores = tl.dot(q0, tl.trans(_load(row + dims, valid[:, None], OPERAND)))
        scores = tl.dot(q1, tl.trans(_load(row + 128 + dims, valid[:, None], OPERAND)), scores)
        scores = tl.dot(q2, tl.trans(_load(row + 256 + dims, valid[:, None], OPERAND)), scores)
        scores = tl.dot(q3, tl.trans(_load(row + 384 + dims, valid[:, None], OPERAND)), scores)
        scores = tl.dot(q_rope, tl.trans(_load(row + rope_dims, valid[:, None], OPERAND)), scores)
        scores = tl.where(valid[None, :], scores * score_scale, float("-inf"))
        new = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(highest - base)
        total = total * fade + tl.sum(weights, 1)
        codes = _round(weights * prob_scale, IS_FP8).to(OPERAND)
        out0 = tl.dot(codes, _load_again(row + first + dims, valid[:, None], OPERAND), out0 * fade[:, None])
        out1 = tl.dot(
            codes, _load_again(row + first + 128 + dims, valid[:, None], OPERAND), out1 * fade[:, None]
        )
        highest = new
    # A NaN total stays one; without a valid slot the sums and the total are both zero.
    factor = tl.where(total == 0, 0.0, value_scale / (total * prob_scale))[:, None]
    answer = out + place * 512 + first + dims
    tl.store(answer, (out0 * factor).to(out.dtype.element_ty), mask=live[:, None])
    tl.store(answer + 128, (out1 * factor).to(out.dtype.element_ty), mask=live[:, None])
    tl.store(lse + token * heads + head, (highest + tl.log2(total)) / LOG2_E, mask=live)


@triton.jit
def _load(pointers: tl.tensor, mask: tl.tensor, OPERAND: tl.constexpr) -> tl.tensor:
    return _decode(tl.load(pointers, mask=mask, other=0, eviction_policy="evict_last"), OPERAND)


@triton.jit
def _load_again(pointers: tl.tensor, mask: tl.tensor, OPERAND: tl.constexpr) -> tl.tensor:
    """As `_load`; another policy keeps the compiler from merging the two, which would hold a tile in registers."""
    return _decode(tl.load(pointers, mask=mask, other=0, eviction_policy="evict_first"), OPERAND)


@triton.jit
def _decode(x: tl.tensor, OPERAND: tl.constexpr) -> tl.tensor:
    """e4m3 codes, given as uint8, or bf16 values -> OPERAND."""
    if x.dtype == tl.uint8:
        size = x.to(tl.uint16) & 0x7F
        # e4m3's exponent is biased by 7, float16's by 15; both count subnormals alike.
        bits = ((x.to(tl.uint16) & 0x80) << 8) | tl.where(size == 0x7F, 0x7E00, size << 7).to(tl.uint16)
        x = bits.to(tl.float16, bitcast=True) * 256.0
    return x.to(OPERAND)


@triton.jit
def _round(x: tl.tensor, IS_FP8: tl.constexpr) -> tl.tensor:
    """x in [0, 448] float32 to the nearest e4m3, or to the nearest bf16; ties to even, NaN stays."""
    rounded = _drop_bits(x, 20 if IS_FP8 else 16)
    if IS_FP8:
        # From 2^-6 on e4m3 keeps 3 bits after the first; below, the multiples of 2^-9, float32's step at 2^14.
        rounded = tl.where(x < 0.015625, (x + 16384.0) - 16384.0, rounded)
    return rounded


@triton.jit
def _drop_bits(x: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    bits = x.to(tl.int32, bitcast=True)
    half = (1 << (BITS - 1)) - 1
    kept = (bits + half + ((bits >> BITS) & 1)) & -(1 << BITS)
    return tl.where(x == x, kept.to(tl.float32, bitcast=True), x)
