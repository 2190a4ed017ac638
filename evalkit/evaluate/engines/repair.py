"""vLLM 0.25.1 cannot allocate an fp8_ds_mla cache for DeepSeek-V3.2; with one argument it can.

Its `MLAAttention.get_kv_cache_spec` gives the spec no `kv_quant_mode`, so the cache is shaped as rows of 576 values and
the 656 bytes of a row do not fit. Newer versions pass `get_kv_quant_mode(self.kv_cache_dtype)`, as is done here.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

STATED = "kv_quant_mode given to the cache spec of MLAAttention, which this version leaves out"


def repair() -> None:
    """Have `MLAAttention` state its quant mode wherever it leaves it out."""
    from vllm.model_executor.layers.attention.mla_attention import MLAAttention
    from vllm.v1.kv_cache_interface import get_kv_quant_mode

    own = MLAAttention.get_kv_cache_spec
    if hasattr(own, "repaired"):
        return

    def spec(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = own(self, *args, **kwargs)
        return replace(made, kv_quant_mode=get_kv_quant_mode(self.kv_cache_dtype))

    spec.repaired = True  # type: ignore[attr-defined]
    MLAAttention.get_kv_cache_spec = spec


def needed() -> bool:
    """Whether the installed version leaves the mode out: read from its source, which is what is run."""
    from vllm.model_executor.layers.attention.mla_attention import MLAAttention

    return "kv_quant_mode" not in inspect.getsource(MLAAttention.get_kv_cache_spec)
