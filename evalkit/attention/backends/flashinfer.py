"""FlashInfer's MLA kernel on SM90 (`BatchMLAPagedAttentionWrapper`, backend fa3), page size 1.

Sparse attention is expressed as pages of one token: every query is a request of its own whose pages are the slots it
selected. The kernel does not mask -1, so slots are packed before planning. It multiplies by fp8 scales rounded to
bf16 and keeps P in bf16.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from evalkit.attention.backends.base import BF16Operands, backends
from evalkit.kv import RowFormat, Scales

WORKSPACE_BYTES = 128 * 2**20
ROWS_PER_PLAN = 8192  # a plan holds at most 16384 work items, and a row of KV may be split in two


@backends.register
class FlashInfer(BF16Operands):
    name = "flashinfer"
    kernel = "flashinfer BatchMLAPagedAttentionWrapper fa3"

    def __init__(self) -> None:
        self._wrappers: dict[tuple[torch.device, torch.dtype], Any] = {}

    def unavailable_because(
        self, format: RowFormat, device: torch.device, heads: int, topk: int
    ) -> str | None:
        if format.name not in _READS:
            return f"FlashInfer's SM90 kernel reads {', '.join(_READS)}, not {format.name}"
        if device.type != "cuda":
            return f"FlashInfer needs an NVIDIA GPU, the device is {device.type}"
        if importlib.util.find_spec("flashinfer") is None:
            return "the package flashinfer-python is not installed (pip install 'evalkit[cuda]')"
        major, minor = torch.cuda.get_device_capability(device)
        if major != 9:
            return f"FlashInfer's fa3 MLA kernel needs SM90, this GPU is SM{major}{minor}"
        return None

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
        latent, rope, options = _READS[format.name](format.planes(cache), scales)
        out = torch.empty_like(q_latent, memory_format=torch.contiguous_format)
        lse = q_latent.new_empty(q_latent.shape[:2], dtype=torch.float32)
        for start in range(0, q_latent.shape[0], ROWS_PER_PLAN):
            part = slice(start, start + ROWS_PER_PLAN)
            wrapper = self._plan(indices[part], q_latent, latent.dtype, sm_scale)
            out[part], lse[part] = wrapper.run(
                query=(q_latent[part].contiguous(), q_rope[part].contiguous()),
                kv_cache=(latent, rope),
                return_lse=True,
                return_lse_base_on_e=True,
                **options,
            )
        return out, lse

    def _plan(self, indices: Tensor, query: Tensor, dtype: torch.dtype, sm_scale: float) -> Any:
        from flashinfer.mla import BatchMLAPagedAttentionWrapper, MLAPlanMetadata

        key = (query.device, dtype)
        if key not in self._wrappers:
            workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=query.device)
            self._wrappers[key] = BatchMLAPagedAttentionWrapper(workspace, backend="fa3")
        wrapper = self._wrappers[key]
        valid = indices >= 0
        lengths = valid.sum(-1, dtype=torch.int32)
        starts = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=query.device)
        starts[1:] = lengths.cumsum(0)
        wrapper.plan(
            metadata=MLAPlanMetadata.csr(
                qo_indptr=torch.arange(len(lengths) + 1, dtype=torch.int32, device=query.device),
                kv_indptr=starts,
                kv_indices=indices[valid].int(),
                kv_len_arr=lengths,
            ),
            num_heads=query.shape[1],
            head_dim_ckv=query.shape[2],
            head_dim_kpe=64,
            page_size=1,
            causal=False,
            sm_scale=sm_scale,
            q_data_type=query.dtype,
            kv_data_type=dtype,
            query_layout="split",
            kv_cache_layout="split",
            lse_mode="basee",
            scale_mode="default" if dtype == torch.bfloat16 else "kv-per-tensor",
        )
        return wrapper


def _split(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [N, C + R] -> the kernel's pages of one token, latent [N, 1, C] and rope [N, 1, R], without a copy."""
    return rows[:, None, :512], rows[:, None, 512:]


def _bf16(planes: Any, _scales: Scales) -> tuple[Tensor, Tensor, dict[str, Any]]:
    return *_split(planes.rows), {}


def _fp8(planes: Any, scales: Scales) -> tuple[Tensor, Tensor, dict[str, Any]]:
    return *_split(planes.rows), {"ckv_scale": scales.latent, "kpe_scale": scales.rope}


def _fp8_groups(planes: Any, scales: Scales) -> tuple[Tensor, Tensor, dict[str, Any]]:
    options = {"ckv_scale_arr": planes.scale[:, None], "kpe_scale": scales.rope}
    return planes.latent[:, None], planes.rope[:, None], options


_READS = {"bf16": _bf16, "fp8_e4m3": _fp8, "fp8_group128": _fp8_groups}
