"""Rows' sums by the kernel are those by torch."""

from __future__ import annotations

import pytest
import torch

from evalkit.compare.figures.metrics import Accumulator
from tests.interpreter import interpret


@pytest.mark.slow
def test_the_kernel_adds_what_torch_adds_where_triton_is_interpreted() -> None:
    interpret("tests.compare.sums_triton")


@pytest.mark.gpu
def test_on_a_gpu_the_kernel_adds_what_torch_adds() -> None:
    from tests.compare import sums_triton

    sums_triton.check("cuda")


@pytest.mark.gpu
def test_on_a_gpu_the_figures_are_those_of_a_cpu() -> None:
    """With values that are not finite, a mask and several chunks."""
    draw = torch.Generator().manual_seed(4)
    ref = torch.randn(300, 7, 130, generator=draw)
    got = (ref + 0.1 * torch.randn(ref.shape, generator=draw)).bfloat16()
    got[5, 3, 7], got[9] = torch.inf, torch.nan
    where = torch.rand(ref.shape, generator=draw) < 0.9
    found = []
    for device in ("cpu", "cuda"):
        accumulator = Accumulator()
        for part in (slice(0, 100), slice(100, 300)):
            accumulator.add(got[part].to(device), ref[part].to(device), where[part].to(device))
        found.append(accumulator.result())
    on_cpu, on_gpu = found
    assert on_cpu.nonfinite == on_gpu.nonfinite > 0
    for name, value in vars(on_cpu).items():
        assert getattr(on_gpu, name) == pytest.approx(value, rel=1e-9), name
