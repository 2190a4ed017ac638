"""summary.md: the tables a pull request shows."""

from collections.abc import Sequence
from pathlib import Path

from evalkit.records import EnvironmentRecord, Record, RunDirectory, only, read, write_whole
from evalkit.report import attribution, ranges, starts, tables
from evalkit.report.answers import answers
from evalkit.report.tables import Table


def write(run: Path) -> Path:
    """Write a run's summary beside its records and return where it lies.

    Raises:
        InputError: `run` is not a run directory that this version reads.
    """
    path = run / "summary.md"
    write_whole(path, render(RunDirectory(run), read(run)))
    return path


def render(run: RunDirectory, records: Sequence[Record]) -> str:
    """The summary as text."""
    lines = [f"# {run.path.name}", ""]
    for record in only(records, EnvironmentRecord):
        where = record.gpu or record.device
        lines += [
            f"{record.checkpoint} ({record.checkpoint_sha256[:12]}) on {where}, {record.dtype}, {record.started_utc}.",
            "",
        ]
    if told := tables.unjudged(records):
        lines += [f"**{told}**", ""]
    shown = (
        tables.verdicts,
        tables.candidates,
        tables.layers,
        tables.tasks,
        starts.scores,
        starts.next_tokens,
        answers,
        tables.scoring,
        tables.tokens,
    )
    for table in (make(records) for make in shown):
        if table.rows:
            lines += [f"## {table.title}", "", table.caption, "", *_rows(table), ""]
    if faults := ranges.sentences(records):
        lines += ["## Ranges", "", *(f"- {one}" for one in faults), ""]
    if blame := attribution.sentences(records):
        table = attribution.table(records)
        lines += [
            f"## {table.title}",
            "",
            *(f"- {one}" for one in blame),
            "",
            table.caption,
            "",
            *_rows(table),
            "",
        ]
    return "\n".join([*lines, "Repeat with:", "", f"    {run.command}", ""])


def _rows(table: Table) -> list[str]:
    rule = ["---" if place < table.text_columns else "---:" for place in range(len(table.columns))]
    return [f"| {' | '.join(map(_cell, row))} |" for row in (table.columns, rule, *table.rows)]


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")
