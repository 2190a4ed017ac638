"""fp8_ds_mla_fp32scale: fp8_ds_mla's layout with any fp32 scale, as vLLM wrote it up to 0.25.1.

A reader that rounds the scale reads these rows wrong: slightly in bf16, by up to 2x in e8m0.
"""

import torch
from torch import Tensor

from evalkit.kv.base import formats
from evalkit.kv.numerics.e4m3 import E4M3_MAX, divide, tile_amax
from evalkit.kv.rows.fp8_ds_mla import Fp8DsMla


@formats.register
class Fp8DsMlaFp32Scale(Fp8DsMla):
    name = "fp8_ds_mla_fp32scale"
    what = "fp8_ds_mla with any float32 scale, as vLLM wrote up to 0.25.1"

    def tile_scale(self, tiles: Tensor) -> Tensor:
        return divide(tile_amax(tiles), E4M3_MAX).clamp(min=torch.finfo(torch.float32).tiny)
