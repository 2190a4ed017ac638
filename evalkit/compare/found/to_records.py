"""Figures as the records of where they were found."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any, Final

from evalkit.compare.figures.metrics import Figures
from evalkit.compare.figures.ranges import RangeFigures
from evalkit.compare.figures.selection import SelectionFigures
from evalkit.compare.figures.tokens import TokenFigures
from evalkit.compare.passes.variants import PREFILL, PROPAGATED, REFERENCE, Arm
from evalkit.records import LayerRecord, RangeRecord, SelectionRecord, TokenRecord

RECORDED: Final = {field.name for field in fields(Figures)} & {field.name for field in fields(LayerRecord)}


def layer_record(
    arm: Arm, layer: int | None, phase: str, probe: str, rung: str, found: Figures
) -> LayerRecord:
    """One probe of one arm; layer is None for what comes after the last one."""
    figures: dict[str, Any] = {name: value for name, value in asdict(found).items() if name in RECORDED}
    where: dict[str, Any] = {
        "candidate": str(arm.subject.candidate),
        "mode": arm.mode,
        "frozen": arm.frozen_name,
    }
    return LayerRecord(layer=layer, phase=phase, probe=probe, rung=rung, **where, **figures)


def selection_record(arm: Arm, layer: int, phase: str, found: SelectionFigures) -> SelectionRecord:
    """What one arm attended to at one layer."""
    candidate = str(arm.subject.candidate)
    return SelectionRecord(candidate=candidate, layer=layer, phase=phase, mode=arm.mode, **asdict(found))


def range_record(candidate: str, layer: int, part: str, scale: float, found: RangeFigures) -> RangeRecord:
    """Where the values of one part of a layer's rows lie."""
    return RangeRecord(candidate=candidate, layer=layer, part=part, scale=scale, **asdict(found))


def token_record(arm: Arm, phase: str, found: TokenFigures) -> TokenRecord:
    """How far the next token's distribution is from the reference's."""
    candidate = str(arm.subject.candidate)
    return TokenRecord(candidate=candidate, phase=phase, frozen=arm.frozen_name, **asdict(found))


def missing_floor(rung: str) -> LayerRecord:
    """A floor that cannot be measured here: a record without a number, which a reader prints as n/a."""
    missing: dict[str, Any] = dict.fromkeys(RECORDED - {"nonfinite", "n"})
    return LayerRecord(
        candidate=str(REFERENCE),
        layer=None,
        phase=PREFILL,
        mode=PROPAGATED,
        probe="attention",
        rung=rung,
        frozen="none",
        nonfinite=0,
        n=0,
        **missing,
    )
