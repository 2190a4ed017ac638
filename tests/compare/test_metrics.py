"""Metrics: values worked out by hand, chunks, values that are not finite, references of zero."""

from __future__ import annotations

import math

import pytest
import torch

from evalkit.compare.figures import sums
from evalkit.compare.figures.metrics import Accumulator, compare, relative_l2


def test_figures_match_values_worked_out_by_hand():
    """ref (3, 4), got (3, 1): error (0, -3); norms 5, sqrt(10), 3; dot 13."""
    found = compare(torch.tensor([[3.0, 1.0]]), torch.tensor([[3.0, 4.0]]))
    assert found.cosine == pytest.approx(13 / math.sqrt(250))
    assert found.relative_l2 == pytest.approx(0.6)
    assert found.symmetric_distance == pytest.approx(1 - 26 / 35)
    assert (found.max_abs_error, found.max_abs_token) == (3.0, 0)
    assert (found.max_abs_got, found.max_abs_ref) == (1.0, 4.0)
    assert found.sqnr_db == pytest.approx(10 * math.log10(25 / 9))
    assert (found.abs_p50, found.abs_p999) == (0.0, pytest.approx(3.0, rel=0.032))
    assert (found.n, found.tokens, found.nonfinite) == (2, 1, 0)


def test_identical_tensors_have_no_error_and_no_sqnr():
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(1))
    found = compare(x, x.clone())
    assert found.cosine == 1.0
    assert found.relative_l2 == found.symmetric_distance == found.max_abs_error == found.abs_p999 == 0.0
    assert found.sqnr_db is None


def test_a_wrong_scale_keeps_its_cosine_and_is_seen_by_the_others():
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(2))
    found = compare(2 * x, x)
    assert found.cosine == pytest.approx(1.0)
    assert found.relative_l2 == pytest.approx(1.0)
    assert found.symmetric_distance == pytest.approx(0.2)


def test_chunks_add_up_to_the_whole():
    generator = torch.Generator().manual_seed(3)
    ref = torch.randn(1000, 3, 100, generator=generator) * torch.logspace(-4, 3, 1000)[:, None, None]
    got = ref * (1 + 1e-2 * torch.randn(ref.shape, generator=generator))
    whole, parts = compare(got, ref), Accumulator()
    for start in range(0, 1000, 37):
        parts.add(got[start : start + 37], ref[start : start + 37])
    summed = parts.result()
    for name in (
        "max_abs_token",
        "max_abs_got",
        "abs_p50",
        "abs_p99",
        "abs_p999",
        "n",
        "tokens",
    ):
        assert getattr(summed, name) == getattr(whole, name), name
    for name in ("cosine", "relative_l2", "symmetric_distance", "sqnr_db", "token_relative_l2_mean"):
        assert getattr(summed, name) == pytest.approx(getattr(whole, name), rel=1e-12), name


def test_percentiles_are_within_the_stated_resolution():
    error = torch.logspace(-12, 3, 10_001)
    found = compare(error[:, None], torch.zeros(10_001, 1))
    for name, share in (("abs_p50", 0.5), ("abs_p99", 0.99), ("abs_p999", 0.999)):
        exact = float(torch.quantile(error.double(), share, interpolation="higher"))
        assert getattr(found, name) == pytest.approx(exact, rel=0.032), name


def test_the_mean_over_tokens_weighs_a_small_token_like_a_large_one():
    ref = torch.tensor([[1000.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    got = torch.tensor([[1000.0, 0.0], [0.5, 0.0], [0.0, 0.0]])
    found = compare(got, ref)
    assert found.token_relative_l2_mean == pytest.approx(0.25), "the all-zero token has no relative error"
    assert found.relative_l2 == pytest.approx(0.5e-3)


def test_a_reference_of_zeros_is_never_perfect():
    found = compare(torch.ones(2, 2), torch.zeros(2, 2))
    assert found.cosine is None
    assert found.relative_l2 is None
    assert found.sqnr_db is None
    assert found.symmetric_distance == 1.0
    assert found.max_abs_error == 1.0
    both = compare(torch.zeros(2, 2), torch.zeros(2, 2))
    assert both.cosine is None
    assert both.relative_l2 is None
    assert both.symmetric_distance is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_counted_and_left_out(bad: float):
    ref = torch.tensor([[3.0, 4.0, 7.0], [1.0, 2.0, 3.0]])
    got = torch.tensor([[3.0, 1.0, bad], [1.0, 2.0, 3.0]])
    found = compare(got, ref)
    assert found.nonfinite == 1
    assert found.n == 5
    assert found.tokens == 2
    assert found.max_abs_error == 3.0
    assert found.relative_l2 == pytest.approx(3 / math.sqrt(25 + 14))


def test_nothing_but_nan_gives_no_figure_at_all():
    found = compare(torch.full((2, 2), math.nan), torch.ones(2, 2))
    assert found.nonfinite == 4
    assert found.n == 0
    assert found.cosine is None
    assert found.relative_l2 is None
    assert found.abs_p50 is None


def test_a_mask_takes_values_out_of_every_figure():
    ref = torch.tensor([[1.0, -math.inf], [1.0, 2.0]])
    got = torch.tensor([[2.0, 5.0], [1.0, 2.0]])
    accumulator = Accumulator()
    accumulator.add(got, ref, where=torch.isfinite(ref))
    found = accumulator.result()
    assert found.n == 3
    assert found.max_abs_error == 1.0
    assert found.relative_l2 == pytest.approx(1 / math.sqrt(6))
    assert found.abs_p50 == 0.0
    assert found.abs_p99 == pytest.approx(1.0, rel=0.032)


def test_measuring_nothing_raises():
    with pytest.raises(ValueError, match="nothing"):
        compare(torch.zeros(0, 4), torch.zeros(0, 4))
    with pytest.raises(ValueError, match="nothing"):
        Accumulator().result()


def test_shapes_that_differ_raise():
    with pytest.raises(ValueError, match=r"\[2, 3\].*\[2, 4\]"):
        relative_l2(torch.zeros(2, 3), torch.zeros(2, 4))


def test_a_reference_that_is_not_finite_raises_and_says_where():
    ref = torch.ones(3, 4)
    ref[2, 1] = math.nan
    with pytest.raises(ValueError, match="token 2, position 1"):
        compare(torch.ones(3, 4), ref)


def test_bf16_and_huge_values_are_summed_without_overflow():
    found = compare(torch.full((4, 4), 3e38).bfloat16(), torch.full((4, 4), 1.5e38).bfloat16())
    assert found.relative_l2 == pytest.approx(1.0, rel=0.02)
    assert found.cosine == pytest.approx(1.0)


def test_an_error_beyond_float32_still_has_a_finite_percentile():
    found = compare(torch.full((2, 2), 3e38), torch.full((2, 2), -3e38))
    assert found.abs_p50 == pytest.approx(6e38, rel=1e-6)


def test_one_number_a_token_is_a_tensor_too():
    found = compare(torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.ones(4))
    assert found.token_relative_l2_mean == 0.25
    assert found.tokens == 4


def test_percentiles_of_long_tokens_come_from_blocks_that_every_column_has_a_turn_in():
    """Columns differ a thousandfold, so that the same columns of every token would miss the percentiles."""
    draw = torch.Generator().manual_seed(12)
    ref = torch.zeros(64, 16_384)
    got = torch.randn(64, 16_384, generator=draw) * torch.logspace(-2, 1, 16_384)
    whole, parts = compare(got, ref), Accumulator()
    for start in range(0, 64, 5):
        parts.add(got[start : start + 5], ref[start : start + 5])
    assert sums.period(16_384) == 4
    assert int(parts.histogram.sum()) == 64 * 16_384 // 4
    true = got.abs().flatten().quantile(torch.tensor([0.5, 0.99, 0.999]))
    for name, want in zip(("abs_p50", "abs_p99", "abs_p999"), true, strict=True):
        assert getattr(whole, name) == pytest.approx(float(want), rel=0.045), name
        assert getattr(parts.result(), name) == getattr(whole, name)
    assert whole.n == got.numel()
    assert whole.max_abs_error == float(got.abs().max())


def test_a_part_of_which_a_mask_leaves_nothing_has_no_largest_error(monkeypatch: pytest.MonkeyPatch):
    """What is compared of the second part is not finite, and nothing of the first is compared."""
    monkeypatch.setattr(sums, "CHUNK_CPU", 4)
    got = torch.tensor([[1.0, 2.0, 3.0, 4.0], [math.nan] * 4])
    accumulator = Accumulator()
    accumulator.add(got, torch.ones(2, 4), where=torch.tensor([[False], [True]]).expand(2, 4))
    found = accumulator.result()
    assert (found.nonfinite, found.n, found.tokens) == (4, 0, 2)
    assert found.max_abs_error is None
    assert found.max_abs_token is None


@pytest.mark.parametrize("chunk", [4, 8, 64])
def test_a_token_that_is_not_finite_has_no_norm_however_tokens_are_cut_into_parts(
    chunk: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sums, "CHUNK_CPU", chunk)
    ref = torch.arange(1.0, 25.0).view(6, 4)
    got = ref + 0.5
    got[1] = math.nan  # all of it
    got[4, 2] = math.inf
    accumulator = Accumulator(keep_rows=True)
    accumulator.add(got, ref)
    norms = accumulator.take_rows()
    assert norms.shape == (6, 2)
    assert norms.isnan().all(1).tolist() == [False, True, False, False, True, False]
    assert norms[[0, 2, 3, 5], 0].tolist() == [1.0] * 4
    assert accumulator.result().nonfinite == 5
