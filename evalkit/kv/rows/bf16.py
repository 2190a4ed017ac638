"""bf16: 512 latent | 64 rope, 1152 bytes per token: what vLLM's "auto" stores, and the baseline."""

import torch
from torch import Tensor

from evalkit.kv import pages
from evalkit.kv.base import RowFormat, Rows, as_bytes, formats
from evalkit.kv.layout import Layout, Part
from evalkit.kv.scales import ReadScale, Scales


@formats.register
class Bf16(RowFormat):
    name, row_bytes = "bf16", 1152
    what = "bf16 numbers, vLLM's auto: the baseline"
    layout = Layout(latent=Part(kind="bf16", offset=0), rope=Part(kind="bf16", offset=1024))

    def encode(self, latent: Tensor, rope: Tensor, scales: Scales) -> Tensor:
        return as_bytes(latent.bfloat16(), rope.bfloat16())

    def decode(self, rows: Tensor, scales: Scales, read_scale: ReadScale) -> tuple[Tensor, Tensor]:
        values = rows.view(torch.bfloat16).float()
        return values[:, :512], values[:, 512:]

    def planes(self, cache: Tensor) -> Rows:
        """View rows [N, 576] bfloat16."""
        return Rows(pages.rows_of(cache, self.row_bytes).view(torch.bfloat16))
