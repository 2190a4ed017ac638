"""The e2m1 encoding against a table of its codes."""

import numpy as np
import torch

from evalkit.kv.numerics.e2m1 import from_e2m1, pack, to_e2m1, unpack
from tests.kv.codes import E2M1, encode


def test_every_code_ties_and_neighbours_encode_as_the_table_says():
    table = E2M1.astype(np.float32)
    exact = np.concatenate([table, (table[1:] + table[:-1]) / 2])
    near = [np.nextafter(exact, np.float32(limit)) for limit in (1e9, -1e9)]
    values = np.concatenate([exact, *near, np.float32([6.5, 7, 1e4, 3e38, np.inf, 1e-30])])
    values = np.concatenate([values, -values])
    got = to_e2m1(torch.from_numpy(values)).numpy()
    np.testing.assert_array_equal(got, encode(values, E2M1))


def test_random_values_encode_as_the_table_says():
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(2)) * torch.logspace(-2, 1, 20_000)
    np.testing.assert_array_equal(to_e2m1(values).numpy(), encode(values.numpy(), E2M1))


def test_codes_decode_as_the_table_says():
    codes = torch.arange(16, dtype=torch.uint8)
    np.testing.assert_array_equal(from_e2m1(codes).numpy(), np.concatenate([E2M1, -E2M1]))
    assert bool(from_e2m1(codes)[8].signbit())


def test_nan_encodes_as_the_largest_number():
    assert to_e2m1(torch.tensor([torch.nan, -torch.nan])).tolist() == [7, 7]


def test_the_even_element_is_the_low_nibble():
    codes = torch.tensor([[1, 2, 3, 15]], dtype=torch.uint8)
    assert pack(codes).tolist() == [[0x21, 0xF3]]
    assert torch.equal(unpack(pack(codes)), codes)
