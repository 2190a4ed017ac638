"""What a log shows of long work."""

from __future__ import annotations

import pytest

from evalkit import progress


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(progress._Lines, "said", 0.0)
    return clock


def work(clock: Clock, title: str, *ends: float) -> None:
    with progress.progress(title, len(ends)) as advance:
        for end in ends:
            clock.now = end
            advance()


def test_a_log_says_every_half_minute_how_far_it_is_and_when_it_has_ended(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    work(clock, "layers", 10.0, 31.0, 45.0, 62.0)
    assert capsys.readouterr().err == "layers: 2 of 4 after 31 s\nlayers: 4 of 4 after 62 s\n"


def test_many_short_pieces_of_work_say_as_much_as_a_long_one(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stage that works on one piece after the other, each shorter than half a minute, is not silent."""
    for start in range(0, 100, 1):
        work(clock, f"piece {start}", start + 0.5, start + 1.0)
    told = capsys.readouterr().err.splitlines()
    assert told == [f"piece {start}: 1 of 2 after 0 s" for start in (30, 60, 90)]
    work(clock, "longer", 101.0, 103.5)
    assert capsys.readouterr().err == "longer: 2 of 2 after 4 s\n"


def test_a_line_names_the_part_that_the_work_belongs_to(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.part("tasks, arm 2 of 6"):
        work(clock, "answering", 31.0, 32.0)
    work(clock, "report", 70.0)
    assert capsys.readouterr().err == (
        "tasks, arm 2 of 6: answering: 1 of 2 after 31 s\n"
        "tasks, arm 2 of 6: answering: 2 of 2 after 32 s\n"
        "report: 1 of 1 after 38 s\n"
    )
