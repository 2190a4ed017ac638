import numpy as np
import pytest

from benchmarks.changes import normal, resized, smallest_p
from evalkit.report import changes
from evalkit.report.changes import of_errors, of_scores

N = [1000] * 120


def series(seed: int, nights: int = 120) -> np.ndarray:
    return 0.9 + 0.0025 * np.random.default_rng(seed).standard_normal(nights)


@pytest.mark.parametrize("seed", range(20))
def test_a_drop_of_two_points_is_found_at_its_night_on_the_third(seed: int):
    night = 40 + 3 * seed
    scores = series(seed)
    scores[night:] -= 0.02
    (change,) = of_scores(scores.tolist(), N)
    assert change.at == night
    assert change.found <= night + 2
    assert change.after - change.before == pytest.approx(-0.02, abs=0.003)


@pytest.mark.parametrize("seed", range(20))
def test_nights_that_only_vary_are_no_change(seed: int):
    assert of_scores(series(seed).tolist(), N) == []


def test_the_limit_holds_its_false_alarm_rate():
    """Of 400 unchanging years, 4 are expected below the limit; 13 or more would come once in 10,000 times."""
    least = smallest_p(400, np.random.default_rng(7))
    assert (least < changes.LIMIT).sum() < 13
    assert (least < 20 * changes.LIMIT).sum() > 13


def test_what_is_known_on_a_night_is_what_a_store_of_that_night_shows():
    scores = series(3)
    scores[80:] -= 0.02
    (change,) = of_scores(scores.tolist(), N)
    assert of_scores(scores[: change.found].tolist(), N[: change.found]) == []
    assert of_scores(scores[: change.found + 1].tolist(), N[: change.found + 1])[0].at == 80


@pytest.mark.parametrize("size", [0.02, 0.1, 0.9])
def test_one_bad_night_is_no_change(size: float):
    scores = series(4)
    scores[70] -= size
    assert of_scores(scores.tolist(), N) == []


def test_a_drop_that_is_mended_after_five_nights_is_two_changes():
    scores = series(5)
    scores[60:65] -= 0.02
    assert [change.at for change in of_scores(scores.tolist(), N)] == [60, 65]


def test_a_gain_is_a_change_too():
    scores = series(6)
    scores[90:] += 0.02
    (change,) = of_scores(scores.tolist(), N)
    assert change.after > change.before


def test_a_score_that_repeats_to_the_bit_may_move_by_one_document_for_a_night_or_two():
    """Its sd is no less than half a document, though no night showed any."""
    scores = [0.9] * 60 + [0.899] * 2 + [0.9] * 58
    assert of_scores(scores, N) == []
    lasting = [0.9] * 60 + [0.896] * 60
    assert [change.at for change in of_scores(lasting, N)] == [60]


def test_more_documents_are_another_sample_and_no_change():
    """The first 100 of 1,000 documents may be easier than the rest by what 100 say."""
    scores, n = [0.97] * 60 + [0.90] * 60, [100] * 60 + [1000] * 60
    assert of_scores(scores, n) == []
    assert of_scores(scores, N) != []
    rng = np.random.default_rng(8)
    alarmed = 0
    for _ in range(20):
        drawn, documents = resized(rng, 120)
        alarmed += bool(of_scores(drawn.tolist(), documents.tolist()))
    assert alarmed <= 1


def test_errors_are_compared_as_ratios():
    rng = np.random.default_rng(9)
    noise = np.exp(0.01 * rng.standard_normal(100))
    for level in (1e-7, 0.03):
        errors = level * noise
        errors[50:] *= 1.2
        (change,) = of_errors(errors.tolist())
        assert change.at == 50
        assert change.after / change.before == pytest.approx(1.2, rel=0.02)


def test_errors_that_repeat_to_the_bit_may_move_by_a_thousandth():
    assert of_errors([0.03] * 50 + [0.03003] * 50) == []
    assert len(of_errors([0.03] * 50 + [0.033] * 50)) == 1


def test_what_has_no_level_has_no_change():
    assert of_scores([], []) == []
    assert of_errors([]) == []
    assert of_errors([0.0] * 50) == []
    with pytest.raises(ValueError, match="no documents"):
        of_scores([0.5], [0])


def test_few_nights_say_nothing():
    scores, n = normal(np.random.default_rng(10), changes.FEWEST + 1)
    scores[5:] -= 0.5
    assert of_scores(scores.tolist(), n.tolist()) == []
