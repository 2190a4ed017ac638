"""Which layer is the first whose error leaves the floor, and how much of a layer's error was handed to it.

Works on records, so that it can be told again of any run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from evalkit.records import DivergenceRecord, LayerRecord, MultipleRecord, Record, only, output_probe

# Another kernel is the floor that multiples are taken of; where none runs, or it is bit-identical, what else moves
# bf16 stands in and is named.
PREFERENCE: Final = ("floor:kernel", "floor:start", "floor:noise", "floor:batch")


def divergences(records: Sequence[Record]) -> Iterator[DivergenceRecord]:
    """The first divergent layer of each candidate, phase and mode, free of freezing."""
    probe = output_probe(records)
    found = [
        r
        for r in only(records, MultipleRecord)
        if (r.probe, r.frozen) == (probe, "none") and r.layer is not None
    ]
    totals = {
        (r.candidate, r.phase, r.mode, r.layer): r
        for r in only(records, LayerRecord)
        if (r.probe, r.frozen, r.rung) == (probe, "none", "total")
    }
    for place in dict.fromkeys((r.candidate, r.phase, r.mode) for r in found):
        mine = [r for r in found if (r.candidate, r.phase, r.mode) == place]
        layers = sorted({r.layer for r in mine if r.layer is not None})
        # One floor for every layer, or the first divergent one would be where the floor changes.
        kind = next((k for k in PREFERENCE if sum(r.floor == k for r in mine) == len(layers)), None)
        if kind is None:
            continue
        by_layer = {r.layer: r for r in mine if r.floor == kind}
        first = next((layer for layer in layers if leaves(by_layer[layer])), None)
        shown = None if first is None else by_layer[first]
        total = totals.get((*place, first))
        yield DivergenceRecord(
            candidate=place[0],
            phase=place[1],
            mode=place[2],
            probe=probe,
            floor=kind,
            first_layer=first,
            relative_l2=None if total is None else total.relative_l2,
            multiple=None if shown is None else shown.multiple,
            multiple_lower=None if shown is None else shown.lower,
            interval_method=mine[0].interval_method if shown is None else shown.interval_method,
            layers=len(layers),
        )


def leaves(record: MultipleRecord) -> bool:
    """Whether an error is above the floor: the interval's lower end, or without one the multiple, is above 1."""
    return (record.multiple if record.lower is None else record.lower) > 1
