"""fp8 weights multiplied out by the kernel are those of torch, bit for bit."""

from __future__ import annotations

import pytest
import torch

from tests.interpreter import interpret


def test_the_kernel_multiplies_as_torch_under_tritons_interpreter() -> None:
    interpret("tests.model.fp8_triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu_the_kernel_multiplies_as_torch(dtype: torch.dtype) -> None:
    from tests.model import fp8_triton

    fp8_triton.check("cuda", dtype)
