"""bf16, fp16, fp32: indexer keys as numbers of that type, 256 or 512 bytes per token."""

import torch
from torch import Tensor

from evalkit.kv.index.base import IndexFormat, Keys, index_formats


class Plain(IndexFormat):
    def encode(self, keys: Tensor) -> Keys:
        codes = keys.to(self.dtype)
        # A cast keeps a NaN's payload on one device and not on another.
        return Keys(codes.masked_fill(codes.isnan(), torch.nan), None)


@index_formats.register
class Bf16(Plain):
    name, dtype = "bf16", torch.bfloat16
    what = "bf16 numbers"


@index_formats.register
class Fp16(Plain):
    name, dtype = "fp16", torch.float16
    what = "fp16 numbers"


@index_formats.register
class Fp32(Plain):
    name, dtype = "fp32", torch.float32
    what = "float32 numbers"
