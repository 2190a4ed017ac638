"""Rows of any format decoded to bf16 on their device, then read by another backend's bf16 kernel.

Kernels that take bf16 queries dequantise rows to bf16 before they multiply, so a format that no kernel here reads gets
the operands that a fused kernel would have: each float32 scale is rounded to bf16, its product with the code to bf16.
Where a call selects at least as many rows as the cache holds, the whole cache is decoded once; otherwise the selected
rows are, each as often as it is selected, and the selection is renumbered. Neither waits for the device, and a row is
decoded alike whatever else is.

On CUDA one Triton kernel decodes every format that declares its `layout`; rows that are bf16 already stay where they
are. The `decode` of any other format is fused by torch.compile, once a format; eager torch would take about ten passes
over float32 values. Scales enter compiled code as tensors, since it would be bound to one number each, and are rounded
in integer arithmetic, since inductor drops a cast to bf16 and back.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache as once
from types import FunctionType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from evalkit import kv
from evalkit.attention.backends.base import Backend, BF16Operands
from evalkit.errors import InputError
from evalkit.kv import RowFormat, Scales, pages, round_to_bf16
from evalkit.kv.numerics.e4m3 import constant

Decoder = Callable[[tuple[Tensor, ...], Tensor | None, Any], Tensor]


class Decoded(BF16Operands):
    """Another backend's bf16 kernel, over rows decoded to bf16."""

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.name = inner.name
        self.kernel = f"{inner.kernel}, on rows decoded to bf16"
        self.takes_float32 = inner.takes_float32

    def kernel_on(self, device: torch.device) -> str:
        return f"{self.inner.kernel_on(device)}, on rows decoded to bf16"

    def unavailable_because(
        self, format: RowFormat, device: torch.device, heads: int, topk: int
    ) -> str | None:
        """Why the inner backend cannot read bf16 here; the stored format is no hindrance."""
        return self.inner.unavailable_because(kv.get("bf16"), device, heads, topk)

    def reading_as(self, reader: str) -> Backend:
        if reader != "exact":
            raise InputError(
                f"reader={reader} goes with read=native: decoded rows are rounded to bf16, as SM90's kernels do"
            )
        return self

    def steady(self, full: bool) -> Backend | None:
        inner = self.inner.steady(full)
        return None if inner is None else _decoded(inner)

    def attend(
        self,
        q_latent: Tensor,
        q_rope: Tensor,
        cache: Tensor,
        format: RowFormat,
        indices: Tensor,
        sm_scale: float,
        scales: Scales,
    ) -> tuple[Tensor, Tensor]:
        rows, numbers = decode(format, cache, indices, scales)
        return self.inner.attend(q_latent, q_rope, rows, kv.get("bf16"), numbers, sm_scale, Scales())


@once
def _decoded(inner: Backend) -> Decoded:
    return Decoded(inner)


def decode(format: RowFormat, cache: Tensor, indices: Tensor, scales: Scales) -> tuple[Tensor, Tensor]:
    """What `indices` select, as a cache of format bf16.

    Args:
        format, cache, scales: as in `Backend.attend`.
        indices: [T, K] int32 slots, -1 where a query has fewer than K.

    Returns:
        The bf16 cache, uint8 pages of one slot each, and `indices` [T, K] renumbered to its slots, -1 kept.
    """
    planes = format.byte_planes(cache)
    if format.layout is not None and format.layout == kv.get("bf16").layout and len(planes) == 1:
        return planes[0], indices
    whole = indices.numel() >= len(planes[0])
    if format.layout is not None and planes[0].device.type == "cuda":
        from evalkit.attention.backends.kernels.unpacking import unpack

        rows, renumbered = unpack(format.layout, planes, None if whole else indices, scales)
        return rows.view(torch.uint8), indices if renumbered is None else renumbered
    if whole:
        return decode_rows(format, planes, None, scales), indices
    numbers = torch.arange(indices.numel(), dtype=torch.int32, device=indices.device).view_as(indices)
    # A query without a row there decodes slot 0 in its place, and does not attend to it.
    selected = decode_rows(format, planes, indices.flatten().clamp(min=0), scales)
    return selected, torch.where(indices >= 0, numbers, -1)


@torch.no_grad()
def decode_rows(
    format: RowFormat, planes: tuple[Tensor, ...], slots: Tensor | None, scales: Scales
) -> Tensor:
    """Rows at `slots` [N], or all of them where it is None, of `format.byte_planes(cache)`: [N, 1152] uint8."""
    if planes[0].device.type != "cuda" or format.name in _EAGER:
        return _eager(format, planes, slots, scales).view(torch.uint8)
    given = _Given(*(constant(scale, planes[0]) for scale in (scales.latent, scales.rope)))
    try:
        with warnings.catch_warnings():
            # Numerics are exact here on purpose, and there is no matrix product to speed up.
            warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
            return fused(format)(planes, slots, given).view(torch.uint8)
    except TorchDynamoException as error:
        _EAGER.add(format.name)
        warnings.warn(
            f"{format.name}: torch.compile cannot fuse its decode, eager torch takes many times as long: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return _eager(format, planes, slots, scales).view(torch.uint8)


_EAGER: set[str] = set()  # formats that torch.compile refused


class _Given(NamedTuple):
    """The part of `Scales` that decoding uses, as float32 scalars on the device."""

    latent: Tensor
    rope: Tensor


@once
def fused(format: RowFormat) -> Decoder:
    """`format`'s decode to bf16 rows [N, C + R], compiled: of (planes, slots or None, scales as `_Given`)."""

    def run(planes: tuple[Tensor, ...], slots: Tensor | None, given: Any) -> Tensor:
        return _to_bf16(format, planes, slots, given, _round_to_bf16)

    # torch.compile keeps a few variants of one code object: each format has one of its own.
    code = run.__code__.replace(co_name=f"decode_{format.name}")
    own = FunctionType(code, run.__globals__, code.co_name, run.__defaults__, run.__closure__)
    return cast(Decoder, torch.compile(own, dynamic=True, fullgraph=True))


def _eager(format: RowFormat, planes: tuple[Tensor, ...], slots: Tensor | None, scales: Scales) -> Tensor:
    return _to_bf16(format, planes, slots, scales, round_to_bf16)


def _to_bf16(
    format: RowFormat, planes: tuple[Tensor, ...], slots: Tensor | None, scales: Any, read_scale: kv.ReadScale
) -> Tensor:
    if slots is not None:
        rows = pages.take_rows(planes, slots)
    else:
        rows = planes[0] if len(planes) == 1 else torch.cat(planes, -1)
    latent, rope = format.decode(rows, scales, read_scale)
    return torch.cat([latent.bfloat16(), rope.bfloat16()], -1)


def _round_to_bf16(scale: Tensor) -> Tensor:
    """`round_to_bf16` of float32, bit for bit but for a NaN's payload, in integer arithmetic."""
    bits = scale.view(torch.int32)
    # Half of the last kept bit, and a tie goes to the even one. The carry of a large number is infinity, as it should be.
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x1_0000).view(torch.float32)
    return torch.where(scale.isnan(), scale, rounded)
