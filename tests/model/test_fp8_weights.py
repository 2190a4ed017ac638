"""fp8 weights multiplied out by the kernel are those of torch, bit for bit."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def test_the_kernel_multiplies_as_torch_under_tritons_interpreter() -> None:
    """In a process of its own: Triton decides at its import whether it interprets."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the package triton is not installed")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.model.fp8_triton"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu_the_kernel_multiplies_as_torch(dtype: torch.dtype) -> None:
    from tests.model import fp8_triton

    fp8_triton.check("cuda", dtype)
