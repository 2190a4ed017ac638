import pytest

from evalkit.stats.intervals import wilson


def test_wilson_gives_the_published_interval():
    """Newcombe (1998), table I: 81 of 263 and 0 of 20, score method without correction."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_one_observation_has_no_interval():
    assert wilson(1, 1) is None
    assert wilson(0, 0) is None


@pytest.mark.parametrize(("successes", "n", "alpha"), [(3, 2, 0.05), (-1, 2, 0.05), (1, 2, 0.0), (1, 2, 1.0)])
def test_impossible_counts_are_refused(successes, n, alpha):
    with pytest.raises(ValueError, match="want"):
        wilson(successes, n, alpha)
