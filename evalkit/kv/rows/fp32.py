"""fp32: 512 latent | 64 rope in float32, 2304 bytes per token. No server has it: it verifies the path itself."""

import torch
from torch import Tensor

from evalkit.kv import pages
from evalkit.kv.base import RowFormat, Rows, as_bytes, formats
from evalkit.kv.layout import Layout, Part
from evalkit.kv.scales import ReadScale, Scales


@formats.register
class Fp32(RowFormat):
    name, row_bytes = "fp32", 2304
    what = "float32 numbers: no server has it, it verifies the path itself"
    layout = Layout(latent=Part(kind="fp32", offset=0), rope=Part(kind="fp32", offset=2048))

    def encode(self, latent: Tensor, rope: Tensor, scales: Scales) -> Tensor:
        return as_bytes(latent.float(), rope.float())

    def decode(self, rows: Tensor, scales: Scales, read_scale: ReadScale) -> tuple[Tensor, Tensor]:
        values = rows.view(torch.float32)
        return values[:, :512], values[:, 512:]

    def planes(self, cache: Tensor) -> Rows:
        """View rows [N, 576] float32."""
        return Rows(pages.rows_of(cache, self.row_bytes).view(torch.float32))
