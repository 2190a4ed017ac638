"""What test_fp8_weights.py runs: the Triton kernel against torch, under TRITON_INTERPRET=1 or on a GPU."""

from __future__ import annotations

from itertools import product

import torch

from evalkit.model.weights import fp8, fp8_kernel

BLOCKS = ((128, 128), (64, 32))
SHAPES = ((576, 300), (100, 256), (256, 384), (7168, 32))  # blocks cut off at an edge among them


def check(device: str, dtype: torch.dtype) -> None:
    for shape, block in product(SHAPES, BLOCKS):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(shape[1]))
        codes, scale = fp8.quantise(weight, block)
        scale *= 1.37  # no power of two
        wanted = torch.empty(shape, dtype=dtype)
        fp8.dequantise(codes, scale, block, wanted)
        got = torch.empty(shape, dtype=dtype, device=device)
        fp8_kernel.multiply(codes.to(device), scale.to(device), block, got)
        assert torch.equal(got.cpu(), wanted), (shape, block)


if __name__ == "__main__":
    check("cpu", torch.float32)
