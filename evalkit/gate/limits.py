"""A policy's limits on recorded figures."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date
from typing import Any

from evalkit.errors import InputError
from evalkit.gate.contradictions import WORDS
from evalkit.gate.policy import Exemption, Limit, Policy
from evalkit.gate.words import Check, Verdict
from evalkit.records import CandidateRecord, Record

# Figures that only a format has which is given its scales.
OF_GIVEN_SCALES = ("range.saturated_share", "range.headroom")


def check_limits(
    records: Sequence[Record], candidate: CandidateRecord, policy: Policy, today: date
) -> Iterator[Check]:
    """One check a limit. An exception excuses a breach, never a figure that was not recorded.

    Raises:
        InputError: a limit selects by a value that no record of its kind has.
    """
    for limit in policy.limits:
        allowed = [
            exempt
            for exempt in policy.exceptions
            if exempt.limit == limit.name and exempt.candidate in (candidate.candidate, candidate.requested)
        ]
        yield _check(records, candidate, limit, allowed, today)


def _check(
    records: Sequence[Record],
    candidate: CandidateRecord,
    limit: Limit,
    allowed: Sequence[Exemption],
    today: date,
) -> Check:
    name = f"limit: {limit.name}"
    kind = [r for r in records if r.kind == limit.kind]
    _refuse_unknown_values(kind, limit)
    matching = [r for r in kind if _matches(r, {**limit.where, "candidate": candidate.candidate})]
    if not matching and limit.figure in OF_GIVEN_SCALES and not _is_given_scales(candidate.format):
        return Check(
            name=name,
            verdict=Verdict.NON_INFERIOR,
            reason=f"{candidate.format} takes no scale from outside, so that no value can lie beyond it.",
        )
    if not matching:
        return Check(
            name=name,
            verdict=Verdict.INCONCLUSIVE,
            reason=f"{limit.figure} was not recorded for this candidate.",
            needs="A run that measures it.",
        )
    values: list[float | None] = [getattr(record, limit.value) for record in matching]
    unknown = sum(value is None for value in values)
    if unknown:
        return Check(
            name=name,
            verdict=Verdict.INCONCLUSIVE,
            reason=f"{limit.figure} has no value in {unknown} of {len(values)} records.",
            needs="A run in which it can be measured.",
        )
    known = [value for value in values if value is not None]
    pick, bound = (max, limit.at_most) if limit.at_most is not None else (min, limit.at_least)
    assert bound is not None
    worst = pick(known)
    held = worst <= bound if limit.at_most is not None else worst >= bound
    said = f"{limit.figure} is {worst:.3g}{_where(matching[known.index(worst)])}"
    limited = f"{'at most' if limit.at_most is not None else 'at least'} {bound:.3g}"
    if held:
        return Check(name=name, verdict=Verdict.NON_INFERIOR, reason=f"{said}; {limited} is asked for.")
    breach = Check(
        name=name,
        verdict=Verdict(limit.breach),
        reason=f"{said}; the policy asks for {limited}.",
        needs=f"A {'smaller' if limit.at_most is not None else 'larger'} figure, or an exception with a reason and a day.",
    )
    return _excepted(breach, allowed, today)


def _is_given_scales(format: str) -> bool:
    """By the format itself: what a record says of its scales may be damaged, and older ones say `one` of any."""
    from evalkit import kv

    return kv.get(format).uses_scales


def _excepted(breach: Check, allowed: Sequence[Exemption], today: date) -> Check:
    """The breach as the exception that lasts longest leaves it."""
    if not allowed:
        return breach
    last = max(allowed, key=lambda exempt: exempt.expires)
    if today > last.expires:
        return replace(breach, reason=f"{breach.reason} The exception for it ended on {last.expires}.")
    said = f"{breach.reason} Excepted until {last.expires}: {last.reason}"
    return Check(name=breach.name, verdict=Verdict.NON_INFERIOR, reason=said)


def _matches(record: Record, wanted: dict[str, Any]) -> bool:
    return all(getattr(record, name) == value for name, value in wanted.items())


def _where(record: Record) -> str:
    layer = getattr(record, "layer", None)
    return "" if layer is None else f" at layer {layer}"


def _refuse_unknown_values(kind: Sequence[Record], limit: Limit) -> None:
    """A word that no record can hold would select nothing; one that could and does not is evidence that is missing."""
    for name, wanted in limit.where.items():
        held = {getattr(record, name) for record in kind}
        if kind and wanted not in held and wanted not in WORDS.get(name, ()):
            raise InputError(
                f"policy: limit {limit.name}: no {limit.kind} record has {name} {wanted!r}; "
                f"there are {', '.join(sorted(map(str, held)))}"
            )
