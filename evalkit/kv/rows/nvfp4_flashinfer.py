"""nvfp4_flashinfer: 512 e2m1 | 32 e4m3 scales, one per 16 | 64 e4m3 rope, 352 bytes per token, in three planes.

What FlashInfer's `nvfp4_quantize_append_paged_mla_kv_cache` writes, as its CUDA source (0.7.2, page.cuh) has it:
`Scales.latent` is the global scale g (`ckv_scale`), `Scales.rope` the rope's (`kpe_scale`). A group's scale is
amax · fl(1 / 6g) rounded to the nearest e4m3, its values are multiplied by fl(1 / (scale · g)), the rope by
fl(1 / kpe_scale). The element 2i is the low nibble of byte i; scales are in order. A group whose scale rounds to zero,
amax ≤ 6g · 2^-10, is stored as zeros; one whose scale rounds down saturates. NaN is stored as zero.

FlashInfer takes each plane as a tensor of its own; here they are contiguous over all slots, so that the cache is one
page. Its writer is compiled with subnormal float32 flushed to zero, which is not modelled. Its bytes on an
H200 are these (tests/kv/fixtures).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from evalkit.kv.base import PlanarFormat, as_bytes, formats
from evalkit.kv.layout import Layout, Part
from evalkit.kv.numerics.e2m1 import E2M1_MAX, GROUP, as_groups, decode_groups, encode_groups, group_amax
from evalkit.kv.numerics.e4m3 import constant, to_e4m3
from evalkit.kv.scales import ReadScale, Scales


class Planes(NamedTuple):
    """latent [N, 256] uint8, two values a byte; scale [N, 32] float8_e4m3fn; rope [N, 64] float8_e4m3fn."""

    latent: Tensor
    scale: Tensor
    rope: Tensor


@formats.register
class Nvfp4FlashInfer(PlanarFormat):
    name, row_bytes, uses_scales, four_bit = "nvfp4_flashinfer", 352, True, True
    what = "e2m1 latent, an e4m3 scale every 16; e4m3 rope; as FlashInfer writes it"
    plane_bytes = (256, 32, 64)
    layout = Layout(
        latent=Part(kind="e2m1", offset=0, scaled=True),
        scale=Part(kind="e4m3", offset=256),
        group=GROUP,
        rope=Part(kind="e4m3", offset=288, scaled=True),
    )

    def encode(self, latent: Tensor, rope: Tensor, scales: Scales) -> Tensor:
        groups = as_groups(latent)
        one, outer, rope_scale = (constant(x, groups) for x in (1.0, scales.latent, scales.rope))
        scale = to_e4m3(group_amax(groups) * (one / (E2M1_MAX * outer)))  # [T, 32]
        kept = scale.float() > 0
        factor = torch.where(kept, one / torch.where(kept, scale.float() * outer, one), 0.0)
        # NaN has no code: this writer's comparisons send it to zero.
        codes = encode_groups(groups.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf), factor)
        return as_bytes(codes, scale, to_e4m3(rope.float() * (one / rope_scale)))

    def decode(self, rows: Tensor, scales: Scales, read_scale: ReadScale) -> tuple[Tensor, Tensor]:
        codes, scale, rope = rows.split_with_sizes(self.plane_bytes, -1)
        outer, rope_scale = (read_scale(constant(x, rows)) for x in (scales.latent, scales.rope))
        latent = decode_groups(codes, scale.view(torch.float8_e4m3fn).float()) * outer
        return latent, rope.view(torch.float8_e4m3fn).float() * rope_scale

    def planes(self, cache: Tensor) -> Planes:
        latent, scale, rope = self.byte_planes(cache)
        return Planes(latent, scale.view(torch.float8_e4m3fn), rope.view(torch.float8_e4m3fn))

    def calibrate(self, latent_amax: float, rope_amax: float) -> Scales:
        """Each part's own scale; the latent's puts the largest group's scale at e4m3's largest value."""
        return Scales(
            latent=super().calibrate(latent_amax or rope_amax, 0.0).latent / E2M1_MAX,
            rope=super().calibrate(0.0, rope_amax or latent_amax).rope,
        )
