"""Errors by position: bins and slopes worked out by hand, a step found exactly at top-k."""

from __future__ import annotations

import numpy as np
import pytest

from evalkit.compare.figures.positions import figures

PLACES = np.arange(320)


def test_bins_are_equal_and_hold_their_means():
    found = figures([(np.arange(40), np.arange(40.0))], None)
    assert found.starts == list(range(0, 40, 3))
    assert found.counts == [3] * 13 + [1]
    assert found.means[0] == 1.0
    assert found.means[-1] == 39.0
    assert found.cliff is None


def test_the_slope_is_that_of_the_line_and_its_interval_says_by_what():
    line = 0.02 + PLACES / 1000 * 0.5
    one = figures([(PLACES, line)], None)
    assert one.slope_per_1000_tokens == pytest.approx(0.5)
    assert one.slope_lower == pytest.approx(0.5)
    assert one.slope_method == "block bootstrap, 16 blocks of 20 tokens"
    noise = np.random.default_rng(0)
    many = figures([(PLACES, line + noise.normal(0, 0.01, 320)) for _ in range(6)], None)
    assert many.slope_method == "by document, t, 6 documents"
    assert many.slope_lower < 0.5 < many.slope_upper
    few = figures([(np.arange(5), np.arange(5.0))], None)
    assert few.slope_per_1000_tokens is None
    assert "fewer than 16" in few.slope_method


def test_a_level_error_has_a_slope_whose_interval_holds_zero():
    held = 0
    for seed in range(60):
        noise = np.random.default_rng(seed).normal(0.02, 0.005, 320)
        found = figures([(PLACES, noise)], None)
        held += found.slope_lower <= 0 <= found.slope_upper
    assert held / 60 > 0.85


def test_a_cliff_is_flagged_exactly_at_topk():
    error = np.where(PLACES < 128, 0.02, 0.05) + np.random.default_rng(0).normal(0, 0.002, 320)
    found = figures([(PLACES, error)], 128)
    assert found.cliff is True
    assert found.below_topk_mean == pytest.approx(0.02, rel=0.05)
    assert found.above_topk_mean == pytest.approx(0.05, rel=0.05)
    assert figures([(PLACES, error)], 192).cliff is False
    level = np.full(320, 0.02)
    assert figures([(PLACES, level)], 128).cliff is False
    assert figures([(PLACES, level)], 400).cliff is None, "the text does not reach top-k"


def test_a_slope_through_topk_is_no_cliff():
    assert figures([(PLACES, 0.02 + PLACES * 2e-5)], 128).cliff is False


def test_from_nothing_to_something_is_a_cliff():
    """Indexer keys in fp8 leave every token alone that selects all it sees."""
    found = figures([(PLACES, np.where(PLACES < 128, 0.0, 0.01))], 128)
    assert (found.below_topk_mean, found.cliff) == (0.0, True)


def test_what_is_not_finite_is_counted_and_left_out():
    error = np.full(320, 0.02)
    error[7] = np.nan
    found = figures([(PLACES, error)], 128)
    assert (found.nonfinite, found.n) == (1, 319)
    assert found.means[0] == pytest.approx(0.02)
    with pytest.raises(ValueError, match="no token"):
        figures([], 128)
