"""Index scores by this project's Triton kernel: bf16 or e4m3 keys, any number of heads, NVIDIA GPUs from SM90 on.

Products are exact and summed in float32. A score does not depend on the other queries or keys of its call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evalkit.attention.indexer.base import Scorer
from evalkit.environment import has_triton
from evalkit.kv.index import IndexFormat

READS = (torch.bfloat16, torch.float8_e4m3fn)
KEYS_PER_BLOCK = 128
QUERIES_PER_BLOCK = 16
FEWEST_HEADS = 16  # a matrix product takes no narrower operand


class Fused(Scorer):
    name, kernel = "triton", "evalkit's Triton kernel"

    def unavailable_because(self, keys: IndexFormat, heads: int, device: torch.device) -> str | None:
        if keys.dtype not in READS:
            return f"the Triton kernel reads bf16 and e4m3 keys, not {keys.name}"
        if device.type != "cuda":
            return f"the Triton kernel needs an NVIDIA GPU, the device is {device.type}"
        if not has_triton():
            return "the package triton is not installed"
        major, minor = torch.cuda.get_device_capability(device)
        if major < 9:
            return f"the Triton kernel is for SM90 and later, this GPU is SM{major}{minor}"
        return None

    def scores(self, query: Tensor, keys: Tensor, weights: Tensor, key_scale: Tensor | None) -> Tensor:
        with torch.cuda.device_of(query):
            return launch(query, keys, weights, key_scale)


def launch(
    query: Tensor, keys: Tensor, weights: Tensor, key_scale: Tensor | None, operand: Any = None
) -> Tensor:
    """As `Scorer.scores`, on the current device.

    `operand` is the dtype, one of triton.language's, that keys and queries are multiplied in; None takes the
    narrowest that holds them.
    """
    import triton.language as tl

    from evalkit.attention.indexer.kernel import score_kernel

    if operand is None:
        operand = tl.float16 if keys.dtype == torch.float8_e4m3fn else tl.bfloat16
    batch, length, heads, width = query.shape
    cached = keys.shape[1]
    query, keys, weights = _packed(query), _packed(keys), _packed(weights.float())
    # Without scales, a pointer that nothing follows.
    scale = keys if key_scale is None else _packed(key_scale)
    scores = torch.empty(batch, length, cached, dtype=torch.float32, device=query.device)
    grid = (-(-cached // KEYS_PER_BLOCK), -(-length // QUERIES_PER_BLOCK), batch)
    score_kernel[grid](
        query,
        keys,
        weights,
        scale,
        scores,
        length,
        cached,
        heads,
        query.stride(0),
        keys.stride(0),
        weights.stride(0),
        scale.stride(0),
        SCALED=key_scale is not None,
        OPERAND=operand,
        WIDTH=width,
        HEADS=max(FEWEST_HEADS, 1 << (heads - 1).bit_length()),
        QUERIES=QUERIES_PER_BLOCK,
        KEYS=KEYS_PER_BLOCK,
    )
    return scores


def _packed(x: Tensor) -> Tensor:
    """x [B, …] with each sequence's elements next to each other; sequences may lie apart."""
    return x if x[0].is_contiguous() else x.contiguous()
