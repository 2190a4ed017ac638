"""float8 e4m3fn arithmetic as CUDA's writers do it: saturating casts, true division, scales per 128-wide tile."""

import torch
from torch import Tensor

E4M3_MAX = 448.0
TILE = 128


def constant(value: float | Tensor, like: Tensor) -> Tensor:
    """A float32 scalar on the tensor's device, filled there rather than copied, which would synchronise.

    A scalar that is there already stays as it is: compiled code is not bound to one number then.
    """
    if isinstance(value, Tensor):
        return value
    return torch.full((), value, dtype=torch.float32, device=like.device)


def divide(values: Tensor, by: float) -> Tensor:
    """The quotient values / by, rounded as IEEE division.

    On CUDA, tensor / python number becomes a multiplication by the reciprocal, which changes 0.1 % of the codes.
    """
    return values / constant(by, values)


def to_e4m3(values: Tensor) -> Tensor:
    """float32 -> float8_e4m3fn, nearest even, saturating at ±448; NaN of either sign becomes the code 0x7f."""
    # torch below 2.13 casts what exceeds 448 to NaN on some devices. clamp keeps NaN.
    codes = values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return codes.masked_fill(codes == 0xFF, 0x7F).view(torch.float8_e4m3fn)


def as_tiles(latent: Tensor) -> Tensor:
    """Cut latent [T, C] into tiles [T, C / TILE, TILE] float32."""
    return latent.float().reshape(-1, latent.shape[-1] // TILE, TILE)


def tile_amax(tiles: Tensor) -> Tensor:
    """max|x| of each tile [..., TILE], over its numbers: like CUDA's fmaxf it passes over NaN, which the codes keep."""
    return tiles.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(-1)


def power_of_two_scale(tiles: Tensor) -> Tensor:
    """2^ceil(log2(max(amax/448, 1e-4))) of each tile: vLLM's writer from #49435 on, and FlashMLA's tests.

    A power of two survives a reader that rounds the scale; the floor keeps a tile of zeros finite.
    """
    return next_power_of_two(divide(tile_amax(tiles), E4M3_MAX).clamp(min=1e-4))


def next_power_of_two(values: Tensor) -> Tensor:
    """The smallest power of two that is not below each positive normal float32."""
    # Rounding the bits up to the next bare exponent is exact, where log2 may differ between devices.
    return ((values.view(torch.int32) + 0x7F_FFFF) & 0x7F80_0000).view(torch.float32)


def encode_tiles(tiles: Tensor, scale: Tensor) -> Tensor:
    """Tiles [T, n, TILE], scale [T, n] -> codes [T, n * TILE]."""
    return to_e4m3(tiles / scale[..., None]).flatten(-2)


def decode_tiles(codes: Tensor, scale: Tensor) -> Tensor:
    """Codes [T, n * TILE] e4m3, scale [T, n] -> values [T, n * TILE] float32."""
    return (as_tiles(codes) * scale[..., None]).flatten(-2)
