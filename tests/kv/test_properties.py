"""What every writer and reader keeps, whatever finite numbers it is given."""

import pytest
import torch
from torch import Tensor

from evalkit import kv
from evalkit.kv import Scales
from evalkit.kv.base import RowFormat

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis makes the numbers: pip install -e .[dev]")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

SMALLEST_TILE = 16
numbers = st.floats(-3.0000000054977558e38, 3.0000000054977558e38, width=32) | st.sampled_from(
    [0.0, -0.0, 448.0, -448.0, 464.0, 1e-4, 2**-9, 2**-10, 2**-6, 6.0, 5.0, 2.5, 0.25]
)
scale_values = st.floats(2**-10, 2**10, width=32)


@st.composite
def rows(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Three tokens of random numbers of one magnitude each, some elements drawn: latent [3, 512], rope [3, 64]."""
    noise = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    size = torch.tensor([[draw(st.floats(-4, 30))] for _ in range(3)])
    values = torch.randn(3, 576, generator=noise) * 10**size
    for place, number in draw(st.dictionaries(st.integers(0, 3 * 576 - 1), numbers, max_size=12)).items():
        values.view(-1)[place] = number
    return values.split_with_sizes([512, 64], -1)


def loaded(row_format: RowFormat, row: tuple[Tensor, Tensor], scales: Scales) -> tuple[Tensor, Tensor]:
    cache = row_format.allocate(3)
    row_format.store(cache, torch.arange(3), *row, scales)
    return row_format.load(cache, torch.arange(3), scales)


@pytest.mark.parametrize("name", kv.names())
@settings(max_examples=30, deadline=None, derandomize=True)
@given(row=rows(), latent=scale_values, rope=scale_values)
def test_finite_numbers_keep_their_order_zero_and_value(
    name: str, row: tuple[Tensor, Tensor], latent: float, rope: float
):
    """No NaN; zero is zero; within a tile no larger number reads back smaller; a second round trip changes nothing."""
    row_format, scales = kv.get(name), Scales(latent=latent, rope=rope)
    once = loaded(row_format, row, scales)
    for got, ref in zip(once, row, strict=True):
        assert not bool(got.isnan().any())
        assert bool((got[ref == 0] == 0).all())
        order = ref.abs().unflatten(-1, (-1, SMALLEST_TILE)).argsort(-1)
        assert bool((got.abs().unflatten(-1, (-1, SMALLEST_TILE)).gather(-1, order).diff(dim=-1) >= 0).all())
    if not row_format.four_bit:  # the contract test measures the share of those that change
        for got, ref in zip(loaded(row_format, once, scales), once, strict=True):
            torch.testing.assert_close(got, ref, rtol=2**-22, atol=0)
