"""The chart of cost and loss: what it is given, and what Chromium draws of it."""

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from evalkit.records import CandidateRecord, EnvironmentRecord, RunDirectory, TaskRecord, TokenRecord, only
from evalkit.report import html, plots
from tests.report import answered
from tests.report.answered import BASELINE, TASKS, charted, rewritten
from tests.report.browser import Browser, browsers
from tests.report.conftest import CANDIDATES

Browse = Callable[..., Browser]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return answered.make_run(tmp_path_factory.mktemp("answered"))


@pytest.fixture(scope="module")
def page(run: RunDirectory) -> Path:
    return html.write(run.path)


def test_the_chart_holds_every_candidates_bytes_loss_and_divergence(run: RunDirectory):
    records = run.read()
    found = {one["name"]: one for one in plots.tradeoff(records)["candidates"]}
    assert next(iter(found)) == BASELINE
    for record in only(records, CandidateRecord):
        one = found[record.candidate]
        assert one["bytes"] == record.row_bytes_per_token
        (token,) = [r for r in only(records, TokenRecord) if r.candidate == record.candidate]
        assert (one["kl"]["value"], one["kl"]["n"]) == (token.kl_mean_nats, token.n)
        for task in one["tasks"]:
            (score,) = [r for r in only(records, TaskRecord) if (r.candidate, r.task) == (record.candidate, task["task"])]  # fmt: skip
            assert task["value"] == 100 * score.loss
            assert (task["lower"], task["upper"]) == (100 * score.loss_lower, 100 * score.loss_upper)
            assert task["time"] == {
                "value": score.decode_step_ms, "lower": score.decode_step_lower_ms, "upper": score.decode_step_upper_ms,
                "sequences": 8, "columns": 1024.5, "steps": 1234, "graph": record.candidate != BASELINE,
            }  # fmt: skip


def test_a_task_whose_steps_nobody_timed_has_no_time_on_the_chart(run: RunDirectory):
    records = [untimed(r) if isinstance(r, TaskRecord) and r.task == TASKS[1] else r for r in run.read()]
    for one in plots.tradeoff(records)["candidates"]:
        assert {task["task"]: task["time"] is None for task in one["tasks"]} == {TASKS[0]: False, TASKS[1]: True}  # fmt: skip


def untimed(record: TaskRecord) -> TaskRecord:
    """As records were before decode steps were timed."""
    return dataclasses.replace(record, decode_step_ms=None, decode_step_lower_ms=None, decode_step_upper_ms=None, decode_sequences=None, decode_columns=None, decode_steps=None, decode_graph=None)  # fmt: skip


@browsers
def test_the_chart_shows_the_records_values(page: Path, run: RunDirectory, browse: Browse):
    browser, records = charted(browse, page), run.read()
    traces = "document.getElementById('trade-chart').data.map(t => [t.name, t.y[0], t.error_y.array[0], t.error_y.arrayminus[0], t.text[0]])"
    for name, y, above, below, hover in browser.script(traces):
        (score,) = [r for r in only(records, TaskRecord) if (r.candidate, r.task) == (name, TASKS[0])]
        assert y == pytest.approx(100 * score.loss)
        assert (y - below, y + above) == pytest.approx((100 * score.loss_lower, 100 * score.loss_upper))
        assert f"n = {score.n}" in hover
    browser.choose("trade-down", "")
    kl = {r.candidate: r for r in only(records, TokenRecord)}
    for name, y, *_, hover in browser.script(traces):
        record = kl[name.partition(" (")[0]]
        assert y == (pytest.approx(record.kl_mean_nats) if record.kl_mean_nats else None)
        assert "n = 2,048" in hover
    assert not any(browser.script("document.getElementById('trade-chart').data.map(t => t.error_x.visible)"))
    title = "document.querySelector('#trade-chart .xtitle').textContent"
    assert browser.script(title) == "bytes per token"
    browser.choose("trade-across", "ms")
    across = "document.getElementById('trade-chart').data.map(t => [t.name, t.x[0], t.error_x.visible, t.error_x.array[0], t.error_x.arrayminus[0], t.text[0]])"
    for task, timed_on in (("", TASKS[0]), (TASKS[0], TASKS[0]), (TASKS[1], TASKS[1])):
        browser.choose("trade-down", task)
        points = browser.script(across)
        assert len(points) == len(CANDIDATES)
        for name, x, visible, above, below, hover in points:
            (score,) = [r for r in only(records, TaskRecord) if (r.candidate, r.task) == (name.partition(" (")[0], timed_on)]  # fmt: skip
            assert x == score.decode_step_ms
            assert visible
            assert (x - below, x + above) == pytest.approx((score.decode_step_lower_ms, score.decode_step_upper_ms))  # fmt: skip
            assert f"ms a decode step of 8 sequences, 95 %: {score.decode_step_lower_ms:#.3g} to " in hover
            assert ("in a CUDA graph" in hover) == score.decode_graph
    assert browser.script(title) == "ms a decode step of 8 sequences"
    drawn = "[...document.querySelectorAll('#trade-chart .xerror')].filter(bar => bar.getBoundingClientRect().width > 2).length"
    assert browser.script(drawn) == len(CANDIDATES), "bars across"


@browsers
def test_equal_losses_do_not_hide_each_others_times(run: RunDirectory, tmp_path: Path, browse: Browse):
    """Markers whose bars overlap are set apart by a few pixels; times and the ends of all bars stay what the records say."""

    def wide(record: TaskRecord) -> TaskRecord:
        bars = {
            "loss_lower": -0.1,
            "loss_upper": 0.2,
            "decode_step_lower_ms": 0.1,
            "decode_step_upper_ms": 1e3,
        }
        return dataclasses.replace(record, loss=0.0, **bars)

    browser = charted(browse, rewritten(run, tmp_path, TaskRecord, wide))
    browser.choose("trade-across", "ms")
    points = browser.script(
        "document.getElementById('trade-chart').data.map(t => [t.name, t.x[0], t.y[0], t.error_y.array[0], t.error_y.arrayminus[0]])"
    )
    times = {r.candidate: r.decode_step_ms for r in only(run.read(), TaskRecord) if r.task == TASKS[0]}
    assert {name: x for name, x, *_ in points} == times
    for _, _, y, above, below in points:
        assert (y - below, y + above) == pytest.approx((-10, 20))
    heights = browser.script(
        "[...document.querySelectorAll('#trade-chart .points path')].map(p => p.getBoundingClientRect()).map(r => r.y + r.height / 2)"
    )
    assert len(heights) == len(CANDIDATES)
    assert heights == sorted(heights), "the first candidate is at the top"
    assert min(b - a for a, b in pairwise(heights)) > 5
    assert max(abs(y) for _, _, y, *_ in points) < 2


def apart(record: TaskRecord) -> TaskRecord:
    """The same loss for every candidate, and times whose intervals do not touch."""
    ms = 10.0 * (1 + CANDIDATES.index(record.candidate))
    time = {"decode_step_ms": ms, "decode_step_lower_ms": ms - 1, "decode_step_upper_ms": ms + 1}
    return dataclasses.replace(record, loss=0.01, loss_lower=-0.1, loss_upper=0.2, **time)


@browsers
def test_a_point_that_covers_none_is_drawn_at_its_loss(run: RunDirectory, tmp_path: Path, browse: Browse):
    browser = charted(browse, rewritten(run, tmp_path, TaskRecord, apart))
    browser.choose("trade-across", "ms")
    drawn = browser.script("document.getElementById('trade-chart').data.map(t => [t.x[0], t.y[0]])")
    assert sorted(drawn) == [[10.0 * (1 + place), 1.0] for place in range(len(CANDIDATES))]


@browsers
def test_a_task_whose_steps_were_not_timed_says_so(run: RunDirectory, tmp_path: Path, browse: Browse):
    """One task generates, the other only scores: an empty chart would be a riddle."""
    made = rewritten(run, tmp_path, TaskRecord, lambda r: untimed(r) if r.task == TASKS[1] else r)
    browser = charted(browse, made)
    browser.choose("trade-across", "ms")
    browser.choose("trade-down", TASKS[1])
    said = "document.getElementById('trade-chart').textContent"
    assert browser.script(said) == f"No decode step was timed on {TASKS[1]}."
    for _ in range(2):
        browser.choose("trade-down", TASKS[0])
        assert "No decode step" not in browser.script(said)
        assert browser.script("document.querySelectorAll('#trade-chart .points path').length") == len(
            CANDIDATES
        )
    assert browser.errors == []


@browsers
def test_many_equal_losses_are_set_apart_by_little(run: RunDirectory, tmp_path: Path, browse: Browse):
    """However many there are, a marker stays near its loss, and no two candidates look alike."""
    made: Any = RunDirectory.create(tmp_path, "many", {}, "evalkit run")
    records = run.read()
    candidate = only(records, CandidateRecord)[-1]
    (score,) = [
        r for r in only(records, TaskRecord) if (r.candidate, r.task) == (candidate.candidate, TASKS[0])
    ]
    with made.stage("all") as write:
        write.write(only(records, EnvironmentRecord)[0])
        for number in range(14):
            name = f"fp8_{number}@flashmla"
            write.write(dataclasses.replace(candidate, candidate=name))
            write.write(dataclasses.replace(score, candidate=name, loss=0.0, loss_lower=-0.1, loss_upper=0.2))
    browser = charted(browse, html.write(made.path))
    browser.choose("trade-across", "ms")
    points = browser.script(
        "document.getElementById('trade-chart').data.map(t => [t.y[0], t.marker.color, t.marker.symbol])"
    )
    assert len(points) == 14
    assert max(abs(y) for y, *_ in points) < 2, "of bars from -10 to 20"
    assert len({(colour, symbol) for _, colour, symbol in points}) == 14


@browsers
def test_without_timed_steps_the_chart_offers_bytes_alone(run: RunDirectory, tmp_path: Path, browse: Browse):
    page = rewritten(run, tmp_path, TaskRecord, untimed)
    browser = charted(browse, page)
    assert browser.script("[...document.getElementById('trade-across').options].map(o => o.value)") == ["bytes"]  # fmt: skip
    assert "No decode step was timed in this run." in page.read_text(encoding="utf-8")
    assert browser.script("document.getElementById('trade-chart').data.length") == len(CANDIDATES)
