"""The table of what became of the answers themselves."""

from collections.abc import Sequence

from evalkit.records import (
    AnswerLengthRecord,
    AnswerShareRecord,
    FirstDifferenceRecord,
    Record,
    only,
)
from evalkit.report.tables import NA, Table, interval, number, share


def answers(records: Sequence[Record], *, brief: bool = False) -> Table:
    """A row a task and candidate: shares of answers that went wrong in form, lengths, and how soon answers part.

    `brief` leaves out the intervals, for a terminal.
    """
    shares = {(r.task, r.candidate, r.measure): r for r in only(records, AnswerShareRecord)}
    parting = {(r.task, r.candidate): r for r in only(records, FirstDifferenceRecord)}
    names = list(dict.fromkeys(measure for *_, measure in shares))
    rows = []
    for length in sorted(only(records, AnswerLengthRecord), key=lambda r: r.task):
        where = (length.task, length.candidate)
        found = [shares.get((*where, name)) for name in names]
        part = parting.get(where)
        rows.append(
            (
                *where,
                f"{length.n:,}",
                *(
                    NA
                    if r is None
                    else share(r.share) + ("" if brief else f" {interval(r.share_lower, r.share_upper)}")
                    for r in found
                ),
                f"{length.mean_tokens:,.1f}",
                NA if part is None else f"{part.differing:,}",
                NA
                if part is None
                else number(part.per_1000_tokens)
                + ("" if brief else f" {interval(part.lower, part.upper, number)}"),
                *(NA if r is None else _points(r) for r in found),
                f"{length.difference_tokens:+,.1f} {interval(length.lower_tokens, length.upper_tokens, lambda x: f'{x:+.1f}')}",
                length.baseline,
            )
        )
    return Table(
        key="answers",
        title="Answers",
        caption=(
            "Of n answers: degenerate, empty and cut off; generated tokens; how many differ from what they are held against, and how "
            "often the first differing token comes in 1,000. summary.md has the intervals and differences."
            if brief
            else "Of n answers, with 95 % intervals: degenerate (the last third, of 12 tokens or more, repeats exactly a piece three times "
            "or more), empty (nothing but white space), length-limited (cut off at the limit); mean generated tokens; answers that "
            "differ from those they are held against, and how often the first differing token comes in 1,000 tokens until there. Δ: "
            "candidate less the other, on the same documents, in points or tokens. Intervals by document from 40 on, 10 of them apart."
        ),
        columns=(
            "task", "candidate", "n", *(name.replace("length-limited", "cut off") if brief else name for name in names), "tokens", "differ", "first difference per 1,000" if not brief else "per 1,000", *(f"Δ {name}" for name in names),
            "Δ tokens", "Δ against",
        ),
        rows=tuple(rows),
        text_columns=2,
    )  # fmt: skip


def _points(record: AnswerShareRecord) -> str:
    lower, upper = record.difference_lower, record.difference_upper
    return f"{100 * record.difference:+.1f} {interval(lower, upper, lambda x: f'{100 * x:+.1f}')}"
