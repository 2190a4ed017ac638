"""The page of a report in Chromium, and what its flips and its cost chart are made of."""

import dataclasses
import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from evalkit.records import (
    AnswerLengthRecord,
    AnswerShareRecord,
    CandidateRecord,
    EnvironmentRecord,
    FirstDifferenceRecord,
    RunDirectory,
    SampleRecord,
    TaskRecord,
    TokenRecord,
    only,
    read_samples,
)
from evalkit.report import flips, html, plots
from evalkit.report.answers import answers
from tests.report import answered
from tests.report.answered import BASELINE, CONTROL, DAMAGED, HOSTILE, TASKS, token_text
from tests.report.browser import Browser, browsers
from tests.report.conftest import CANDIDATES

Browse = Callable[..., Browser]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return answered.make_run(tmp_path_factory.mktemp("answered"))


@pytest.fixture(scope="module")
def page(run: RunDirectory) -> Path:
    return html.write(run.path)


def expected(run: RunDirectory) -> dict[tuple[str, str, int], str]:
    """Direction of every flip, from the samples alone."""
    scores = {(s.candidate, s.task, s.doc_id): s.score for s in read_samples(run.path)}
    return {
        (name, task, document): "lost" if score < scores[BASELINE, task, document] else "gained"
        for (name, task, document), score in scores.items()
        if name not in (BASELINE, CONTROL) and score != scores[BASELINE, task, document]
    }


# What the page is given


def test_every_flip_is_there_with_its_direction(run: RunDirectory):
    found = flips.browse(run.read(), read_samples(run.path))
    assert {(i["candidate"], i["task"], i["document"]): i["direction"] for i in found["items"]} == expected(
        run
    )
    assert found["total"] == len(expected(run)) > 20
    assert {i["direction"] for i in found["items"]} == {"lost", "gained"}
    arms = list(dict.fromkeys(i["candidate"] for i in found["items"]))
    assert arms[-1] == DAMAGED, "candidates come first"


def test_the_marked_token_is_the_first_that_differs(run: RunDirectory):
    samples = {(s.candidate, s.task, s.doc_id): s for s in read_samples(run.path)}
    items = [
        i for i in flips.browse(run.read(), list(samples.values()))["items"] if i["candidate"] != DAMAGED
    ]
    assert items
    for item in items:
        before = samples[BASELINE, item["task"], item["document"]].generated_ids or []
        after = samples[item["candidate"], item["task"], item["document"]].generated_ids or []
        place = next(n for n, (a, b) in enumerate(zip(before, after, strict=False)) if a != b)
        assert item["place"] == place
        for ids, side in zip((before, after), item["sides"], strict=True):
            head, mark, _ = side["parts"]
            assert mark == token_text(ids[place])
            assert head == "".join(map(token_text, ids[:place]))


def test_an_answer_that_stops_first_is_marked_at_its_end():
    pair = [
        answered.answer(name, "t", 0, ids, right=name == "a")
        for name, ids in (("a", [1, 2]), ("b", [1, 2, 3]))
    ]
    records = [dataclasses.replace(answered.score("b", "a", "t", pair), candidate="b")]
    (item,) = flips.browse(records, pair)["items"]
    stopped, went_on = item["sides"]
    assert (stopped["parts"][1], stopped["ends"]) == ("", True)
    assert (went_on["parts"][1], went_on["ends"]) == (token_text(3), False)


def test_a_long_transcript_is_cut_around_the_mark_and_says_by_how_much():
    ids = list(range(1, 900))
    other = [*ids[:600], 7, *ids[601:]]
    pair = [
        answered.answer(name, "t", 0, said, right=name == "a") for name, said in (("a", ids), ("b", other))
    ]
    (item,) = flips.browse([answered.score("b", "a", "t", pair)], pair)["items"]
    for sample, side in zip(pair, item["sides"], strict=True):
        assert len(side["parts"][0]) == flips.BEFORE
        assert len(side["parts"][2]) == flips.AFTER
        assert sum(map(len, side["parts"])) + sum(side["left_out"]) == len(sample.generated_text or "")


def test_too_many_flips_are_counted_and_every_kind_stays():
    said = [1, 2, 3]
    samples = [answered.answer("a", "t", n, said, right=True) for n in range(400)]
    samples += [answered.answer("b", "t", n, [1, 9, 3], right=False) for n in range(400)]
    samples += [answered.answer("c", "t", n, [1, 9, 3], right=n != 399) for n in range(400)]
    records = [answered.score(name, "a", "t", samples) for name in ("b", "c")]
    found = flips.browse(records, samples)
    assert found["total"] == 401
    assert len(found["items"]) == flips.MOST
    assert [i["document"] for i in found["items"] if i["candidate"] == "c"] == [399]
    assert [i["document"] for i in found["items"] if i["candidate"] == "b"] == list(range(flips.MOST - 1))


def test_samples_without_tokens_are_shown_without_a_mark():
    pair = [
        dataclasses.replace(
            answered.answer(name, "t", 0, [1], right=name == "a"),
            generated_ids=None,
            generated_chars=None,
            generated_text=None,
            response="B",
        )
        for name in ("a", "b")
    ]
    (item,) = flips.browse([answered.score("b", "a", "t", pair)], pair)["items"]
    assert item["place"] is None
    assert [side["parts"] for side in item["sides"]] == [["B", "", ""]] * 2
    assert not any(side["marked"] for side in item["sides"])


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


def test_the_table_of_answers_prints_its_records(run: RunDirectory):
    records = run.read()
    rows = {(row[0], row[1]): row for row in answers(records).rows}
    lengths, parts = only(records, AnswerLengthRecord), only(records, FirstDifferenceRecord)
    assert len(rows) == len(lengths) == len(TASKS) * 5
    for length, part in zip(lengths, parts, strict=True):
        row = dict(zip(answers(records).columns, rows[length.task, length.candidate], strict=True))
        assert row["tokens"] == f"{length.mean_tokens:,.1f}"
        assert row["differ"] == str(part.differing)
        assert row["Δ against"] == length.baseline
        assert row["Δ tokens"].startswith(f"{length.difference_tokens:+,.1f} [")
        (share,) = [r for r in only(records, AnswerShareRecord) if (r.task, r.candidate, r.measure) == (length.task, length.candidate, "degenerate")]  # fmt: skip
        assert row["degenerate"].startswith(f"{share.share:.1%} [")
        assert row["Δ degenerate"].startswith(f"{100 * share.difference:+.1f} [")


# The page in a browser


def shown(browser: Browser) -> list[str]:
    return browser.script("[...document.querySelectorAll('#flip-list li')].map(one => one.innerText.replace(/\\s+/g, ' '))")  # fmt: skip


def choose(browser: Browser, select: str, value: str) -> None:
    browser.script(
        f"(() => {{ const s = document.getElementById({json.dumps(select)}); s.value = {json.dumps(value)};"
        " s.dispatchEvent(new Event('change')); })()"
    )


@browsers
def test_charts_and_flips_are_drawn_without_a_network(page: Path, browse: Browse):
    browser = browse(page)
    browser.wait("document.querySelectorAll('#trade-chart .main-svg').length > 0")
    charts = browser.script(
        "[...document.querySelectorAll('.chart')].map(c => c.querySelectorAll('.main-svg').length)"
    )
    assert len(charts) >= 4
    assert all(charts)
    assert browser.requests == [page.as_uri()]


@browsers
def test_filters_leave_what_they_name(page: Path, run: RunDirectory, browse: Browse):
    browser, flipped = browse(page), expected(run)
    assert len(shown(browser)) == len(flipped)
    candidate = "fp8_ds_mla@flashmla"
    choose(browser, "flip-candidate", candidate)
    choose(browser, "flip-task", TASKS[1])
    for direction in ("lost", "gained"):
        choose(browser, "flip-direction", direction)
        wanted = sorted(d for (name, task, d), way in flipped.items() if (name, task, way) == (candidate, TASKS[1], direction))  # fmt: skip
        assert shown(browser) == [f"{TASKS[1]}, document {d} {candidate}: {direction}" for d in wanted]
        assert (
            browser.script("document.getElementById('flip-count').textContent")
            == f"{len(wanted)} of {len(flipped)}"
        )
    choose(browser, "flip-candidate", DAMAGED)
    if not shown(browser):
        assert "No document flipped so" in browser.script("document.getElementById('flip-shown').innerText")


@browsers
def test_the_keyboard_goes_through_the_list(page: Path, run: RunDirectory, browse: Browse):
    browser, count = browse(page), len(expected(run))
    titles = [line.partition(" fp8")[0].partition(" bf16")[0] for line in shown(browser)]
    browser.script("document.getElementById('flip-direction').focus()")
    browser.key("Tab", 9)
    assert browser.script("document.activeElement.id") == "flip-list", (
        "Tab leads from the filters to the list"
    )

    def at() -> tuple[int, str]:
        place = browser.script("[...document.querySelectorAll('#flip-list li')].findIndex(one => one.ariaSelected === 'true')")  # fmt: skip
        active = browser.script("document.getElementById('flip-list').getAttribute('aria-activedescendant')")
        assert active == f"flip-{place}"
        inside = browser.script(
            "(() => { const list = document.getElementById('flip-list').getBoundingClientRect(), one = document.querySelector('#flip-list [aria-selected=true]').getBoundingClientRect();"
            " return one.top >= list.top - 2 && one.bottom <= list.bottom + 2; })()"
        )
        assert inside, "what is selected is in view"
        return place, browser.script("document.querySelector('#flip-shown h3').textContent")

    assert at() == (0, titles[0])
    for key, code, place in (
        ("ArrowDown", 40, 1), ("ArrowDown", 40, 2), ("ArrowUp", 38, 1), ("End", 35, count - 1), ("ArrowDown", 40, count - 1),
        ("Home", 36, 0), ("ArrowUp", 38, 0),
    ):  # fmt: skip
        browser.key(key, code)
        assert at() == (place, titles[place])


@browsers
def test_both_transcripts_stand_side_by_side_and_nothing_in_them_runs(
    page: Path, run: RunDirectory, browse: Browse
):
    browser = browse(page)
    (item, *_) = flips.browse(run.read(), read_samples(run.path))["items"]
    texts = browser.script(
        "[...document.querySelectorAll('.sides pre')].map(pre => { const copy = pre.cloneNode(true);"
        " copy.querySelectorAll('.gap').forEach(gap => gap.remove()); return copy.textContent.trim(); })"
    )
    marks = browser.script("[...document.querySelectorAll('.sides mark')].map(mark => mark.textContent)")
    assert texts == ["".join(side["parts"]).strip() for side in item["sides"]]
    assert marks == [side["parts"][1] for side in item["sides"]]
    left, right = browser.script("[...document.querySelectorAll('.sides > div')].map(box => [box.getBoundingClientRect().x, box.getBoundingClientRect().y])")  # fmt: skip
    assert left[0] < right[0]
    assert left[1] == right[1]
    assert HOSTILE in browser.script("document.getElementById('flip-shown').textContent")
    assert browser.script("document.querySelectorAll('#flips img, #flips b').length") == 0


@browsers
def test_the_chart_shows_the_records_values(page: Path, run: RunDirectory, browse: Browse):
    browser, records = browse(page), run.read()
    browser.wait("document.querySelectorAll('#trade-chart .main-svg').length > 0")
    traces = "document.getElementById('trade-chart').data.map(t => [t.name, t.y[0], t.error_y.array[0], t.error_y.arrayminus[0], t.text[0]])"
    for name, y, above, below, hover in browser.script(traces):
        (score,) = [r for r in only(records, TaskRecord) if (r.candidate, r.task) == (name, TASKS[0])]
        assert y == pytest.approx(100 * score.loss)
        assert (y - below, y + above) == pytest.approx((100 * score.loss_lower, 100 * score.loss_upper))
        assert f"n = {score.n}" in hover
    choose(browser, "trade-down", "")
    kl = {r.candidate: r for r in only(records, TokenRecord)}
    for name, y, *_, hover in browser.script(traces):
        record = kl[name.partition(" (")[0]]
        assert y == (pytest.approx(record.kl_mean_nats) if record.kl_mean_nats else None)
        assert "n = 2,048" in hover
    assert not any(browser.script("document.getElementById('trade-chart').data.map(t => t.error_x.visible)"))
    title = "document.querySelector('#trade-chart .xtitle').textContent"
    assert browser.script(title) == "bytes per token"
    choose(browser, "trade-across", "ms")
    across = "document.getElementById('trade-chart').data.map(t => [t.name, t.x[0], t.error_x.visible, t.error_x.array[0], t.error_x.arrayminus[0], t.text[0]])"
    for task, timed_on in (("", TASKS[0]), (TASKS[0], TASKS[0]), (TASKS[1], TASKS[1])):
        choose(browser, "trade-down", task)
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
    made: Any = RunDirectory.create(tmp_path, "equal", {}, "evalkit run")
    with made.stage("all") as write:
        for record in [*run.read(), *read_samples(run.path)]:
            if record.kind != "stage":
                wide = {"decode_step_lower_ms": 0.1, "decode_step_upper_ms": 1e3}
                same = {"loss": 0.0, "loss_lower": -0.1, "loss_upper": 0.2} | wide
                write.write(dataclasses.replace(record, **same) if isinstance(record, TaskRecord) else record)  # type: ignore[arg-type]
    browser = browse(html.write(made.path))
    browser.wait("document.querySelectorAll('#trade-chart .main-svg').length > 0")
    choose(browser, "trade-across", "ms")
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
    made: Any = RunDirectory.create(tmp_path, "apart", {}, "evalkit run")
    with made.stage("all") as write:
        for record in [*run.read(), *read_samples(run.path)]:
            if record.kind != "stage":
                write.write(apart(record) if isinstance(record, TaskRecord) else record)  # type: ignore[arg-type]
    browser = browse(html.write(made.path))
    browser.wait("document.querySelectorAll('#trade-chart .main-svg').length > 0")
    choose(browser, "trade-across", "ms")
    drawn = browser.script("document.getElementById('trade-chart').data.map(t => [t.x[0], t.y[0]])")
    assert sorted(drawn) == [[10.0 * (1 + place), 1.0] for place in range(len(CANDIDATES))]


@browsers
def test_a_task_whose_steps_were_not_timed_says_so(run: RunDirectory, tmp_path: Path, browse: Browse):
    """One task generates, the other only scores: an empty chart would be a riddle."""
    made: Any = RunDirectory.create(tmp_path, "one-timed", {}, "evalkit run")
    with made.stage("all") as write:
        for record in [*run.read(), *read_samples(run.path)]:
            if record.kind != "stage":
                scored = isinstance(record, TaskRecord) and record.task == TASKS[1]
                write.write(untimed(record) if scored else record)  # type: ignore[arg-type]
    browser = browse(html.write(made.path))
    browser.wait("document.querySelectorAll('#trade-chart .main-svg').length > 0")
    choose(browser, "trade-across", "ms")
    choose(browser, "trade-down", TASKS[1])
    said = "document.getElementById('trade-chart').textContent"
    assert browser.script(said) == f"No decode step was timed on {TASKS[1]}."
    for _ in range(2):
        choose(browser, "trade-down", TASKS[0])
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
    browser = browse(html.write(made.path))
    browser.wait("document.querySelectorAll('#trade-chart .main-svg').length > 0")
    choose(browser, "trade-across", "ms")
    points = browser.script(
        "document.getElementById('trade-chart').data.map(t => [t.y[0], t.marker.color, t.marker.symbol])"
    )
    assert len(points) == 14
    assert max(abs(y) for y, *_ in points) < 2, "of bars from -10 to 20"
    assert len({(colour, symbol) for _, colour, symbol in points}) == 14


@browsers
def test_without_timed_steps_the_chart_offers_bytes_alone(run: RunDirectory, tmp_path: Path, browse: Browse):
    made: Any = RunDirectory.create(tmp_path, "untimed", {}, "evalkit run")
    with made.stage("all") as write:
        for record in [*run.read(), *read_samples(run.path)]:
            if record.kind != "stage":
                write.write(untimed(record) if isinstance(record, TaskRecord) else record)  # type: ignore[arg-type]
    page = html.write(made.path)
    browser = browse(page)
    browser.wait("document.querySelectorAll('#trade-chart .main-svg').length > 0")
    assert browser.script("[...document.getElementById('trade-across').options].map(o => o.value)") == ["bytes"]  # fmt: skip
    assert "No decode step was timed in this run." in page.read_text(encoding="utf-8")
    assert browser.script("document.getElementById('trade-chart').data.length") == len(CANDIDATES)


@browsers
@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_needs_no_sideways_scrolling(page: Path, browse: Browse, dark: bool):
    browser = browse(page, dark=dark, width=390, height=844)
    browser.wait("document.querySelectorAll('#trade-chart .main-svg').length > 0")
    assert browser.script("document.documentElement.scrollWidth") <= 390
    left, right = browser.script("[...document.querySelectorAll('.sides > div')].map(box => box.getBoundingClientRect().x)")  # fmt: skip
    assert left == right, "transcripts stand one below the other"


@browsers
def test_a_long_task_name_breaks_on_a_phone(run: RunDirectory, tmp_path: Path, browse: Browse):
    made: Any = RunDirectory.create(tmp_path, "long", {}, "evalkit run")
    name = "someones_own_task_with_a_rather_long_name_of_2048_tokens"
    with made.stage("all") as write:
        for record in run.read():
            if record.kind != "stage":
                named = isinstance(record, TaskRecord) and record.task == TASKS[0]
                write.write(dataclasses.replace(record, task=name) if named else record)  # type: ignore[arg-type,call-arg]
    browser = browse(html.write(made.path), width=390, height=844)
    browser.wait("document.querySelectorAll('#trade-chart .main-svg').length > 0")
    assert name in browser.script("document.querySelector('#candidates p').textContent")
    assert browser.script("document.documentElement.scrollWidth") <= 390


@browsers
@pytest.mark.parametrize("dark", [False, True])
def test_text_of_the_page_can_be_read_in_either_scheme(page: Path, browse: Browse, dark: bool):
    """Contrast of at least 4.5 between ink and ground, of what is marked, selected, and of chart labels."""
    browser = browse(page, dark=dark)
    browser.wait("document.querySelectorAll('#trade-chart .main-svg').length > 0")
    colours = browser.script(
        "['body', '#flips .quiet', '#flip-list small', '.sides mark', '.sides pre', '#trade-chart .legendtext'].map(s => {"
        " const e = document.querySelector(s), style = getComputedStyle(e); let up = e;"
        " const clear = 'rgba(0, 0, 0, 0)'; while (getComputedStyle(up).backgroundColor === clear) up = up.parentElement;"
        " return [s, s.includes('legend') ? style.fill : style.color, getComputedStyle(up).backgroundColor]; })"
    )
    for what, ink, ground in colours:
        assert contrast(ink, ground) >= 4.5, what


def contrast(*colours: str) -> float:
    """WCAG's ratio of two CSS colours."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted(map(luminance, colours))
    return (high + 0.05) / (low + 0.05)


@browsers
def test_without_flips_the_page_has_no_browser(run: RunDirectory, tmp_path: Path, browse: Browse):
    made: Any = RunDirectory.create(tmp_path, "none", {}, "evalkit run")
    with made.stage("all") as write:
        for record in [*run.read(), *read_samples(run.path)]:
            if record.kind != "stage":
                same = isinstance(record, SampleRecord)
                write.write(dataclasses.replace(record, score=1.0) if same else record)  # type: ignore[call-arg]
    browser = browse(html.write(made.path))
    browser.wait("document.querySelectorAll('#trade-chart .main-svg').length > 0")
    assert browser.script("document.getElementById('flips')") is None
