import json
import random
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from evalkit import cli
from evalkit.errors import InputError
from evalkit.records import RunDirectory, VerdictRecord
from evalkit.report import dashboard, html, tables
from evalkit.report.history import History, StoredLayer, StoredResult, StoredRun, StoredScore
from evalkit.report.trends import tiles
from tests.report.browser import Browser, browsers
from tests.report.nights import (
    BF16,
    DAMAGED,
    FIRST,
    GUILTY,
    SOUND,
    TASKS,
    commit_of,
    make_store,
    night_records,
    write_run,
)

NIGHTS, DROP_AT = 120, 100


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> History:
    """120 nights, the newest three hours ago, with 2 points lost on one task from the hundredth on."""
    newest = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=3)
    return make_store(tmp_path_factory.mktemp("nights"), NIGHTS, drop_at=DROP_AT, newest=newest)


@pytest.fixture(scope="module")
def site(store: History) -> dashboard.Site:
    return dashboard.write(store.path, store.path.parent / "site")


def data_of(page: Path) -> dict[str, Any]:
    text = re.search(
        r'<script id="data" type="application/json">(.*?)</script>',
        page.read_text(encoding="utf-8"),
        re.DOTALL,
    )
    assert text is not None
    return json.loads(text[1])


def small_store(path: Path, nights: int, **last: Any) -> History:
    """A store of a few nights, the last with other options."""
    history = History(path / "store", create=True)
    rng = random.Random(0)
    for night in range(nights):
        options = last if night == nights - 1 else {}
        history.add(write_run(path / "runs", night, night_records(night, rng, **options)))
    return history


def hours_after(nights: int, hours: float) -> datetime:
    return FIRST + timedelta(days=nights - 1, hours=hours)


def test_the_page_holds_the_stores_values(store: History, site: dashboard.Site):
    data = data_of(site.page)
    runs = [run.run for run in store.read(StoredRun)]
    scores = {(r.run, r.candidate, r.task): r for r in store.read(StoredScore)}
    results = {(r.run, r.candidate): r for r in store.read(StoredResult)}
    layers = {(r.run, r.candidate, r.mode, r.layer): r.relative_l2 for r in store.read(StoredLayer)}
    assert {tile["candidate"] for tile in data["tiles"]} == {BF16, DAMAGED, SOUND}
    for tile in data["tiles"]:
        name, nights = tile["candidate"], [runs[place] for place in tile["nights"]]
        assert nights == runs
        series = {one["name"]: one for one in tile["series"]}
        for task in TASKS:
            assert series[task]["values"] == [scores[run, name, task].score for run in nights]
            assert series[task]["n"] == [1000] * NIGHTS
        assert series["KL divergence"]["values"] == [results[run, name].kl_nats for run in nights]
        assert tile["verdicts"] == [results[run, name].verdict for run in nights]
        for mode, found in tile["layers"].items():
            for layer, values in zip(found["layers"], found["values"], strict=True):
                assert values == pytest.approx([layers[run, name, mode, layer] for run in nights], rel=1e-5)


def test_the_planted_drop_is_found_at_its_commit_within_three_nights(store: History):
    shown = {tile.candidate: tile for tile in tiles(store)}
    assert shown[BF16].events == ()
    assert shown[SOUND].events == ()
    (event,) = shown[DAMAGED].events
    assert event.commit_before == commit_of(DROP_AT - 1)
    assert event.commit_after == commit_of(DROP_AT)
    assert event.found <= DROP_AT + 2
    assert {shown[DAMAGED].series[place].name for place, _, _ in event.series} == {
        TASKS[0], "KL divergence", "attention error, worst layer",
    }  # fmt: skip
    assert event.guilty is not None
    assert event.guilty.layer == GUILTY
    assert event.guilty.ratio == pytest.approx(2.2, rel=0.02)
    assert event.packages == ("torch 2.11.0 → 2.12.0",)


def test_a_change_that_no_layer_shows_blames_none(tmp_path: Path):
    history = History(tmp_path / "store", create=True)
    rng = random.Random(1)
    for night in range(30):
        records = [
            r
            if getattr(r, "task", None) != TASKS[0] or night < 20
            else type(r)(**{**vars(r), "score": r.score - 0.05})  # type: ignore[attr-defined]
            for r in night_records(night, rng)
        ]
        history.add(write_run(tmp_path / "runs", night, records))
    events = [tile.events for tile in tiles(history)]
    assert [[event.at for event in found] for found in events] == [[20]] * 3
    assert all(found[0].guilty is None for found in events)


def test_commits_between_two_nights_are_named(tmp_path: Path):
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=A", "-c", "user.email=a@example.com"]
        return subprocess.run(
            ["git", "-C", str(tmp_path / "repo"), *who, *arguments],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    (tmp_path / "repo").mkdir()
    git("init", "-q")
    shas = []
    for text in ("first", "faster rows <b>", "a kernel of its own"):
        git("commit", "-q", "--allow-empty", "-m", text)
        shas.append(git("rev-parse", "HEAD"))
    history = History(tmp_path / "store", create=True)
    rng = random.Random(0)
    for night in range(30):
        records = night_records(night, rng, drop_at=20)
        sha = shas[0] if night < 20 else shas[2] + "-dirty"
        records[0] = type(records[0])(**{**vars(records[0]), "commit": sha})
        history.add(write_run(tmp_path / "runs", night, records))
    (event,) = next(tile.events for tile in tiles(history, tmp_path / "repo") if tile.candidate == DAMAGED)
    assert [line.partition(" ")[2] for line in event.commits] == ["a kernel of its own", "faster rows <b>"]
    assert next(tile.events for tile in tiles(history) if tile.events)[0].commits == ()
    page = dashboard.write(history.path, tmp_path / "site", repository=tmp_path / "repo").page
    assert "<b>" not in page.read_text(encoding="utf-8")


def test_a_quiet_night_raises_no_alert(tmp_path: Path):
    history = small_store(tmp_path, 3)
    assert dashboard.write(history.path, tmp_path / "site", now=hours_after(3, 30)).alerts == ()
    assert "No alert" in (tmp_path / "site" / "index.html").read_text(encoding="utf-8")


def test_a_missing_run_is_an_alert(tmp_path: Path):
    history = small_store(tmp_path, 3)
    assert dashboard.write(history.path, tmp_path / "site", now=hours_after(3, 36)).alerts == ()
    (alert,) = dashboard.write(history.path, tmp_path / "site", now=hours_after(3, 36.1)).alerts
    assert alert.startswith("Missing: no run of dsa-nano on NVIDIA H200 for 36 h")
    assert alert in (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert (
        dashboard.write(history.path, tmp_path / "site", now=hours_after(3, 900), expected_h=0).alerts == ()
    )
    assert len(dashboard.write(history.path, tmp_path / "site", now=hours_after(3, 900)).alerts) == 1


def test_a_gpu_that_stopped_is_missed_until_it_is_retired(tmp_path: Path):
    history = History(tmp_path / "store", create=True)
    rng = random.Random(0)
    for night in range(20):
        history.add(write_run(tmp_path / "h200", night, night_records(night, rng)))
        if night < 4:
            history.add(
                write_run(tmp_path / "b200", night, night_records(night, rng, gpu="NVIDIA B200, SM100"))
            )
    assert dashboard.write(history.path, tmp_path / "site", now=hours_after(20, 3)).alerts == ()
    with_b200 = dashboard.write(
        history.path, tmp_path / "site", now=hours_after(20, 3) - timedelta(days=6)
    ).alerts
    assert [alert[:42] for alert in with_b200] == ["Missing: no run of dsa-nano on NVIDIA B200"]


def test_a_night_that_was_judged_by_another_policy_afterwards_is_not_shown_as_passed(tmp_path: Path):
    history = small_store(tmp_path, 2, verdict="WORSE")
    records = [
        replace(r, post_hoc=True) if isinstance(r, VerdictRecord) else r
        for r in night_records(2, random.Random(2), verdict="NON-INFERIOR")
    ]
    history.add(write_run(tmp_path / "runs", 2, records))
    site = dashboard.write(history.path, tmp_path / "site", now=hours_after(3, 1))
    assert sorted(site.alerts) == [
        f"Verdict: {name} (dsa-nano on NVIDIA H200) went from WORSE to INCONCLUSIVE."
        for name in sorted((DAMAGED, SOUND))
    ]
    page = site.page.read_text(encoding="utf-8")
    assert page.count('<p class="verdict INCONCLUSIVE">') == 2
    assert 'class="verdict NON-INFERIOR"' not in page


def test_a_verdict_that_changed_is_an_alert_on_its_night_alone(tmp_path: Path):
    history = small_store(tmp_path, 3, verdict="INCONCLUSIVE")
    alerts = dashboard.write(history.path, tmp_path / "site", now=hours_after(3, 1)).alerts
    assert sorted(alerts) == [
        f"Verdict: {name} (dsa-nano on NVIDIA H200) went from NON-INFERIOR to INCONCLUSIVE."
        for name in sorted((DAMAGED, SOUND))
    ]
    records = night_records(3, random.Random(3), verdict="INCONCLUSIVE")
    history.add(write_run(tmp_path / "runs", 3, records))
    assert dashboard.write(history.path, tmp_path / "site", now=hours_after(4, 1)).alerts == ()


def test_a_change_is_an_alert_on_the_night_it_is_found(tmp_path: Path):
    history = make_store(tmp_path, 23, drop_at=20)
    found = dashboard.write(history.path, tmp_path / "site", now=hours_after(23, 1)).alerts
    assert [alert.partition(":")[0] for alert in found] == ["Change"]
    assert "between 0019c0ff and 0020c0ff" in found[0]
    assert f"{TASKS[0]} −" in found[0]


def test_the_command_exits_with_20_on_an_alert(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    history = small_store(tmp_path, 2)
    for options, code in (([], 20), (["--expected", "0"], 0)):
        with pytest.raises(SystemExit) as caught:
            cli.main(["dashboard", str(history.path), "--out", str(tmp_path / "site"), *options])
        assert caught.value.code == code
        out, err = capsys.readouterr()
        assert out == f"{tmp_path / 'site' / 'index.html'}\n"
        assert err.startswith("evalkit: Missing:") == bool(code)


def test_what_is_no_history_or_an_empty_one_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="no history at"):
        dashboard.write(tmp_path / "nowhere", tmp_path / "site")
    history = History(tmp_path / "store", create=True)
    with pytest.raises(InputError, match="has no run"):
        dashboard.write(history.path, tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_a_site_holds_the_stores_reports_and_no_other(tmp_path: Path):
    history = small_store(tmp_path, 4)
    dashboard.write(history.path, tmp_path / "site")
    history.prune(2)
    again = history.reports / history.read(StoredRun)[0].report
    again.unlink()
    again.write_text("another text")
    dashboard.write(history.path, tmp_path / "site")
    reports = {path.name: path.read_text() for path in (tmp_path / "site" / "reports").iterdir()}
    assert reports == {path.name: path.read_text() for path in history.reports.iterdir()}
    assert len(reports) == 2


def test_names_cannot_become_markup(tmp_path: Path):
    history = History(tmp_path / "store", create=True)
    records = night_records(0, random.Random(0))
    evil = "</script><img src=x onerror=alert(1)>"
    changed = [type(r)(**{**vars(r), "task": evil + r.task}) if hasattr(r, "task") else r for r in records]
    history.add(write_run(tmp_path / "runs", 0, changed))
    text = dashboard.write(history.path, tmp_path / "site").page.read_text(encoding="utf-8")
    assert "<img" not in text
    assert {s["name"] for t in data_of(tmp_path / "site" / "index.html")["tiles"] for s in t["series"]} >= {
        evil + task for task in TASKS
    }


def test_the_page_names_no_address(site: dashboard.Site):
    text = site.page.read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\s\"']*", text)) <= {"http://www.w3.org/2000/svg"}
    assert "plotly" not in text.lower()


def test_a_candidate_without_numbers_is_a_tile(tmp_path: Path):
    records = [r for r in night_records(0, random.Random(0)) if r.kind in ("environment", "candidate")]
    history = History(tmp_path / "store", create=True)
    history.add(write_run(tmp_path / "runs", 0, records))
    assert len(data_of(dashboard.write(history.path, tmp_path / "site").page)["tiles"]) == 3


@pytest.mark.slow
def test_five_hundred_runs_are_written_in_twenty_seconds(tmp_path: Path):
    """Of 61 layers; rows are multiplied in the database, since what is measured is the site."""
    history = make_store(tmp_path, 1, layers=61)
    copies = 500
    with history._transaction() as db:
        for table in ("runs", "results", "layers", "scores"):
            columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
            rows = [dict(zip(columns, row, strict=True)) for row in db.execute(f"SELECT * FROM {table}")]
            for night in range(1, copies):
                moved = {
                    "run": f"{night:016d}",
                    "started_utc": (FIRST + timedelta(days=night)).isoformat(),
                    "report": f"{night:016d}.html",
                }
                new = [tuple((row | {k: v for k, v in moved.items() if k in row}).values()) for row in rows]
                db.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(columns))})", new)
    for night in range(1, copies):
        (history.reports / f"{night:016d}.html").write_text("a report")
    began = time.process_time()
    site = dashboard.write(history.path, tmp_path / "site", now=hours_after(copies, 1))
    assert time.process_time() - began < 20
    assert len(data_of(site.page)["runs"]) == copies
    assert site.page.stat().st_size < 8e6


@browsers
def test_the_page_shows_what_the_store_holds(
    store: History, site: dashboard.Site, browse: Callable[..., Browser]
):
    browser = browse(site.page)
    last = store.read(StoredRun)[-1].run
    scores = {(r.candidate, r.task): r.score for r in store.read(StoredScore) if r.run == last}
    kl = {r.candidate: r.kl_nats for r in store.read(StoredResult) if r.run == last}
    shown = browser.script(
        "[...document.querySelectorAll('.tile')].map(t => [t.querySelector('h3').textContent, t.querySelector('.verdict').textContent, "
        "Object.fromEntries([...t.querySelectorAll('tr')].map(r => [r.dataset.series, [r.lastElementChild.textContent, Number(r.lastElementChild.dataset.value)]])),"
        "t.querySelectorAll('.spark polyline').length])"
    )
    assert {name for name, *_ in shown} == {BF16, DAMAGED, SOUND}
    for name, verdict, rows, sparks in shown:
        for task in TASKS:
            assert rows[task] == [f"{100 * scores[name, task]:.1f}%", scores[name, task]]
        assert rows["KL divergence"] == [tables.number(kl[name]), kl[name]]
        assert sparks == (2 if name == BF16 else 4)
        assert {DAMAGED: "WORSE", SOUND: "NON-INFERIOR", BF16: "not judged"}[name] in verdict
    assert browser.requests == [site.page.as_uri()]
    assert "No alert" in browser.script("document.getElementById('alerts').textContent")


@browsers
def test_three_clicks_lead_from_the_tile_to_the_guilty_layer(
    run: RunDirectory, tmp_path: Path, browse: Callable[..., Browser]
):
    """The report that ends the way is a real one: its plotly.js is the copy that reports share."""
    page = html.write(run.path).read_text(encoding="utf-8")
    newest = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=1)
    history = make_store(tmp_path, 24, drop_at=16, page=page, newest=newest)
    browser = browse(dashboard.write(history.path, tmp_path / "site").page)
    place = browser.script(
        f"[...document.querySelectorAll('.tile')].findIndex(t => t.textContent.includes('{DAMAGED}'))"
    )

    browser.click(f"#tile-t{place} h3 a")
    browser.wait("document.querySelector('#detail .event')")
    assert browser.script("document.querySelector('tr.guilty .layer').textContent") == f"layer {GUILTY}"
    assert f"Layer {GUILTY} moved most" in browser.script("document.querySelector('.blame').textContent")
    assert "0015c0ff" in browser.script("document.querySelector('.event').textContent")
    rows = browser.script(
        "[...document.querySelectorAll('.layers table')[0].querySelectorAll('tbody tr')].map(r => [...r.children].map(c => c.textContent))"
    )
    event = next(tile.events[0] for tile in tiles(history) if tile.candidate == DAMAGED)
    assert [row[:3] for row in rows] == [
        [f"layer {m.layer}", tables.number(m.before), tables.number(m.after)]
        for m in event.layers["isolated"]
    ]

    browser.click("tr.guilty .layer")
    browser.wait("document.querySelector('.trend polyline')")
    points = browser.script("document.querySelector('.trend polyline').getAttribute('points')").split()
    assert len(points) == 24

    browser.click(".trend .at-layers")
    browser.wait(
        "location.href.includes('/reports/') && document.querySelector('#layer-charts .js-plotly-plot')"
    )
    assert browser.script("location.hash") == "#layers"
    runs = {r.commit_sha: r.report for r in history.read(StoredRun)}
    assert browser.script("location.pathname").endswith(f"/reports/{runs[commit_of(16)]}")


@browsers
def test_filters_leave_what_was_asked_for(site: dashboard.Site, browse: Callable[..., Browser]):
    browser = browse(site.page)

    def choose(key: str, value: str) -> list[str]:
        browser.script(
            f"{{ const s = document.getElementById('{key}'); s.value = {json.dumps(value)}; s.dispatchEvent(new Event('change')); }}"
        )
        return browser.script(
            "[...document.querySelectorAll('.tile')].filter(t => t.checkVisibility()).map(t => t.querySelector('h3').textContent)"
        )

    assert choose("format", "fp8_e4m3") == [DAMAGED]
    assert browser.script("document.getElementById('shown').textContent") == "1 of 3 candidates"
    assert choose("verdict", "NON-INFERIOR") == []
    assert choose("format", "") == [SOUND]
    assert len(choose("verdict", "")) == 3
    assert len(choose("task", TASKS[1])) == 3
    visible = browser.script(
        "[...document.querySelectorAll('.tile tr')].filter(r => r.checkVisibility()).map(r => r.dataset.series)"
    )
    assert TASKS[1] in visible
    assert TASKS[0] not in visible


@browsers
def test_the_keyboard_alone_opens_a_tile_and_goes_back(site: dashboard.Site, browse: Callable[..., Browser]):
    browser = browse(site.page)
    for _ in range(40):
        browser.key("Tab", 9)
        if browser.script("document.activeElement.closest('.tile') !== null"):
            break
    opened = browser.script("document.activeElement.textContent")
    browser.key("Enter", 13, "\r")
    browser.wait("!document.getElementById('detail').hidden")
    assert browser.script("document.querySelector('#detail h2').textContent") == opened
    assert not browser.script("document.getElementById('overview').checkVisibility()")
    browser.key("Escape", 27)
    browser.wait("document.getElementById('detail').hidden")
    assert browser.script("document.activeElement.textContent") == opened


@browsers
def test_charts_hold_every_night_and_say_what_they_show(
    store: History, site: dashboard.Site, browse: Callable[..., Browser]
):
    browser = browse(site.page)
    place = next(i for i, tile in enumerate(tiles(store)) if tile.candidate == DAMAGED)
    browser.script(f"location.hash = 't{place}'")
    browser.wait("document.querySelectorAll('.charts polyline').length === 4")
    counts = browser.script(
        "[...document.querySelectorAll('.charts polyline')].map(p => p.getAttribute('points').split(' ').length)"
    )
    assert counts == [NIGHTS] * 4
    assert browser.script("document.querySelectorAll('.charts .mark').length") == 3
    last = store.read(StoredRun)[-1]
    score = next(
        r for r in store.read(StoredScore) if (r.run, r.candidate, r.task) == (last.run, DAMAGED, TASKS[0])
    )
    reading = browser.script("document.querySelector('.charts .reading').textContent")
    assert reading.startswith(f"{last.started_utc[:10]}: {100 * score.score:.1f}%")
    assert "n = 1,000" in reading
    assert browser.script("document.querySelectorAll('#runs tbody tr').length") == 30
    browser.click("#runs > button")
    assert browser.script("document.querySelectorAll('#runs tbody tr').length") == NIGHTS


@browsers
@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_it_without_scrolling_sideways(
    dark: bool, site: dashboard.Site, browse: Callable[..., Browser]
):
    browser = browse(site.page, width=390, height=844, dark=dark)
    for address in ("", "#t0", "#t2"):
        browser.script(f"location.hash = '{address}'")
        browser.wait(f"document.getElementById('detail').hidden === {str(not address).lower()}")
        assert browser.script("document.documentElement.scrollWidth") <= 390
    assert browser.script("getComputedStyle(document.body).backgroundColor") == (
        "rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)"
    )


@browsers
@pytest.mark.parametrize("dark", [False, True])
def test_every_word_stands_out_from_its_ground(
    dark: bool, site: dashboard.Site, browse: Callable[..., Browser]
):
    """WCAG's contrast of 4.5 for text."""
    browser = browse(site.page, dark=dark)
    browser.script("location.hash = 't2'")
    browser.wait("!document.getElementById('detail').hidden")
    browser.script("document.getElementById('overview').hidden = false")
    least = browser.script("""(() => {
      const bits = c => (c.match(/[\\d.]+/g) || []).map(Number);
      const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
      const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (c.startsWith("rgb(")) return bits(c); } return [255, 255, 255]; };
      let least = [99, ""];
      for (const e of document.querySelectorAll("body *")) {
        if (e instanceof SVGElement || !e.checkVisibility() || ![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
        const [a, b] = [light(bits(getComputedStyle(e).color)), light(ground(e))];
        const contrast = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
        if (contrast < least[0]) least = [contrast, e.outerHTML.slice(0, 120)];
      }
      return least; })()""")
    assert least[0] >= 4.5, least


@browsers
def test_a_page_that_grew_old_says_so(tmp_path: Path, browse: Callable[..., Browser]):
    """Written in time, and read long after."""
    history = small_store(tmp_path, 2)
    browser = browse(dashboard.write(history.path, tmp_path / "site", now=hours_after(2, 1)).page)
    assert "the newest run on this page started" in browser.script(
        "document.getElementById('stale').textContent"
    )
    assert "No alert" not in browser.script("document.getElementById('alerts').textContent")


@browsers
def test_it_prints(site: dashboard.Site, browse: Callable[..., Browser]):
    browser = browse(site.page, dark=True)
    browser.call(
        "Emulation.setEmulatedMedia",
        media="print",
        features=[{"name": "prefers-color-scheme", "value": "dark"}],
    )
    assert browser.script("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not browser.script("document.getElementById('filters').checkVisibility()")
    assert browser.pdf().startswith(b"%PDF")


@pytest.mark.parametrize("command", ["dashboard", "export", "history add", "history list", "history prune"])
def test_help_holds_an_example(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        cli.main([*command.split(), "--help"])
    assert caught.value.code == 0
    assert f"Example: evalkit {command}" in capsys.readouterr().out
