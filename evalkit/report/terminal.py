"""The tables a terminal shows when a run ends."""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from evalkit.records import Record, read
from evalkit.report import attribution, ranges, starts, tables
from evalkit.report.answers import answers
from evalkit.report.tables import Table

# Columns that summary.md and report.html have room for.
LEFT_TO_FILES = ("loss:", "Δ ")


def show(run: Path, console: Console | None = None) -> None:
    """Print the candidates, layers and tasks of a run.

    Raises:
        InputError: `run` is not a run directory that this version reads.
    """
    # A log has no width of its own, and 80 columns would fold its numbers.
    console = console or Console(width=None if sys.stdout.isatty() else 132)
    records = read(run)
    for table in (
        tables.candidates(records),
        tables.layers(records),
        tables.tasks(records),
        starts.scores(records),
        starts.next_tokens(records),
        answers(records, brief=True),
    ):
        if table.rows:
            console.print(_rich(table))
            console.print(Text(table.caption, style="dim"))
            console.print()
    for sentence in [*ranges.sentences(records), *attribution.sentences(records)]:
        console.print(Text(sentence))


def show_verdicts(records: Sequence[Record], console: Console | None = None) -> None:
    """Print the last judgement in `records`: each verdict, its reason, and what it would take."""
    console = console or Console(width=None if sys.stdout.isatty() else 132)
    table = tables.verdicts(records)
    for candidate, verdict, reason, needs in table.rows:
        console.print(Text(f"{verdict}  {candidate}", style="bold"))
        console.print(Text(reason))
        if verdict != "NON-INFERIOR":
            console.print(Text(f"It would take: {needs}", style="dim"))
        console.print()
    console.print(Text(table.caption, style="dim"))


def _rich(table: Table) -> RichTable:
    made = RichTable(
        title=table.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    shown = [place for place, column in enumerate(table.columns) if not column.startswith(LEFT_TO_FILES)]
    for place in shown:
        text = place < table.text_columns
        heading = Text(table.columns[place].replace("@", "\n@"))
        made.add_column(heading, justify="left" if text else "right", no_wrap=text)
    for row in table.rows:
        made.add_row(*(Text(row[place]) for place in shown))
    return made
