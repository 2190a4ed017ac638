"""docs/statistics.md says what the statistics do."""

from pathlib import Path

import pytest

from benchmarks import statistics
from evalkit.errors import InputError

PAGE = Path(__file__).parents[2] / "docs" / "statistics.md"


@pytest.mark.parametrize(
    "rows",
    [
        statistics.sizes((50, 100, 250)),
        statistics.plans((0.01, 0.02)),
        statistics.coverage((50, 100, 250, 500)),
        statistics.looks((1, 3)),
    ],
    ids=["sizes", "plans", "coverage", "looks"],
)
def test_the_tables_of_the_page_are_what_the_script_computes(rows):
    page = PAGE.read_text(encoding="utf-8").splitlines()
    for row in rows:
        assert f"| {' | '.join(row)} |" in page


def test_what_the_page_promises_holds_in_every_row():
    cells = {name: list(_cells(name)) for name in statistics.TABLES}
    assert {name: len(rows) for name, rows in cells.items()} == {
        "sizes": 14, "plans": 5, "coverage": 7, "clusters": 18, "graded": 8, "looks": 4
    }  # fmt: skip
    for row in cells["sizes"]:
        assert max(_percent(row[5]), _percent(row[6])) <= 5.0
    for row in cells["plans"]:
        for cell, target in zip(row[1:], (0.8, 0.9) * 3, strict=True):
            assert target <= float(cell.split("(")[1].rstrip(")")) <= target + 0.03
    for row in cells["coverage"]:
        least = 94.5 if int(row[0].replace(",", "")) >= 500 else 93.0
        assert min(map(_percent, row[1:])) >= least
    for row in (*cells["clusters"], *cells["graded"], *cells["looks"]):
        assert _percent(row[-1]) <= 5.0
    # Tables of what goes wrong without it, too.
    for name in ("clusters", "graded"):
        assert max(_percent(row[-2]) for row in cells[name]) > 10.0


def test_clusters_taken_as_apart_err_and_by_their_effect_do_not():
    plain, adjusted, held = statistics.cluster_errors(100, 4, 0.3, runs=2_000, seed=1)
    assert plain > 0.08
    assert held <= adjusted < 0.065


def test_a_table_that_is_none_is_refused_by_its_name():
    with pytest.raises(InputError, match="no table lucks: there are sizes, "):
        statistics.main(PAGE, ["looks", "lucks"])


def _cells(name):
    text = PAGE.read_text(encoding="utf-8").split(f"<!-- table:{name} -->\n")[1].split("<!-- end -->")[0]
    for line in text.splitlines()[2:]:
        yield [cell.strip() for cell in line.strip("|").split("|")]


def _percent(cell):
    return float(cell.removesuffix(" %"))
