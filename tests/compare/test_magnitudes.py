"""Percentiles of |x| against sorting."""

from __future__ import annotations

import math

import pytest
import torch

from evalkit.compare.figures.magnitudes import Magnitudes
from evalkit.errors import InputError


@pytest.mark.parametrize("percent", [1e-9, 50, 99, 99.9, 99.99, 100])
def test_a_percentile_is_the_order_statistic_of_all_values_added(percent: float) -> None:
    draw = torch.Generator().manual_seed(2)
    parts = [torch.randn(37, 64, generator=draw).mul(size).bfloat16() for size in (1e-30, 1e-3, 1.0, 3e37)]
    sizes = Magnitudes()
    for part in parts:
        sizes.add(part.float())
    values = torch.cat([part.float().abs().flatten() for part in parts]).sort().values
    assert sizes.percentile(percent) == float(values[max(1, math.ceil(len(values) * percent / 100)) - 1])


def test_a_hundred_percent_is_the_maximum_and_zero_is_a_value() -> None:
    sizes = Magnitudes()
    sizes.add(torch.tensor([0.0, -0.0, -3.5, 2.0]))
    assert (sizes.percentile(100), sizes.percentile(75), sizes.percentile(50)) == (3.5, 2.0, 0.0)


@pytest.mark.parametrize("broken", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_counted_and_refused_at_any_percentile(broken: float) -> None:
    sizes = Magnitudes()
    sizes.add(torch.tensor([broken, 1.0, 2.0, 3.0]))
    with pytest.raises(InputError, match="1 of 4 values are not finite"):
        sizes.percentile(10)


@pytest.mark.parametrize("percent", [0.0, -1.0, 100.1, math.nan])
def test_a_percentile_lies_above_zero_and_at_most_at_a_hundred(percent: float) -> None:
    sizes = Magnitudes()
    sizes.add(torch.ones(3))
    with pytest.raises(InputError, match="above 0 and at most 100"):
        sizes.percentile(percent)


def test_nothing_counted_has_no_percentile() -> None:
    with pytest.raises(InputError, match="no values were counted"):
        Magnitudes().percentile(100)
