"""FlashMLA's sparse kernels on SM90, as the vLLM wheel ships them: decode over fp8_ds_mla rows, prefill over bf16.

The shared object is loaded without importing vLLM. Heads are padded to 64 or 128 and selections to a multiple of 64
(decode) or 128 (prefill) with -1, which the kernels mask. The decode kernel multiplies by scales rounded to bf16.
Neither op is a public API: their signatures were read from vLLM 0.33.0.

The decode kernel cuts a query's slots into as many parts as there are processors for each block of 64 heads of each
query, processors // queries // (heads // 64) (`Decode_Sm90_Impl::get_meta`, in FlashMLA's source and in that wheel),
so that a query's result would depend on how many others share the call. Calls with too few are padded with queries
without a slot until there is one part; the padding's results are dropped. The prefill kernel never cuts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache as once
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evalkit.attention.backends.base import Backend, BF16Operands, backends
from evalkit.kv import RowFormat, Scales

DS_MLA = ("fp8_ds_mla", "fp8_ds_mla_fp32scale")
ROWS_PER_CALL = 4096


@backends.register
class FlashMLA(BF16Operands):
    name = "flashmla"
    kernel = "FlashMLA sparse_decode_fwd (fp8_ds_mla), sparse_prefill_fwd (bf16)"

    def unavailable_because(
        self, format: RowFormat, device: torch.device, heads: int, topk: int
    ) -> str | None:
        if format.name not in (*DS_MLA, "bf16"):
            return f"FlashMLA's SM90 kernels read bf16 and {', '.join(DS_MLA)}, not {format.name}"
        if heads > 128:
            return f"FlashMLA takes at most 128 heads a rank, the model has {heads}"
        if device.type != "cuda":
            return f"FlashMLA needs an NVIDIA GPU, the device is {device.type}"
        if library() is None:
            return "vLLM's FlashMLA library (vllm/_flashmla_C.abi3.so) is not installed (pip install 'evalkit-kv[vllm]')"
        major, minor = torch.cuda.get_device_capability(device)
        if major != 9:
            return f"these FlashMLA calls are for SM90, this GPU is SM{major}{minor}"
        return None

    def steady(self, full: bool) -> Backend | None:
        return self  # its kernels mask -1, and nothing is counted

    def attend(
        self,
        q_latent: Tensor,
        q_rope: Tensor,
        cache: Tensor,
        format: RowFormat,
        indices: Tensor,
        sm_scale: float,
        scales: Scales,
    ) -> tuple[Tensor, Tensor]:
        decodes = format.name in DS_MLA
        call = _decode if decodes else _prefill
        rows = format.planes(cache).rows
        heads = q_latent.shape[1]
        width = 64 if heads <= 64 else 128
        least = unsplit_queries(width, _processors(q_latent.device)) if decodes else 1
        assembled, finished = _hands(q_latent.device)
        found = []
        for start in range(0, max(1, len(indices)), ROWS_PER_CALL):
            part = slice(start, start + ROWS_PER_CALL)
            queries = len(indices[part])
            query = _whole(q_latent[part], q_rope[part])
            if query is None or query.shape[:2] != (max(queries, least), width):
                query = assembled(q_latent[part], q_rope[part], max(queries, least), width)
            slots = _padded(indices[part], len(query), 64 if decodes else 128)
            out, lse = call(query, rows, slots, sm_scale)
            found.append(finished(out, lse, queries, heads))
        if len(found) == 1:
            return found[0]
        outs, lses = zip(*found, strict=True)
        return torch.cat(outs), torch.cat(lses)


def unsplit_queries(heads: int, processors: int) -> int:
    """The least queries of 64 or 128 heads that the decode kernel leaves uncut: from there on it makes one part."""
    return processors // (2 * (heads // 64)) + 1


def _decode(query: Tensor, rows: Tensor, indices: Tensor, sm_scale: float) -> tuple[Tensor, Tensor]:
    """rows [pages, 64, 656] uint8; tokens go into the second dimension, so that one launch serves them all."""
    out, lse, *_ = _ops().sparse_decode_fwd(
        query[None], rows.unsqueeze(2), indices[None], *[None] * 7, 512, sm_scale, None, False
    )  # out [1, t, H, C], lse [1, H, t]
    return out[0], lse[0].T


def _prefill(query: Tensor, rows: Tensor, indices: Tensor, sm_scale: float) -> tuple[Tensor, Tensor]:
    """rows [N, C + R] bf16."""
    out, _, lse = _ops().sparse_prefill_fwd(
        query, rows[:, None], indices[:, None], sm_scale, 512, None, None, None
    )  # out [t, H, C], lse [t, H]
    return out, lse


def _hands(device: torch.device) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]]]:
    """What makes a kernel's query, and what makes an answer of its results: `_query` and `_results`, or kernels."""
    if device.type != "cuda":
        return _query, _results
    from evalkit.attention.backends.kernels import packing

    return packing.query, packing.results


def _results(out: Tensor, lse: Tensor, queries: int, heads: int) -> tuple[Tensor, Tensor]:
    """The first queries and heads alone, contiguous.

    The kernels' lse of +inf stands for a query without a valid slot, whose output they set to 0.
    """
    lse = lse[:queries, :heads].nan_to_num(nan=torch.nan, posinf=-torch.inf, neginf=-torch.inf)
    return out[:queries, :heads].contiguous(), lse.contiguous()


def _whole(q_latent: Tensor, q_rope: Tensor) -> Tensor | None:
    """The contiguous query [T, H, C + R] that the two are views of; None where they are not."""
    tokens, heads, width = q_latent.shape
    whole = tokens, heads, width + q_rope.shape[2]
    strides = heads * whole[2], whole[2], 1
    if q_latent.untyped_storage().data_ptr() != q_rope.untyped_storage().data_ptr():
        return None
    beside = q_rope.storage_offset() - q_latent.storage_offset() == width
    if not beside or not q_latent.stride() == q_rope.stride() == strides:
        return None
    return q_latent.as_strided(whole, strides)


def _query(q_latent: Tensor, q_rope: Tensor, queries: int, heads: int) -> Tensor:
    """Latent and rope side by side, [queries, heads, C + R]; what is added is 0."""
    width = q_latent.shape[2]
    query = q_latent.new_zeros(queries, heads, width + q_rope.shape[2])
    query[: len(q_latent), : q_latent.shape[1], :width] = q_latent
    query[: len(q_latent), : q_latent.shape[1], width:] = q_rope
    return query


def _padded(indices: Tensor, queries: int, multiple: int) -> Tensor:
    """Selections [queries, K up to a multiple] int32, filled up with -1."""
    missing = -indices.shape[1] % multiple, queries - len(indices)
    if any(missing):
        indices = F.pad(indices, (0, missing[0], 0, missing[1]), value=-1)
    return indices.int().contiguous()


def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@once
def library() -> Path | None:
    """The shared object within vLLM's package; None where there is none."""
    spec = importlib.util.find_spec("vllm")
    for place in (spec.submodule_search_locations or []) if spec else []:
        for file in Path(place).glob("_flashmla_C*.so"):
            return file
    return None


@once
def _ops() -> Any:
    torch.ops.load_library(str(library()))
    return torch.ops._flashmla_C
