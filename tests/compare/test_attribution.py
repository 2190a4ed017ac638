"""Attribution on tiny random models: controls are exact, the component that is damaged is blamed, errors add up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from evalkit import kv
from evalkit.attention.backends.readers import READERS
from evalkit.attention.cache import PagedCache
from evalkit.candidate import Candidate
from evalkit.compare import attribution
from evalkit.compare.attribution import attribute, count_passes
from evalkit.compare.layers import calibrate, compare
from evalkit.compare.passes.mixing import MixedRows, components, mix
from evalkit.compare.passes.variants import REFERENCE
from evalkit.errors import InputError
from evalkit.kv import Scales
from evalkit.kv.base import formats
from evalkit.kv.rows.bf16 import Bf16
from evalkit.kv.scales import ReadScale
from evalkit.model.checkpoint import resolve_checkpoint
from evalkit.model.load import load
from evalkit.records import AttributionRecord, LayerRecord, TokenRecord, only, to_line

CALIBRATED = Candidate.parse("fp8_e4m3:calibrated@reference")
DS_MLA = Candidate.parse("fp8_ds_mla@reference")
EMULATED = Candidate.parse("fp8_e4m3:calibrated@emulated+index=fp8")
EMULATED_ONE = Candidate.parse("fp8_e4m3:one@emulated")
E8M0 = Candidate.parse("fp8_ds_mla_fp32scale@reference+reader=sm100_e8m0")
INDEX_FP8 = Candidate.parse("bf16@reference+index=fp8")
EVERY = [CALIBRATED, DS_MLA, EMULATED, EMULATED_ONE, E8M0, INDEX_FP8]


def run(model: Any, documents: list[Tensor], *candidates: Candidate) -> list[AttributionRecord]:
    scales = {
        c: calibrate(model, documents, kv.get(c.format)) for c in candidates if c.scales == "calibrated"
    }
    return list(attribute(model, documents, candidates, scales=scales))


@pytest.fixture(scope="session")
def found(model: Any, documents: list[Tensor]) -> list[AttributionRecord]:
    return run(model, documents, REFERENCE, *EVERY)


def squared(
    records: list[AttributionRecord], candidate: Candidate, arm: str, component: str | None = None
) -> list[float]:
    """An arm's squared relative L2, layer by layer."""
    values = [
        r.squared_relative_l2
        for r in records
        if (r.candidate, r.arm, r.component) == (str(candidate), arm, component) and r.layer is not None
    ]
    assert values
    assert all(value is not None for value in values)
    return [value for value in values if value is not None]


def divergence(
    records: list[AttributionRecord],
    candidate: Candidate,
    arm: str,
    component: str | None = None,
    *,
    frozen: bool,
) -> float:
    """An arm's mean KL divergence."""
    (value,) = (
        r.kl_mean_nats
        for r in records
        if (r.candidate, r.arm, r.component) == (str(candidate), arm, component)
        and r.layer is None
        and (r.frozen != "none") == frozen
    )
    assert value is not None
    return value


@pytest.mark.parametrize(
    ("candidate", "expected"),
    [
        ("bf16@reference", ()),
        ("bf16@flashinfer", ()),
        ("fp8_ds_mla@reference", ("latent", "rope")),
        ("fp8_ds_mla@flashmla", ("latent", "rope", "scale_rule")),
        ("fp8_e4m3@flashinfer+index=fp8", ("latent", "rope", "scale_rule", "index")),
        ("fp8_e4m3@reference+read=decoded", ("latent", "rope", "scale_rule")),
        ("fp8_e4m3@emulated", ("latent", "rope", "query", "prob")),
        ("bf16@reference+index=fp8", ("index",)),
        ("fp8_ds_mla@reference+reader=sm100_e8m0", ("latent", "rope", "scale_rule")),
    ],
)
def test_a_candidate_has_the_components_in_which_it_differs(candidate: str, expected: tuple[str, ...]):
    assert components(Candidate.parse(candidate)) == expected


@pytest.mark.parametrize("candidate", EVERY, ids=str)
def test_with_nothing_enabled_all_is_the_reference_to_the_last_bit(
    found: list[AttributionRecord], candidate: Candidate
):
    assert set(squared(found, candidate, "none")) == {0.0}
    for frozen in (False, True):
        assert divergence(found, candidate, "none", frozen=frozen) == 0.0
        assert divergence(found, candidate, "all", frozen=frozen) > 0.0 or (frozen and candidate == INDEX_FP8)
    assert max(squared(found, candidate, "all")) > 0.0


@pytest.mark.parametrize("candidate", EVERY, ids=str)
def test_all_components_make_the_candidates_own_attention(
    found: list[AttributionRecord], candidate: Candidate
):
    apart = squared(found, candidate, "apart")
    if candidate == EMULATED:  # products of scales are rounded elsewhere, which moves P across a step of e4m3
        assert 0.0 < max(apart) < 1e-7
        assert all(a < 1e-4 * whole for a, whole in zip(apart, squared(found, candidate, "all"), strict=True))
    else:
        assert set(apart) == {0.0}


def test_all_components_are_the_format_rung_and_the_candidates_own_divergence(
    model: Any, documents: list[Tensor], found: list[AttributionRecord]
):
    scales = {CALIBRATED: calibrate(model, documents, kv.get(CALIBRATED.format))}
    records = list(compare(model, documents, [CALIBRATED, DS_MLA], scales=scales, decode_tokens=0, floors=()))
    for candidate in (CALIBRATED, DS_MLA):
        rung = [
            r.relative_l2**2
            for r in only(records, LayerRecord)
            if (r.candidate, r.rung) == (str(candidate), "format") and r.relative_l2 is not None
        ]
        assert squared(found, candidate, "all") == pytest.approx(rung, rel=1e-12)
        for token in only(records, TokenRecord):
            if token.candidate == str(candidate):
                whole = divergence(found, candidate, "all", frozen=token.frozen != "none")
                assert whole == pytest.approx(token.kl_mean_nats, rel=1e-12)


def test_ds_mla_owes_nothing_to_its_rope_and_everything_to_its_latent(found: list[AttributionRecord]):
    assert set(squared(found, DS_MLA, "only", "rope")) == {0.0}
    assert set(squared(found, DS_MLA, "without", "latent")) == {0.0}
    assert squared(found, DS_MLA, "only", "latent") == squared(found, DS_MLA, "all")
    for frozen in (False, True):
        assert divergence(found, DS_MLA, "only", "rope", frozen=frozen) == 0.0
        assert divergence(found, DS_MLA, "only", "latent", frozen=frozen) > 0.0


def test_truncated_scales_are_blamed_on_the_scale_rule(found: list[AttributionRecord]):
    for whole, rule, rest in zip(
        squared(found, E8M0, "all"),
        squared(found, E8M0, "only", "scale_rule"),
        squared(found, E8M0, "without", "scale_rule"),
        strict=True,
    ):
        assert rule > 0.95 * whole
        assert rest < 0.05 * whole


def test_rounded_indexer_keys_are_blamed_on_the_index_where_a_layer_has_an_indexer(
    model: Any, found: list[AttributionRecord]
):
    kinds = getattr(model.config, "indexer_types", None) or ["full"] * model.config.num_hidden_layers
    for candidate in (INDEX_FP8, EMULATED):
        alone = squared(found, candidate, "only", "index")
        for kind, value, whole in zip(kinds, alone, squared(found, candidate, "all"), strict=True):
            if kind == "shared":
                assert value == 0.0  # its selection is part of its input
            else:
                assert value > 0.5 * whole > 0.0
        assert divergence(found, candidate, "only", "index", frozen=True) == 0.0
        assert divergence(found, candidate, "only", "index", frozen=False) > 0.0


@pytest.mark.parametrize("candidate", [CALIBRATED, EMULATED_ONE, EMULATED, E8M0], ids=str)
def test_what_components_do_together_is_near_the_sum_of_what_each_does(
    found: list[AttributionRecord], candidate: Candidate
):
    """In squared error on the reference's input, and in KL where selection and routing are frozen."""
    for rest, whole in zip(
        squared(found, candidate, "interaction"), squared(found, candidate, "all"), strict=True
    ):
        assert abs(rest) < 0.08 * whole
    parts = components(candidate)
    for layer, whole in enumerate(squared(found, candidate, "all")):
        alone = sum(squared(found, candidate, "only", part)[layer] for part in parts)
        rest = squared(found, candidate, "interaction")[layer]
        assert rest == pytest.approx(whole - alone, abs=1e-15)
    whole = divergence(found, candidate, "all", frozen=True)
    assert abs(divergence(found, candidate, "interaction", frozen=True)) < 0.25 * whole


def test_emulated_query_and_p_each_have_an_error_of_their_own(found: list[AttributionRecord]):
    for component in ("query", "prob"):
        alone = squared(found, EMULATED_ONE, "only", component)
        rest = squared(found, EMULATED_ONE, "without", component)
        for part, less, whole in zip(alone, rest, squared(found, EMULATED_ONE, "all"), strict=True):
            assert 0.0 < part < whole
            assert less < whole


class CoarseRope(Bf16):
    """bf16 rows whose rope is read a tenth too long."""

    name = "coarse_rope"

    def decode(self, rows: Tensor, scales: Scales, read_scale: ReadScale) -> tuple[Tensor, Tensor]:
        latent, rope = super().decode(rows, scales, read_scale)
        return latent, rope * 1.1


class NaNRope(Bf16):
    """bf16 rows whose rope reads as NaN."""

    name = "nan_rope"

    def decode(self, rows: Tensor, scales: Scales, read_scale: ReadScale) -> tuple[Tensor, Tensor]:
        latent, rope = super().decode(rows, scales, read_scale)
        return latent, torch.full_like(rope, torch.nan)


@pytest.fixture
def planted_formats() -> Iterator[None]:
    for planted in (CoarseRope, NaNRope):
        formats.register(planted)
    yield
    for planted in (CoarseRope, NaNRope):
        formats.remove(planted.name)


def test_a_format_that_damages_the_rope_alone_is_blamed_on_its_rope(
    model: Any, documents: list[Tensor], planted_formats: None
):
    planted = Candidate.parse("coarse_rope@reference")
    records = run(model, documents, planted)
    assert set(squared(records, planted, "only", "latent")) == {0.0}
    assert set(squared(records, planted, "without", "rope")) == {0.0}
    assert min(squared(records, planted, "only", "rope")) > 0.0
    assert squared(records, planted, "only", "rope") == squared(records, planted, "all")


def test_a_scale_rule_alone_multiplies_the_references_values():
    """Latent and rope of the candidate would be rounded to e4m3; here only their scale's truncation shows."""
    stored, reader = kv.get("fp8_ds_mla_fp32scale"), READERS["sm100_e8m0"]
    generator = torch.Generator().manual_seed(3)
    latent = torch.randn(5, 512, generator=generator).bfloat16()
    latent[1, :200] = 0.0
    rope = torch.randn(5, 64, generator=generator).bfloat16()
    mixed = MixedRows(stored, reader, frozenset({"scale_rule"}))
    cache, slots = mixed.allocate(5), torch.arange(5)
    mixed.store(cache, slots, latent, rope, Scales())
    got, got_rope = mixed.load(cache, slots, Scales())
    factor = (got / latent.float())[latent != 0]
    assert bool(((factor > 0.4999) & (factor <= 1.0)).all())
    assert float(factor.min()) < 0.99
    assert bool((got[latent == 0] == 0).all())
    assert torch.equal(got_rope, rope.float())


def test_a_mixture_also_decodes_token_by_token(model: Any, documents: list[Tensor]):
    """The rows of a mixture live in pages like any other: nothing enabled generates what the reference does."""

    def logits(cache: PagedCache) -> Tensor:
        ids = documents[0][None]
        with torch.no_grad():
            model(ids[:, :70], **cache.argument)
            steps = [model(ids[:, t : t + 1], **cache.argument).logits for t in range(70, 76)]
        return torch.cat(steps, 1)

    mixed = model.evalkit.new_cache(DS_MLA, {})
    mix(mixed.state, frozenset())
    assert torch.equal(logits(mixed), logits(model.evalkit.new_cache(REFERENCE, {})))
    every = model.evalkit.new_cache(DS_MLA, {})
    mix(every.state, frozenset(components(DS_MLA)))
    own = logits(model.evalkit.new_cache(DS_MLA, {}))
    assert torch.equal(logits(every), own)
    assert not torch.equal(own, logits(model.evalkit.new_cache(REFERENCE, {})))


def test_progress_is_reported_as_often_as_was_said(model: Any, documents: list[Tensor]):
    calls: list[None] = []
    candidates = [REFERENCE, EMULATED_ONE, INDEX_FP8]
    for _ in attribute(model, documents, candidates, advance=lambda: calls.append(None)):
        pass
    assert len(calls) == count_passes(model, len(documents), candidates)
    assert count_passes(model, len(documents), [REFERENCE]) == 0
    assert list(attribute(model, documents, [REFERENCE])) == []


def test_every_record_is_a_line_and_no_place_is_recorded_twice(
    model: Any, found: list[AttributionRecord], documents: list[Tensor]
):
    places = [(r.candidate, r.layer, r.mode, r.frozen, r.arm, r.component) for r in found]
    assert len(places) == len(set(places))
    tokens = sum(map(len, documents))
    for record in found:
        to_line(record)
        heads = model.config.num_attention_heads
        assert record.n == (tokens if record.layer is None else tokens * heads * 512)
        assert (record.squared_relative_l2 is None) == (record.layer is None)
        assert (record.kl_mean_nats is None) == (record.layer is not None)
    assert {r.layer for r in found} == {0, 1, 2, None}


def test_what_is_not_finite_is_counted_and_has_no_figure(
    model: Any, documents: list[Tensor], planted_formats: None
):
    records = run(model, documents[:1], Candidate.parse("nan_rope@reference"))
    for record in records:
        broken = record.arm in ("all", "apart", "interaction") or (record.arm, record.component) in (
            ("only", "rope"),
            ("without", "latent"),
        )
        assert (record.nonfinite > 0) == broken, record
        assert ((record.squared_relative_l2 is None) and (record.kl_mean_nats is None)) == broken


def test_documents_and_scales_that_do_not_fit_are_refused(model: Any, documents: list[Tensor]):
    for wrong in ([], [documents[0][:0]], [torch.zeros(300, dtype=torch.int64)]):
        with pytest.raises(InputError, match="attribution"):
            next(attribute(model, wrong, [DS_MLA]))
    with pytest.raises(InputError, match="needs the scales of every layer"):
        next(attribute(model, documents, [CALIBRATED]))
    assert attribution.attributed([REFERENCE, DS_MLA]) == [DS_MLA]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "text", ["fp8_e4m3:one@flashinfer+index=fp8", "fp8_ds_mla@flashmla", "fp8_e4m3:one@emulated"]
)
def test_on_a_gpu_the_controls_hold_for_kernels(text: str):
    """All components together are exact attention on the rows that the kernel wrote, read with its rounding."""
    on_gpu = load(resolve_checkpoint("dsa-nano"), "bf16@reference", device="cuda")
    try:
        candidate = on_gpu.evalkit.resolve(text)
    except InputError as refusal:
        pytest.skip(str(refusal))
    ids = torch.randint(5, 1000, (700,), generator=torch.Generator().manual_seed(2))
    records = run(on_gpu, [ids], candidate)
    assert set(squared(records, candidate, "none")) == {0.0}
    assert divergence(records, candidate, "none", frozen=False) == 0.0
    for apart, whole in zip(
        squared(records, candidate, "apart"), squared(records, candidate, "all"), strict=True
    ):
        assert whole > 0.0
        assert apart <= (1e-2 * whole if candidate.backend == "emulated" else 0.0)
    if "scale_rule" in components(candidate):  # scale 1, and powers of two, survive a rounding to bf16
        assert set(squared(records, candidate, "only", "scale_rule")) == {0.0}
