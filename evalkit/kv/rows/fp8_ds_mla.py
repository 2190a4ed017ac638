"""fp8_ds_mla: 512 e4m3 | 4 fp32 scales, powers of two | 64 bf16 rope, 656 bytes per token.

DeepSeek's own layout, read by FlashMLA. vLLM writes powers of two from #49435 on.
"""

import torch
from torch import Tensor

from evalkit.kv import pages
from evalkit.kv.base import RowFormat, Rows, as_bytes, formats
from evalkit.kv.layout import Layout, Part
from evalkit.kv.numerics.e4m3 import TILE, as_tiles, decode_tiles, encode_tiles, power_of_two_scale
from evalkit.kv.scales import ReadScale, Scales


@formats.register
class Fp8DsMla(RowFormat):
    name, row_bytes = "fp8_ds_mla", 656
    what = "DeepSeek's own: e4m3 latent, a power of two every 128, bf16 rope"
    layout = Layout(
        latent=Part(kind="e4m3", offset=0),
        scale=Part(kind="fp32", offset=512),
        group=TILE,
        rope=Part(kind="bf16", offset=528),
    )

    def tile_scale(self, tiles: Tensor) -> Tensor:
        """The write rule: tiles [T, 4, TILE] -> scale [T, 4] float32."""
        return power_of_two_scale(tiles)

    def encode(self, latent: Tensor, rope: Tensor, scales: Scales) -> Tensor:
        tiles = as_tiles(latent)
        scale = self.tile_scale(tiles)
        return as_bytes(encode_tiles(tiles, scale), scale, rope.bfloat16())

    def decode(self, rows: Tensor, scales: Scales, read_scale: ReadScale) -> tuple[Tensor, Tensor]:
        codes, scale, rope = rows.split_with_sizes([512, 16, 128], -1)
        latent = decode_tiles(codes.view(torch.float8_e4m3fn), read_scale(scale.view(torch.float32)))
        return latent, rope.view(torch.bfloat16).float()

    def planes(self, cache: Tensor) -> Rows:
        """View rows [pages, page_size, 656] uint8."""
        return Rows(pages.rows_of(cache, self.row_bytes).view(len(cache), -1, self.row_bytes))
