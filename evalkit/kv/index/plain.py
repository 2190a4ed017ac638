"""bf16, fp16, fp32: indexer keys as numbers of that type, 256 or 512 bytes per token."""

import torch
from torch import Tensor

from evalkit.kv.index.base import IndexFormat, Keys, index_formats


class Plain(IndexFormat):
    def encode(self, keys: Tensor) -> Keys:
        return Keys(keys.to(self.dtype), None)


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
