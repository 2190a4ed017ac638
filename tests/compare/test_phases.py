"""Phases: a sound candidate's error does not depend on how tokens arrive; a broken way of serving is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from evalkit.attention.paged_layer import PagedLayer
from evalkit.candidate import Candidate
from evalkit.compare.passes.variants import REFERENCE
from evalkit.compare.phases import PHASES, Way, compare_phases, count_phase_passes
from evalkit.errors import InputError
from evalkit.kv import Scales
from evalkit.records import PhaseRecord, to_line
from tests.compare.planted import Plant, Planted

SOUND = Candidate.parse("fp8_e4m3:one@reference")
PLANTED = Candidate.parse("fp8_e4m3:calibrated@planted")


class ScaleMissingInDecode(Planted):
    """TRT-LLM #16916: the kernel that generates is not handed the scale."""

    def scales_for(self, indices: Tensor, scales: Scales) -> Scales:
        return Scales() if len(indices) == 1 else scales


class GarbageOverCachedRows(Planted):
    """vLLM #38652: a prompt over rows of an earlier turn reads them wrongly."""

    def scales_for(self, indices: Tensor, scales: Scales) -> Scales:
        sees_earlier_rows = len(indices) > 1 and int((indices[0] >= 0).sum()) > 1
        return Scales(latent=64 * scales.latent, rope=scales.rope) if sees_earlier_rows else scales


def departing(found: list[PhaseRecord], mode: str = "isolated") -> set[str]:
    return {r.phase for r in found if r.departs and r.mode == mode and r.layer is not None}


def test_every_way_holds_the_same_tokens_once_and_in_order():
    for way in Way.all_of(83):
        seen = [number for step in way.steps for number in range(step.start, step.stop)]
        assert seen == list(range(83)), way
    turns = next(way for way in Way.all_of(96) if way.phase == "second_turn")
    assert turns.first == 72
    sizes = [step.stop - step.start for step in turns.steps]
    assert sizes == [60, *[1] * 12, 12, *[1] * 12], "first turn, its answer, second prompt, second answer"


def test_no_phase_of_a_sound_candidate_departs(model: Any, documents: list[Tensor]):
    calls: list[None] = []
    candidates = [REFERENCE, SOUND]
    found = list(compare_phases(model, documents, candidates, advance=lambda: calls.append(None)))
    assert len(calls) == count_phase_passes(model, len(documents), candidates)
    assert {r.candidate for r in found} == {str(SOUND)}
    places = {(r.layer, r.mode, r.phase) for r in found}
    assert len(places) == len(found) == 3 * 2 * len(PHASES) + len(PHASES)
    assert all((r.n, r.nonfinite) == (24 + 20, 0) for r in found)
    assert not [r for r in found if r.departs is not False]
    assert all(r.relative_l2 is not None and 0 < r.relative_l2 < 0.2 for r in found if r.layer is not None)
    assert all(to_line(r) for r in found)


def test_a_scale_missing_in_decode_is_named(model: Any, documents: list[Tensor], plant: Plant):
    plant(ScaleMissingInDecode)
    scales = {PLANTED: dict.fromkeys(range(3), Scales(latent=1 / 64, rope=1 / 64))}
    found = list(compare_phases(model, documents, [PLANTED], scales=scales))
    assert departing(found) == {"decode", "cached_prefix", "second_turn"}, "where tokens go one by one"
    logits = {r.phase for r in found if r.layer is None and r.departs}
    assert "decode" in logits
    assert not logits & {"prefill", "chunked_prefill"}


def test_garbage_in_turn_two_is_named(model: Any, documents: list[Tensor], plant: Plant):
    plant(GarbageOverCachedRows)
    scales = {PLANTED: dict.fromkeys(range(3), Scales(latent=1 / 64, rope=1 / 64))}
    found = list(compare_phases(model, documents, [PLANTED], scales=scales))
    assert departing(found) == {"second_turn", "chunked_prefill"}, "where a prompt reads earlier rows"


def test_rows_lost_on_the_way_to_another_sequence_are_named(
    model: Any, documents: list[Tensor], monkeypatch: pytest.MonkeyPatch
):
    """A prefix whose last page did not come along."""
    whole = PagedLayer.take

    def cut(self: PagedLayer, sequences: Tensor) -> None:
        whole(self, sequences)
        if self.rows is not None and self.format.name == SOUND.format:
            self.rows[-1] = 0

    monkeypatch.setattr(PagedLayer, "take", cut)
    found = list(compare_phases(model, documents, [SOUND]))
    assert departing(found) == {"cached_prefix"}


def test_a_phase_that_is_not_finite_departs(model: Any, documents: list[Tensor], plant: Plant):
    class NotFinite(Planted):
        def attend(self, *arguments: Any) -> tuple[Tensor, Tensor]:
            out, lse = super().attend(*arguments)
            return (out * torch.nan if len(out) == 1 else out), lse

    plant(NotFinite)
    scales = {PLANTED: dict.fromkeys(range(3), Scales())}
    found = list(compare_phases(model, documents, [PLANTED], scales=scales))
    first = {r.phase: r for r in found if (r.layer, r.mode) == (0, "isolated")}
    assert first["decode"].nonfinite == 44
    assert first["prefill"].nonfinite == 0
    assert departing(found) == {"decode", "cached_prefix", "second_turn"}
    assert all(to_line(r) for r in found)


def test_a_document_too_short_for_its_phases_is_refused(model: Any):
    with pytest.raises(InputError, match="document 0 has 5 tokens"):
        list(compare_phases(model, [torch.zeros(5, dtype=torch.int64)], [SOUND]))
