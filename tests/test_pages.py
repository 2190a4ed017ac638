"""Tables that benchmarks write into pages of docs/."""

from pathlib import Path

import pytest

from benchmarks import statistics
from benchmarks.pages import write_tables
from evalkit.errors import InputError

PAGE = "Before.\n\n<!-- table:a -->\n| old |\n<!-- end -->\n\nBetween.\n\n<!-- table:b -->\n<!-- end -->\nAfter.\n"


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.md"
    path.write_text(PAGE, encoding="utf-8")
    return path


def test_tables_take_their_places_letter_by_letter_and_the_prose_stays(page: Path):
    """A backslash is a backslash."""
    lines = [r"| \1 |", r"| \g<0> 2 \n |"]
    write_tables(page, {"b": lines, "a": ["| new |"]})
    want = PAGE.replace("| old |\n", "| new |\n").replace("b -->\n", "b -->\n" + "\n".join(lines) + "\n")
    assert page.read_text(encoding="utf-8") == want
    write_tables(page, {"a": ["| old |"], "b": []})
    assert page.read_text(encoding="utf-8") == PAGE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PAGE.replace("table:b", "table:c"), "page.md has 0 places for the table b: one is right"),
        (PAGE + PAGE, "page.md has 2 places for the table a"),
        (PAGE.replace("| old |\n<!-- end -->", "| old |"), "place for the table a does not close"),
        (PAGE.rpartition("<!-- end -->")[0], "place for the table b does not close"),
    ],
    ids=["no place", "two places", "open until the next", "open to the end"],
)
def test_a_page_without_one_place_a_table_is_refused_before_anything_is_computed(page, text, message):
    page.write_text(text, encoding="utf-8")

    def never():
        pytest.fail("was asked for its lines")
        yield ""

    with pytest.raises(InputError, match=message):
        write_tables(page, {"a": never(), "b": never()})
    assert page.read_text(encoding="utf-8") == text


def test_the_tables_of_the_statistics_are_printed_and_written(page: Path, monkeypatch, capsys):
    tables = {name: ((name, "n"), lambda: iter([("x", "1"), ("y", "2")])) for name in ("a", "b")}
    monkeypatch.setattr(statistics, "TABLES", tables)
    statistics.main(page)
    rows = "| a | n |\n| ---: | ---: |\n| x | 1 |\n| y | 2 |\n"
    assert f"<!-- table:a -->\n{rows}<!-- end -->" in page.read_text(encoding="utf-8")
    assert capsys.readouterr().out == rows + rows.replace("a", "b")
