"""The e4m3 encoding against a table of its 256 codes, built from the definition."""

import numpy as np
import torch

from evalkit.kv.numerics.e4m3 import divide, power_of_two_scale, tile_amax, to_e4m3
from tests.kv.codes import E4M3, encode


def test_every_code_ties_and_neighbours_encode_as_the_table_says():
    table = E4M3.astype(np.float32)
    ties = (table[1:] + table[:-1]) / 2
    exact = np.concatenate([table, ties])
    values = np.concatenate(
        [exact, np.nextafter(exact, np.float32(1e9)), np.nextafter(exact, np.float32(-1e9))]
    )
    values = np.concatenate([values, -values, np.float32([449, 464, 465, 1e4, 3e38, np.inf, 1e-30])])
    got = to_e4m3(torch.from_numpy(values)).view(torch.uint8).numpy()
    np.testing.assert_array_equal(got, encode(values, E4M3))


def test_random_values_encode_as_the_table_says():
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(20_000, generator=generator) * torch.logspace(-4, 4, 20_000)
    got = to_e4m3(values).view(torch.uint8).numpy()
    np.testing.assert_array_equal(got, encode(values.numpy(), E4M3))


def test_codes_decode_as_the_table_says():
    codes = torch.arange(0x7F, dtype=torch.uint8)
    np.testing.assert_array_equal(codes.view(torch.float8_e4m3fn).float().numpy(), E4M3)


def test_nan_of_either_sign_is_one_code():
    """As `cvt.rn.satfinite.e4m3x2` has it; torch keeps the sign, and inf / inf has one on x86 only."""
    values = torch.tensor([torch.nan, -torch.nan, torch.inf])
    assert to_e4m3(torch.cat([values, values[2:] / -values[2:]])).view(torch.uint8).tolist() == [
        0x7F,
        0x7F,
        0x7E,
        0x7F,
    ]


def test_division_is_rounded_once():
    """A multiplication by the reciprocal rounds twice: 49 * fl(1/49) is not 1."""
    values = torch.arange(1, 2000, dtype=torch.float32)
    for by in (448.0, 0.013, 49.0):
        np.testing.assert_array_equal(divide(values, by).numpy(), values.numpy() / np.float32(by))


def test_the_scale_is_the_smallest_power_of_two_that_does_not_saturate():
    amax = torch.tensor([448.0, 449.0, 447.0, 7.0, 7.03125, 3.5, 0.5, 1e-30, 0.0, 3e38, 2.0**-7 * 7])
    tiles = torch.zeros(len(amax), 128)
    tiles[:, 77] = -amax
    expected = [1.0, 2.0, 1.0, 2**-6, 2**-5, 2**-7, 2**-9, 2**-13, 2**-13, 2.0**120, 2**-13]
    assert power_of_two_scale(tiles).tolist() == expected


def test_the_power_of_two_matches_the_logarithm():
    amax = (torch.rand(5000, generator=torch.Generator().manual_seed(3)) * 40 - 20).exp2().bfloat16()
    wanted = (amax.double() / 448).clamp(min=1e-4)
    np.testing.assert_array_equal(
        power_of_two_scale(amax.float()[:, None].expand(-1, 128)).double().numpy(),
        wanted.log2().ceil().exp2().numpy(),
    )


def test_the_tile_maximum_passes_over_nan_and_sees_infinity():
    tiles = torch.tensor([[1.0, -3.0, torch.nan], [torch.nan] * 3, [1.0, -torch.inf, 2.0]])
    assert tile_amax(tiles).tolist() == [3.0, 0.0, torch.inf]
