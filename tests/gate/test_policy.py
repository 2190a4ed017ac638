import shutil
from datetime import date
from pathlib import Path

import pytest

from evalkit.errors import InputError
from evalkit.gate.policy import load

POLICIES = Path(__file__).parents[2] / "tasks" / "policies"
DEFAULT = POLICIES / "default.toml"


@pytest.mark.parametrize("path", sorted(POLICIES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_policies_here_are_read(path: Path):
    policy = load(path)
    assert policy.decide
    assert len(policy.sha256) == 64


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


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("alpha = 0.05", "alhpa = 0.05", "unknown key 'alhpa'; did you mean alpha?"),
        ("margin = 0.05", "margins = 0.05", "endpoints[0]: unknown key 'margins'; did you mean margin?"),
        ("margin = 0.05\n", "", "endpoints[0]: margin missing"),
        ("margin = 0.05", 'margin = "2 points"', "margin is '2 points': a number is right"),
        ("margin = 0.05", "margin = 0.0", "want at least 2, a margin between 0 and 1"),
        ("looks = 1", "looks = true", "looks is True: a whole number is right"),
        ("looks = 1", "looks = 0", "looks is 0: at least 1 is right"),
        ("heads = [4]", "heads = 4", "heads is 4: a list is right"),
        ('baselines = ["bf16"]', "baselines = []", "name at least one of each"),
        ("layer.relative_l2", "layer.relative_l3", "a layer record has layer, cosine, relative_l2"),
        ("layer.relative_l2", "layers.relative_l2", "no such kind of record"),
        ("layer.relative_l2", "layer.probe", "figure 'layer.probe'"),
        ('probe = "attention"', 'prob = "attention"', "'prob' selects nothing"),
        ("at_most = 0.01", "", "give at_most or at_least"),
        ("at_most = 0.01", 'at_most = 0.01\nbreach = "WORSE"', "INCONCLUSIVE or ANOMALOUS is right"),
        ('name = "saturated values"', 'name = "attention, isolated"', "two have one name"),
        ("loss_at_most = 0.3", "loss_at_most = 0.09", "at least 0.1 is right"),
        ("over_topk = 0.9", "over_topk = 90", "a share is right"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_place(tmp_path: Path, old: str, new: str, said: str):
    text, file = DEFAULT.read_text(), tmp_path / "policy.toml"
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError) as refused:
        load(file)
    assert said in str(refused.value)
    assert str(file) in str(refused.value)


def test_an_exception_names_a_limit_and_a_reason(tmp_path: Path):
    file = tmp_path / "policy.toml"
    for limit, reason in (("another", "because"), ("saturated values", " ")):
        shutil.copy(DEFAULT, file)
        with file.open("a") as out:
            out.write(
                f'[[exceptions]]\ncandidate = "a"\nlimit = "{limit}"\nexpires = 2030-01-01\nreason = "{reason}"\n'
            )
        with pytest.raises(InputError, match="name one of the limits"):
            load(file)


@pytest.mark.parametrize(("text", "said"), [(None, "no policy at"), ("a =", "is not TOML")])
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str | None, said: str):
    file = tmp_path / "policy.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=said):
        load(file)
