"""What test_indexer.py runs under TRITON_INTERPRET=1: the Triton kernel on CPU tensors against torch."""

from __future__ import annotations

import torch
import triton.language as tl

from evalkit.attention.indexer import index_scores
from evalkit.attention.indexer.fused import launch
from tests.attention.test_indexer import FORMATS, problem, relative

SHAPES = [(2, 5, 200, 8), (1, 1, 130, 32), (2, 18, 18, 12), (1, 2, 3, 64)]


def main() -> None:
    for name in FORMATS:
        # The interpreter multiplies bf16's bits as integers.
        operand = tl.float32 if name == "bf16" else None
        for shape in SHAPES:
            given = problem(name, shape)
            assert relative(launch(*given, operand), index_scores(*given)) <= 1e-6, (name, shape)
    query, keys, weights, _ = problem("bf16", (1, 4, 140, 20))
    keys[0, 138] = torch.nan
    keys[0, 5, 0] = torch.inf  # times a padded head's zeros it is NaN
    weights = weights.abs()
    got = launch(query, keys, weights, None, tl.float32)
    assert got[0, :, 138].isnan().tolist() == [False, False, True, True], got[0, :, 138]
    assert got[0, :, 5].tolist() == [torch.inf] * 4, got[0, :, 5]


if __name__ == "__main__":
    main()
