"""Range profiles: what they change in the rows, and that they change nothing else."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import evalkit
from evalkit import kv
from evalkit.candidate import Candidate
from evalkit.compare.layers import calibrate, compare
from evalkit.errors import InputError
from evalkit.evaluate.documents import generated_tokens, range_documents
from evalkit.evaluate.lm import EvalkitLM
from evalkit.kv import Scales
from evalkit.kv.scale_files import write_overlay
from evalkit.model.checkpoint import EMBEDDED
from evalkit.model.graft import graft
from evalkit.model.ranges import profile as profiles
from evalkit.model.ranges.profile import Curves, Profile, Range, load_profile
from evalkit.model.ranges.rescale import Rescaled, apply, exponents, multiply, record
from evalkit.model.ranges.spread import Spread, measure
from evalkit.records import LayerRecord, RangeRecord, Record, only

ONE = Candidate.parse("fp8_e4m3:one@reference")
CALIBRATED = Candidate.parse("fp8_e4m3:calibrated@reference")
DS_MLA = Candidate.parse("fp8_ds_mla@reference")
REAL = ("deepseek-v3.2", "glm-5.2")
LAYERS = 4


def curves(rms: float, largest: float, tail: float) -> Curves:
    return Curves(rms=(rms,), max=(largest,), tail=(tail,))


def profile_of(**parts: Curves) -> Profile:
    return Profile(name="made", sha256="0", **parts)


@pytest.fixture(scope="module")
def nano() -> Any:
    return evalkit.load("dsa-nano", device="cpu")


@pytest.fixture(scope="module")
def calibration(nano: Any) -> list[Tensor]:
    return range_documents(EvalkitLM(nano).tok_encode, 256)


@pytest.fixture(scope="module")
def document(nano: Any) -> Tensor:
    """Longer than the top-k of 512, so that the indexer has to choose."""
    return generated_tokens(EvalkitLM(nano).tok_encode, 640, seed=3)


@pytest.fixture(scope="module")
def given(nano: Any, calibration: list[Tensor]) -> Mapping[str, tuple[Any, list[Rescaled]]]:
    """By profile, dsa-nano under it and what was found."""
    found = {}
    for name in profiles.names():
        model = evalkit.load("dsa-nano", device="cpu")
        found[name] = model, apply(model, load_profile(name), calibration)
    return found


class Seen:
    """The probes of one pass over one document."""

    def __init__(self, model: Any, ids: Tensor, *probes: str) -> None:
        self.probes, self.found = frozenset(probes), dict[tuple[str, int], Tensor]()
        cache = model.evalkit.new_cache()
        cache.state.observer = self
        with torch.no_grad():
            self.logits = model(ids[None], **cache.argument).logits

    def tensor(self, probe: str, layer: int, value: Tensor) -> None:
        self.found[probe, layer] = value.clone()

    def attention(self, layer: int, call: Any) -> None: ...


@pytest.fixture(scope="module")
def before(nano: Any, document: Tensor) -> Seen:
    return Seen(nano, document, "selection", "index_scores", "values", "latent", "rope")


@pytest.mark.parametrize("name", profiles.names())
def test_a_profile_changes_no_bit_of_what_the_model_computes(
    name: str, given: Any, before: Seen, document: Tensor
) -> None:
    after = Seen(given[name][0], document, "selection", "index_scores", "values")
    assert torch.equal(after.logits, before.logits)
    for (probe, layer), value in after.found.items():
        assert torch.equal(value, before.found[probe, layer]), (probe, layer)
    assert {probe for probe, _ in after.found} == {"selection", "index_scores", "values"}


@pytest.mark.parametrize("name", REAL)
def test_rows_change_by_powers_of_two_and_the_members_of_a_rope_pair_alike(
    name: str, given: Any, before: Seen, document: Tensor
) -> None:
    after = Seen(given[name][0], document, "latent", "rope")
    for (probe, layer), value in after.found.items():
        was = before.found[probe, layer]
        factor = (value / was).nan_to_num(nan=math.inf).amin(0)  # 0 / 0 says nothing
        assert torch.equal(was * factor, value)
        assert torch.equal(factor.log2().round().exp2(), factor)
        assert factor.unique().numel() > 2
        if probe == "rope":
            assert torch.equal(factor[0::2], factor[1::2])


@pytest.mark.parametrize("name", REAL)
def test_each_layer_comes_near_its_target(name: str, given: Any) -> None:
    """One of 512 channels comes within 1 % of its layer's max by a power of two, one of 32 pairs within 15 %."""
    targets = load_profile(name).targets(LAYERS)
    found = given[name][1]
    assert [(one.layer, one.part) for one in found] == [
        (n, part) for n in range(LAYERS) for part in targets[n]
    ]
    for one in found:
        assert one.target == targets[one.layer][one.part]
        slack = 0.99 if one.part == "latent" else 0.85
        assert slack * one.target.max <= one.found.max <= one.target.max
        assert one.found.rms == pytest.approx(one.target.rms, rel=0.3)
        assert one.found.tail == pytest.approx(one.target.tail, abs=0.15)
        assert one.zero_channels == 0
        assert record(load_profile(name), one).max_abs == one.found.max


def test_the_latent_of_glm_spans_what_its_layers_are_known_to_span(given: Any) -> None:
    largest = [one.found.max for one in given["glm-5.2"][1] if one.part == "latent"]
    assert largest == sorted(largest)
    assert (largest[0], largest[-1]) == (pytest.approx(0.02, rel=0.01), pytest.approx(5.2, rel=0.01))


def test_native_leaves_every_weight(given: Any, nano: Any) -> None:
    model, found = given["native"]
    assert found == []
    assert all(torch.equal(value, nano.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_profile_twice_is_once_and_of_two_the_last_counts(given: Any, calibration: list[Tensor]) -> None:
    model = evalkit.load("dsa-nano", device="cpu")
    for name in ("glm-5.2", "deepseek-v3.2", "deepseek-v3.2"):
        apply(model, load_profile(name), calibration)
    wanted = given["deepseek-v3.2"][0].state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


def test_bf16_weights_are_scaled_as_exactly(calibration: list[Tensor], document: Tensor) -> None:
    model = evalkit.load("dsa-nano", device="cpu", dtype=torch.bfloat16)
    ids, short = document[:96], [ids[:128] for ids in calibration]
    was = Seen(model, ids, "values")
    apply(model, load_profile("glm-5.2"), short)
    assert model.dtype == torch.bfloat16
    assert torch.equal(Seen(model, ids, "values").logits, was.logits)


def test_both_architectures_biases_included(make_model: Any, architecture: str) -> None:
    """GLM's layers that share a selection have no indexer; attention_bias adds a bias to kv_a."""
    plain = make_model(architecture, attention_bias=True)
    with torch.no_grad():
        for layer in plain.model.layers:
            layer.self_attn.kv_a_proj_with_mqa.bias.normal_()
    model = graft(plain, rounding=torch.bfloat16)
    ids = torch.randint(2, 128, (80,), generator=torch.Generator().manual_seed(0))
    was = Seen(model, ids, "rope")
    apply(model, load_profile("deepseek-v3.2"), [ids])
    now = Seen(model, ids, "rope")
    assert torch.equal(now.logits, was.logits)
    assert all(float(value.abs().max()) <= 1.0 for value in now.found.values())


@pytest.mark.gpu
def test_on_a_gpu_in_bf16_logits_stay_bit_identical(document: Tensor, calibration: list[Tensor]) -> None:
    model = evalkit.load("dsa-nano", device="cuda")
    ids = document.cuda()
    was = Seen(model, ids, "selection")
    apply(model, load_profile("glm-5.2"), calibration)
    now = Seen(model, ids, "selection")
    assert torch.equal(now.logits, was.logits)
    assert all(torch.equal(value, was.found[where]) for where, value in now.found.items())


def shifted(nano: Any, **powers: int) -> Any:
    """dsa-nano with every channel of a part times one power of two, in every layer."""
    model = copy.deepcopy(nano)
    sizes = {"latent": 512, "rope": 32}
    factors = {part: torch.full((sizes[part],), power) for part, power in powers.items()}
    multiply(model, [factors] * LAYERS)
    return model


def errors(
    model: Any,
    candidates: Sequence[Candidate],
    document: Tensor,
    calibration: Sequence[Tensor],
    scales: Mapping[int, Scales] | None = None,
) -> tuple[dict[tuple[str, int | None], float], list[Record]]:
    """The isolated error of `values`, which no profile scales, by candidate and layer; and all records."""
    measured = scales if scales is not None else calibrate(model, calibration, kv.get("fp8_e4m3"))
    records = list(
        compare(model, [document], candidates, scales={CALIBRATED: measured}, decode_tokens=0, floors=())
    )
    found = {
        (r.candidate, r.layer): r.relative_l2 or 0.0
        for r in only(records, LayerRecord)
        if (r.probe, r.mode, r.rung, r.frozen) == ("values", "isolated", "total", "none")
    }
    return found, records


def test_deepcopied_models_are_grafted_apart(nano: Any) -> None:
    """`shifted` relies on it: a copy whose path were the original's would scale that."""
    gain = nano.evalkit.layers[0].kv_a_layernorm.weight.clone()
    other = shifted(nano, latent=-3)
    assert torch.equal(nano.evalkit.layers[0].kv_a_layernorm.weight, gain)
    assert torch.equal(other.model.layers[0].self_attn.kv_a_layernorm.weight, gain / 8)


def test_formats_that_carry_or_fit_their_scales_do_not_see_a_common_factor_and_scale_one_does(
    nano: Any, document: Tensor, calibration: list[Tensor]
) -> None:
    short = document[:200]
    candidates = [ONE, CALIBRATED, DS_MLA]
    was, _ = errors(nano, candidates, short, calibration)
    up, _ = errors(shifted(nano, latent=2, rope=2), [CALIBRATED, DS_MLA], short, calibration)
    # The latent's max|x| of 1 to 6 becomes 0.003 to 0.02.
    down, _ = errors(shifted(nano, latent=-8, rope=-8), candidates, short, calibration)
    for layer in range(LAYERS):
        for candidate in map(str, (CALIBRATED, DS_MLA)):
            assert up[candidate, layer] == was[candidate, layer] > 0
        assert down[str(CALIBRATED), layer] == was[str(CALIBRATED), layer]
        # Small tiles meet the floor of fp8_ds_mla's scale, 2^-13, and stay well above what e4m3 can tell apart there.
        assert down[str(DS_MLA), layer] == pytest.approx(was[str(DS_MLA), layer], rel=0.05)
        assert down[str(ONE), layer] > 1.3 * was[str(ONE), layer]


def test_a_tail_of_channels_that_e4m3_cannot_span_hurts_one_scale_for_all_more_than_one_for_each_tile(
    nano: Any, document: Tensor, calibration: list[Tensor]
) -> None:
    """Each layer's max stays what it was: the tail alone differs, and a calibrated scale with it not at all."""
    short, heavy = document[:200], copy.deepcopy(nano)
    own = tuple(spread["latent"].range().max for spread in measure(nano, calibration))
    apply(
        heavy,
        profile_of(latent=Curves(rms=tuple(x / 100 for x in own), max=own, tail=(2.0,))),
        calibration,
    )
    was, _ = errors(nano, [CALIBRATED, DS_MLA], short, calibration)
    now, _ = errors(heavy, [CALIBRATED, DS_MLA], short, calibration)
    for layer in range(LAYERS):
        assert now[str(CALIBRATED), layer] > 1.5 * was[str(CALIBRATED), layer]
        assert now[str(CALIBRATED), layer] > 3 * now[str(DS_MLA), layer]


def latent_only(model: Any, documents: Sequence[Tensor]) -> dict[int, Scales]:
    """What a calibration that forgets the rope part makes: its scale for both."""
    found = {}
    for layer, spread in enumerate(measure(model, documents)):
        scale = float(spread["latent"].max.max()) / 448
        found[layer] = Scales(latent=scale, rope=scale)
    return found


def test_a_scale_calibrated_on_the_latent_alone_saturates_the_rope_in_every_layer(
    given: Any, document: Tensor, calibration: list[Tensor], tmp_path: Path
) -> None:
    """As vLLM issue 42956 had it; such scales reach a run as those of a checkpoint."""
    model, short = given["deepseek-v3.2"][0], document[:200]
    write_overlay(EMBEDDED / "dsa-nano", tmp_path / "scaled", latent_only(model, calibration), {})
    scales = kv.from_checkpoint(tmp_path / "scaled")
    right, records = errors(model, [CALIBRATED], short, calibration)
    assert all(r.saturated_share < 1e-3 for r in only(records, RangeRecord) if r.saturated_share is not None)
    wrong, records = errors(model, [CALIBRATED], short, calibration, scales)
    shares = {(r.part, r.layer): r.saturated_share for r in only(records, RangeRecord)}
    for layer in range(LAYERS):
        assert (shares["rope", layer] or 0.0) > 0.05
        assert (shares["latent", layer] or 0.0) < 1e-3
        assert wrong[str(CALIBRATED), layer] > 2 * right[str(CALIBRATED), layer]


def test_measured_ranges_are_a_profile_that_another_model_takes(
    make_model: Any, given: Any, calibration: list[Tensor], tmp_path: Path
) -> None:
    measured = [
        {part: spread[part].range() for part in profiles.PARTS}
        for spread in measure(given["glm-5.2"][0], calibration)
    ]
    file = tmp_path / "measured.toml"
    file.write_text(profiles.to_toml(measured, 'dsa-nano "as GLM"'))
    read = load_profile(str(file))
    assert read.targets(LAYERS) == measured
    other = graft(make_model(), rounding=torch.bfloat16)
    ids = torch.randint(2, 128, (300,), generator=torch.Generator().manual_seed(1))
    for one in apply(other, read, [ids]):
        assert 0.75 * one.target.max <= one.found.max <= one.target.max
        assert one.found.rms == pytest.approx(one.target.rms, rel=0.5)
        assert one.found.tail == pytest.approx(one.target.tail, abs=0.25)


def test_a_profile_of_other_depth_is_interpolated_between_its_points() -> None:
    made = Profile(
        name="made",
        sha256="0",
        latent=Curves(rms=(0.001, 0.001), max=(0.02, 5.12), tail=(0.0, 2.0)),
        rope=Curves(rms=(0.1,), max=(1.0, 4.0, 1.0), tail=(0.5,)),
    )
    found = made.targets(5)
    assert [one["latent"].max for one in found] == pytest.approx([0.02, 0.08, 0.32, 1.28, 5.12])
    assert [one["latent"].tail for one in found] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert [one["rope"].max for one in found] == pytest.approx([1, 2, 4, 2, 1])
    assert made.targets(78)[77]["latent"].max == 5.12
    assert made.targets(1) == [
        {"latent": Range(rms=0.001, max=0.02, tail=0.0), "rope": Range(rms=0.1, max=1.0, tail=0.5)}
    ]


def test_channels_of_zeros_stay_and_are_counted(make_model: Any) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.layers[2].self_attn.kv_a_layernorm.weight[[3, 500]] = 0
    model = graft(model, rounding=torch.bfloat16)
    ids = torch.randint(2, 128, (60,), generator=torch.Generator().manual_seed(2))
    found = apply(model, load_profile("glm-5.2"), [ids])
    assert [one.zero_channels for one in found if one.part == "latent"] == [0, 0, 2, 0]
    assert all(math.isfinite(one.found.tail) for one in found)
    up = model.evalkit.layers[2].kv_b_proj.weight
    assert torch.isfinite(up).all()


def test_a_layer_of_zeros_and_weights_that_cannot_take_a_factor_are_refused_with_nothing_changed(
    make_model: Any,
) -> None:
    ids = torch.randint(2, 128, (20,), generator=torch.Generator().manual_seed(3))
    model = graft(make_model(), rounding=torch.bfloat16)
    with torch.no_grad():
        model.evalkit.layers[1].kv_b_proj.weight[0, 0] = 1e-38
    was = {name: value.clone() for name, value in model.state_dict().items()}
    huge = profile_of(latent=curves(1e6, 1e8, 0.0))
    with pytest.raises(
        InputError, match=r"layer 1: kv_b_proj: 1 of .* weights leave what torch\.float32 holds"
    ):
        apply(model, huge, [ids])
    with torch.no_grad():
        model.evalkit.layers[3].kv_a_layernorm.weight.zero_()
        was["model.layers.3.self_attn.kv_a_layernorm.weight"].zero_()
    with pytest.raises(InputError, match="layer 3 stores a latent of zeros only"):
        apply(model, load_profile("glm-5.2"), [ids])
    assert all(torch.equal(value, was[name]) for name, value in model.state_dict().items())
    with pytest.raises(InputError, match="at least one"):
        measure(model, [])
    with pytest.raises(InputError, match="held whole"):
        apply(graft(make_model()).to("meta"), load_profile("glm-5.2"), [ids])
    with pytest.raises(InputError, match=r"torch\.float16"):
        apply(graft(make_model().half()), load_profile("deepseek-v3.2"), [ids])


def test_no_channel_passes_the_max_and_one_reaches_it() -> None:
    draw = torch.Generator().manual_seed(5)
    rms = torch.rand(512, generator=draw, dtype=torch.float64) + 0.5
    own = Spread(rms=rms, max=3 * rms, tokens=1)
    for tail in (0.0, 1.0, 3.0):
        target = Range(rms=0.01, max=0.02, tail=tail)
        largest = 3 * rms * exponents(own, target, torch.Generator().manual_seed(0)).double().exp2()
        assert 0.99 * target.max <= float(largest.max()) <= target.max


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("layers = 3\n[latent]\nrms = [1, 2]\nmax = 3\ntail = 1", "latent.rms has 2 values and layers is 3"),
        ("[latent]\nrms = 1\nmax = 2", "latent lacks tail"),
        ("[latent]\nrms = 0\nmax = 2\ntail = 0", "latent.rms holds 0: numbers above zero"),
        ("[rope]\nrms = 1\nmax = inf\ntail = 0", "rope.max holds inf"),
        ("[rope]\nrms = 1\nmax = []\ntail = 0", "rope.max is an empty list"),
        ("[rope]\nrms = 1\nmax = true\ntail = 0", "rope.max holds True"),
        ("[rope]\nrms = 1\nmax = 1\ntail = -1", "rope.tail holds -1: finite numbers, zero or more"),
        ("[rope]\nrms = 1\nmax = 1\ntale = 1", "unknown key 'tale'"),
        ("rope = 3", "rope is 3: a table"),
        ("latents = 3", "unknown key 'latents'"),
        ("layers = 0", "layers is 0"),
        ('seed = "a"', "seed is 'a'"),
        ("[rope", "not TOML"),
    ],
)
def test_a_bad_profile_is_refused_in_one_line(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(InputError, match=said) as refused:
        load_profile(str(file))
    assert "\n" not in str(refused.value)


def test_a_profile_that_does_not_exist_or_contradicts_itself_is_refused() -> None:
    with pytest.raises(InputError, match=r"no profile 'glm-5\.1': did you mean 'glm-5\.2'"):
        load_profile("glm-5.1")
    made = replace(profile_of(latent=curves(1.0, 2.0, 0.0)), rope=curves(3.0, 2.0, 0.0))
    with pytest.raises(InputError, match="rope of layer 0 would have rms 3 above its max 2"):
        made.targets(LAYERS)


def test_shipped_profiles_name_what_they_assume() -> None:
    for name in REAL:
        text = (profiles.SHIPPED / f"{name}.toml").read_text()
        assert text.count("# Assumed:") >= 6
        assert load_profile(name).latent is not None
