"""The Triton kernel of fp8_weights.py: codes times the scale of their block, in one pass."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton takes an annotation for a type of its own.

import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 32, 256  # of a program


def multiply(codes: Tensor, scale: Tensor, block: tuple[int, int], out: Tensor) -> None:
    """As `fp8_weights.dequantise`; codes and out [N, K] are contiguous, scale is float32."""
    rows, columns = codes.shape
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS))
    _multiply[grid](
        *(codes, scale, out, rows, columns, scale.shape[1]),
        BLOCK_ROWS=block[0],
        BLOCK_COLUMNS=block[1],
        ROWS=ROWS,
        COLUMNS=COLUMNS,
    )


@triton.jit
def _multiply(
    codes,  # [N, K] e4m3
    scale,  # [ceil(N / BLOCK_ROWS), scale_columns] float32
    out,  # [N, K]
    rows,
    columns,
    scale_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    place = row.to(tl.int64) * columns + column
    code = tl.load(codes + place, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(
        scale + row // BLOCK_ROWS * scale_columns + column // BLOCK_COLUMNS, mask=inside, other=0.0
    )
    tl.store(out + place, (code * factor).to(out.dtype.element_ty), mask=inside)
