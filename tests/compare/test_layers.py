"""The layer stream on tiny random models: bf16 against itself is nothing, fp8 something, memory flat."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch

from evalkit import kv
from evalkit.candidate import Candidate
from evalkit.compare import layers
from evalkit.compare.figures.metrics import relative_l2
from evalkit.compare.layers import LayerStream, calibrate, compare, count_passes
from evalkit.compare.passes.capture import ATTENTION_PROBES, Capture
from evalkit.compare.passes.variants import FROZEN, REFERENCE, Subject
from evalkit.errors import InputError
from evalkit.kv import Scales
from evalkit.records import (
    LayerRecord,
    MultipleRecord,
    RangeRecord,
    Record,
    SelectionRecord,
    TokenRecord,
    only,
    to_line,
)

FP8 = Candidate.parse("fp8_e4m3:one@reference")
CALIBRATED = Candidate.parse("fp8_e4m3:calibrated@reference")
DS_MLA = Candidate.parse("fp8_ds_mla@reference")
INDEX_FP8 = Candidate.parse("bf16@reference+index=fp8")
EVERYWHERE = ATTENTION_PROBES | {"hidden", "logits"}


@pytest.fixture(scope="session")
def found(model: Any, documents: list[torch.Tensor]) -> list[Record]:
    scales = {CALIBRATED: calibrate(model, documents, kv.get(CALIBRATED.format))}
    candidates = [REFERENCE, FP8, CALIBRATED, DS_MLA, INDEX_FP8]
    return list(compare(model, documents, candidates, scales=scales, decode_tokens=6))


def of(records: list[Record], candidate: Candidate, rung: str = "total") -> list[LayerRecord]:
    return [r for r in only(records, LayerRecord) if r.candidate == str(candidate) and r.rung == rung]


def test_bf16_against_itself_is_exactly_zero_everywhere(found: list[Record]):
    control = [r for rung in ("total", "format", "kernel") for r in of(found, REFERENCE, rung)]
    assert {r.probe for r in control} == EVERYWHERE
    for record in control:
        assert (record.max_abs_error, record.relative_l2, record.nonfinite) == (0.0, 0.0, 0), record
    selections = [r for r in only(found, SelectionRecord) if r.candidate == str(REFERENCE)]
    assert selections
    assert all(r.recall_min == 1.0 and r.mass_lost_mean == 0.0 for r in selections)
    tokens = [r for r in only(found, TokenRecord) if r.candidate == str(REFERENCE)]
    assert len(tokens) == 4
    assert all(r.kl_max_nats == 0.0 and r.top1_agreement == 1.0 for r in tokens)


def test_every_layer_phase_and_mode_has_its_record(found: list[Record], documents: list[torch.Tensor]):
    places = {(r.layer, r.phase, r.mode, r.frozen) for r in of(found, FP8) if r.probe == "attention"}
    ways = {("isolated", "none"), ("propagated", "none"), ("propagated", FROZEN)}
    assert places == {
        (layer, phase, *way) for layer in range(3) for phase in ("prefill", "decode") for way in ways
    }
    sizes = {r.phase: r.n for r in of(found, FP8) if r.probe == "latent"}
    assert sizes == {"prefill": (96 + 80 - 12) * 512, "decode": 12 * 512}


def test_no_place_is_recorded_twice(found: list[Record]):
    keys = [
        (r.candidate, r.layer, r.phase, r.mode, r.probe, r.rung, r.frozen) for r in only(found, LayerRecord)
    ]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("candidate", [FP8, CALIBRATED, DS_MLA], ids=str)
def test_fp8_rows_differ_in_latent_and_attention(found: list[Record], candidate: Candidate):
    for record in of(found, candidate):
        if record.probe in ("latent", "attention", "output", "hidden"):
            assert 0 < (record.relative_l2 or 0) < 1, record


def test_ds_mla_keeps_the_rope_of_an_isolated_layer_bit_exact(found: list[Record]):
    rope = [r for r in of(found, DS_MLA) if r.probe == "rope" and r.mode == "isolated"]
    assert rope
    assert all(r.max_abs_error == 0.0 for r in rope)


def test_fp8_index_keys_change_the_selection_and_not_the_rows(found: list[Record], model: Any):
    isolated = [r for r in of(found, INDEX_FP8) if r.mode == "isolated"]
    assert all(r.max_abs_error == 0.0 for r in isolated if r.probe in ("latent", "rope"))
    scores = [r for r in isolated if r.probe == "index_scores"]
    assert scores
    assert all(r.relative_l2 is not None and r.relative_l2 > 0 for r in scores)
    lost = [r for r in only(found, SelectionRecord) if r.candidate == str(INDEX_FP8) and r.mode == "isolated"]
    full = [r for r in lost if r.phase == "prefill" and r.margin_p50 is not None]
    assert full
    assert all(r.recall_mean is not None and r.recall_mean < 1 for r in full)
    assert all(r.mass_lost_mean is not None and 0 < r.mass_lost_mean < 1 for r in full)


def test_the_rungs_of_an_isolated_layer_add_up_on_the_reference_backend(found: list[Record]):
    """There the kernel is exact attention: no kernel gap, and the format gap is the total."""
    by_place = {
        (r.layer, r.phase): r for r in of(found, FP8) if r.probe == "attention" and r.mode == "isolated"
    }
    for record in of(found, FP8, "kernel"):
        assert record.max_abs_error == 0.0
    for record in of(found, FP8, "format"):
        assert record.relative_l2 == by_place[record.layer, record.phase].relative_l2


def test_frozen_runs_select_and_route_as_the_reference(found: list[Record]):
    frozen = [
        r for r in only(found, LayerRecord) if r.frozen == FROZEN and r.probe in ("selection", "routing")
    ]
    assert frozen
    assert all(r.max_abs_error == 0.0 for r in frozen)


def test_the_last_layer_diverges_more_than_the_first(found: list[Record]):
    hidden = {
        r.layer: r.relative_l2 or 0.0
        for r in of(found, FP8)
        if r.probe == "hidden" and r.mode == "propagated" and r.frozen == "none" and r.phase == "prefill"
    }
    assert hidden[2] > hidden[0] > 0
    tokens = [r for r in only(found, TokenRecord) if r.candidate == str(FP8)]
    assert all(r.kl_mean_nats is not None and r.kl_mean_nats > 0 for r in tokens)


def test_ranges_are_given_for_formats_that_use_a_scale(found: list[Record]):
    ranges = only(found, RangeRecord)
    assert {r.candidate for r in ranges} == {str(FP8), str(CALIBRATED)}
    tiles = [f"latent {first}-{first + 127}" for first in range(0, 512, 128)]
    assert [r.part for r in ranges if (r.candidate, r.layer) == (str(FP8), 0)] == ["latent", *tiles, "rope"]
    assert len(ranges) == 2 * 3 * 6
    for layer in range(3):
        largest = {r.part: r.max_abs for r in ranges if (r.candidate, r.layer) == (str(FP8), layer)}
        assert largest["latent"] == max(largest[tile] or 0.0 for tile in tiles)
    for layer in range(3):
        room = [r.headroom for r in ranges if r.candidate == str(CALIBRATED) and r.layer == layer]
        assert min(x for x in room if x is not None) == pytest.approx(1.0), (
            "latent and rope share the tightest scale"
        )


def test_every_record_can_be_written(found: list[Record]):
    assert all(to_line(record).endswith("\n") for record in found)


def test_floors_of_bf16_are_recorded_by_kind(found: list[Record]):
    noise = of(found, REFERENCE, "floor:noise")
    isolated = [r.relative_l2 for r in noise if r.probe == "latent" and r.mode == "isolated"]
    assert isolated
    assert all(x is not None and 1e-4 < x < 1e-2 for x in isolated)
    assert {r.probe for r in of(found, REFERENCE, "floor:batch")} == EVERYWHERE
    missing = of(found, REFERENCE, "floor:kernel")
    assert len(missing) == 1
    assert missing[0].n == 0
    assert missing[0].relative_l2 is None


def test_a_multiple_is_a_candidates_error_over_the_floors_at_the_same_place(found: list[Record]):
    def place(record: LayerRecord | MultipleRecord) -> tuple[Any, ...]:
        return record.layer, record.phase, record.mode, record.probe, record.frozen

    errors = {(r.candidate, r.rung, *place(r)): r.relative_l2 for r in only(found, LayerRecord)}
    multiples = [r for r in only(found, MultipleRecord) if r.probe != "kl"]
    for record in multiples:
        mine = errors[record.candidate, "total", *place(record)]
        floor = errors[str(REFERENCE), record.floor, *place(record)]
        assert mine is not None
        assert floor, "nothing is a multiple of zero"
        assert record.multiple == pytest.approx(mine / floor), record
    every = [r for r in multiples if r.candidate == str(FP8) and r.floor == "floor:noise"]
    assert {(r.layer, r.phase, r.mode, r.probe) for r in every} == {
        (layer, phase, mode, probe)
        for layer in range(3)
        for phase in ("prefill", "decode")
        for mode in ("isolated", "propagated")
        for probe in ("attention", "hidden")
    }


def test_the_control_stream_ends_in_the_models_own_logits(model: Any, documents: list[torch.Tensor]):
    stream = LayerStream(model, documents[:1], [Subject(candidate=REFERENCE)], 0, lambda: None)
    for layer in range(3):
        stream.layer(layer)
    free = next(arm for arm in stream.arms if arm.mode == "propagated" and not arm.frozen)
    with torch.no_grad():
        whole = model(documents[0][None]).logits[0]
        torch.testing.assert_close(stream.head(stream.hidden[free, 0]), whole, rtol=0, atol=0)


def test_captures_live_no_longer_than_their_layer(
    model: Any, documents: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
):
    alive: list[weakref.ref[Any]] = []
    most = 0

    class Watched(Capture):
        def __init__(self, probes: frozenset[str], keep_calls: bool) -> None:
            nonlocal most
            super().__init__(probes, keep_calls)
            alive.append(weakref.ref(self))
            most = max(most, sum(ref() is not None for ref in alive))

        def tensor(self, probe: str, layer: int, value: torch.Tensor) -> None:
            super().tensor(probe, layer, value)
            tensors.append(weakref.ref(self.parts[probe][-1]))

    tensors: list[weakref.ref[torch.Tensor]] = []
    monkeypatch.setattr("evalkit.compare.passes.capture.Capture", Watched)
    stream = LayerStream(model, documents[:1], [Subject(candidate=FP8)], 4, lambda: None)
    for layer in range(3):
        stream.layer(layer)
        kept = sum(ref() is not None for ref in tensors)
        assert kept == 0, f"after layer {layer}, {kept} captured tensors are still alive"
    assert len(alive) == 2 + 2 * 4, "the first layer's propagated passes are its isolated one"
    assert most == 1


def test_decode_equals_prefill_up_to_rounding(model: Any, documents: list[torch.Tensor]):
    """The reference's decode steps see the same rows as one long prompt would."""
    short, whole = (LayerStream(model, documents[:1], [], decode, lambda: None) for decode in (8, 0))
    got, ref = (stream.reference(0, 0).run.hidden for stream in (short, whole))
    difference = relative_l2(got[0], ref[0])
    assert difference is not None
    assert difference < 3e-3


def test_progress_is_reported_as_often_as_announced(model: Any, documents: list[torch.Tensor]):
    calls: list[None] = []
    list(compare(model, documents, [REFERENCE], decode_tokens=2, advance=lambda: calls.append(None)))
    assert len(calls) == count_passes(model, documents=2, candidates=1)


def test_a_scale_far_off_is_not_mistaken_for_a_fit(model: Any, documents: list[torch.Tensor]):
    """Scales so small that e4m3 saturates at once, so large that all is zero: neither may look like a fit."""
    for scale in (1e-6, 1e6):
        scales = {CALIBRATED: {layer: Scales(latent=scale, rope=scale) for layer in range(3)}}
        records = list(compare(model, documents[:1], [CALIBRATED], scales=scales, decode_tokens=0, floors=()))
        latent = [r for r in of(records, CALIBRATED) if r.probe == "latent" and r.mode == "isolated"]
        assert latent
        assert all(r.relative_l2 is not None and r.relative_l2 > 0.9 for r in latent)
        assert {r.phase for r in only(records, LayerRecord)} == {"prefill"}


def test_a_nan_in_the_rows_is_counted_and_does_not_stop_the_run(model: Any, documents: list[torch.Tensor]):
    damaged = Subject(candidate=REFERENCE, rung="floor:noise", noise=math.nan)
    records = list(compare(model, documents[:1], [REFERENCE], decode_tokens=4, floors=[damaged]))
    latent = [r for r in of(records, REFERENCE, "floor:noise") if r.probe == "latent"]
    assert latent
    assert all(r.nonfinite > 0 and r.n == 0 and r.relative_l2 is None for r in latent)
    assert all(r.nonfinite == 0 for r in of(records, REFERENCE))
    assert all(to_line(record) for record in records)


def test_a_candidate_that_stores_nan_is_counted_and_does_not_stop_the_run(
    model: Any, documents: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
):
    """The kernel gap's reference is attention over the candidate's own rows, which is then not finite."""
    stored = kv.get("fp8_ds_mla")
    encode = stored.encode

    def damaged(latent: torch.Tensor, rope: torch.Tensor, scales: Scales) -> torch.Tensor:
        latent = latent.clone()
        latent[len(latent) // 2, 3] = math.nan
        return encode(latent, rope, scales)

    monkeypatch.setattr(stored, "encode", damaged)
    records = list(compare(model, documents[:1], [DS_MLA], decode_tokens=4, floors=()))
    for probe, rung in (("latent", "total"), ("attention", "format"), ("attention", "total")):
        seen = [r for r in of(records, DS_MLA, rung) if (r.probe, r.phase) == (probe, "prefill")]
        assert len({r.layer for r in seen}) == 3
        assert all(r.nonfinite > 0 for r in seen), "one NaN in a row of each layer"
    kernel = [r for r in of(records, DS_MLA, "kernel") if r.phase == "prefill"]
    assert all((r.nonfinite, r.relative_l2) == (0, 0.0) and 0 < r.n < 92 * 4 * 512 for r in kernel)
    assert all(to_line(record) for record in records)


@pytest.mark.parametrize(
    ("documents", "candidates", "message"),
    [
        ([], [REFERENCE], "0 documents"),
        ([torch.zeros(40, dtype=torch.long)], [], "0 candidates"),
        ([torch.zeros(8, dtype=torch.long)], [REFERENCE], "document 0 has shape"),
        ([torch.zeros(257, dtype=torch.long)], [REFERENCE], "max_position_embeddings"),
    ],
)
def test_bad_input_is_one_clear_line(model: Any, documents: Any, candidates: Any, message: str):
    with pytest.raises(InputError, match=message) as error:
        list(layers.compare(model, documents, candidates, decode_tokens=8))
    assert "\n" not in str(error.value)


def test_a_four_bit_latent_is_not_judged_by_the_range_of_e4m3():
    """It saturates at each group's own scale; its rope, or another format's latent, at 448 of a per-tensor one."""
    assert not layers._is_scaled(kv.get("nvfp4_flashinfer"), "latent")
    assert layers._is_scaled(kv.get("fp8_e4m3"), "latent")
    assert layers._is_scaled(kv.get("fp8_group128"), "rope")
    assert not layers._is_scaled(kv.get("fp8_ds_mla"), "rope")
