from dataclasses import dataclass, replace
from math import lgamma, log

import numpy as np
import pytest

from evalkit.stats.paired import PairingError, compare, join, mcnemar_p, tango_interval
from evalkit.stats.score import tango_z


@dataclass(frozen=True)
class Sample:
    doc_id: int
    score: float | None
    task: str = "needle"
    prompt_sha256: str = "11" * 32
    target_sha256: str = "22" * 32
    filter: str = "none"
    metric: str = "exact_match"


def samples(scores):
    return [Sample(doc_id, score) for doc_id, score in enumerate(scores)]


@pytest.mark.parametrize(
    ("lost", "gained", "n"), [(1, 7, 21), (12, 3, 400), (5, 5, 10), (9, 0, 9), (0, 1, 44)]
)
def test_at_margin_zero_the_score_statistic_is_mcnemars(lost, gained, n):
    assert tango_z(lost, gained, n, 0.0) ** 2 == pytest.approx(
        (lost - gained) ** 2 / (lost + gained), abs=1e-9
    )


def test_the_interval_is_the_published_one():
    """Airway hyper-responsiveness, Bentur et al. (2009), as in Fagerland, Lydersen & Laake (2014)."""
    assert tango_interval(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)


def test_without_a_difference_the_interval_is_that_of_one_proportion_at_zero():
    """By hand: z^2 = n d / (1 - d), so d = z^2 / (n + z^2)."""
    z2 = 1.959963984540054**2
    assert tango_interval(0, 0, 149) == pytest.approx((-z2 / (149 + z2), z2 / (149 + z2)), abs=1e-12)


@pytest.mark.parametrize(
    ("lost", "gained", "n"), [(0, 0, 2), (1, 0, 2), (3, 9, 40), (40, 0, 40), (0, 40, 40), (7, 7, 900)]
)
@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2])
def test_the_interval_contains_the_estimate_and_mirrors_under_swapping(lost, gained, n, alpha):
    lower, upper = tango_interval(lost, gained, n, alpha)
    assert -1 <= lower <= (lost - gained) / n <= upper <= 1
    assert tango_interval(gained, lost, n, alpha) == pytest.approx((-upper, -lower), abs=1e-9)


@pytest.mark.parametrize(("lost", "gained", "n"), [(1, 7, 21), (12, 3, 400), (0, 3, 50)])
def test_the_ends_are_where_the_test_just_rejects(lost, gained, n):
    for end, sign in zip(tango_interval(lost, gained, n, 0.05), (1, -1), strict=True):
        assert sign * tango_z(lost, gained, n, end) == pytest.approx(1.959963984540054, abs=1e-9)


@pytest.mark.parametrize(
    ("n", "discordance", "loss"), [(60, 0.08, 0.0), (60, 0.16, 0.05), (150, 0.04, 0.02), (150, 0.08, -0.04)]
)
def test_the_interval_covers_the_true_loss(n, discordance, loss):
    """By exact enumeration over every (lost, gained)."""
    p_lost, p_gained = (discordance + loss) / 2, (discordance - loss) / 2
    covered = total = 0.0
    for lost in range(n + 1):
        for gained in range(n + 1 - lost):
            probability = trinomial(n, lost, gained, p_lost, p_gained)
            if probability < 1e-12:
                continue
            total += probability
            lower, upper = tango_interval(lost, gained, n, 0.05)
            covered += probability * (lower <= loss <= upper)
    assert total == pytest.approx(1.0, abs=1e-8)
    assert covered >= 0.93


def trinomial(n, a, b, p, q):
    ways = lgamma(n + 1) - lgamma(a + 1) - lgamma(b + 1) - lgamma(n - a - b + 1)
    return np.exp(ways + a * log(p) + b * log(q) + (n - a - b) * log(1 - p - q))


def test_one_document_has_no_interval():
    (result,) = compare(samples([1]), samples([0]))
    assert (result.n, result.loss, result.loss_interval, result.score_interval) == (1, 1.0, None, None)


@pytest.mark.parametrize(
    ("lost", "gained", "n", "alpha"), [(-1, 0, 4, 0.05), (3, 2, 4, 0.05), (1, 1, 4, 0.0), (1, 1, 4, 2)]
)
def test_impossible_counts_are_refused(lost, gained, n, alpha):
    with pytest.raises(ValueError, match="want"):
        tango_interval(lost, gained, n, alpha)


def test_mcnemars_p_is_the_binomials():
    """By hand: one of six discordant pairs, 2 (1 + 6) / 2^6."""
    assert mcnemar_p(1, 5) == pytest.approx(14 / 64)
    assert mcnemar_p(5, 1) == mcnemar_p(1, 5)
    assert mcnemar_p(0, 0) == 1.0


def test_counts_scores_and_loss_come_from_the_joined_pairs():
    (result,) = compare(samples([1, 1, 1, 0, 1]), reversed(samples([1, 0, 0, 1, 1])))
    assert (result.n, result.lost, result.gained) == (5, 2, 1)
    assert (result.baseline_score, result.score, result.loss) == (0.8, 0.6, pytest.approx(0.2))
    assert result.endpoint == ("needle", "exact_match", "none")
    assert result.mcnemar_p == 1.0


def test_each_task_and_filter_is_its_own_endpoint():
    both = [*samples([1, 1]), Sample(0, 1, filter="strict"), Sample(0, 0, task="walk")]
    assert [(r.endpoint.task, r.endpoint.filter, r.n) for r in compare(both, both)] == [
        ("needle", "none", 2),
        ("needle", "strict", 1),
        ("walk", "none", 1),
    ]


def test_a_missing_document_is_named():
    with pytest.raises(
        PairingError, match=r"1 of 3 samples missing from the candidate: needle document 1 \(prompt 1111"
    ):
        join(samples([1, 0, 1]), [Sample(0, 1), Sample(2, 1)])
    with pytest.raises(PairingError, match="missing from the baseline: needle document 2"):
        join(samples([1, 0]), samples([1, 0, 1]))


def test_a_document_that_comes_twice_is_named():
    with pytest.raises(PairingError, match="more than once in the candidate: needle document 1"):
        join(samples([1, 0]), [*samples([1, 0]), Sample(1, 1)])


def test_a_document_whose_prompt_changed_does_not_pair():
    changed = [replace(s, prompt_sha256="33" * 32) for s in samples([1, 0])]
    with pytest.raises(PairingError, match="2 of 2 samples missing"):
        compare(samples([1, 0]), changed)


def test_nothing_to_compare_is_an_error():
    with pytest.raises(PairingError, match="both sides are empty"):
        compare([], [])


@pytest.mark.parametrize(("score", "said"), [(float("nan"), "nan"), (float("inf"), "inf"), (None, "missing")])
def test_a_missing_score_is_not_counted_as_wrong(score, said):
    with pytest.raises(PairingError, match=f"needle document 1 .*: its score is {said}"):
        compare(samples([1, score]), samples([1, 1]))


def test_graded_scores_have_a_bootstrap_interval_of_their_mean_loss():
    rng = np.random.default_rng(5)
    before = rng.uniform(0.3, 1.0, 200).tolist()
    after = [score - loss for score, loss in zip(before, rng.normal(0.05, 0.1, 200), strict=True)]
    (found,) = compare(samples(before), samples(after))
    difference = np.subtract(before, after)
    assert (found.score, found.baseline_score) == (
        pytest.approx(np.mean(after)),
        pytest.approx(np.mean(before)),
    )
    assert found.loss == pytest.approx(difference.mean())
    assert (found.lost, found.gained, found.mcnemar_p) == (None, None, None)
    half = 1.96 * difference.std(ddof=1) / 200**0.5
    assert tuple(found.loss_interval) == pytest.approx(
        (difference.mean() - half, difference.mean() + half), abs=half / 10
    )
    own = 1.96 * np.std(after, ddof=1) / 200**0.5
    assert tuple(found.score_interval) == pytest.approx(
        (np.mean(after) - own, np.mean(after) + own), abs=own / 10
    )
    assert found.interval_method == "studentised bootstrap"


def test_few_graded_scores_have_no_interval():
    (found,) = compare(samples([0.5] * 39), samples([0.4] * 39))
    assert found.loss == pytest.approx(0.1)
    assert (found.loss_interval, found.score_interval) == (None, None)


def test_one_graded_score_among_rights_and_wrongs_makes_them_graded():
    (found,) = compare(samples([1, 0, 1]), samples([1, 0.5, 0]))
    assert (found.loss, found.lost, found.interval_method) == (
        pytest.approx(1 / 6),
        None,
        "studentised bootstrap",
    )
