"""The real kernel on SM100: FlashInfer's `trtllm_batch_decode_with_kv_cache_mla` with `sparse_mla_top_k`.

Called as vLLM's FLASHINFER_MLA_SPARSE calls it, one query a request, and with its lse. Its arguments are held against
FlashInfer 0.7.2's source; it has not been run, for want of such a GPU.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evalkit.attention.backends.sm100.arithmetic import LATENT, Operands
from evalkit.errors import InputError

KERNEL = "flashinfer trtllm_batch_decode_with_kv_cache_mla trtllm-gen"
WORKSPACE_BYTES = 128 * 2**20
PAGE_SIZES = (64, 32)
_workspaces: dict[torch.device, Tensor] = {}


def runs_on(device: torch.device) -> bool:
    """Whether the GPU is one that the kernel is made for."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 10


def unavailable_because(heads: int) -> str | None:
    """Why the kernel cannot run on an SM100 GPU, in one line, or None where it can."""
    if importlib.util.find_spec("flashinfer") is None:
        return "the package flashinfer-python is not installed (pip install 'evalkit-kv[cuda]')"
    if 64 < heads < 128 or heads > 128:
        return f"the SM100 kernel takes up to 64 heads a rank, or 128; the model has {heads}"
    return None


def attend(given: Operands, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Attention by the real kernel: out [T, H, C] bf16 and lse [T, H] float32."""
    from flashinfer.mla import trtllm_batch_decode_with_kv_cache_mla

    device = given.query.device
    if device not in _workspaces:
        # The kernel counts in it from zero, and leaves it at zero.
        with torch.inference_mode(False):
            _workspaces[device] = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    out, lse = trtllm_batch_decode_with_kv_cache_mla(**arguments(given, indices, _workspaces[device]))
    empty = (indices < 0).all(-1)
    out = out.view(*given.query.shape[:2], LATENT).masked_fill(empty[:, None, None], 0)
    return out, lse.view(given.query.shape[:2]).masked_fill(empty[:, None], -torch.inf)


def arguments(given: Operands, indices: Tensor, workspace: Tensor) -> dict[str, Any]:
    """The kernel's arguments by name. A query without a valid slot is given slot 0, for `attend` to mask.

    Raises:
        InputError: the cache cannot be cut into pages of 64 or 32 tokens.
    """
    tokens = given.rows.shape[0]
    page_size = next((size for size in PAGE_SIZES if tokens % size == 0), None)
    if page_size is None:
        raise InputError(f"a cache of {tokens} slots: the SM100 kernel needs whole pages of 64 or 32")
    slots, counts = packed(F.pad(indices.int(), (0, -indices.shape[1] % 4), value=-1))
    return {
        "query": given.query[:, None].contiguous(),  # [T, 1, H, C + R]
        "kv_cache": given.rows.view(-1, page_size, given.rows.shape[1]),
        "workspace_buffer": workspace,
        "qk_nope_head_dim": 128,  # checked for the packed caches of SM120 alone
        "kv_lora_rank": LATENT,
        "qk_rope_head_dim": given.rows.shape[1] - LATENT,
        "block_tables": slots[:, None],  # [T, 1, K]
        "seq_lens": counts,
        "max_seq_len": slots.shape[1],
        "sparse_mla_top_k": slots.shape[1],
        "bmm1_scale": given.score_scale,
        "bmm2_scale": given.value_scale,
        "backend": "trtllm-gen",
        "return_lse": True,
        "return_lse_base": "basee",
    }


def packed(indices: Tensor) -> tuple[Tensor, Tensor]:
    """Slots [T, K] with the valid ones in front, in their order, and how many they are [T] int32, at least 1."""
    order = (indices < 0).byte().argsort(dim=-1, stable=True)
    slots = indices.gather(-1, order)
    slots[:, 0].clamp_(min=0)
    return slots, (slots >= 0).sum(-1, dtype=torch.int32)
