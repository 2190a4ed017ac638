"""Tables in a Markdown page, between `<!-- table:NAME -->` and `<!-- end -->`; the prose around stays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from evalkit.errors import InputError

END = "<!-- end -->"


def write_tables(page: Path, tables: Mapping[str, Iterable[str]]) -> None:
    """Replace what stands in each table's place by its lines, which are asked for once all places are found.

    Raises:
        InputError: a table has no place in the page, or several; nothing is written.
    """
    text = page.read_text(encoding="utf-8")
    for name in tables:
        _around(page, text, name)
    for name, lines in tables.items():
        before, after = _around(page, text, name)
        text = before + "".join(f"{line}\n" for line in lines) + after
    page.write_text(text, encoding="utf-8")


def _around(page: Path, text: str, name: str) -> tuple[str, str]:
    """What stands before a table's lines, and what after them."""
    mark = f"<!-- table:{name} -->\n"
    count = text.count(mark)
    if count != 1:
        raise InputError(f"{page} has {count} places for the table {name}: one is right")
    before, _, rest = text.partition(mark)
    table, end, after = rest.partition(END)
    if not end or "<!-- " in table:
        raise InputError(f"{page}: the place for the table {name} does not close: {END} is missing")
    return before + mark, end + after
