"""indexer_fp8_ue8m0: 128 e4m3 and one fp32 scale, a power of two, 132 bytes per token: what vLLM stores.

A page holds the codes of its tokens, then their scales. The scale is 2^ceil(log2(max(amax, 1e-4) / 448)), the rule of
vLLM's `indexer_k_quant_and_cache` with "ue8m0", which it uses at every KV dtype.
"""

import torch
from torch import Tensor

from evalkit.kv.index.base import IndexFormat, Keys, index_formats
from evalkit.kv.numerics.e4m3 import E4M3_MAX, divide, next_power_of_two, tile_amax, to_e4m3

SMALLEST_AMAX = 1e-4


@index_formats.register
class IndexerFp8Ue8m0(IndexFormat):
    name, dtype, scaled = "indexer_fp8_ue8m0", torch.float8_e4m3fn, True
    what = "e4m3 under a power of two per token: what vLLM stores"

    def scale(self, amax: Tensor) -> Tensor:
        """The write rule: max|x| of keys [...] -> their scale [...] float32."""
        return next_power_of_two(divide(amax.clamp(min=SMALLEST_AMAX), E4M3_MAX))

    def encode(self, keys: Tensor) -> Keys:
        values = keys.float()
        scale = self.scale(tile_amax(values))
        return Keys(to_e4m3(values / scale[..., None]), scale)
