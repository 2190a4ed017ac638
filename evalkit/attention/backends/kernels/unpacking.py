"""Rows of any format that declares a `Layout`, decoded to bf16 by one Triton kernel.

A program decodes four rows. Stored and given float32 scales are rounded to bf16, products to float32, the result to
bf16: the bits of `RowFormat.decode` with the reader `round_to_bf16`, but for a NaN's payload.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from evalkit.kv import Scales
from evalkit.kv.layout import Layout, Part

ROWS = 4
STORED_AS = {"fp32": torch.float32, "bf16": torch.bfloat16, "e4m3": torch.uint8, "e2m1": torch.uint8}


def unpack(
    layout: Layout,
    planes: Sequence[Tensor],
    slots: Tensor | None,
    scales: Scales,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor | None]:
    """Decode the rows at `slots` [T, K], or all where it is None, of byte planes [N, width] on one CUDA device.

    Returns:
        rows [n, 576] in `dtype`, and for given slots their numbers among these [T, K] int32; -1 stays, and its row is
        slot 0's.
    """
    count = len(planes[0]) if slots is None else slots.numel()
    rows = planes[0].new_empty((count, 576), dtype=dtype)
    numbers = None
    if slots is not None:
        slots = slots.contiguous()
        numbers = torch.empty(slots.shape, dtype=torch.int32, device=slots.device)
    latent, latent_stride, latent_first = _place(layout.latent, planes)
    rope, rope_stride, rope_first = _place(layout.rope, planes)
    scale, scale_stride, scale_first = _place(layout.scale or layout.latent, planes)
    if count:
        with torch.cuda.device_of(rows):
            _unpack[(triton.cdiv(count, ROWS),)](
                latent,
                scale,
                rope,
                rows if slots is None else slots,
                rows,
                rows if numbers is None else numbers,
                count,
                _rounded(scales.latent),
                _rounded(scales.rope),
                SELECTED=slots is not None,
                LATENT_KIND=layout.latent.kind,
                LATENT_STRIDE=latent_stride,
                LATENT_FIRST=latent_first,
                LATENT_SCALED=layout.latent.scaled,
                SCALE_KIND=layout.scale.kind if layout.scale else "",
                SCALE_STRIDE=scale_stride,
                SCALE_FIRST=scale_first,
                SCALE_LANES=layout.scale_lanes,
                ROPE_KIND=layout.rope.kind,
                ROPE_STRIDE=rope_stride,
                ROPE_FIRST=rope_first,
                ROPE_SCALED=layout.rope.scaled,
                GROUP=layout.group,
                ROWS=ROWS,
                num_warps=4,
            )
    return rows, numbers


def _place(part: Part, planes: Sequence[Tensor]) -> tuple[Tensor, int, int]:
    """The plane that holds a part, in the part's own type, with a row's length and the part's first element there."""
    offset, index = part.offset, 0
    while offset >= planes[index].shape[1]:
        offset, index = offset - planes[index].shape[1], index + 1
    dtype = STORED_AS[part.kind]
    return planes[index].view(dtype), planes[index].shape[1] // dtype.itemsize, offset // dtype.itemsize


def _rounded(scale: float) -> float:
    """A given scale as the reader multiplies by it."""
    return float(torch.tensor(scale, dtype=torch.float32).bfloat16())


@triton.jit
def _unpack(
    latent: tl.tensor,  # the plane with each part, uint8 codes or numbers
    scale: tl.tensor,
    rope: tl.tensor,
    slots: tl.tensor,  # [count] where SELECTED
    rows: tl.tensor,  # [count, 576]
    numbers: tl.tensor,  # [count] int32 where SELECTED
    count: tl.tensor,
    latent_scale: tl.tensor,  # rounded to bf16 already
    rope_scale: tl.tensor,
    SELECTED: tl.constexpr,
    LATENT_KIND: tl.constexpr,
    LATENT_STRIDE: tl.constexpr,
    LATENT_FIRST: tl.constexpr,
    LATENT_SCALED: tl.constexpr,
    SCALE_KIND: tl.constexpr,  # "" without stored scales
    SCALE_STRIDE: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    SCALE_LANES: tl.constexpr,
    ROPE_KIND: tl.constexpr,
    ROPE_STRIDE: tl.constexpr,
    ROPE_FIRST: tl.constexpr,
    ROPE_SCALED: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    GROUPS: tl.constexpr = 512 // GROUP
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < count
    source = row.to(tl.int64)
    if SELECTED:
        slot = tl.load(slots + row, mask=live, other=0)
        tl.store(numbers + row, tl.where(slot >= 0, row, -1), mask=live)
        source = tl.where(slot >= 0, slot, 0).to(tl.int64)
    answer = rows + row.to(tl.int64)[:, None, None] * 576  # [ROWS, 1, 1]
    wanted = live[:, None, None]

    value = _numbers(latent + source * LATENT_STRIDE + LATENT_FIRST, live, LATENT_KIND, GROUPS, GROUP)
    if SCALE_KIND != "":
        group = tl.arange(0, GROUPS)
        place = (group % SCALE_LANES) * (GROUPS // SCALE_LANES) + group // SCALE_LANES
        pointers = (scale + source * SCALE_STRIDE + SCALE_FIRST)[:, None] + place[None, :]
        stored = _number(tl.load(pointers, mask=live[:, None], other=0), SCALE_KIND)  # [ROWS, GROUPS]
        value = value * _round_to_bf16(stored)[:, :, None]
    if LATENT_SCALED:
        value = value * latent_scale
    dims = tl.arange(0, GROUPS)[None, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    tl.store(answer + dims, value.to(rows.dtype.element_ty), mask=wanted)

    value = _numbers(rope + source * ROPE_STRIDE + ROPE_FIRST, live, ROPE_KIND, 1, 64)
    if ROPE_SCALED:
        value = value * rope_scale
    tl.store(answer + 512 + tl.arange(0, 64)[None, None, :], value.to(rows.dtype.element_ty), mask=wanted)


@triton.jit
def _numbers(
    starts: tl.tensor, live: tl.tensor, KIND: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr
) -> tl.tensor:
    """GROUPS x GROUP numbers from each of `starts` [ROWS] on: [ROWS, GROUPS, GROUP] float32."""
    WIDTH: tl.constexpr = GROUP // 2 if KIND == "e2m1" else GROUP  # of a group, in elements of memory
    place = tl.arange(0, GROUPS)[None, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    x = tl.load(starts[:, None, None] + place, mask=live[:, None, None], other=0)
    if KIND == "e2m1":
        low = _e2m1(x & 0xF)
        high = _e2m1(x >> 4)
        # Reshaping puts each pair side by side.
        value = tl.reshape(tl.join(low, high), [starts.shape[0], GROUPS, GROUP])
    else:
        value = _number(x, KIND)
    return value


@triton.jit
def _number(x: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    if KIND == "e4m3":
        x = x.to(tl.float8e4nv, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _e2m1(code: tl.tensor) -> tl.tensor:
    """Codes 0 to 15 -> float32. As float32's own bits they are 2^126 times too small; subnormals are alike in both."""
    bits = code.to(tl.int32)
    return (((bits & 7) << 22) | ((bits & 8) << 28)).to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def _round_to_bf16(scale: tl.tensor) -> tl.tensor:
    """As a cast to bf16 and back; in integers, which Triton's interpreter rounds too."""
    bits = scale.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return tl.where(scale == scale, rounded.to(tl.float32, bitcast=True), scale)
