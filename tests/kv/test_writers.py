"""Each format's bytes against a second implementation of its writer's rule, in numpy, by searching tables of codes."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from evalkit import kv
from evalkit.kv import Scales
from tests.kv.codes import E2M1, E4M3, encode

Array = NDArray[np.float32]
Writer = Callable[[Array, Array, np.float32, np.float32], list[NDArray[np.generic]]]
SCALES = Scales(latent=0.37, rope=1.9)
ONE, MAX = np.float32(1), np.float32(448)


def bf16(x: Array) -> NDArray[np.uint16]:
    """The upper half of a float32, rounded to nearest even."""
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def tiled(latent: Array, width: int) -> tuple[Array, Array]:
    """latent in tiles [T, n, width] and their largest magnitudes [T, n]."""
    tiles = latent.reshape(len(latent), -1, width)
    return tiles, np.abs(tiles).max(-1)


def power_of_two(scale: Array) -> Array:
    return np.exp2(np.ceil(np.log2(scale.astype(np.float64)))).astype(np.float32)


def coded(tiles: Array, scale: Array) -> NDArray[np.uint8]:
    return encode((tiles / scale[..., None]).reshape(len(tiles), -1), E4M3)


def write_fp32(latent: Array, rope: Array, *_: np.float32) -> list[NDArray[np.generic]]:
    return [latent, rope]


def write_bf16(latent: Array, rope: Array, *_: np.float32) -> list[NDArray[np.generic]]:
    return [bf16(latent), bf16(rope)]


def write_fp8(latent: Array, rope: Array, k: np.float32, r: np.float32) -> list[NDArray[np.generic]]:
    return [encode(latent / k, E4M3), encode(rope / r, E4M3)]


def write_ds_mla(latent: Array, rope: Array, *_: np.float32) -> list[NDArray[np.generic]]:
    tiles, amax = tiled(latent, 128)
    scale = power_of_two(np.maximum(amax / MAX, np.float32(1e-4)))
    return [coded(tiles, scale), scale, bf16(rope)]


def write_older_ds_mla(latent: Array, rope: Array, *_: np.float32) -> list[NDArray[np.generic]]:
    tiles, amax = tiled(latent, 128)
    scale = np.maximum(amax / MAX, np.finfo(np.float32).tiny)
    return [coded(tiles, scale), scale, bf16(rope)]


def write_groups(latent: Array, rope: Array, k: np.float32, r: np.float32) -> list[NDArray[np.generic]]:
    codes, scale, _ = write_ds_mla(latent, rope)
    return [codes, encode(rope / r, E4M3), scale]


def packed(groups: Array, factor: Array) -> NDArray[np.uint8]:
    codes = encode((groups * factor[..., None]).reshape(len(groups), -1), E2M1)
    return codes[:, ::2] + 16 * codes[:, 1::2]


def write_nvfp4(latent: Array, rope: Array, k: np.float32, r: np.float32) -> list[NDArray[np.generic]]:
    groups, amax = tiled(latent / k, 16)
    wanted = np.maximum(amax / np.float32(6), np.float32(2**-9))
    code = encode(wanted, E4M3)
    placed = np.zeros((len(latent), 32), np.uint8)
    for group in range(32):
        placed[:, 8 * (group % 4) + group // 4] = code[:, group]
    return [packed(groups, ONE / E4M3[code].astype(np.float32)), encode(rope, E4M3), placed]


def write_nvfp4_flashinfer(
    latent: Array, rope: Array, k: np.float32, r: np.float32
) -> list[NDArray[np.generic]]:
    groups, amax = tiled(latent, 16)
    code = encode(amax * (ONE / (np.float32(6) * k)), E4M3)
    scale = E4M3[code].astype(np.float32) * k
    factor = np.where(scale > 0, ONE / np.where(scale > 0, scale, ONE), np.float32(0))
    return [packed(groups, factor), code, encode(rope * (ONE / r), E4M3)]


WRITERS: dict[str, Writer] = {
    "fp32": write_fp32,
    "bf16": write_bf16,
    "fp8_e4m3": write_fp8,
    "fp8_ds_mla": write_ds_mla,
    "fp8_ds_mla_fp32scale": write_older_ds_mla,
    "fp8_group128": write_groups,
    "nvfp4_ds_mla": write_nvfp4,
    "nvfp4_flashinfer": write_nvfp4_flashinfer,
}


def inputs() -> tuple[Tensor, Tensor]:
    """200 tokens, bf16-valued: magnitudes 1e-4 to 3e38 by token and by element, zeros, ±448, ties and neighbours."""
    draw = torch.Generator().manual_seed(21)
    values = torch.randn(200, 576, generator=draw) * torch.logspace(-4, 4, 200)[:, None]
    spread = torch.rand(60, 576, generator=draw) * 42 - 4
    values[:60] = 10**spread * torch.randn(60, 576, generator=draw).sign()
    values[60:64] = 0
    values[64, ::3], values[64, 1::3] = 448, -448
    values[65] = torch.linspace(-464, 464, 576)
    values[66] = 3e38 * torch.linspace(-1, 1, 576)
    values[67] = torch.arange(576) * 2.0**-10 - 0.25  # e4m3 subnormals, and halves of them
    values[68:80] = values[68:80].where(torch.rand(12, 576, generator=draw) < 0.03, torch.tensor(0.0))
    values[80] = (torch.arange(576) % 29) * 0.25 - 3.5  # e2m1 ties
    return values.bfloat16().float().clamp(-3e38, 3e38).split_with_sizes([512, 64], -1)


@pytest.mark.parametrize("page_size", [1, 16, 64, 256])
@pytest.mark.parametrize("name", kv.names())
def test_the_bytes_are_those_of_the_writers_rule(name: str, page_size: int):
    """Random slots, every seventh token skipped; no other byte changes."""
    latent, rope = inputs()
    row_format = kv.get(name)
    slots = torch.randperm(512, generator=torch.Generator().manual_seed(page_size))[: len(latent)]
    slots[::7] = -1
    cache = row_format.allocate(512, page_size).fill_(0xA5)
    row_format.store(cache, slots, latent, rope, SCALES)

    k, r = np.float32(SCALES.latent), np.float32(SCALES.rope)
    with np.errstate(over="ignore"):
        parts = WRITERS[name](latent.numpy(), rope.numpy(), k, r)
    expected = np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in parts], -1)
    got = torch.cat(row_format.byte_planes(cache), -1).numpy()
    written = slots >= 0
    np.testing.assert_array_equal(got[slots[written]], expected[written.numpy()])
    untouched = np.setdiff1d(np.arange(512), slots.numpy())
    assert len(untouched) == 512 - int(written.sum())
    assert (got[untouched] == 0xA5).all()
