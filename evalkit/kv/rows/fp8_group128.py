"""fp8_group128: 512 e4m3 | 64 e4m3 rope | 4 fp32 scales, 592 bytes per token, as FlashInfer's `ckv_scale_arr` reads it.

The latent is written by fp8_ds_mla's rule, the rope with the given `Scales.rope` (`kpe_scale`). FlashInfer wants each
part contiguous over all slots, so that the cache is one page of three planes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from evalkit.kv.base import PlanarFormat, as_bytes, formats
from evalkit.kv.layout import Layout, Part
from evalkit.kv.numerics.e4m3 import (
    TILE,
    as_tiles,
    constant,
    decode_tiles,
    divide,
    encode_tiles,
    power_of_two_scale,
    to_e4m3,
)
from evalkit.kv.scales import ReadScale, Scales


class Planes(NamedTuple):
    """latent [N, 512] float8_e4m3fn, rope [N, 64] float8_e4m3fn, scale [N, 4] float32."""

    latent: Tensor
    rope: Tensor
    scale: Tensor


@formats.register
class Fp8Group128(PlanarFormat):
    name, row_bytes, uses_scales = "fp8_group128", 592, True
    what = "e4m3 latent, a float32 scale every 128; e4m3 rope: FlashInfer's"
    plane_bytes = (512, 64, 16)
    layout = Layout(
        latent=Part(kind="e4m3", offset=0),
        rope=Part(kind="e4m3", offset=512, scaled=True),
        scale=Part(kind="fp32", offset=576),
        group=TILE,
    )

    def encode(self, latent: Tensor, rope: Tensor, scales: Scales) -> Tensor:
        tiles = as_tiles(latent)
        scale = power_of_two_scale(tiles)
        return as_bytes(encode_tiles(tiles, scale), to_e4m3(divide(rope.float(), scales.rope)), scale)

    def decode(self, rows: Tensor, scales: Scales, read_scale: ReadScale) -> tuple[Tensor, Tensor]:
        codes, rope, scale = rows.split_with_sizes(self.plane_bytes, -1)
        latent = decode_tiles(codes.view(torch.float8_e4m3fn), read_scale(scale.view(torch.float32)))
        return latent, rope.view(torch.float8_e4m3fn).float() * read_scale(constant(scales.rope, rows))

    def planes(self, cache: Tensor) -> Planes:
        latent, rope, scale = self.byte_planes(cache)
        return Planes(
            latent.view(torch.float8_e4m3fn), rope.view(torch.float8_e4m3fn), scale.view(torch.float32)
        )
