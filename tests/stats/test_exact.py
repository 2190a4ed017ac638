import itertools
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from statsmodels.stats.contingency_tables import mcnemar

from evalkit.errors import InputError
from evalkit.stats.exact import (
    NONINFERIOR,
    WORSE,
    bounds,
    critical_value,
    p_value,
    rejection_edge,
    rejects,
    size,
)
from evalkit.stats.paired import tango_interval
from evalkit.stats.score import tango_z

TAILS = [NONINFERIOR, WORSE]


@pytest.mark.parametrize(("lost", "gained", "n"), [(1, 7, 21), (12, 3, 400), (5, 6, 11), (90, 40, 1000)])
def test_at_margin_zero_the_squared_score_is_statsmodels_mcnemar(lost, gained, n):
    table = [[n - lost - gained, lost], [gained, 0]]
    expected = mcnemar(table, exact=False, correction=False).statistic
    assert tango_z(lost, gained, n, 0.0) ** 2 == pytest.approx(expected, abs=1e-9)


def test_the_score_takes_arrays_as_it_takes_numbers():
    lost, gained = np.array([0, 3, 9]), np.array([2, 3, 0])
    one_by_one = [tango_z(int(a), int(b), 40, 0.05) for a, b in zip(lost, gained, strict=True)]
    assert tango_z(lost, gained, 40, 0.05).tolist() == one_by_one


@pytest.mark.parametrize("critical", [0.5, 1.6448536, 2.3])
@pytest.mark.parametrize("margin", [0.02, 0.15])
def test_the_edge_is_the_last_number_of_losses_that_the_score_rejects(margin, critical):
    n = 120
    below, above = (rejection_edge(n, margin, critical, tail) for tail in TAILS)
    for m in range(n + 1):
        z = [tango_z(lost, m - lost, n, margin) for lost in range(m + 1)]
        assert below[m] == sum(value <= -critical for value in z) - 1
        assert above[m] == m + 1 - sum(value >= critical for value in z)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(("n", "discordance", "loss"), [(12, 0.3, 0.1), (15, 0.5, -0.2), (9, 1.0, 0.4)])
def test_a_rejection_probability_is_the_trinomial_sum(n, discordance, loss, tail):
    """Over every (lost, gained), without the binomials that make it O(n)."""
    edge = rejection_edge(n, 0.15, 1.2, tail)
    p, q = (discordance + loss) / 2, (discordance - loss) / 2
    total = 0.0
    for lost, gained in itertools.product(range(n + 1), repeat=2):
        if lost + gained <= n:
            z = tango_z(lost, gained, n, 0.15)
            if z <= -1.2 if tail == NONINFERIOR else z >= 1.2:
                ways = comb(n, lost) * comb(n - lost, gained)
                total += ways * p**lost * q**gained * max(0.0, 1 - p - q) ** (n - lost - gained)
    assert rejects(n, discordance, loss, edge, tail) == pytest.approx(total, abs=1e-9)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("margin", [0.01, 0.02, 0.1])
@pytest.mark.parametrize("n", [50, 137, 250])
def test_the_size_is_held_at_every_discordance_and_not_only_on_the_search_grid(n, margin, tail):
    critical = critical_value(n, margin, 0.05, tail)
    edge = rejection_edge(n, margin, critical, tail)
    sizes = [rejects(n, d, margin, edge, tail) for d in np.linspace(margin, 1, 1500)]
    assert max(sizes) <= 0.05


@pytest.mark.parametrize("n", [150, 401])
def test_the_unraised_critical_value_does_not_hold_it(n):
    assert size(n, 0.02, 1.6448536) > 0.05


def test_a_raised_critical_value_is_not_raised_for_nothing():
    """At some documents one step of TOLERANCE back breaks the size: the least value was found."""
    critical = critical_value(400, 0.02, 0.05)
    assert size(400, 0.02, critical - 1e-3) > 0.05


@settings(deadline=None, derandomize=True)
@given(st.integers(2, 200), st.data())
def test_bounds_and_tests_agree(n, data):
    lost = data.draw(st.integers(0, n))
    gained = data.draw(st.integers(0, n - lost))
    lower, upper = bounds(lost, gained, n, 0.05, 0.05)
    assert lower <= (lost - gained) / n <= upper
    z = tango_z(lost, gained, n, 0.05)
    assert (upper < 0.05) == (z < -critical_value(n, 0.05, 0.05, NONINFERIOR))
    assert (lower > 0.05) == (z > critical_value(n, 0.05, 0.05, WORSE))


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (0, 3), (4, 1), (9, 9), (25, 3), (40, 2)])
def test_a_p_value_falls_below_alpha_where_the_critical_value_is_passed(lost, gained):
    for tail, sign in ((NONINFERIOR, -1), (WORSE, 1)):
        passed = sign * tango_z(lost, gained, 300, 0.04) > critical_value(300, 0.04, 0.05, tail)
        assert (p_value(lost, gained, 300, 0.04, tail) <= 0.05) == passed


def test_p_and_bound_agree_at_an_alpha_that_the_enumeration_alone_would_hold():
    """At 40 documents the size of z = 2.327 is below 1 %, but no critical value is below the normal one."""
    assert 0.0099 < size(40, 0.05, float(tango_z(18, 5, 40, 0.05)), WORSE) < 0.01
    assert p_value(18, 5, 40, 0.05, WORSE) > 0.01
    assert bounds(18, 5, 40, 0.05, 0.01).lower < 0.05


@pytest.mark.parametrize("tail", TAILS)
def test_more_losses_raise_p_of_noninferiority_and_lower_p_of_worse(tail):
    values = [p_value(lost, 5, 250, 0.03, tail) for lost in range(0, 60, 3)]
    assert values == sorted(values, reverse=tail == WORSE)


def test_without_a_flip_p_is_that_of_no_lost_document_at_discordance_equal_to_the_margin():
    """(1 - margin)^n is the binomial part; at larger discordances gained documents make up for lost ones."""
    assert p_value(0, 0, 149, 0.02) >= 0.98**149
    assert p_value(0, 0, 149, 0.02) == pytest.approx(binom.pmf(0, 149, 0.02), rel=0.5)


def test_the_raised_bounds_are_no_narrower_than_the_plain_interval():
    lower, upper = bounds(6, 4, 250, 0.02, 0.05)
    plain = tango_interval(6, 4, 250, 0.10)
    assert lower <= plain.lower
    assert upper >= plain.upper


@pytest.mark.parametrize(("n", "margin", "alpha"), [(1, 0.02, 0.05), (50, 0.0, 0.05), (50, 0.02, 0.6)])
def test_an_impossible_test_is_refused(n, margin, alpha):
    with pytest.raises(InputError, match="want at least 2"):
        critical_value(n, margin, alpha)
