"""The page of a report in Chromium, and what its flips are made of."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from evalkit.records import (
    AnswerLengthRecord,
    AnswerShareRecord,
    FirstDifferenceRecord,
    RunDirectory,
    SampleRecord,
    TaskRecord,
    only,
    read_samples,
)
from evalkit.report import flips, html
from evalkit.report.answers import answers
from tests.report import answered
from tests.report.answered import BASELINE, CONTROL, DAMAGED, HOSTILE, TASKS, charted, rewritten, token_text
from tests.report.browser import Browser, browsers

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


@browsers
def test_charts_and_flips_are_drawn_without_a_network(page: Path, browse: Browse):
    browser = charted(browse, page)
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
    browser.choose("flip-candidate", candidate)
    browser.choose("flip-task", TASKS[1])
    for direction in ("lost", "gained"):
        browser.choose("flip-direction", direction)
        wanted = sorted(d for (name, task, d), way in flipped.items() if (name, task, way) == (candidate, TASKS[1], direction))  # fmt: skip
        assert shown(browser) == [f"{TASKS[1]}, document {d} {candidate}: {direction}" for d in wanted]
        assert (
            browser.script("document.getElementById('flip-count').textContent")
            == f"{len(wanted)} of {len(flipped)}"
        )
    browser.choose("flip-candidate", DAMAGED)
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
@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_needs_no_sideways_scrolling(page: Path, browse: Browse, dark: bool):
    browser = charted(browse, page, dark=dark, width=390, height=844)
    assert browser.script("document.documentElement.scrollWidth") <= 390
    left, right = browser.script("[...document.querySelectorAll('.sides > div')].map(box => box.getBoundingClientRect().x)")  # fmt: skip
    assert left == right, "transcripts stand one below the other"


@browsers
def test_a_long_task_name_breaks_on_a_phone(run: RunDirectory, tmp_path: Path, browse: Browse):
    name = "someones_own_task_with_a_rather_long_name_of_2048_tokens"
    made = rewritten(
        run, tmp_path, TaskRecord, lambda r: dataclasses.replace(r, task=name) if r.task == TASKS[0] else r
    )
    browser = charted(browse, made, width=390, height=844)
    assert name in browser.script("document.querySelector('#candidates p').textContent")
    assert browser.script("document.documentElement.scrollWidth") <= 390


@browsers
@pytest.mark.parametrize("dark", [False, True])
def test_text_of_the_page_can_be_read_in_either_scheme(page: Path, browse: Browse, dark: bool):
    """Contrast of at least 4.5 between ink and ground, of what is marked, selected, and of chart labels."""
    browser = charted(browse, page, dark=dark)
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
    made = rewritten(run, tmp_path, SampleRecord, lambda r: dataclasses.replace(r, score=1.0))
    browser = charted(browse, made)
    assert browser.script("document.getElementById('flips')") is None
