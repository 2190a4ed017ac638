"""How far fresh starts of one serving engine lie apart: tables of the starts that every other table leaves out."""

from collections.abc import Sequence
from itertools import product

from evalkit.records import CandidateRecord, Record, TaskRecord, TokenRecord, only
from evalkit.report.tables import NA, Table, number, ordered, reference, share


def scores(records: Sequence[Record]) -> Table:
    """How far fresh starts of one serving engine lie apart."""
    found = only(records, TaskRecord)
    again: dict[tuple[str, str, str, str], list[TaskRecord]] = {}
    for r in found:
        if r.again:
            again.setdefault((r.task, r.baseline, r.metric, r.filter), []).append(r)
    rows = []
    for (task, candidate, metric, filter_), others in again.items():
        (first,) = (
            r
            for r in found
            if (r.task, r.candidate, r.metric, r.filter) == (task, candidate, metric, filter_)
        )
        every = [first.score, *(r.score for r in others)]
        otherwise = ", ".join(
            NA if r.lost is None or r.gained is None else str(r.lost + r.gained) for r in others
        )
        rows.append(
            (
                task,
                candidate,
                f"{first.n:,}",
                str(len(every)),
                f"{share(min(every))} to {share(max(every))}",
                f"{100 * (max(every) - min(every)):.1f}",
                otherwise,
            )
        )
    return Table(
        key="starts",
        title="Fresh starts",
        caption=(
            "Each candidate on engines that were started afresh, on the same documents: what batching and start order leave. Every "
            "other table counts the first start; the last column is how many documents each later one scores otherwise."
        ),
        columns=("task", "candidate", "n", "starts", "scores", "spread, points", "otherwise"),
        rows=tuple(rows),
        text_columns=2,
    )  # fmt: skip


def next_tokens(records: Sequence[Record]) -> Table:
    """How far next tokens of fresh starts of one serving engine lie apart, by phase."""
    found, told_from = only(records, TokenRecord), reference(records)
    candidates = [record.candidate for record in ordered(records, only(records, CandidateRecord))]
    rows = []
    for phase, candidate in product(dict.fromkeys(r.phase for r in found if r.again), candidates):
        of_phase = [r for r in found if r.phase == phase]
        later = [r for r in of_phase if r.again and r.candidate.startswith(f"{candidate}, ")]
        if not later:
            continue
        first = [r for r in of_phase if r.candidate == candidate != told_from]
        means = [r.kl_mean_nats for r in (*first, *later)]
        known = [mean for mean in means if mean is not None]
        span = "non-finite" if len(known) < len(means) else f"{number(min(known))} to {number(max(known))}"
        rows.append((candidate, phase, str(1 + len(later)), span, f"{later[0].n:,}"))
    return Table(
        key="token-starts",
        title="Fresh starts, next token",
        caption=(
            f"Mean KL divergence in nats from the first start of {told_from}, least to most over the fresh starts of each "
            f"candidate, over the same n tokens; of {told_from} over its later starts, which is bf16 against itself. Every other "
            "table counts the first start."
        ),
        columns=("candidate", "phase", "starts", "KL nats, least to most", "n"),
        rows=tuple(rows),
        text_columns=2,
    )
