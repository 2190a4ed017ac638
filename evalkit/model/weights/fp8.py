"""Block-scaled e4m3 weights as DeepSeek publishes them: w = code · weight_scale_inv of its 128 x 128 block."""

from __future__ import annotations

import torch
from torch import Tensor

from evalkit.environment import has_triton
from evalkit.errors import InputError
from evalkit.kv.numerics.e4m3 import E4M3_MAX

SCALE_SUFFIX = "_scale_inv"


def dequantise(codes: Tensor, scale: Tensor, block: tuple[int, int], out: Tensor) -> None:
    """Write float32 products of codes and scales to `out`, rounded to its dtype.

    Args:
        codes: [N, K] e4m3.
        scale: [ceil(N / block[0]), ceil(K / block[1])] float32: the last block of a row or column may be a part.
        block: its rows and columns.
        out: [N, K], any float dtype, the same device.
    """
    if codes.is_cuda and codes.is_contiguous() and out.is_contiguous() and has_triton():
        from evalkit.model.weights import fp8_kernel

        with torch.cuda.device_of(codes):
            fp8_kernel.multiply(codes, scale.float().contiguous(), block, out)
        return
    rows = scale.float().repeat_interleave(block[0], 0)[: codes.shape[0]]  # [N, ceil(K / block)]
    product = codes.float()
    if codes.shape[1] % block[1] == 0:
        product.unflatten(1, (-1, block[1])).mul_(rows[:, :, None])
    else:
        product.mul_(rows.repeat_interleave(block[1], 1)[:, : codes.shape[1]])
    out.copy_(product)


def quantise(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> codes [N, K] e4m3 and float32 scales, each the power of two that keeps its block below 448."""
    rows, columns = weight.shape
    grid = scale_shape(weight.shape, block)
    if (rows, columns) == (grid[0] * block[0], grid[1] * block[1]):
        tiles = weight.float()
    else:
        tiles = weight.new_zeros(grid[0] * block[0], grid[1] * block[1], dtype=torch.float32)
        tiles[:rows, :columns] = weight
    tiles = tiles.view(grid[0], block[0], grid[1], block[1])
    amax = tiles.abs().amax((1, 3), keepdim=True).clamp(min=1e-12)
    scale = (amax / E4M3_MAX).log2().ceil().exp2()
    codes = (tiles / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    codes = codes.view(grid[0] * block[0], grid[1] * block[1])[:rows, :columns]
    return codes.contiguous(), scale.view(grid)


def scale_shape(shape: torch.Size | tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """The grid of scales of a weight [N, K]."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def block_size(quantization: dict[str, object] | None, where: str) -> tuple[int, int] | None:
    """The rows and columns of a block that config.json's `quantization_config` gives; None without one.

    Raises:
        InputError: weights are quantised in another way.
    """
    if quantization is None:
        return None
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
    if method != "fp8" or not isinstance(block, list) or len(block) != 2:
        raise InputError(
            f"{where} quantises its weights by {method!r} in blocks of {block}: evalkit reads fp8 in blocks, "
            "as in weight_block_size [128, 128]"
        )
    return int(block[0]), int(block[1])
