import io
import json
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import pytest
from rich.console import Console

from evalkit import cli
from evalkit.records import (
    LayerRecord,
    PolicyRecord,
    RunDirectory,
    StageRecord,
    TaskRecord,
    VerdictRecord,
    only,
)
from evalkit.report import html, markdown, plots, tables, terminal, where
from tests.report.conftest import layer_record


class Page(HTMLParser):
    """The text of table cells, and every address that a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.fetched: list[str] = []
        self.scripts = 0
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "wbr":
            return
        self._cell = tag in ("td", "th")
        self.scripts += tag == "script"
        if self._cell:
            self.cells.append("")
        self.fetched += [
            value or ""
            for name, value in attrs
            if name in ("src", "srcset") or (tag == "link" and name == "href")
        ]

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.cells[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._cell = False


def payload(page: str, name: str) -> list[dict]:
    return json.loads(re.search(rf"^const {name} = (.*);$", page, re.MULTILINE)[1])


def test_every_table_stands_in_the_page_cell_by_cell(run: RunDirectory):
    records = run.read()
    page = Page(html.write(run.path).read_text(encoding="utf-8"))
    made = (
        tables.candidates, tables.tasks, where.amplification, where.direction, tables.rungs, tables.tokens, tables.selection, tables.scoring, tables.ranges, tables.probes,
        tables.provenance, tables.environment,
    )  # fmt: skip
    expected = [
        cell
        for table in (make(records) for make in made)
        for row in (table.columns, *table.rows)
        for cell in row
    ]
    assert page.cells == expected


def test_the_verdict_stands_first_with_its_reason_whole(run: RunDirectory):
    judged = {
        "policy": "p",
        "policy_sha256": "d" * 64,
        "post_hoc": False,
        "against": None,
        "judged_utc": "2026-01-31T13:00:00+00:00",
    }
    said = [
        ("all that decide", "overall", "WORSE", "WORSE for <b>.", "nothing"),
        ("b", "candidate", "WORSE", "2 points < 3 & more.", "Another format."),
        ("b", "scope", "NON-INFERIOR", "not shown here", "nothing"),
    ]
    with run.stage("gate") as write:
        for candidate, check, verdict, reason, needs in said:
            write.write(
                VerdictRecord(
                    candidate=candidate, check=check, verdict=verdict, reason=reason, needs=needs, **judged
                )
            )
    text = html.write(run.path).read_text(encoding="utf-8")
    cards = re.findall(r'<li class="([A-Z-]+)">(.*?)</li>', text, re.DOTALL)
    plain = [" ".join(unescape(re.sub("<[^>]*>", " ", card)).split()) for _, card in cards]
    assert [verdict for verdict, _ in cards] == ["WORSE", "WORSE"]
    assert plain == [
        "▼ WORSE all that decide WORSE for <b>.",
        "▼ WORSE b 2 points < 3 & more. What it would take: Another format.",
    ]
    assert text.index("2 points") < text.index('<section id="candidates">')


def test_a_run_that_nobody_judged_says_so_at_its_top(run: RunDirectory):
    records = [r for r in run.read() if r.kind not in ("verdict", "policy")]
    for page in (html.render(run, records), markdown.render(run, records)):
        assert "Not judged: this run was made for no policy and decides nothing" in page
    # Whose tasks differ; one that all answer right shows no loss.
    assert "too easy" not in tables.unjudged(records)
    full = [
        replace(r, score=1.0, baseline_score=1.0)
        if isinstance(r, TaskRecord) and r.task == "registers"
        else r
        for r in records
    ]
    assert "Every candidate scores 100.0% on registers: too easy to show a loss." in tables.unjudged(full)
    stored = PolicyRecord(name="signed", sha256="0" * 64, text="{}")
    assert "evalkit gate judges this run under the policy that it stored, signed" in tables.unjudged(
        [stored, *records]
    )
    assert not tables.unjudged([r for r in records if not isinstance(r, TaskRecord)])


def test_curves_hold_the_records_values(run: RunDirectory):
    page = html.render(run, run.read())
    first = payload(page, "views")[0]
    assert (first["probe"], first["phase"], first["frozen"]) == ("attention", "decode", "none")
    curves = {curve["name"]: curve for curve in first["modes"]["isolated"]}
    for candidate in ("fp8_e4m3:one@flashinfer", "fp8_ds_mla@flashmla"):
        assert curves[candidate]["value"] == [
            r.relative_l2
            for r in only(run.read(), LayerRecord)
            if (r.candidate, r.phase, r.mode, r.probe, r.rung)
            == (candidate, "decode", "isolated", "attention", "total")
        ]
    assert [curve["role"] for curve in first["modes"]["isolated"]] == [
        "control",
        "candidate",
        "candidate",
        "candidate",
        "floor",
    ]
    assert "floor: other-kernel (bf16@reference)" in curves


def test_a_curve_without_a_logarithm_is_named_so():
    zero = [layer_record("a", layer, 0.0) for layer in range(2)]
    none = [layer_record("b", layer, None) for layer in range(2)]
    (view,) = plots.layer_views([*zero, *none])
    assert [curve["name"] for curve in view["modes"]["isolated"]] == ["a (0 throughout)", "b (not measured)"]
    assert view["modes"]["isolated"][0]["value"] == [None, None]


def test_the_page_needs_no_network_and_holds_plotly_once(run: RunDirectory):
    text = html.render(run, run.read())
    page = Page(text)
    assert page.fetched == []
    assert page.scripts == 2
    assert text.count("plotly.js v") == 1
    assert "default-src 'none'" in text


def test_what_a_run_was_called_cannot_become_markup(run: RunDirectory):
    text = html.render(run, run.read())
    assert "evalkit run --config &lt;made-up&gt;.toml" in text
    assert "fp8 &lt;asked&gt;" in text
    assert "<asked>" not in text


def test_a_run_without_figures_is_a_page_without_plotly(run: RunDirectory):
    text = html.render(run, [StageRecord(stage="start", wall_s=1.0)])
    assert "<script" not in text
    assert len(text) < 20_000


def test_the_summary_holds_the_tables(run: RunDirectory):
    text = markdown.write(run.path).read_text(encoding="utf-8")
    for table in (tables.candidates(run.read()), tables.layers(run.read()), tables.tasks(run.read())):
        for row in table.rows:
            assert f"| {' | '.join(row)} |" in text
    assert "evalkit run --config <made-up>.toml" in text


def test_a_bar_in_a_cell_does_not_split_it():
    assert tables.ranges([]).columns[3] == "max |x|"
    assert markdown._rows(tables.ranges([]))[0].count(r"\|") == 2


@pytest.mark.parametrize("width", [80, 132])
def test_the_terminal_shows_every_candidate_and_its_numbers(width: int, run: RunDirectory):
    out = io.StringIO()
    terminal.show(run.path, Console(file=out, width=width))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width
    for row in tables.candidates(run.read()).rows:
        assert row[0] in text
    for row in tables.layers(run.read()).rows:
        assert all(cell in text for cell in row)


def test_report_writes_both_files_and_says_where(run: RunDirectory, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        cli.main(["report", str(run.path)])
    assert caught.value.code == 0
    assert capsys.readouterr().out.rstrip().endswith("report.html")
    assert (run.path / "report.html").is_file()
    assert (run.path / "summary.md").is_file()
