from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn
from vllm.recorded import RECORDED
from vllm.v1.kv_cache_interface import KVQuantMode, get_kv_quant_mode

WIDTHS = {"bfloat16": (576, torch.bfloat16), "fp8_ds_mla": (656, torch.uint8), "fp8_e4m3": (576, torch.uint8)}


@dataclass(frozen=True, kw_only=True)
class MLAAttentionSpec:
    width: int
    kv_quant_mode: KVQuantMode = KVQuantMode.NONE


class MLAAttention(nn.Module):
    def __init__(self, layer_name, options):
        super().__init__()
        self.layer_name, self.attn_backend = layer_name, options.backend
        self.kv_cache_dtype = options.cache_dtype
        self.num_heads, self.quant_method = options.heads, None
        self.impl = SimpleNamespace(topk_indices_buffer=None)
        self.register_buffer("_k_scale", torch.tensor(1.0))
        self.register_buffer("_q_scale", torch.tensor(1.0))
        width, dtype = WIDTHS[self.kv_cache_dtype]
        spec = self.get_kv_cache_spec(None)
        if spec.kv_quant_mode == KVQuantMode.NONE and width == 656:
            raise RuntimeError(f"shape '[{options.blocks}, 64, 576]' is invalid for input of size 656")
        self.kv_cache = torch.zeros(options.blocks, 64, width, dtype=dtype)

    if RECORDED["spec_states_quant_mode"]:

        def get_kv_cache_spec(self, vllm_config):
            return MLAAttentionSpec(width=576, kv_quant_mode=get_kv_quant_mode(self.kv_cache_dtype))

    else:

        def get_kv_cache_spec(self, vllm_config):
            return MLAAttentionSpec(width=576)

    def show(self, layer, values, selection):
        """What the native layer stored, gave and selected."""
        slots = layer.slots(0, layer.length)[0]
        (rows,) = layer.format.byte_planes(layer.rows)
        flat = self.kv_cache.view(torch.uint8).flatten(0, 1)
        flat[: len(slots)] = rows[slots]
        self.values = values
        self.impl.topk_indices_buffer = selection.flip(-1).int()  # vLLM's is in no order

    def forward(self, q, kv_c_normed, k_pe, output_shape=None):
        return self.values
