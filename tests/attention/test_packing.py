"""The Triton kernels that pack operands and unpack rows, and what chooses them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from evalkit import kv
from evalkit.kv import ReadScale, Scales
from tests.interpreter import interpret


@pytest.mark.slow
def test_the_kernels_agree_with_torch_under_tritons_interpreter() -> None:
    interpret("tests.attention.packing_triton")


@pytest.mark.gpu
@pytest.mark.parametrize("check", ["taking", "query", "weighing", "results", "unpacking"])
def test_the_kernels_agree_with_torch_on_a_gpu(check: str) -> None:
    from tests.attention import packing_triton

    getattr(packing_triton, f"check_{check}")("cuda")


@pytest.mark.parametrize("name", kv.names())
def test_a_layout_fits_into_its_row(name: str) -> None:
    """Parts neither overlap nor leave a byte: what a kernel reads is what the format stores."""
    format = kv.get(name)
    layout = format.layout
    assert layout is not None
    bits = {"fp32": 32, "bf16": 16, "e4m3": 8, "e2m1": 4}
    parts = [(layout.latent, 512), (layout.rope, 64)]
    if layout.scale is not None:
        parts.append((layout.scale, 512 // layout.group))
    taken = sorted((part.offset, part.offset + count * bits[part.kind] // 8) for part, count in parts)
    assert [start for start, _ in taken] == [0, *(end for _, end in taken[:-1])]
    assert taken[-1][1] == format.row_bytes


def test_a_format_that_decodes_in_its_own_way_does_not_inherit_a_layout() -> None:
    class Doubled(type(kv.get("fp8_e4m3"))):  # type: ignore[misc]
        name = "doubled"

        def decode(self, rows: Tensor, scales: Scales, read_scale: ReadScale) -> Any:
            return tuple(2 * part for part in super().decode(rows, scales, read_scale))

    class Renamed(type(kv.get("fp8_e4m3"))):  # type: ignore[misc]
        name = "renamed"

    assert Doubled().layout is None
    assert Renamed().layout == kv.get("fp8_e4m3").layout is not None


def test_every_code_of_four_bits_has_one_value_whether_compiled_or_not() -> None:
    """Signs of zero included, which arithmetic on floats may lose."""
    from evalkit.kv.numerics.e2m1 import from_e2m1

    codes = torch.arange(16, dtype=torch.uint8)
    sizes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    assert torch.equal(from_e2m1(codes).view(torch.int32), torch.cat([sizes, -sizes]).view(torch.int32))
