"""Documents whose outcome differs between an arm and its baseline, with what both said, for the page to browse."""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

from evalkit.records import CandidateRecord, Record, SampleRecord, TaskRecord, only
from evalkit.stats.answers import first_difference

MOST = 200  # documents in one page
BEFORE, AFTER = 900, 300  # characters of a transcript around its first differing token
LOST, GAINED = "lost", "gained"

Pair = tuple[str, SampleRecord, SampleRecord]


def browse(records: Sequence[Record], samples: Sequence[SampleRecord]) -> dict[str, Any]:
    """What the page shows: `items`, and of how many (`total`).

    Where there are more than `MOST`, each task, arm and direction gives its first ones, in turn.
    """
    cells: dict[tuple[str, str, str], list[Pair]] = {}
    total = 0
    for baseline, before, after in _flipped(records, samples):
        key = (after.task, after.candidate, direction(before, after))
        cells.setdefault(key, []).append((baseline, before, after))
        total += 1
    # Candidates in their order; planted damage, which is none, after them.
    order = [record.candidate for record in only(records, CandidateRecord)]
    rank = {name: place for place, name in enumerate(order)}
    cells = dict(sorted(cells.items(), key=lambda cell: (rank.get(cell[0][1], len(rank)), cell[0][0])))
    turns = [pair for turn in zip_longest(*cells.values()) for pair in turn if pair is not None]
    kept = {id(after) for _, _, after in turns[:MOST]}
    items = [_item(*pair) for pairs in cells.values() for pair in pairs if id(pair[2]) in kept]
    return {"items": items, "total": total}


def direction(before: SampleRecord, after: SampleRecord) -> str:
    """`lost` where the baseline scored more, `gained` where the candidate did."""
    return LOST if after.score < before.score else GAINED


def _flipped(records: Sequence[Record], samples: Sequence[SampleRecord]) -> Iterator[Pair]:
    """(baseline, its sample, the arm's) of every document, metric and filter that they score apart."""
    against = {r.candidate: r.baseline for r in only(records, TaskRecord)}
    own = next(iter(against), None)
    theirs = {(s.candidate, s.task, s.doc_id, s.filter, s.metric): s for s in samples}
    controls = set(against.values()) - set(against)
    for after in samples:
        # An arm that no record compares is planted damage; the control is what the baseline is compared with.
        baseline = against.get(after.candidate, own)
        if baseline is None or after.candidate in controls:
            continue
        before = theirs.get((baseline, after.task, after.doc_id, after.filter, after.metric))
        if before is not None and before.prompt_sha256 == after.prompt_sha256 and before.score != after.score:
            yield baseline, before, after


def _item(baseline: str, before: SampleRecord, after: SampleRecord) -> dict[str, Any]:
    place = None
    if before.generated_ids is not None and after.generated_ids is not None:
        place = first_difference(before.generated_ids, after.generated_ids)
    return {
        "task": after.task,
        "candidate": after.candidate,
        "baseline": baseline,
        "direction": direction(before, after),
        "document": after.doc_id,
        "scored": f"{after.metric} ({after.filter})",
        "target": after.target,
        "prompt": after.prompt_end,
        "place": place,
        "sides": [_side(before, place), _side(after, place)],
    }


def _side(sample: SampleRecord, place: int | None) -> dict[str, Any]:
    """A transcript in three parts: until the marked token, that token, and the rest; with what was left out of each."""
    text = sample.response if sample.generated_text is None else sample.generated_text
    chars = sample.generated_chars
    start = stop = len(text)
    if place is not None and chars is not None:
        start = sum(chars[:place])
        stop = start + sum(chars[place : place + 1])
    head, mark, rest = text[:start], text[start:stop], text[stop:]
    return {
        "score": sample.score,
        "tokens": sample.generated_tokens,
        "limited": sample.truncated is True,
        "parts": [head[-BEFORE:], mark, rest[:AFTER]],
        "left_out": [max(0, len(head) - BEFORE), max(0, len(rest) - AFTER)],
        "marked": place is not None,
        "ends": place is not None
        and sample.generated_ids is not None
        and place >= len(sample.generated_ids) - 1,
    }
