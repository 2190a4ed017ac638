import numpy as np
import pytest

from evalkit.stats.means import FEWEST_DOCUMENTS, bootstrap_mean, by_document


def test_documents_are_averaged_before_they_are_compared():
    assert by_document(["a", "b", "a", "a"], [1.0, 5.0, 2.0, 6.0]).tolist() == [3.0, 5.0]
    with pytest.raises(ValueError, match="want one each"):
        by_document(["a"], [1.0, 2.0])


def test_the_interval_is_students_where_values_are_normal():
    x = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    found = bootstrap_mean(x)
    half = 1.966 * x.std(ddof=1) / 20
    assert found.interval() == pytest.approx((x.mean() - half, x.mean() + half), abs=0.06 * half)


def test_skewed_means_are_covered_where_a_percentile_bootstrap_misses():
    rng = np.random.default_rng(1)
    covered = percentile = 0
    for seed in range(200):
        x = rng.lognormal(0.0, 1.2, size=50)
        lower, upper = bootstrap_mean(x, seed).interval()
        true = np.exp(1.2**2 / 2)
        covered += lower <= true <= upper
        means = rng.choice(x, size=(2000, 50)).mean(axis=1)
        percentile += np.quantile(means, 0.025) <= true <= np.quantile(means, 0.975)
    assert covered >= 0.9 * 200
    assert covered > percentile + 5


def test_p_values_agree_with_the_bounds():
    found = bootstrap_mean(np.random.default_rng(2).exponential(size=120))
    assert found.p_below(found.upper(0.05)) == pytest.approx(0.05, abs=1e-3)
    assert found.p_above(found.lower(0.05)) == pytest.approx(0.05, abs=1e-3)
    assert found.p_below(found.mean + 9) < 0.001
    assert found.p_above(found.mean + 9) > 0.99


def test_the_same_seed_gives_the_same_interval():
    x = np.random.default_rng(3).normal(size=60)
    assert bootstrap_mean(x, 5).interval() == bootstrap_mean(x, 5).interval()
    assert bootstrap_mean(x, 5).interval() != bootstrap_mean(x, 6).interval()


def test_too_few_documents_have_no_interval():
    x = np.arange(FEWEST_DOCUMENTS - 1.0)
    assert bootstrap_mean(x) is None
    assert bootstrap_mean(np.append(x, 0.5)) is not None


def test_documents_that_hardly_differ_have_no_interval():
    """9 of 300 differ: most resamples would hold other numbers of them, and none at all in one of 10,000."""
    assert bootstrap_mean([0.0] * 291 + [0.3] * 9) is None
    assert bootstrap_mean([0.0] * 290 + [0.3] * 10) is not None


def test_a_value_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="1 of 41 values are not finite"):
        bootstrap_mean([*np.arange(40.0), float("nan")])
