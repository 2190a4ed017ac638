from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

from evalkit.compare import engines, phases
from evalkit.compare.passes import noise, variants
from evalkit.compare.passes.capture import ATTENTION_PROBES
from evalkit.errors import InputError
from evalkit.gate.contradictions import WORDS
from evalkit.gate.policy import load

POLICIES = Path(__file__).parents[2] / "tasks" / "policies"
DEFAULT = POLICIES / "default.toml"


@pytest.mark.parametrize("path", sorted(POLICIES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_policies_here_are_read(path: Path):
    policy = load(path)
    assert policy.decide
    assert len(policy.sha256) == 64


def test_a_policy_here_is_read_from_every_folder_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert load("default") == load("default.toml") == load(DEFAULT)
    (tmp_path / "default").write_text(DEFAULT.read_text().replace("margin = 0.05", "margin = 0.06"))
    assert load("default").sha256 != load("default.toml").sha256 == load(DEFAULT).sha256


def test_the_hash_is_of_what_is_said_and_not_of_its_layout(tmp_path: Path):
    text = DEFAULT.read_text()
    other = tmp_path / "other.toml"
    other.write_text("# signed\n" + text.replace("alpha = 0.05\npower = 0.8", "power = 0.80\nalpha = 0.05"))
    assert other.read_text() != text
    assert load(other).sha256 == load(DEFAULT).sha256
    other.write_text(text.replace("margin = 0.05", "margin = 0.0501"))
    assert load(other).sha256 != load(DEFAULT).sha256


def test_dates_and_numbers_are_of_their_types(tmp_path: Path):
    found = load(POLICIES / "deepseek-v3.2-gsm8k-5shot.toml")
    assert found.exceptions[0].expires == date(2026, 12, 31)
    assert found.limits[1].at_most == 10.0
    assert isinstance(found.limits[1].at_most, float)


HUGE = "1" + 400 * "0"  # an integer that no float holds


def refused(folder: Path, old: str, new: str) -> str:
    """What is said of the committed policy with a change."""
    text, file = DEFAULT.read_text(), folder / "policy.toml"
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError) as caught:
        load(file)
    assert str(caught.value).startswith(str(file))
    return str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("alpha = 0.05", "alhpa = 0.05", "unknown key 'alhpa'; did you mean alpha?"),
        ("margin = 0.05", "margins = 0.05", "endpoints[0]: unknown key 'margins'; did you mean margin?"),
        ("margin = 0.05\n", "", "endpoints[0]: margin missing"),
        ("margin = 0.05", 'margin = "2 points"', "margin is '2 points': a number is right"),
        ("looks = 1", "looks = true", "looks is True: a whole number"),
        ("heads = [4]", "heads = 4", "heads is 4: a list is right"),
        ('baselines = ["bf16"]', "baselines = []", "name at least one of each"),
        ("layer.relative_l2", "layer.relative_l3", "a layer record has layer, cosine, relative_l2"),
        ("layer.relative_l2", "layers.relative_l2", "no such kind of record"),
        ("layer.relative_l2", "layer.probe", "figure is 'layer.probe'"),
        ("layer.relative_l2", "position.counts", "figure is 'position.counts': a position record has layer, slope"),
        ("layer.relative_l2", "position.cliff", "figure is 'position.cliff'"),
        ("layer.relative_l2", "sample.score", "no such kind of record"),
        ("layer.relative_l2", "verdict.post_hoc", "no such kind of record"),
        ('probe = "attention"', 'prob = "attention"', "'prob' selects nothing"),
        ('probe = "attention"', 'probe = "attenton"', "probe is 'attenton', did you mean attention?; there are latent"),
        ('mode = "isolated"', 'mode = "alone"', "mode is 'alone'; there are isolated, propagated"),
        ('rung = "total"', 'rung = "floor:"', "rung is 'floor:', did you mean floor:"),
        ('probe = "attention"', 'candidate = "bf16"', "candidate is always the one that is judged"),
        ('probe = "attention"', 'probe = ""', "where.probe is '': text that is not blank is right"),
        ("at_most = 0.01", "", "give at_most or at_least"),
        ("at_most = 0.01", 'at_most = 0.01\nbreach = "WORSE"', "INCONCLUSIVE or ANOMALOUS is right"),
        ('name = "saturated values"', 'name = "attention, isolated"', "two have one name"),
        ("loss_at_most = 0.3", "loss_at_most = 0.1", "more than 0.1 is right"),
        ("true_loss = 0.0", "true_loss = 0.05", "less than the margin of evalkit_registers_2048"),
        ('gpus = ["cpu",', 'gpus = ["",', "gpus[0] is '': text that is not blank is right"),
        ('name = "dsa-nano"', 'name = " "', "name is ' ': text that is not blank is right"),
        ('filter = "answer"', 'filter = ""', "endpoints[0]: filter is ''"),
        ('"fp8_ds_mla"]', '"fp8_ds_mla@flash mla"]', "decide[1]: candidate 'fp8_ds_mla@flash mla' is not format"),
        ('baselines = ["bf16"]', 'baselines = ["bf16+indx=fp8"]', "baselines[0]: candidate 'bf16+indx=fp8': unknown key"),
        ('"fp8_ds_mla"]', '"fp8_ds_mla", " fp8_ds_mla:one"]', "decide[2] is ' fp8_ds_mla:one', which is named before"),
        ('baselines = ["bf16"]', 'baselines = ["bf16", "bf16:one"]', "baselines[1] is 'bf16:one', which is named before"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_with_its_place(tmp_path: Path, old: str, new: str, said: str):
    assert said in refused(tmp_path, old, new)


@pytest.mark.parametrize(
    ("key", "wrong", "within"),
    [
        ("alpha = 0.05", ("0.0", "0.21", "0.49", "0.6", "-0.05", "5e-324"), "a number from 1e-06 to 0.2"),
        ("power = 0.8", ("0", "1", "80", "-0.8"), "a number from 0.1 to 0.9999"),
        ("true_loss = 0.0", ("5.0", "-2"), "a number from -1 to 1"),
        ("looks = 1", ("0", "-1", "101", HUGE, f"0x{5000 * 'f'}"), "a whole number from 1 to 100"),
        ("documents = 400", ("0", "1", "-400", HUGE), "a whole number from 2 to 1,000,000"),
        ("margin = 0.05", ("0.0", "-0.05", "1", "5"), "a number from 0.0001 to 0.25"),
        ("chance = 0.0", ("-7", "1"), "a number from 0 to 0.98"),
        ("documents_per_cluster = 1", ("0", "-4", HUGE), "a whole number from 1 to 1,000,000"),
        ("over_topk = 0.9", ("90", "-0.1"), "a number from 0 to 1"),
        ("stored_rows = 1.0", ("1.1", "-1"), "a number from 0 to 1"),
        ("truncated = 0.05", ("5", "-0.05"), "a number from 0 to 1"),
        ("noise = 0.095", ("0", "-0.1", "11"), "a number from 0.0001 to 10"),
        ("loss_at_most = 0.3", ("9.0", "1", "0"), "a number from 0.0002 to 0.5"),
        ("heads = [4]", ("[0]", "[4, 100000]", f"[{HUGE}]"), "a whole number from 1 to 4,096"),
    ],
)  # fmt: skip
def test_a_number_out_of_its_range_is_refused_in_a_line(
    tmp_path: Path, key: str, wrong: tuple[str, ...], within: str
):
    name = key.partition(" ")[0]
    for value in wrong:
        said = refused(tmp_path, key, f"{name} = {value}")
        assert f"{within} is right" in said
        assert name in said
        assert said.count("\n") == 0
        assert len(said) < len(str(tmp_path)) + 220


@pytest.mark.parametrize(
    "key",
    [
        "alpha = 0.05", "power = 0.8", "true_loss = 0.0", "margin = 0.05", "chance = 0.0", "over_topk = 0.9",
        "stored_rows = 1.0", "truncated = 0.05", "noise = 0.095", "loss_at_most = 0.3", "at_most = 0.01",
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", HUGE])
def test_a_number_that_is_not_finite_is_refused_wherever_it_stands(tmp_path: Path, key: str, value: str):
    assert "a finite number is right" in refused(tmp_path, key, f"{key.partition(' ')[0]} = {value}")


def test_a_lower_bound_is_finite_too(tmp_path: Path):
    assert "at_least is -inf: a finite number" in refused(tmp_path, "at_most = 0.01", "at_least = -inf")


@pytest.mark.parametrize(
    ("decide", "baselines"),
    [
        ('["bf16"]', '["bf16"]'),
        ('["fp8_ds_mla", "bf16@flashmla"]', '["bf16", "bf16@flashmla"]'),
        ('["fp8_e4m3:one@flashinfer+read=native"]', '["fp8_e4m3@flashinfer"]'),
    ],
)
def test_no_candidate_is_judged_against_itself(tmp_path: Path, decide: str, baselines: str):
    before = 'decide = ["fp8_e4m3:calibrated", "fp8_ds_mla"]\nbaselines = ["bf16"]'
    said = refused(tmp_path, before, f"decide = {decide}\nbaselines = {baselines}")
    assert "which is in decide too" in said


@pytest.mark.parametrize(
    ("candidate", "limit", "reason", "said"),
    [
        ("bf16", "another", "because", "limit is 'another': one of the limits is right: attention, isolated"),
        ("bf16", "saturated values", " ", "exceptions[0]: reason is ' ': text that is not blank is right"),
        ("fp8:two", "saturated values", "because", "exceptions[0]: candidate 'fp8:two': scales 'two' is not one of"),
    ],
)  # fmt: skip
def test_an_exception_names_a_candidate_a_limit_and_a_reason(
    tmp_path: Path, candidate: str, limit: str, reason: str, said: str
):
    file = tmp_path / "policy.toml"
    file.write_text(
        DEFAULT.read_text()
        + f'[[exceptions]]\ncandidate = "{candidate}"\nlimit = "{limit}"\nexpires = 2030-01-01\nreason = "{reason}"\n'
    )
    with pytest.raises(InputError) as caught:
        load(file)
    assert said in str(caught.value)


def test_a_policy_that_plans_no_documents_keeps_the_hash_that_runs_have_stored():
    """docs/validation.md's recorded runs hold it."""
    hashes = {
        "validation-bf16": "d66d968504cd84e2f037ba5e930d13dc842ae53441d4efcd0a4603844e558f23",
        "validation-formats": "0f1d2c224e49f9717c6522e664647cf9b7ef85627fb2fa37a700dd36689d6381",
        "validation-smoke": "12cb9444a17ff80daf512bd3c89bcd95d09814012bcbfeb86fb0bafb1d278295",
    }
    assert {name: load(POLICIES / f"{name}.toml").sha256 for name in hashes} == hashes


def test_the_words_that_a_limit_may_select_by_are_those_of_the_records():
    assert set(WORDS["mode"]) == {variants.ISOLATED, variants.PROPAGATED}
    assert set(WORDS["frozen"]) == {"none", variants.FROZEN}
    assert set(WORDS["probe"]) == ATTENTION_PROBES | set(engines.PROBES) | {"hidden", "logits", "kl"}
    assert set(WORDS["phase"]) == set(phases.PHASES) | {"text", "prompt", "response"}
    floors = {noise.KERNEL, noise.SPLIT, noise.BATCH, noise.NOISE, noise.START}
    assert set(WORDS["floor"]) == floors
    assert set(WORDS["rung"]) == floors | {"format", "kernel", "total"}


def test_looks_are_at_multiples_of_the_documents_planned():
    policy = load(POLICIES / "validation-bf16.toml")
    assert policy.planned == ()
    assert replace(policy, documents=522).planned == (522,)
    assert replace(policy, documents=522, looks=3).planned == (522, 1044, 1566)
    assert replace(policy, documents=522).sha256 != replace(policy, documents=523).sha256 != policy.sha256


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "neither a file nor a name that evalkit ships"),
        ("a =", "is not TOML"),
        (f"alpha = {5000 * '1'}", "is not TOML: Exceeds the limit"),
        (f"alpha = {5000 * '['}", "is not TOML: it is nested too deeply"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str | None, said: str):
    file = tmp_path / "policy.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=said):
        load(file)
