"""What every writer and reader keeps, whatever finite numbers it is given."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from evalkit import kv
from evalkit.attention.backends.readers import READERS
from evalkit.kv import RowFormat, Scales, index
from evalkit.kv.index import IndexFormat
from evalkit.kv.numerics.e2m1 import GROUP
from evalkit.kv.numerics.e4m3 import TILE

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis makes the numbers: pip install -e .[dev]")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

Row = tuple[Tensor, Tensor]
# Stored again, what a reader with rounded scales read has the same codes, but where a row carries its scale, another
# one: up to a bf16 step, 2^-7, away, and each product is rounded to bf16 too.
SAME = {"exact": 2**-22, "sm90_bf16": 2**-6, "sm100_e8m0": 2**-22}
numbers = st.floats(-3.0000000054977558e38, 3.0000000054977558e38, width=32) | st.sampled_from(
    [0.0, -0.0, 448.0, -448.0, 464.0, 1e-4, 2**-9, 2**-10, 2**-6, 6.0, 5.0, 2.5, 0.25]
)
scale_values = st.floats(2**-10, 2**10, width=32)


@st.composite
def rows(draw: st.DrawFn) -> Row:
    """Three tokens of random numbers of one magnitude each, some tiles zero, some elements drawn.

    latent [3, 512], rope [3, 64].
    """
    noise = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    size = torch.tensor([[draw(st.floats(-4, 30))] for _ in range(3)])
    values = torch.randn(3, 576, generator=noise) * 10**size
    for tile in draw(st.sets(st.integers(0, 3 * 576 // 64 - 1), max_size=9)):
        values.view(-1, 64)[tile : tile + 2] = 0
    for place, number in draw(st.dictionaries(st.integers(0, 3 * 576 - 1), numbers, max_size=12)).items():
        values.view(-1)[place] = number
    return values.split_with_sizes([512, 64], -1)


def read_back(row_format: RowFormat, reader: str, row: Row, scales: Scales) -> Row:
    slots = torch.arange(len(row[0]))
    cache = row_format.allocate(len(slots))
    row_format.store(cache, slots, *row, scales)
    return READERS[reader].read(row_format, cache, slots, scales)


def keeps_zero_and_order(got: Tensor, ref: Tensor, tile: int) -> None:
    """No NaN; zero is zero; in a tile, which has one scale, no number larger in size reads back smaller in size."""
    assert not bool(got.isnan().any())
    assert bool((got[ref == 0] == 0).all())
    size, order = (part.abs().unflatten(-1, (-1, tile)) for part in (got, ref))
    ranked = size.gather(-1, order.argsort(-1))
    assert bool((ranked[..., 1:] >= ranked[..., :-1]).all())


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", kv.names())
@settings(max_examples=25, deadline=None, derandomize=True)
@given(row=rows(), latent=scale_values, rope=scale_values)
def test_finite_numbers_keep_their_order_zero_and_value(
    name: str, reader: str, row: Row, latent: float, rope: float
):
    """And another round trip changes nothing, but for a latent of four bits."""
    row_format, scales = kv.get(name), Scales(latent=latent, rope=rope)
    once = read_back(row_format, reader, row, scales)
    keeps_zero_and_order(once[0], row[0], GROUP if row_format.four_bit else TILE)
    keeps_zero_and_order(once[1], row[1], 64)
    if (
        reader == "sm100_e8m0"
    ):  # which reads with another scale than it is written with, unless it is a power of two
        powers = {
            part: 2.0 ** math.floor(math.log2(value)) for part, value in (("latent", latent), ("rope", rope))
        }
        scales = replace(scales, **powers)
        once = read_back(row_format, reader, row, scales)
    twice = read_back(row_format, reader, once, scales)
    for got, ref in list(zip(twice, once, strict=True))[row_format.four_bit :]:
        torch.testing.assert_close(got, ref, rtol=SAME[reader], atol=0)


@pytest.mark.parametrize("key_format", list(map(index.get, index.names())), ids=index.names())
@settings(max_examples=30, deadline=None, derandomize=True)
@given(row=rows())
def test_finite_keys_keep_their_order_zero_and_value(key_format: IndexFormat, row: Row):
    """Every indexer reads its keys' float32 scales as they are; fp16's largest become infinite."""
    keys = row[0].unflatten(1, (4, 128)).flatten(0, 1)
    slots = torch.arange(len(keys))

    def read_again(values: Tensor) -> Tensor:
        cache = key_format.allocate(len(values))
        key_format.store(cache, slots, values)
        return key_format.load(cache, slots)

    once = read_again(keys)
    keeps_zero_and_order(once, keys, 128)
    torch.testing.assert_close(read_again(once), once, rtol=SAME["exact"], atol=0)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", [name for name in kv.names() if kv.get(name).four_bit])
def test_one_latent_of_four_bits_in_a_thousand_changes_in_another_round_trip(name: str, reader: str):
    """One in a group whose largest value was lowered, and whose scale is another for that."""
    values = torch.randn(512, 576, generator=torch.Generator().manual_seed(41))
    row = (values * torch.logspace(-3, 3, 512)[:, None]).split_with_sizes([512, 64], -1)
    row_format, scales = kv.get(name), Scales(latent=0.125, rope=8.0)
    once, _ = read_back(row_format, reader, row, scales)
    twice, _ = read_back(row_format, reader, (once, row[1]), scales)
    assert 0.0008 < float((twice != once).float().mean()) < 0.0012
