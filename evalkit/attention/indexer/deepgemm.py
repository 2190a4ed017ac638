"""DeepGEMM's fp8 indexer kernel on SM90, as the vLLM wheel ships it: the kernel that serves DeepSeek-V3.2.

The shared object is loaded without importing vLLM, and compiles its kernel at the first call (seconds; it needs nvcc).
Its operator is no public API: name and arguments are checked against vLLM 0.33.0's. Products are summed by the fp8
tensor cores, which keep fewer bits than float32, and a NaN product counts as 0: a NaN key shows through its scale only.
"""

from __future__ import annotations

import atexit
import importlib.util
from functools import cache as once
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evalkit.attention.indexer.base import Scorer
from evalkit.kv.index import IndexFormat

HEADS = (32, 64)
ARGUMENTS = [
    *("q", "q_sf", "kv", "kv_sf", "weights"),
    *("cu_seq_len_k_start", "cu_seq_len_k_end", "max_seqlen_k", "schedule_meta"),
]


class DeepGemm(Scorer):
    name, kernel = "deepgemm", "DeepGEMM fp8_fp4_mqa_logits"

    def unavailable_because(self, keys: IndexFormat, heads: int, device: torch.device) -> str | None:
        if keys.dtype != torch.float8_e4m3fn or not keys.scaled:
            return f"DeepGEMM's kernel reads scaled e4m3 keys, not {keys.name}"
        if heads not in HEADS:
            return f"DeepGEMM's SM90 kernel takes 32 or 64 indexer heads, the model has {heads}"
        if device.type != "cuda":
            return f"DeepGEMM needs an NVIDIA GPU, the device is {device.type}"
        major, minor = torch.cuda.get_device_capability(device)
        if major != 9:
            return f"this DeepGEMM call is for SM90, this GPU is SM{major}{minor}"
        return _missing()

    def scores(self, query: Tensor, keys: Tensor, weights: Tensor, key_scale: Tensor | None) -> Tensor:
        assert key_scale is not None
        batch, length = query.shape[:2]
        cached = keys.shape[1]
        starts = torch.zeros(length, dtype=torch.int32, device=query.device)
        ends = torch.arange(cached - length + 1, cached + 1, dtype=torch.int32, device=query.device)
        weights = weights.float()
        with torch.cuda.device_of(query):
            scores = torch.stack(
                [
                    torch.ops.deep_gemm.fp8_fp4_mqa_logits(
                        query[one].contiguous(),
                        None,
                        keys[one].contiguous(),
                        # A row of [B, S] need not begin at 16 bytes, as its loads want.
                        key_scale[one].clone(),
                        weights[one].contiguous(),
                        starts,
                        ends,
                        cached,
                        None,
                    )
                    for one in range(batch)
                ]
            )
        # Columns past a query's end are not written.
        columns = torch.arange(cached, device=query.device)
        return scores.masked_fill_(columns >= ends[:, None], -torch.inf)


@once
def _missing() -> str | None:
    """Why the operator cannot be called, or None once it is loaded."""
    folder = library()
    if folder is None:
        return "vLLM's DeepGEMM (vllm/third_party/deep_gemm/_C_extension*.so) is not installed (pip install 'evalkit-kv[vllm]')"
    try:
        torch.ops.load_library(str(next(folder.glob("_C_extension*.so"))))
    except OSError as error:
        return f"vLLM's DeepGEMM does not load with torch {torch.__version__}: {error}"
    operators: Any = torch.ops.deep_gemm
    if not hasattr(operators, "fp8_fp4_mqa_logits"):
        return "vLLM's DeepGEMM has no operator fp8_fp4_mqa_logits: version 0.33.0 has"
    schema = operators.fp8_fp4_mqa_logits.default._schema
    arguments = [argument.name for argument in schema.arguments]
    if arguments != ARGUMENTS:
        return (
            f"DeepGEMM's fp8_fp4_mqa_logits takes {', '.join(arguments)}: other arguments than vLLM 0.33.0's"
        )
    operators.init(str(folder))  # where its kernels' sources are
    atexit.register(operators.shutdown)  # its handles must go before CUDA does
    return None


def library() -> Path | None:
    """The folder within vLLM's package that holds the shared object and its kernels' sources; None where there is none."""
    spec = importlib.util.find_spec("vllm")
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place, "third_party", "deep_gemm")
        if any(folder.glob("_C_extension*.so")):
            return folder
    return None
