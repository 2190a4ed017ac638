"""Bugs that happened in servers, planted: the records name the place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from evalkit.attention.path import SparseMLA
from evalkit.attention.state import PathState
from evalkit.candidate import Candidate
from evalkit.compare.found.divergence import divergences
from evalkit.compare.layers import compare
from evalkit.compare.passes.variants import REFERENCE
from evalkit.records import (
    DivergenceRecord,
    LayerRecord,
    PositionRecord,
    Record,
    SelectionRecord,
    WorstTokenRecord,
    only,
)
from tests.compare.conftest import tiny
from tests.compare.planted import Plant, Planted


@pytest.fixture(scope="module")
def long_document() -> list[Tensor]:
    return [torch.randint(0, 128, (224,), generator=torch.Generator().manual_seed(2))]


def rung(records: list[Record], name: str, layer: int = 0, phase: str = "prefill") -> float:
    (found,) = [
        r
        for r in only(records, LayerRecord)
        if (r.rung, r.layer, r.phase, r.mode, r.probe) == (name, layer, phase, "isolated", "attention")
    ]
    assert found.relative_l2 is not None
    return found.relative_l2


def position(records: list[Record], candidate: str, layer: int = 0) -> PositionRecord:
    (found,) = [
        r
        for r in only(records, PositionRecord)
        if (r.candidate, r.layer, r.mode, r.axis, r.rung)
        == (candidate, layer, "isolated", "position", "total")
    ]
    return found


def test_rows_read_with_neighbours_scales_are_the_kernels_fault(
    model: Any, documents: list[Tensor], plant: Plant
):
    """ROCm/ATOM #2216: the rows are right, and only the kernel reads them wrongly."""

    class NeighboursScales(Planted):
        def attend(self, *arguments: Any) -> tuple[Tensor, Tensor]:
            q_latent, q_rope, cache, format, indices, sm_scale, scales = arguments
            rows = cache.view(-1, format.row_bytes).clone()
            rows[:, 512:528] = rows[:, 512:528].roll(1, 0)  # four fp32 scales behind 512 codes
            return super().attend(q_latent, q_rope, rows.view_as(cache), format, indices, sm_scale, scales)

    plant(NeighboursScales)
    found = list(
        compare(model, documents, [Candidate.parse("fp8_ds_mla@planted")], decode_tokens=6, floors=())
    )
    sound = list(
        compare(model, documents, [Candidate.parse("fp8_ds_mla@reference")], decode_tokens=6, floors=())
    )
    assert rung(found, "format") == rung(sound, "format")
    assert rung(sound, "kernel") == 0
    assert rung(found, "kernel") > 2 * rung(found, "format")
    latent = {
        r.relative_l2
        for records in (found, sound)
        for r in only(records, LayerRecord)
        if (r.probe, r.layer, r.mode, r.phase, r.rung) == ("latent", 0, "isolated", "prefill", "total")
    }
    assert len(latent) == 1, "what was stored is what should have been"


def test_a_truncated_block_table_shows_from_its_end_on(model: Any, long_document: list[Tensor], plant: Plant):
    """SGLang #9675: from some page on, another page's keys are attended."""

    class Truncated(Planted):
        def attend(self, *arguments: Any) -> tuple[Tensor, Tensor]:
            *before, indices, sm_scale, scales = arguments
            return super().attend(*before, indices.where(indices < 128, indices % 64), sm_scale, scales)

    plant(Truncated)
    candidate = Candidate.parse("bf16@planted")
    found = list(compare(model, long_document, [candidate], decode_tokens=0, floors=()))
    curve = position(found, str(candidate))
    means = dict(zip(curve.starts, curve.means, strict=True))
    assert all(mean is not None and mean < 0.005 for start, mean in means.items() if start + 14 <= 128)
    assert all(mean is not None and mean > 0.05 for start, mean in means.items() if start >= 140)
    assert curve.slope_lower is not None
    assert curve.slope_lower > 0
    assert rung(found, "kernel") > 0.05
    assert rung(found, "format") == 0


def test_evicted_attention_sinks_are_a_cliff_at_topk(
    model: Any, long_document: list[Tensor], monkeypatch: pytest.MonkeyPatch
):
    """mlx-lm #1443: once the indexer has to choose, it drops the first tokens."""
    best = SparseMLA._best

    def evicting(self: SparseMLA, query: Tensor, weights: Tensor, state: PathState) -> Tensor:
        columns = best(self, query, weights, state)
        if state.candidate == REFERENCE:
            return columns
        chose = columns.max(-1, keepdim=True).values >= columns.shape[-1]
        return columns.where(~chose | (columns >= 24), -1)

    monkeypatch.setattr(SparseMLA, "_best", evicting)
    candidate = Candidate.parse("fp8_e4m3:one@reference")
    records = list(compare(model, long_document, [candidate], decode_tokens=0, floors=()))
    curve = position(records, str(candidate))
    assert curve.topk == 32
    assert curve.cliff is True
    monkeypatch.undo()
    sound = list(compare(model, long_document, [candidate], decode_tokens=0, floors=()))
    assert position(sound, str(candidate)).cliff is False


def test_an_indexer_shared_between_the_wrong_layers_is_named_by_its_layer(
    documents: list[Tensor], monkeypatch: pytest.MonkeyPatch
):
    """ik_llama #2063: a layer that shares a selection is given one that is not its group's."""
    model = tiny("glm_moe_dsa")
    select = SparseMLA._select

    def misplaced(self: SparseMLA, hidden: Tensor, q_resid: Tensor, *rest: Any) -> Tensor:
        columns, state, start = select(self, hidden, q_resid, *rest), rest[1], rest[3]
        if self.layer_idx != 1 or state.candidate == REFERENCE:
            return columns
        seen = start + torch.arange(columns.shape[1])[None, :, None]
        return (
            torch.where(columns >= 0, seen - columns, -1).sort(-1).values
        )  # as many keys, counted from the end

    monkeypatch.setattr(SparseMLA, "_select", misplaced)
    candidate = Candidate.parse("fp8_ds_mla@reference")
    records = list(compare(model, documents, [candidate], decode_tokens=6))
    recall = {
        r.layer: r.recall_mean
        for r in only(records, SelectionRecord)
        if (r.mode, r.phase, r.candidate) == ("isolated", "prefill", str(candidate))
    }
    assert recall[0] == recall[2] == 1.0
    assert recall[1] is not None
    assert recall[1] < 0.9
    worst = [r for r in only(records, WorstTokenRecord) if r.candidate == str(candidate)]
    named = [r for r in worst if r.mass_layer == 1]
    assert named, "some token lost most of its attention there"
    assert all(r.dropped_keys and r.mass_lost and r.mass_lost > 0.05 for r in named)
    assert 0 not in {r.mass_layer for r in worst}


def test_a_scale_applied_to_a_bf16_cache_is_a_kernel_gap_at_the_first_layer(
    model: Any, documents: list[Tensor], plant: Plant
):
    """SGLang #18396: scores a sixteenth of what they are, of rows that are exact."""

    class Scaled(Planted):
        def attend(self, *arguments: Any) -> tuple[Tensor, Tensor]:
            *before, sm_scale, scales = arguments
            return super().attend(*before, sm_scale / 16, scales)

    plant(Scaled)
    records = list(compare(model, documents, [Candidate.parse("bf16@planted")], decode_tokens=6))
    assert rung(records, "format") == 0
    assert rung(records, "kernel") > 0.05
    stored = [
        r for r in only(records, LayerRecord)
        if (r.candidate, r.mode) == ("bf16@planted", "isolated") and r.probe in ("latent", "rope")
    ]  # fmt: skip
    assert stored
    assert all(r.max_abs_error == 0 for r in stored)
    first = only(list(divergences(records)), DivergenceRecord)
    assert {(r.phase, r.mode) for r in first} == {
        (phase, mode) for phase in ("prefill", "decode") for mode in ("isolated", "propagated")
    }
    assert {(r.floor, r.first_layer) for r in first if r.candidate == "bf16@planted"} == {("floor:noise", 0)}


def test_the_layer_that_breaks_is_the_first_to_diverge(
    model: Any, documents: list[Tensor], plant: Plant, monkeypatch: pytest.MonkeyPatch
):
    """Isolated, no other layer is off; propagated, all after it are."""

    class SecondLayer(Planted):
        def attend(self, *arguments: Any) -> tuple[Tensor, Tensor]:
            out, lse = super().attend(*arguments)
            return out * (1.5 if layers[-1] == 1 else 1.0), lse

    layers: list[int] = []
    forward = SparseMLA.forward

    def noted(self: SparseMLA, *arguments: Any, **options: Any) -> tuple[Tensor | None, ...]:
        layers.append(self.layer_idx)
        return forward(self, *arguments, **options)

    monkeypatch.setattr(SparseMLA, "forward", noted)
    plant(SecondLayer)
    candidate = Candidate.parse("bf16@planted")
    records = list(compare(model, documents, [candidate], decode_tokens=6))
    first = {(r.mode, r.phase): r for r in divergences(records)}
    assert {r.first_layer for r in first.values()} == {1}
    later = [
        r.relative_l2 for r in only(records, LayerRecord)
        if (r.layer, r.probe, r.rung, r.candidate, r.frozen) == (2, "attention", "total", str(candidate), "none")
        and r.phase == "prefill"
    ]  # fmt: skip
    assert later[0] == 0
    assert later[1] is not None
    assert later[1] > 0
