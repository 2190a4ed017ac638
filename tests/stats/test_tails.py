import numpy as np
import pytest

from benchmarks.statistics import cluster_errors, graded_errors
from evalkit.stats.exact import NONINFERIOR, p_value
from evalkit.stats.tails import tail


def test_without_any_p_is_that_of_a_sample_that_holds_none_though_the_margin_fails_whole():
    jitter = np.where(np.arange(100) % 2, 0.01, -0.01)
    assert tail(jitter).p(0.02) == pytest.approx(p_value(0, 0, 100, 0.02, NONINFERIOR))
    assert tail(jitter).p(0.02) >= 0.98**100
    assert tail(np.resize(jitter, 149)).p(0.02) <= 0.05 < tail(np.resize(jitter, 148)).p(0.02)
    assert tail(jitter).needed(0.02, 0.05) == 149


def test_what_differs_by_more_than_half_counts_whole_and_the_rest_takes_from_the_margin():
    found = tail([0.6, 0.9, -0.51, 0.5, -0.1, *[0.0] * 35])
    assert (found.n, found.lost, found.gained) == (40, 2, 1)
    assert found.rest == pytest.approx(0.4 / 40)
    assert found.p(0.3) == p_value(2, 1, 40, 0.3 - found.rest, NONINFERIOR)
    assert tail([-0.4] * 40).rest == 0.0  # a gain of the many pays for no rare loss
    assert tail([30.0, 60.0], whole=100.0).lost == 1


@pytest.mark.parametrize("seed", range(40))
def test_p_and_the_upper_bound_agree(seed: int):
    rng = np.random.default_rng(seed)
    x = rng.normal(rng.uniform(-0.02, 0.03), 0.05, size=int(rng.integers(40, 300)))
    x[: rng.integers(4)] = rng.choice([-1.0, 0.7, 1.0])
    found, margin = tail(x), float(rng.choice([0.02, 0.05, 0.1]))
    assert (found.p(margin) <= 0.05) == (found.upper(margin, 0.05) < margin)
    assert (found.needed(margin, 0.05) > found.n) == (found.p(margin) > 0.05)


def test_where_the_rest_loses_the_margin_nothing_is_shown():
    found = tail([0.05] * 300)
    assert (found.p(0.02), found.needed(0.02, 0.05)) == (1.0, np.inf)
    assert found.upper(0.02, 0.05) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("count", "icc", "discordance"), [(100, 1.0, 0.02), (100, 0.5, 0.02), (100, None, 0.04)]
)
def test_few_clusters_that_differ_do_not_break_the_level(count: int, icc: float | None, discordance: float):
    _, by_effect, held = cluster_errors(count, 4, icc, 300, discordance, margin=0.02)
    assert by_effect > 0.08
    assert held < 0.03


def test_clusters_that_fall_apart_by_chance_keep_their_power():
    """Twice the clusters that the margin takes, 4 % of questions apart and none lost in truth."""
    rng = np.random.default_rng(0)
    shown = [
        tail(rng.choice([-0.1, 0.0, 0.1], p=[0.2, 0.6, 0.2], size=300)).p(0.02) <= 0.05 for _ in range(100)
    ]
    assert sum(shown) > 90


@pytest.mark.parametrize(("n", "share", "lost", "others"), [(40, 0.025, 0.8, 0.0), (100, 0.01, 1.0, 0.01)])
def test_harmless_differences_do_not_hide_that_rare_losses_were_not_seen(n, share, lost, others):
    by_bootstrap, held = graded_errors(n, share, lost, others, 60)
    assert by_bootstrap > 0.2
    assert held < 0.03
