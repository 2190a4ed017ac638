"""What a log shows of long work."""

import pytest

from evalkit import progress


def test_a_log_says_every_half_minute_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 10.0, 31.0, 45.0, 62.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.progress("layers", 4) as advance:
        for _ in range(4):
            advance()
    assert capsys.readouterr().err == "layers: 2 of 4 after 31 s\nlayers: 4 of 4 after 62 s\n"
