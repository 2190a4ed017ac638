"""Follows every token through the layers: multiples of the floor, errors by position, and the tokens that lose most.

The layer stream hands over its cells when a layer is done and its divergences at the end; what is kept in between is
a few numbers a token, layer and propagated candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Final

import numpy as np
import torch
from torch import Tensor

from evalkit.compare.figures import positions
from evalkit.compare.figures.tokens import Place, TokenAccumulator
from evalkit.compare.found.accumulate import Cell
from evalkit.compare.found.worst_tokens import Trace, worst_tokens
from evalkit.compare.passes import noise
from evalkit.compare.passes.variants import DECODE, PREFILL, PROPAGATED, Arm
from evalkit.records import ConfidenceRecord, MultipleRecord, PositionRecord, Record
from evalkit.stats.ratios import Ratio, by_units

# Where no other kernel runs, a layer's divergence is told from what else moves bf16; see compare/divergence.py.
EVERY_FLOOR_PROBES: Final = ("hidden",)  # and the attention output

Decode = Callable[[Sequence[int]], str]


class Watch:
    """What one comparison knows of its tokens.

    documents: token ids [T] each. prefill: tokens of each document's prompt. decode: token ids as text; None writes
    their numbers. output: the probe that is followed as the attention output.
    """

    def __init__(
        self,
        documents: Sequence[Tensor],
        prefill: Sequence[int],
        topk: int,
        decode: Decode | None = None,
        output: str = "attention",
    ) -> None:
        self.documents, self.prefill, self.topk, self.output = documents, prefill, topk, output
        self.decode: Decode = decode or (lambda ids: " ".join(map(str, ids)))
        self.traces: dict[str, Trace] = {}  # by candidate
        self.divergences: dict[Arm, dict[str, TokenAccumulator]] = {}  # by arm and phase

    def layer(self, index: int, cells: Sequence[Cell]) -> Iterator[Record]:
        """The records of a layer whose cells have seen every document."""
        floors = [cell for cell in cells if cell.arm.subject.is_floor and not cell.arm.subject.splits]
        for cell in cells:
            arm = cell.arm
            same = [
                other
                for other in floors
                if (other.arm.mode, other.arm.frozen) == (arm.mode, arm.frozen) and other is not cell
            ]
            if not arm.subject.is_floor:
                yield from self._multiples(index, cell, same)
            if not arm.frozen and not arm.subject.splits:
                yield from self._positions(index, cell)
            if arm.mode == PROPAGATED and not arm.frozen and not arm.subject.is_floor:
                trace = self.traces.setdefault(str(arm.subject.candidate), Trace())
                trace.add(index, self._token_errors(cell), cell.dropped, self._floor_limit(same))

    def _multiples(self, index: int, cell: Cell, floors: Sequence[Cell]) -> Iterator[Record]:
        for (phase, probe, rung), mine in cell.errors.items():
            for floor in floors:
                kind = floor.arm.subject.rung
                if rung != "total" or (
                    kind != noise.KERNEL and probe not in (self.output, *EVERY_FLOOR_PROBES)
                ):
                    continue
                theirs = floor.errors.get((phase, probe, kind))
                if theirs is None:
                    continue
                squares = ([(part[:, 0] ** 2).numpy() for part in parts] for parts in (mine, theirs))
                yield from _multiple(cell.arm, index, phase, probe, kind, by_units(*squares, root=True), mine)

    def _positions(self, index: int, cell: Cell) -> Iterator[Record]:
        errors = self._token_errors(cell)
        curves = [(np.arange(len(part)), part) for part in errors]
        yield self._position(cell.arm, index, self.output, "position", curves)
        made = self._generated([part[self.prefill[number] :] for number, part in enumerate(errors)])
        if made:
            yield self._position(cell.arm, index, self.output, "generated", made)

    def _token_errors(self, cell: Cell) -> list[np.ndarray]:
        """Relative L2 of each token's attention output, a document's prompt and decoded tokens together."""
        parts = [
            cell.errors.get((phase, self.output, cell.arm.subject.rung), []) for phase in (PREFILL, DECODE)
        ]
        return [
            (rows[:, 0] / rows[:, 1]).numpy()
            for rows in (torch.cat(list(phases)) for phases in zip(*filter(None, parts), strict=True))
        ]

    def _floor_limit(self, floors: Sequence[Cell]) -> tuple[str, float] | None:
        """The floor that a token's error is told from: the first of kernel, start, noise and batch that is not zero."""
        for kind in (noise.KERNEL, noise.START, noise.NOISE, noise.BATCH):
            for floor in floors:
                if floor.arm.subject.rung == kind:
                    values = np.concatenate(self._token_errors(floor))
                    values = values[np.isfinite(values)]
                    if len(values) and values.max() > 0:
                        return kind, float(np.quantile(values, 0.99))
        return None

    def place(self, document: int, span: slice) -> Place:
        """Where the logits of a document's tokens `span` come from."""
        ids = self.documents[document].cpu()
        follows = torch.cat([ids[1:], ids.new_full((1,), -1)])
        return Place(document=document, start=span.start, targets=follows[span])

    def diverged(self, arm: Arm, tokens: dict[str, TokenAccumulator]) -> Iterator[Record]:
        """The records of one propagated arm's next-token distributions, by phase."""
        self.divergences[arm] = tokens
        if arm.subject.splits:
            return
        candidate = str(arm.subject.candidate)
        if not arm.subject.is_floor:
            for phase, added in tokens.items():
                for figures in added.by_confidence():
                    yield ConfidenceRecord(
                        candidate=candidate, phase=phase, frozen=arm.frozen_name, **asdict(figures)
                    )
        if arm.frozen:
            return
        pairs: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for added in tokens.values():
            columns = (added.by_document(name) for name in ("document", "position", "kl"))
            for number, at, values in zip(*columns, strict=True):
                pairs.setdefault(int(number[0]), []).append((at, values))
        curves: list[positions.Curve] = []
        for found in pairs.values():
            places, divergences = (torch.cat(part).numpy() for part in zip(*found, strict=True))
            curves.append((places, divergences))
        yield self._position(arm, None, "kl", "position", curves)
        made = self._generated(
            [y[x >= self.prefill[number]] for number, (x, y) in zip(pairs, curves, strict=True)]
        )
        if made:
            yield self._position(arm, None, "kl", "generated", made)

    def end(self) -> Iterator[Record]:
        """Once every arm's divergence is known: multiples of the floor's, and the tokens that lose most."""
        floors = [
            (arm, tokens)
            for arm, tokens in self.divergences.items()
            if arm.subject.is_floor and not arm.subject.splits
        ]
        for arm, tokens in self.divergences.items():
            if arm.subject.is_floor:
                continue
            for other, theirs in floors:
                for phase in tokens if other.frozen == arm.frozen else ():
                    units = ([part.numpy() for part in x[phase].by_document("kl")] for x in (tokens, theirs))
                    found = by_units(*units)
                    yield from _multiple(
                        arm, None, phase, "kl", other.subject.rung, found, tokens[phase].kept["kl"]
                    )
            if not arm.frozen:
                candidate = str(arm.subject.candidate)
                trace = self.traces.get(candidate, Trace())
                yield from worst_tokens(candidate, tokens, trace, self.documents, self.decode)

    @staticmethod
    def _generated(errors: Sequence[np.ndarray]) -> list[positions.Curve]:
        """Curves over the number of tokens since the prompt, of documents that have some."""
        return [(np.arange(len(part)), part) for part in errors if len(part)]

    def _position(
        self, arm: Arm, layer: int | None, probe: str, axis: str, curves: Sequence[positions.Curve]
    ) -> PositionRecord:
        return PositionRecord(
            candidate=str(arm.subject.candidate),
            rung=arm.subject.rung,
            layer=layer,
            mode=arm.mode,
            probe=probe,
            axis=axis,
            topk=self.topk,
            **asdict(positions.figures(curves, self.topk if axis == "position" else None)),
        )


def _multiple(
    arm: Arm,
    layer: int | None,
    phase: str,
    probe: str,
    floor: str,
    found: Ratio | None,
    rows: Sequence[Tensor],
) -> Iterator[MultipleRecord]:
    """The record of a multiple; a floor of zero has none."""
    if found is not None:
        yield MultipleRecord(
            candidate=str(arm.subject.candidate),
            layer=layer,
            phase=phase,
            mode=arm.mode,
            probe=probe,
            frozen=arm.frozen_name,
            floor=floor,
            multiple=found.value,
            lower=found.lower,
            upper=found.upper,
            interval_method=found.method,
            n=sum(map(len, rows)),
        )
