"""Ranges: shares worked out by hand at e4m3's own edges."""

from __future__ import annotations

import pytest
import torch

from evalkit.compare.figures.ranges import RangeAccumulator


def test_shares_at_the_edges_of_e4m3():
    values = torch.tensor(
        [0.0, 448.0, -449.0, 2.0**-6, -(2.0**-7), 2.0**-9, 2.0**-10, -(2.0**-12), 1.0, 100.0]
    )
    ranges = RangeAccumulator(scale=1.0)
    ranges.add(values)
    found = ranges.result()
    assert found.max_abs == 449.0
    assert found.n == 10
    assert found.saturated_share == pytest.approx(0.1)
    assert found.subnormal_share == pytest.approx(0.2)
    assert found.zero_share == pytest.approx(0.2), "a zero that was zero before is not lost"
    assert found.headroom == pytest.approx(448 / 449)


def test_the_shares_agree_with_what_torch_stores():
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 2.0**-8
    stored = values.to(torch.float8_e4m3fn).float()
    ranges = RangeAccumulator(scale=1.0)
    ranges.add(values)
    assert ranges.result().zero_share == float(((stored == 0) & (values != 0)).double().mean())


def test_a_scale_moves_the_range_and_chunks_add_up():
    ranges = RangeAccumulator(scale=4.0)
    for chunk in (torch.tensor([[1000.0]]), torch.tensor([2000.0, 0.05])):
        ranges.add(chunk)
    found = ranges.result()
    assert found.n == 3
    assert found.saturated_share == pytest.approx(1 / 3)
    assert found.subnormal_share == pytest.approx(1 / 3)
    assert found.headroom == pytest.approx(448 * 4 / 2000)


def test_a_scale_calibrated_on_the_same_values_saturates_none():
    """max|x| / (max|x| / 448) is an ulp above 448 for some of these."""
    for largest in torch.linspace(0.01, 40, 500).bfloat16().float().tolist():
        for scale in (largest / 448, float(torch.tensor(largest) / 448)):
            ranges = RangeAccumulator(scale)
            ranges.add(torch.tensor([largest, -largest, 0.0]))
            assert ranges.result().saturated_share == 0, (largest, scale)


def test_zeros_have_no_headroom():
    ranges = RangeAccumulator(scale=1.0)
    ranges.add(torch.zeros(5))
    assert ranges.result().headroom is None


def test_nothing_and_nan_raise():
    with pytest.raises(ValueError, match="no range"):
        RangeAccumulator(scale=1.0).result()
    with pytest.raises(ValueError, match="no value"):
        RangeAccumulator(scale=1.0).add(torch.zeros(0))
    with pytest.raises(ValueError, match="finite"):
        RangeAccumulator(scale=1.0).add(torch.tensor([1.0, torch.nan]))
    with pytest.raises(ValueError, match="scale"):
        RangeAccumulator(scale=0.0)
