from types import SimpleNamespace

import torch
from torch import nn

WIDTHS = {"bfloat16": (576, torch.bfloat16), "fp8_ds_mla": (656, torch.uint8), "fp8_e4m3": (576, torch.uint8)}


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
        self.kv_cache = torch.zeros(options.blocks, 64, width, dtype=dtype)


class DeepseekV32Attention(MLAAttention):
    """Projections, cache and attention in one module, which ends in its `o_proj`."""

    def __init__(self, layer_name, options):
        super().__init__(layer_name, options)
        self.o_proj = nn.Identity()

    def show(self, layer, values, selection, output):
        """What the native layer stored, gave and selected."""
        slots = layer.slots(0, layer.length)[0]
        (rows,) = layer.format.byte_planes(layer.rows)
        flat = self.kv_cache.view(torch.uint8).flatten(0, 1)
        flat[: len(slots)] = rows[slots]
        self.values, self.output = values, output
        self.impl.topk_indices_buffer = selection.flip(-1).int()  # vLLM's is in no order

    def forward(self, positions, hidden_states):
        self.o_proj(self.values)
        return self.output
