"""What test_emulated.py runs under TRITON_INTERPRET=1, the Triton kernel on CPU tensors, and its parts as kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from evalkit.attention.backends.sm100 import arithmetic, kernel
from evalkit.attention.backends.sm100.arithmetic import ProbModel
from evalkit.kv.numerics.e4m3 import to_e4m3
from tests.attention.test_emulated import given, relative


@triton.jit
def _round(values, rounded, count, IS_FP8: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(values + place, mask=place < count, other=0.0)
    tl.store(rounded + place, kernel._round(x, IS_FP8), mask=place < count)


@triton.jit
def _decode(codes, values, OPERAND: tl.constexpr):
    place = tl.arange(0, 256)
    tl.store(values + place, kernel._decode(tl.load(codes + place), OPERAND).to(tl.float32))


def check_rounding(device: str) -> None:
    """Every normal bf16 in [0, 448], the ties between e4m3 codes with both neighbours, and random values."""
    every = torch.arange(2**15, dtype=torch.int16, device=device).view(torch.bfloat16).float()
    codes = torch.arange(127, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float()
    ties = (codes[1:] + codes[:-1]) / 2
    around = torch.cat([ties, ties.nextafter(codes[1:]), ties.nextafter(codes[:-1])])
    draw = torch.Generator().manual_seed(0)
    random = (torch.rand(4096, generator=draw) * 20 - 12).exp2().to(device)
    every = every[(every == 0) | ((every >= 2.0**-126) & (every <= 448))]
    nans = torch.tensor([0x7FC00000, 0x7FFFFFFF], dtype=torch.int32, device=device).view(torch.float32)
    values = torch.cat([every, around, random, nans])
    for is_fp8, want in ((True, to_e4m3(values).float()), (False, values.bfloat16().float())):
        got = torch.empty_like(values)
        _round[(triton.cdiv(len(values), 1024),)](values, got, len(values), is_fp8, 1024)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def check_decoding(device: str) -> None:
    """Every code, NaN included."""
    codes = torch.arange(256, dtype=torch.int32, device=device).to(torch.uint8)
    got = torch.empty(256, device=device)
    _decode[(1,)](codes, got, tl.float16)
    want = codes.view(torch.float8_e4m3fn).float()
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def main() -> None:
    kernel.OPERANDS[torch.bfloat16] = tl.float32  # the interpreter multiplies bf16's bits as integers
    check_rounding("cpu")
    check_decoding("cpu")
    for name, heads, tile in (("fp8_e4m3", 3, 128), ("fp8_e4m3", 20, 32), ("bf16", 3, 128)):
        operands, indices = given(name, heads, counts=(0, 1, 70, 200), slots=320, times=1)
        model = ProbModel(tile=tile)
        got, lse = kernel.attend(operands, indices, model, torch.float32)
        want, want_lse = arithmetic.attend(operands, indices, model)
        assert (got[0] == 0).all()
        assert (lse[0] == -torch.inf).all()
        assert float(relative(got[1:], want[1:]).max()) <= 1e-5, (name, heads, tile)
        torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)
    poison(*given("fp8_e4m3", 3, counts=(0, 1, 70, 200), slots=320, times=1))


def poison(operands: arithmetic.Operands, indices: Tensor) -> None:
    """A NaN row reaches only those that select it; slot 0 stands behind no -1."""
    for slot in (0, int(indices[2].max())):
        operands.rows.view(torch.uint8)[slot] = 0x7F
        out, lse = kernel.attend(operands, indices, ProbModel(), torch.float32)
        hit = (indices == slot).any(-1)
        assert out[hit].isnan().all()
        assert out[~hit].isfinite().all()
        assert lse[hit].isnan().all()


if __name__ == "__main__":
    main()
