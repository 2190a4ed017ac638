"""Runs checks of Triton kernels on CPU tensors, by Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from evalkit.environment import has_triton


def interpret(module: str) -> None:
    """Run a module of checks in a process of its own: Triton decides at its import whether it interprets."""
    if not has_triton():
        pytest.skip("the package triton is not installed")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
