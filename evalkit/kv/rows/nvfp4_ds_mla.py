"""nvfp4_ds_mla: 512 e2m1 | 64 e4m3 rope | 32 e4m3 scales, one per 16, 352 bytes per token.

What vLLM 0.33.0 writes for FlashMLA on SM100. The element 2i is the low nibble of byte i; the scale of group s lies at
byte 8 (s & 3) + (s >> 2) of its 32; the rope has no scale. A group's scale is max(amax / 6, 2^-9) rounded to the
nearest e4m3, and values are multiplied by its float32 reciprocal: where the scale rounded down, the largest saturate.
The rule was read in the machine code of the released library (vLLM's first version of this writer, #51724, rounded
up), the layout again in FlashInfer's description of its SM100 reader. That writer runs on SM100 only: its bytes have
not been compared with these. NaN is stored as the group's largest value.

vLLM's rows have no outer scale. `Scales.latent` is one, as forks of vLLM calibrate it per layer: the latent is divided
by it before it is written and multiplied by it after it is read; 1.0 is without. How a fork rounds that quotient has
not been compared either.
"""

import torch
from torch import Tensor

from evalkit.kv import pages
from evalkit.kv.base import RowFormat, Rows, as_bytes, formats
from evalkit.kv.layout import Layout, Part
from evalkit.kv.numerics.e2m1 import E2M1_MAX, GROUP, as_groups, decode_groups, encode_groups, group_amax
from evalkit.kv.numerics.e4m3 import constant, divide, to_e4m3
from evalkit.kv.scales import ReadScale, Scales

SMALLEST_SCALE = 2.0**-9


@formats.register
class Nvfp4DsMla(RowFormat):
    name, row_bytes, uses_scales, four_bit = "nvfp4_ds_mla", 352, True, True
    what = "e2m1 latent, an e4m3 scale every 16; e4m3 rope: vLLM's"
    layout = Layout(
        latent=Part(kind="e2m1", offset=0, scaled=True),
        rope=Part(kind="e4m3", offset=256),
        scale=Part(kind="e4m3", offset=320),
        group=GROUP,
        scale_lanes=4,
    )

    def encode(self, latent: Tensor, rope: Tensor, scales: Scales) -> Tensor:
        groups = as_groups(divide(latent.float(), scales.latent))
        scale = to_e4m3(divide(group_amax(groups), E2M1_MAX).clamp(min=SMALLEST_SCALE))  # [T, 32]
        codes = encode_groups(groups, constant(1.0, groups) / scale.float())
        return as_bytes(codes, to_e4m3(rope.float()), _permuted(scale, 8, 4))

    def decode(self, rows: Tensor, scales: Scales, read_scale: ReadScale) -> tuple[Tensor, Tensor]:
        codes, rope, permuted = rows.split_with_sizes([256, 64, 512 // GROUP], -1)
        scale = _permuted(permuted.contiguous(), 4, 8).view(torch.float8_e4m3fn).float()
        latent = decode_groups(codes, scale) * read_scale(constant(scales.latent, rows))
        return latent, rope.view(torch.float8_e4m3fn).float()

    def planes(self, cache: Tensor) -> Rows:
        """View rows [pages, page_size, 352] uint8."""
        return Rows(pages.rows_of(cache, self.row_bytes).view(len(cache), -1, self.row_bytes))

    def calibrate(self, latent_amax: float, rope_amax: float) -> Scales:
        """The outer scale that puts the largest group's scale at e4m3's largest value."""
        return Scales(latent=super().calibrate(latent_amax or rope_amax, 0.0).latent / E2M1_MAX)


def _permuted(scale: Tensor, rows: int, columns: int) -> Tensor:
    """Scales [T, 32] in transposed order: as `rows` x `columns`, read by column."""
    return scale.view(-1, rows, columns).transpose(-1, -2).flatten(-2)
