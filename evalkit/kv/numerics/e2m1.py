"""4-bit e2m1 arithmetic as CUDA's writers do it: codes for 0, 0.5, 1, 1.5, 2, 3, 4, 6 and a sign, 16 to a scale.

There is no code for infinity or NaN. Two codes share a byte, the even element in its low nibble.
"""

import torch
from torch import Tensor

from evalkit.kv.numerics.e4m3 import tile_amax

E2M1_MAX = 6.0
GROUP = 16


def as_groups(latent: Tensor) -> Tensor:
    """Cut latent [T, C] into groups [T, C / GROUP, GROUP] float32."""
    return latent.float().reshape(-1, latent.shape[-1] // GROUP, GROUP)


def group_amax(groups: Tensor) -> Tensor:
    """max|x| of each group [..., GROUP], over its numbers: like CUDA's fmaxf it passes over NaN."""
    return tile_amax(groups)


def to_e2m1(values: Tensor) -> Tensor:
    """float32 -> codes 0 to 15 in uint8, nearest even, saturating at ±6; a zero keeps its sign.

    NaN becomes 6, as `cvt.rn.satfinite.e2m1x2` makes it.
    """
    size = values.abs().nan_to_num(nan=E2M1_MAX).clamp(max=E2M1_MAX)
    # Below 2 codes are half a unit apart, below 4 one unit, then two. torch.round takes ties to the even multiple,
    # which is the even code in all three ranges.
    code = torch.where(
        size < 2, (2 * size).round(), torch.where(size < 4, size.round() + 2, (size / 2).round() + 4)
    )
    negative = values.signbit() & ~values.isnan()
    return code.to(torch.uint8) | (negative.to(torch.uint8) << 3)


def from_e2m1(codes: Tensor) -> Tensor:
    """Codes 0 to 15 -> float32, by their bits: compiled code may lose the sign of a zero in arithmetic."""
    size = (codes & 7).int()
    half = 126 << 23  # the bits of 0.5; from 1.0 on, each code is half an exponent further
    bits = torch.where(size < 2, size * half, (size << 22) + half)
    return (bits | ((codes.int() & 8) << 28)).view(torch.float32)


def pack(codes: Tensor) -> Tensor:
    """Codes [..., 2n] -> bytes [..., n], even elements in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`: bytes [..., n] -> codes [..., 2n]."""
    return torch.stack([packed & 0xF, packed >> 4], -1).flatten(-2)


def encode_groups(groups: Tensor, factor: Tensor) -> Tensor:
    """Groups [T, n, GROUP] times factor [T, n] -> packed codes [T, n * GROUP / 2]."""
    return pack(to_e2m1(groups * factor[..., None]).flatten(-2))


def decode_groups(packed: Tensor, scale: Tensor) -> Tensor:
    """Packed codes [T, n * GROUP / 2] and scale [T, n] -> values [T, n * GROUP] float32, exact for an e4m3 scale."""
    return (as_groups(from_e2m1(unpack(packed))) * scale[..., None]).flatten(-2)
