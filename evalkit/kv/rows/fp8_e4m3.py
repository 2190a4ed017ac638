"""fp8_e4m3: 512 latent | 64 rope in e4m3, 576 bytes per token: vLLM's standard fp8, one scale per tensor.

The scale is given, not stored. vLLM uses one for both parts: give `Scales.latent` and `Scales.rope` the same value
to have its bytes.
"""

import torch
from torch import Tensor

from evalkit.kv import pages
from evalkit.kv.base import RowFormat, Rows, as_bytes, formats
from evalkit.kv.layout import Layout, Part
from evalkit.kv.numerics.e4m3 import constant, divide, to_e4m3
from evalkit.kv.scales import ReadScale, Scales


@formats.register
class Fp8E4m3(RowFormat):
    name, row_bytes, uses_scales = "fp8_e4m3", 576, True
    what = "e4m3 under one scale per layer, vLLM's standard fp8"
    layout = Layout(
        latent=Part(kind="e4m3", offset=0, scaled=True), rope=Part(kind="e4m3", offset=512, scaled=True)
    )

    def encode(self, latent: Tensor, rope: Tensor, scales: Scales) -> Tensor:
        return as_bytes(
            to_e4m3(divide(latent.float(), scales.latent)), to_e4m3(divide(rope.float(), scales.rope))
        )

    def decode(self, rows: Tensor, scales: Scales, read_scale: ReadScale) -> tuple[Tensor, Tensor]:
        values = rows.view(torch.float8_e4m3fn).float()
        latent_scale, rope_scale = (
            read_scale(constant(scale, values)) for scale in (scales.latent, scales.rope)
        )
        return values[:, :512] * latent_scale, values[:, 512:] * rope_scale

    def planes(self, cache: Tensor) -> Rows:
        """View rows [N, 576] float8_e4m3fn."""
        return Rows(pages.rows_of(cache, self.row_bytes).view(torch.float8_e4m3fn))
