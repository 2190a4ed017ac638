"""How kernels turn stored rows into the operands of their matrix products: the same bytes read as another GPU does."""

from __future__ import annotations

from torch import Tensor

from evalkit.kv import RowFormat, Scales, round_to_bf16, truncate_to_e8m0


class Reader:
    """Multiplies each code by its scale, in float32."""

    def read_scale(self, scale: Tensor) -> Tensor:
        """The rounding applied to a stored or given float32 scale before it multiplies."""
        return scale

    def read(self, format: RowFormat, cache: Tensor, slots: Tensor, scales: Scales) -> tuple[Tensor, Tensor]:
        """Rows at `slots` [N] as the matrix products see them: latent [N, C], rope [N, R], float32."""
        return format.load(cache, slots, scales, self.read_scale)


class BF16Reader(Reader):
    """Multiplies by the scale rounded to bf16, then rounds the product to bf16: the SM90 kernels."""

    def read_scale(self, scale: Tensor) -> Tensor:
        return round_to_bf16(scale)

    def read(self, format: RowFormat, cache: Tensor, slots: Tensor, scales: Scales) -> tuple[Tensor, Tensor]:
        latent, rope = super().read(format, cache, slots, scales)
        return latent.bfloat16().float(), rope.bfloat16().float()


class E8M0Reader(Reader):
    """Keeps the scale's exponent only, as some SM100 builds of FlashMLA did: up to 2x too small."""

    def read_scale(self, scale: Tensor) -> Tensor:
        return truncate_to_e8m0(scale)


# What a candidate's `reader=` may name.
READERS = {"exact": Reader(), "sm90_bf16": BF16Reader(), "sm100_e8m0": E8M0Reader()}
