"""Which layers' values do not fit their format, in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from evalkit.records import RangeRecord, Record, only
from evalkit.report.tables import share
from evalkit.spans import spans

# Shares from which on a layer is named; every layer's stand in the table.
FAULTS: Final = (
    ("saturated_share", 1e-4, "saturates", "beyond 448 times the scale"),
    ("zero_share", 0.01, "is flushed to zero", "not zero and stored as zero"),
    ("subnormal_share", 0.1, "is subnormal", "below e4m3's smallest normal number"),
)


def sentences(records: Sequence[Record]) -> list[str]:
    """One for each candidate, part of the row and fault: the layers that have it, and the worst of them."""
    found = [r for r in only(records, RangeRecord) if " " not in r.part]  # a tile's are its part's
    said = []
    for candidate, part in dict.fromkeys((r.candidate, r.part) for r in found):
        mine = [r for r in found if (r.candidate, r.part) == (candidate, part)]
        for field, least, fault, means in FAULTS:
            sizes = {r.layer: float(getattr(r, field) or 0.0) for r in mine}
            named = [layer for layer, size in sizes.items() if size >= least]
            if named:
                worst = max(named, key=lambda layer: sizes[layer])
                said.append(
                    f"{candidate}: {part} {fault} in layer{'s' * (len(named) > 1)} {spans(named)}; most in layer {worst}, "
                    f"{share(sizes[worst])} of its values {means}."
                )
    return said
