import numpy as np
import pytest

from evalkit.stats.rates import rate_interval


def documents(rng: np.random.Generator, count: int, frailty: bool) -> tuple[list[int], list[int]]:
    """Events (at most one a document) and exposure, of a hazard that may differ between documents."""
    hazard = 0.004 * (rng.gamma(1.0, 1.0, count) if frailty else np.ones(count))
    time, length = rng.geometric(np.clip(hazard, 1e-9, 1)), rng.integers(80, 220, count)
    happens = time <= length
    return happens.astype(int).tolist(), np.where(happens, time, length).tolist()


@pytest.mark.parametrize("frailty", [False, True])
def test_the_interval_covers_the_rate(frailty: bool, monkeypatch: pytest.MonkeyPatch):
    """95 % are asked for; of 80 draws fewer than 66 would be a coverage below 0.9 with p < 0.02."""
    monkeypatch.setattr("evalkit.stats.rates.RESAMPLES", 499)
    rng = np.random.default_rng(5)
    events, exposure = documents(rng, 400_000, frailty)
    true = sum(events) / sum(exposure)
    found = [rate_interval(*documents(rng, 80, frailty)) for _ in range(80)]
    assert sum(one is not None and one.lower <= true <= one.upper for one in found) >= 66


def test_it_is_wider_where_documents_are_fewer():
    rng = np.random.default_rng(1)
    few, many = (rate_interval(*documents(rng, count, frailty=True)) for count in (60, 960))
    assert few is not None
    assert many is not None
    assert (few.upper - few.lower) > 2 * (many.upper - many.lower)


def test_few_documents_or_events_have_no_interval():
    assert rate_interval([1] * 39, [10] * 39) is None
    assert rate_interval([1] * 9 + [0] * 51, [10] * 60) is None
    assert rate_interval([1] * 10 + [0] * 50, [10] * 60) is not None


def test_documents_that_are_all_alike_have_no_interval():
    """Answers that all differ at their first token: every resample has the same rate, and scipy would warn."""
    assert rate_interval([1] * 60, [1] * 60) is None


def test_exposures_that_are_none_are_refused():
    with pytest.raises(ValueError, match="one each, above 0"):
        rate_interval([1, 0], [3, 0])
    with pytest.raises(ValueError, match="one each, above 0"):
        rate_interval([1], [3, 4])
