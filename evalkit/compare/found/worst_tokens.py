"""The tokens that a candidate loses most at: what was there, what both would have said, and where it went apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from evalkit.compare.figures.tokens import WORST, TokenAccumulator, WorstToken
from evalkit.records import WorstTokenRecord

WINDOW: Final = 24  # tokens of text shown, the query's last

Decode = Callable[[Sequence[int]], str]


@dataclass
class Trace:
    """One propagated candidate's tokens through the layers, each layer's as it was handed over.

    errors: by layer, relative L2 of each token's attention [T] a document. dropped: by layer, [T, 3] a document, see
    `Cell.dropped`. limits: by layer, the floor's name and the 99th percentile of its error over all tokens.
    """

    errors: dict[int, list[NDArray[np.float32]]] = field(default_factory=dict)
    dropped: dict[int, list[NDArray[np.float32]]] = field(default_factory=dict)
    limits: dict[int, tuple[str, float] | None] = field(default_factory=dict)

    def add(
        self,
        layer: int,
        errors: Sequence[NDArray[Any]],
        dropped: Sequence[Tensor],
        limit: tuple[str, float] | None,
    ) -> None:
        """Keep one layer."""
        self.errors[layer] = [part.astype(np.float32) for part in errors]
        self.dropped[layer] = [part.float().numpy() for part in dropped]
        self.limits[layer] = limit

    def first_divergent(self, document: int, position: int) -> tuple[str, int | None]:
        """The floors looked at, and the first layer whose error of this token is beyond its floor's, if any."""
        whole = list(self.errors) == list(range(len(self.errors)))  # not after a run that was gone on with
        if not self.errors or not whole or None in self.limits.values():
            return "none", None
        names = ", ".join(dict.fromkeys(limit[0] for limit in self.limits.values() if limit))
        for layer, errors in self.errors.items():
            limit = self.limits[layer]
            # Written so that a NaN diverges.
            if limit is not None and not errors[document][position] <= limit[1]:
                return names, layer
        return names, None

    def most_mass_lost(self, document: int, position: int) -> tuple[int, int, int, float | None] | None:
        """The layer that lost most of this token's attention: its number, keys dropped, the reference's, mass."""
        seen = [(layer, parts[document][position]) for layer, parts in self.dropped.items()]
        if not seen:
            return None
        measured = [(layer, row) for layer, row in seen if np.isfinite(row[2])]
        layer, row = (
            max(measured, key=lambda one: one[1][2]) if measured else max(seen, key=lambda one: one[1][0])
        )
        return layer, int(row[0]), int(row[1]), float(row[2]) if np.isfinite(row[2]) else None


def worst_tokens(
    candidate: str,
    tokens: Mapping[str, TokenAccumulator],
    trace: Trace,
    documents: Sequence[Tensor],
    decode: Decode,
) -> Iterator[WorstTokenRecord]:
    """The records of a candidate's `WORST` tokens over all phases, the worst first."""
    found = [(one, phase) for phase, added in tokens.items() for one in added.worst]
    found.sort(key=lambda pair: -pair[0].kl_nats)
    for rank, (one, phase) in enumerate(found[:WORST]):
        yield _record(candidate, rank + 1, one, phase, trace, documents[one.document], decode)


def _record(
    candidate: str, rank: int, one: WorstToken, phase: str, trace: Trace, ids: Tensor, decode: Decode
) -> WorstTokenRecord:
    floor, first = trace.first_divergent(one.document, one.position)
    lost = trace.most_mass_lost(one.document, one.position)
    mass_layer, dropped, keys, mass = (None, None, None, None) if lost is None else lost
    end = one.position + 1
    return WorstTokenRecord(
        candidate=candidate,
        rank=rank,
        document=one.document,
        position=one.position,
        phase=phase,
        kl_nats=one.kl_nats,
        text=decode(ids[max(0, end - WINDOW) : end].tolist()),
        next_token=decode([one.target]) if one.target >= 0 else None,
        reference_top=[decode([token]) for token, _ in one.reference],
        reference_p=[p for _, p in one.reference],
        candidate_top=[decode([token]) for token, _ in one.candidate],
        candidate_p=[p for _, p in one.candidate],
        floor=floor,
        first_divergent_layer=first,
        mass_layer=mass_layer,
        dropped_keys=dropped,
        reference_keys=keys,
        mass_lost=mass,
    )
