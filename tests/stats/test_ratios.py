import numpy as np
import pytest

from evalkit.stats.ratios import block_size, by_units, ratio


def test_a_ratio_is_of_sums_and_its_root_of_sums_of_squares():
    assert ratio([1.0, 5.0], [1.0, 1.0]).value == 3.0
    assert ratio([1.0, 17.0], [1.0, 1.0], root=True).value == 3.0


def test_a_common_factor_on_every_unit_leaves_no_width():
    """What makes a unit hard for both cancels: the pairing is the point."""
    hard = np.random.default_rng(0).lognormal(0, 2, 50)
    found = ratio(2 * hard, hard)
    assert (found.lower, found.value, found.upper) == pytest.approx((2.0, 2.0, 2.0))


def test_few_units_or_no_error_have_no_interval_and_a_zero_reference_no_ratio():
    assert ratio([1.0] * 7, [1.0] * 7).lower is None
    assert "7 units of 8" in ratio([1.0] * 7, [1.0] * 7).method
    assert ratio([1.0, 2.0] * 4, [1.0, 3.0] * 4).lower is not None
    zero = ratio([0.0] * 9, [1.0] * 9)
    assert (zero.value, zero.lower) == (0.0, None)
    assert ratio([1.0] * 9, [0.0] * 9) is None


def test_the_interval_holds_the_true_ratio_about_as_often_as_it_says():
    rng, held = np.random.default_rng(3), 0
    for _ in range(400):
        hard = rng.lognormal(0, 0.7, 30)
        found = ratio(1.5 * hard * rng.lognormal(-0.02, 0.2, 30), hard * rng.lognormal(-0.02, 0.2, 30))
        held += found.lower <= 1.5 <= found.upper
    assert 0.91 <= held / 400 <= 0.985


def test_units_are_documents_from_ten_on_and_blocks_below():
    rng = np.random.default_rng(1)
    documents = [rng.random(64) for _ in range(10)]
    assert by_units(documents, documents).method == "linearised, paired, 10 documents"
    assert by_units(documents[:9], documents[:9]).method == "linearised, paired, 144 blocks of 4 tokens"
    assert block_size(5) == 1
    assert block_size(1_000_000) == 64


def test_a_token_that_is_not_finite_on_one_side_counts_on_neither():
    got, ref = np.ones(32), np.ones(32)
    got[3] = np.nan
    ref[3] = 1000.0
    assert by_units([got], [ref]).value == 1.0
    assert by_units([np.full(3, np.nan)], [np.ones(3)]) is None


def test_negative_values_and_other_lengths_raise():
    with pytest.raises(ValueError, match="at least 0"):
        ratio([-1.0], [1.0])
    with pytest.raises(ValueError, match="paired"):
        ratio([1.0, 2.0], [1.0])
