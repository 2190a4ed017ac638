"""Each format's own rule: a row of bytes worked out by hand, its scales, and its error on N(0, 1)."""

import pytest
import torch
from torch import Tensor

from evalkit import kv
from evalkit.errors import InputError
from evalkit.kv import Scales

# Distinct values at the start of each 128-wide tile of the latent, and at the start of the rope; zero elsewhere.
TILES = ([448.0, -1.0, 0.4375], [1.75, -0.5, 0.21875], [3.0, -2.0, 1.5], [-1000.0, 17.0, 500.0])
ROPE = [0.75, -3.5, 600.0]


def worked_row() -> tuple[Tensor, Tensor]:
    latent, rope = torch.zeros(1, 512), torch.zeros(1, 64)
    for tile, values in enumerate(TILES):
        latent[0, tile * 128 : tile * 128 + 3] = torch.tensor(values)
    rope[0, :3] = torch.tensor(ROPE)
    return latent, rope


def padded(parts: list[tuple[str, int]]) -> bytes:
    """Each part's leading bytes in hex, filled with zeros to its length."""
    return b"".join(bytes.fromhex(lead).ljust(length, b"\0") for lead, length in parts)


FP32 = [
    ("0000e043 000080bf 0000e03e", 512),  # 448, -1, 0.4375, little endian
    ("0000e03f 000000bf 0000603e", 512),  # 1.75, -0.5, 0.21875
    ("00004040 000000c0 0000c03f", 512),  # 3, -2, 1.5
    ("00007ac4 00008841 0000fa43", 512),  # -1000, 17, 500
    ("0000403f 000060c0 00001644", 256),  # 0.75, -3.5, 600
]
BF16_ROPE = ("403f 60c0 1644", 128)
BF16 = [
    ("e043 80bf e03e", 256),
    ("e03f 00bf 603e", 256),
    ("4040 00c0 c03f", 256),
    ("7ac4 8841 fa43", 256),
    BF16_ROPE,
]
# Scales 2 and 4. 224 = 1.75 * 2^7 is exponent 14, mantissa 6: 0x76. -500 saturates to 0xfe as -448 does; 8.5 ties
# between 8 and 9 and goes to the even 8 = 0x50. 0.109375 = 1.75 * 2^-4 = 0x1e. The rope's 150 lies between 144 and 160,
# nearer to 144 = 1.125 * 2^7 = 0x71.
FP8_E4M3 = [
    ("76 b0 26", 128),  # 224, -0.5, 0.21875
    ("36 a8 1e", 128),  # 0.875, -0.25, 0.109375
    ("3c b8 34", 128),  # 1.5, -1, 0.75
    ("fe 50 78", 128),  # -448 (from -500), 8 (from 8.5), 256 (from 250)
    ("24 b6 71", 64),  # 0.1875, -0.875, 144 (from 150)
]
# amax / 448 is 1, 2^-8, 3/448 -> 2^-7, 1000/448 -> 4; each tile's values are divided by that.
POW2_CODES = [
    ("7e b8 2e", 128),  # 448, -1, 0.4375
    ("7e f0 66", 128),  # 448, -128, 56
    ("7c f8 74", 128),  # 384, -256, 192
    ("f8 48 70", 128),  # -256 (from -250), 4 (from 4.25), 128 (from 125)
]
POW2_SCALES = ("0000803f 0000803b 0000003c 00008040", 16)
# amax / 448 unrounded: 1, 2^-8, 3/448 = 0x3bdb6db7, 1000/448 = 0x400edb6e; the largest of each tile becomes ±448.
FP32_CODES = [
    ("7e b8 2e", 128),
    ("7e f0 66", 128),
    ("7e f9 76", 128),  # 448, -288 (from -298.67), 224
    ("fe 4f 76", 128),  # -448, 7.5 (from 7.616), 224
]
FP32_SCALES = ("0000803f 0000803b b76ddb3b 6edb0e40", 16)

# Outer scale 2. Sixths of the largest halves rounded to the nearest are scales: 36 = 0x61 (from 37.3), 0.140625 = 0x21
# (from 0.1458), 0.25 = 0x28 and 80 = 0x6a (from 83.3), those of groups 0, 8, 16, 24 at bytes 0, 2, 4, 6; a group of
# zeros has 2^-9 = 0x01. Low nibble first: 6 and -0 (from 6.2, -0.014); 6, -2, 1 (from 6.2, -1.78, 0.78); 6, -4, 3;
# -6, 0, 3 (from -6.25, 0.11, 3.125). The rope's 600 saturates at 448 = 0x7e.
NVFP4_DS_MLA = [
    ("87 00", 64),
    ("c7 02", 64),
    ("e7 05", 64),
    ("0f 05", 64),
    ("34 c6 7e", 64),
    ("61 01 21 01 28 01 6a 01" + " 01" * 24, 32),
]
# Global scale 2. The same codes and scales, the scales in order; a group of zeros has 0.
NVFP4_FLASHINFER = [
    ("87 00", 64),
    ("c7 02", 64),
    ("e7 05", 64),
    ("0f 05", 64),
    ("61", 8),
    ("21", 8),
    ("28", 8),
    ("6a", 8),
    ("24 b6 71", 64),
]

WORKED = {
    "fp32": FP32,
    "bf16": BF16,
    "fp8_e4m3": FP8_E4M3,
    "fp8_ds_mla": [*POW2_CODES, POW2_SCALES, BF16_ROPE],
    "fp8_ds_mla_fp32scale": [*FP32_CODES, FP32_SCALES, BF16_ROPE],
    "fp8_group128": [*POW2_CODES, ("24 b6 71", 64), POW2_SCALES],
    "nvfp4_ds_mla": NVFP4_DS_MLA,
    "nvfp4_flashinfer": NVFP4_FLASHINFER,
}


@pytest.mark.parametrize("name", kv.names())
def test_a_row_has_the_bytes_worked_out_by_hand(name: str):
    """Slot 2 of two-slot pages is row 2 of the cache; a planar format has each part at slot * width of its plane."""
    row_format = kv.get(name)
    cache = row_format.allocate(4, page_size=2)
    row_format.store(cache, torch.tensor([2]), *worked_row(), Scales(latent=2.0, rope=4.0))
    planes = [plane[2] for plane in row_format.byte_planes(cache)]
    expected = padded(WORKED[name])
    assert len(expected) == row_format.row_bytes
    assert torch.cat(planes).numpy().tobytes() == expected
    if len(planes) == 1:
        assert cache.flatten().numpy().tobytes() == bytes(2 * len(expected)) + expected + bytes(len(expected))


def test_group_planes_lie_one_after_another_in_one_page():
    row_format = kv.get("fp8_group128")
    cache = row_format.allocate(3, page_size=64)
    assert cache.shape == (1, 3 * 592)
    row_format.store(cache, torch.tensor([1]), *worked_row(), Scales(latent=2.0, rope=4.0))
    latent, rope, scale = padded(POW2_CODES), padded([("24 b6 71", 64)]), padded([POW2_SCALES])
    expected = bytes(512) + latent + bytes(512) + bytes(64) + rope + bytes(64) + bytes(16) + scale + bytes(16)
    assert cache.flatten().numpy().tobytes() == expected
    planes = row_format.planes(cache)
    assert [tuple(plane.shape) for plane in planes] == [(3, 512), (3, 64), (3, 4)]
    assert planes.scale[1].tolist() == [1.0, 2**-8, 2**-7, 4.0]
    with pytest.raises(InputError, match="a cache of 2 pages: its planes need exactly one"):
        row_format.planes(torch.zeros(2, 592, dtype=torch.uint8))


def test_flashinfers_nvfp4_planes_lie_one_after_another_in_one_page():
    row_format = kv.get("nvfp4_flashinfer")
    cache = row_format.allocate(3, page_size=64)
    row_format.store(cache, torch.tensor([1]), *worked_row(), Scales(latent=2.0, rope=4.0))
    latent, scale, rope = (padded(NVFP4_FLASHINFER[part]) for part in (slice(4), slice(4, 8), slice(8, 9)))
    expected = bytes(256) + latent + bytes(256) + bytes(32) + scale + bytes(32) + bytes(64) + rope + bytes(64)
    assert cache.flatten().numpy().tobytes() == expected
    planes = row_format.planes(cache)
    assert [(tuple(plane.shape), plane.dtype) for plane in planes] == [
        ((3, 256), torch.uint8),
        ((3, 32), torch.float8_e4m3fn),
        ((3, 64), torch.float8_e4m3fn),
    ]
    assert planes.scale[1, ::8].float().tolist() == [36.0, 0.140625, 0.25, 80.0]


def test_nvfp4_ds_mla_scales_lie_in_transposed_order():
    """Groups 0, 1, 2, 3, 4 have theirs at bytes 0, 8, 16, 24, 1."""
    row_format = kv.get("nvfp4_ds_mla")
    cache = row_format.allocate(1)
    codes = torch.arange(0x20, 0x40, dtype=torch.uint8)  # e4m3 from 2^-3 on
    scale = codes.view(torch.float8_e4m3fn).float()
    row_format.store(
        cache, torch.tensor([0]), (6 * scale).repeat_interleave(16)[None], torch.zeros(1, 64), ONE
    )
    stored = row_format.planes(cache).rows[0, 0, 320:]
    assert [int(stored[8 * (s & 3) + (s >> 2)]) for s in range(32)] == codes.tolist()
    assert stored[:3].tolist() == [0x20, 0x24, 0x28]
    assert torch.equal(row_format.load(cache, torch.tensor([0]), ONE)[0][0, ::16], 6 * scale)


def test_nvfp4_stores_nan_as_its_writers_do():
    """As the group's largest value, or as zero: a number, in either."""
    latent = torch.ones(1, 512)
    latent[0, 3] = torch.nan
    assert round_trip("nvfp4_ds_mla", latent)[0, 3].item() == 6 * 0.171875  # a sixth, rounded to e4m3
    assert round_trip("nvfp4_flashinfer", latent)[0, 3].item() == 0


def test_an_outer_scale_lifts_a_quiet_layer_out_of_the_subnormal_scales():
    """Without one, a sixth of 0.002 lies below the smallest scale there is."""
    latent = torch.randn(64, 512, generator=torch.Generator().manual_seed(6))
    latent *= 0.002 / latent.abs().max()
    for name in ("nvfp4_ds_mla", "nvfp4_flashinfer"):
        calibrated = kv.get(name).calibrate(float(latent.abs().max()), 1.0)
        assert calibrated.latent == pytest.approx(0.002 / (6 * 448))
        errors = [float((round_trip(name, latent, s) - latent).norm()) for s in (ONE, calibrated)]
        assert errors[1] < errors[0] / 2
        assert errors[1] < 0.11 * float(latent.norm())
    assert kv.get("nvfp4_ds_mla").calibrate(0.0, 448.0).rope == 1
    assert kv.get("nvfp4_flashinfer").calibrate(1.0, 896.0).rope == 2
    assert kv.get("fp8_e4m3").calibrate(1.0, 896.0) == Scales(latent=2.0, rope=2.0)


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("fp32", (8, 576), torch.float32),
        ("bf16", (8, 576), torch.bfloat16),
        ("fp8_e4m3", (8, 576), torch.float8_e4m3fn),
        ("fp8_ds_mla", (2, 4, 656), torch.uint8),
        ("fp8_ds_mla_fp32scale", (2, 4, 656), torch.uint8),
        ("nvfp4_ds_mla", (2, 4, 352), torch.uint8),
    ],
)
def test_planes_are_what_the_kernels_take(name: str, shape: tuple[int, ...], dtype: torch.dtype):
    planes = kv.get(name).planes(kv.get(name).allocate(8, page_size=4))
    assert (tuple(planes.rows.shape), planes.rows.dtype) == (shape, dtype)


ONE = Scales()


def round_trip(
    name: str, latent: Tensor, scales: Scales = ONE, read_scale: kv.ReadScale = kv.identity
) -> Tensor:
    row_format = kv.get(name)
    slots = torch.arange(len(latent))
    cache = row_format.allocate(len(latent))
    row_format.store(cache, slots, latent, torch.zeros(len(latent), 64), scales)
    return row_format.load(cache, slots, scales, read_scale)[0]


def scales_in(name: str, latent: Tensor) -> Tensor:
    row_format = kv.get(name)
    cache = row_format.allocate(len(latent))
    row_format.store(cache, torch.arange(len(latent)), latent, torch.zeros(len(latent), 64), Scales())
    stored = row_format.planes(cache).rows.flatten(0, 1)[: len(latent), 512:528]
    return stored.contiguous().view(torch.float32)


def magnitudes() -> Tensor:
    generator = torch.Generator().manual_seed(8)
    return (torch.randn(64, 512, generator=generator) * torch.logspace(-6, 4, 64)[:, None]).bfloat16().float()


def test_fp32_is_exact_and_bf16_rounds_once():
    latent, rope = torch.randn(9, 576, generator=torch.Generator().manual_seed(4)).split([512, 64], -1)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        cache = kv.get(name).allocate(9)
        kv.get(name).store(cache, torch.arange(9), latent, rope, Scales(latent=3.0))
        got = kv.get(name).load(cache, torch.arange(9), Scales(latent=3.0))
        assert torch.equal(got[0], latent.to(dtype).float())
        assert torch.equal(got[1], rope.to(dtype).float())


def test_fp8_ds_mla_scales_are_powers_of_two_with_a_floor():
    latent = magnitudes()
    got = scales_in("fp8_ds_mla", latent)
    wanted = latent.unflatten(-1, (4, 128)).abs().amax(-1).double() / 448
    assert torch.equal(got.double(), wanted.clamp(min=1e-4).log2().ceil().exp2())
    assert got.min().item() == 2**-13


def test_the_older_rule_keeps_any_float32_scale():
    latent = magnitudes()
    latent[3] = 0
    got = scales_in("fp8_ds_mla_fp32scale", latent)
    amax = latent.unflatten(-1, (4, 128)).abs().amax(-1).numpy()
    expected = torch.from_numpy(amax / amax.dtype.type(448)).clamp(min=2.0**-126)
    assert torch.equal(got, expected)
    assert bool((got[3] == 2.0**-126).all())
    assert bool((got.frexp().mantissa != 0.5).any())


def test_formats_that_carry_scales_ignore_the_given_latent_scale():
    latent = magnitudes()
    for name in ("fp8_ds_mla", "fp8_ds_mla_fp32scale", "fp8_group128"):
        assert torch.equal(round_trip(name, latent, Scales(latent=8.0)), round_trip(name, latent))


def test_rope_is_bit_exact_in_fp8_ds_mla():
    rope = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    row_format = kv.get("fp8_ds_mla")
    cache = row_format.allocate(5)
    row_format.store(cache, torch.arange(5), torch.zeros(5, 512), rope, Scales(rope=100.0))
    assert torch.equal(row_format.load(cache, torch.arange(5), Scales())[1].bfloat16(), rope)


def test_a_per_tensor_scale_saturates_at_448_scales_and_loses_what_is_small():
    latent = torch.zeros(1, 512)
    latent[0, :5] = torch.tensor([1e6, -1e6, 897.0, 2.0**-8 * 2, 2.0**-11 * 2])
    got = round_trip("fp8_e4m3", latent, Scales(latent=2.0))[0, :5]
    assert got.tolist() == [896.0, -896.0, 896.0, 2.0**-7, 0.0]


def test_latent_and_rope_take_their_own_scales():
    row_format = kv.get("fp8_e4m3")
    cache = row_format.allocate(1)
    latent, rope = torch.full((1, 512), 1000.0), torch.full((1, 64), 1000.0)
    row_format.store(cache, torch.tensor([0]), latent, rope, Scales(latent=1.0, rope=4.0))
    got = row_format.load(cache, torch.tensor([0]), Scales(latent=1.0, rope=4.0))
    assert (got[0][0, 0].item(), got[1][0, 0].item()) == (448.0, 1024.0)


@pytest.mark.parametrize("name", ["fp8_ds_mla", "fp8_group128"])
def test_readers_that_round_scales_read_powers_of_two_exactly(name: str):
    latent = magnitudes()
    for reader in (kv.round_to_bf16, kv.truncate_to_e8m0):
        assert torch.equal(round_trip(name, latent, read_scale=reader), round_trip(name, latent))


def test_readers_that_round_scales_change_the_older_rule():
    """amax 1000: the scale 2.232 reads as 2.234 in bf16, and as 2 in e8m0."""
    latent = torch.full((1, 512), 1000.0)
    for reader, expected in (
        (kv.identity, 1000.0),
        (kv.round_to_bf16, 448 * 2.234375),
        (kv.truncate_to_e8m0, 896.0),
    ):
        got = round_trip("fp8_ds_mla_fp32scale", latent, read_scale=reader)[0, 0].item()
        assert got == pytest.approx(expected, rel=1e-6)


def test_readers_round_given_scales_too():
    latent = torch.full((1, 512), 300.0)
    got = round_trip("fp8_e4m3", latent, Scales(latent=1.003), kv.round_to_bf16)
    assert got[0, 0].item() == 288 * 1.0


@pytest.mark.parametrize(
    ("name", "percent"), [("fp8_ds_mla_fp32scale", 2.574), ("fp8_ds_mla", 2.666), ("fp8_e4m3", 2.650)]
)
def test_the_error_on_normal_values_is_the_published_one(name: str, percent: float):
    latent = torch.randn(8192, 512, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    scales = kv.calibrate(float(latent.abs().max()), 0.0)
    error = (round_trip(name, latent, scales) - latent).double()
    assert 100 * float(error.norm() / latent.double().norm()) == pytest.approx(percent, abs=0.02)
