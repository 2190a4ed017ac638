"""FlashMLA's sparse kernels on SM90, as the vLLM wheel ships them: decode over fp8_ds_mla rows, prefill over bf16.

The shared object is loaded without importing vLLM. Heads are padded to 64 or 128 and selections to a multiple of 64
(decode) or 128 (prefill) with -1, which the kernels mask. The decode kernel multiplies by scales rounded to bf16.
Neither op is a public API: their signatures were read from vLLM 0.33.0.
"""

from __future__ import annotations

import importlib.util
from functools import cache as once
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evalkit.attention.backends.base import BF16Operands, backends
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
        if _library() is None:
            return "vLLM's FlashMLA library (vllm/_flashmla_C.abi3.so) is not installed (pip install vllm)"
        major, minor = torch.cuda.get_device_capability(device)
        if major != 9:
            return f"these FlashMLA calls are for SM90, this GPU is SM{major}{minor}"
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
        call = _decode if format.name in DS_MLA else _prefill
        rows = format.planes(cache).rows
        heads = q_latent.shape[1]
        outs, lses = [], []
        for start in range(0, q_latent.shape[0], ROWS_PER_CALL):
            part = slice(start, start + ROWS_PER_CALL)
            query = torch.cat([q_latent[part], q_rope[part]], -1)
            query = F.pad(query, (0, 0, 0, (64 if heads <= 64 else 128) - heads))  # [t, 64 | 128, C + R]
            out, lse = call(query, rows, indices[part], sm_scale)
            outs.append(out[:, :heads])
            lses.append(lse[:, :heads])
        out, lse = torch.cat(outs), torch.cat(lses).float()
        # The kernels return +inf for a row without a valid slot.
        empty = (indices < 0).all(-1)
        return out.masked_fill(empty[:, None, None], 0), lse.masked_fill(empty[:, None], -torch.inf)


def _decode(query: Tensor, rows: Tensor, indices: Tensor, sm_scale: float) -> tuple[Tensor, Tensor]:
    """rows [pages, 64, 656] uint8; tokens go into the second dimension, so that one launch serves them all."""
    out, lse, *_ = _ops().sparse_decode_fwd(
        query[None], rows.unsqueeze(2), _pad(indices, 64)[None], *[None] * 7, 512, sm_scale, None, False
    )  # out [1, t, H, C], lse [1, H, t]
    return out[0], lse[0].T


def _prefill(query: Tensor, rows: Tensor, indices: Tensor, sm_scale: float) -> tuple[Tensor, Tensor]:
    """rows [N, C + R] bf16."""
    out, _, lse = _ops().sparse_prefill_fwd(
        query, rows[:, None], _pad(indices, 128)[:, None], sm_scale, 512, None, None, None
    )  # out [t, H, C], lse [t, H]
    return out, lse


def _pad(indices: Tensor, multiple: int) -> Tensor:
    return F.pad(indices.int(), (0, -indices.shape[1] % multiple), value=-1).contiguous()


@once
def _library() -> Path | None:
    spec = importlib.util.find_spec("vllm")
    for place in (spec.submodule_search_locations or []) if spec else []:
        for file in Path(place).glob("_flashmla_C*.so"):
            return file
    return None


@once
def _ops() -> Any:
    torch.ops.load_library(str(_library()))
    return torch.ops._flashmla_C
