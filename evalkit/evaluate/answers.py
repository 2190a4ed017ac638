"""What became of the answers themselves, whatever they score: how many went wrong in form, how long, where they part.

`evalkit.stats.answers` says what degenerate means and where two answers part. Empty: no text but white space before
its stop. Length-limited: it ended at its length limit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from evalkit.records import (
    AnswerLengthRecord,
    AnswerShareRecord,
    FirstDifferenceRecord,
    Record,
    SampleRecord,
    TaskRecord,
    only,
)
from evalkit.stats.answers import first_difference, is_degenerate
from evalkit.stats.intervals import wilson
from evalkit.stats.means import bootstrap_mean
from evalkit.stats.paired import tango_interval
from evalkit.stats.rates import rate_interval

DEGENERATE: Final = "degenerate"
EMPTY: Final = "empty"
LIMITED: Final = "length-limited"
MEASURES: Final = (DEGENERATE, EMPTY, LIMITED)
TOO_FEW: Final = "none ({} documents, 40 are needed, 10 of them apart)"


def compare_answers(records: Sequence[Record], samples: Sequence[SampleRecord]) -> Iterator[Record]:
    """Every arm's generated answers against those that its score was compared with; planted damage against the baseline.

    Args:
        records: of a run whose tasks were scored.
        samples: every arm's. Those without generated tokens are left out.
    """
    said: dict[tuple[str, str], dict[int, SampleRecord]] = {}
    for sample in samples:
        if sample.generated_ids is not None:
            said.setdefault((sample.candidate, sample.task), {}).setdefault(sample.doc_id, sample)
    for candidate, baseline in arms(records, samples):
        for task in dict.fromkeys(task for _, task in said):
            before, after = said.get((baseline, task), {}), said.get((candidate, task), {})
            pairs = [(before[document], after[document]) for document in before if document in after]
            if pairs:
                yield from _shares(candidate, baseline, task, pairs)
                yield _length(candidate, baseline, task, pairs)
                yield _difference(candidate, baseline, task, pairs)


def arms(records: Sequence[Record], samples: Sequence[SampleRecord]) -> list[tuple[str, str]]:
    """Each arm that was scored with the one it is held against; an arm of no record is held against the first baseline."""
    paired = dict.fromkeys((r.candidate, r.baseline) for r in only(records, TaskRecord))
    if not paired:
        return []
    own = next(candidate for candidate, _ in paired)
    known = {name for pair in paired for name in pair}
    planted = dict.fromkeys(s.candidate for s in samples if s.candidate not in known)
    return [*paired, *((arm, own) for arm in planted)]


def measures(sample: SampleRecord) -> dict[str, bool]:
    """Each of `MEASURES` of a generated answer."""
    ids = sample.generated_ids or []
    limited = sample.truncated is True
    return {
        DEGENERATE: is_degenerate(ids if limited else ids[:-1]),
        EMPTY: not (sample.generated_text or "").strip(),
        LIMITED: limited,
    }


Pair = tuple[SampleRecord, SampleRecord]


def _shares(candidate: str, baseline: str, task: str, pairs: Sequence[Pair]) -> Iterator[AnswerShareRecord]:
    found = [(measures(before), measures(after)) for before, after in pairs]
    n = len(pairs)
    for measure in MEASURES:
        came = sum(after[measure] and not before[measure] for before, after in found)
        went = sum(before[measure] and not after[measure] for before, after in found)
        count = sum(after[measure] for _, after in found)
        own, change = wilson(count, n), tango_interval(came, went, n)
        yield AnswerShareRecord(
            candidate=candidate,
            baseline=baseline,
            task=task,
            measure=measure,
            count=count,
            share=count / n,
            share_lower=None if own is None else own.lower,
            share_upper=None if own is None else own.upper,
            baseline_count=sum(before[measure] for before, _ in found),
            difference=(came - went) / n,
            difference_lower=None if change is None else change.lower,
            difference_upper=None if change is None else change.upper,
            interval_method="none (1 document)" if change is None else "tango",
            n=n,
        )


def _length(candidate: str, baseline: str, task: str, pairs: Sequence[Pair]) -> AnswerLengthRecord:
    lengths = [(len(before.generated_ids or []), len(after.generated_ids or [])) for before, after in pairs]
    n = len(pairs)
    own, theirs = (sum(column) / n for column in ([b for _, b in lengths], [a for a, _ in lengths]))
    found = bootstrap_mean([after - before for before, after in lengths])
    interval = None if found is None else found.interval()
    return AnswerLengthRecord(
        candidate=candidate,
        baseline=baseline,
        task=task,
        mean_tokens=own,
        baseline_mean_tokens=theirs,
        difference_tokens=own - theirs,
        lower_tokens=None if interval is None else interval.lower,
        upper_tokens=None if interval is None else interval.upper,
        interval_method=TOO_FEW.format(n) if interval is None else f"studentised bootstrap, {n} documents",
        n=n,
    )


def _difference(candidate: str, baseline: str, task: str, pairs: Sequence[Pair]) -> FirstDifferenceRecord:
    events, risk = [], []
    for before, after in pairs:
        place = first_difference(before.generated_ids or [], after.generated_ids or [])
        events.append(int(place is not None))
        risk.append(len(before.generated_ids or []) if place is None else place + 1)
    n, differing, tokens = len(pairs), sum(events), sum(risk)
    interval = rate_interval(events, risk)
    alike = len(set(zip(events, risk, strict=True))) == 1
    why = "all alike" if alike else f"{differing} of them differ; 40 and 10 are needed"
    return FirstDifferenceRecord(
        candidate=candidate,
        baseline=baseline,
        task=task,
        differing=differing,
        tokens_at_risk=tokens,
        per_1000_tokens=1000 * differing / tokens,
        lower=None if interval is None else 1000 * interval.lower,
        upper=None if interval is None else 1000 * interval.upper,
        interval_method=(
            f"none ({n} documents, {why})" if interval is None else f"BCa bootstrap, {n} documents"
        ),
        n=n,
    )
