"""The versions tested are one table: pyproject.toml, requirements/oldest.txt and the Makefile agree with it."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from evalkit import versions
from evalkit.records import EnvironmentRecord
from evalkit.schema import from_values, to_line
from evalkit.versions import TESTED, VersionRange

ROOT = Path(__file__).parents[1]
OLDEST = (ROOT / "requirements" / "oldest.txt").read_text(encoding="utf-8")
TORCH = VersionRange(name="torch", oldest="2.11", newest="2.14")
ALONE = {"vllm"}  # it pins its own torch, which is not the oldest


def asked() -> dict[str, Requirement]:
    """What pyproject.toml asks for, extras included, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [
        *project["dependencies"],
        *(one for some in project["optional-dependencies"].values() for one in some),
    ]
    return {canonicalize_name(one.name): one for one in map(Requirement, lines)}


def bound(requirement: Requirement, operator: str) -> Version:
    (found,) = [one.version for one in requirement.specifier if one.operator == operator]
    return Version(found)


def environment(**packages: str) -> EnvironmentRecord:
    return EnvironmentRecord(
        commit="0123", python="3.11.7", packages=packages, device="cpu", gpu=None, dtype="float32", checkpoint="nano",
        checkpoint_sha256="0" * 64, flags={}, command="evalkit run", started_utc="2026-11-01T00:00:00+00:00",
        untested=[],
    )  # fmt: skip


def test_pyproject_bounds_packages_by_the_versions_tested():
    found = asked()
    for one in TESTED:
        if one.shipped_by is None:
            assert found[canonicalize_name(one.name)].specifier == SpecifierSet(one.bounds), one.name
        else:
            assert found[canonicalize_name(one.shipped_by)].specifier == SpecifierSet(one.bounds), one.name


def test_every_requirement_has_one_lower_and_one_upper_bound():
    """A package that moved must not break a build on its own."""
    for requirement in asked().values():
        assert [one.operator for one in sorted(requirement.specifier, key=str)] == ["<", ">="], requirement
        assert bound(requirement, ">=") < bound(requirement, "<")


def test_the_oldest_versions_are_the_lower_bounds():
    pins = {
        canonicalize_name(one.name): one
        for one in map(Requirement, re.findall(r"^[^#\n]+", OLDEST, re.MULTILINE))
    }
    found = asked()
    assert pins.keys() == found.keys() - ALONE
    for name, pin in pins.items():
        assert bound(pin, "==") == bound(found[name], ">="), name


def test_the_newest_versions_have_no_upper_bound_and_keep_lower_ones_and_markers():
    done = subprocess.run(
        [sys.executable, "requirements/newest.py", "cuda,dev"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines, found = list(map(Requirement, done.stdout.splitlines())), asked()
    assert {canonicalize_name(line.name) for line in lines} == found.keys() - ALONE
    for line in lines:
        was = found[canonicalize_name(line.name)]
        assert line.specifier == SpecifierSet(f">={bound(was, '>=')}")
        assert line.marker == was.marker


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize(
    ("versions", "code"), [("typo", 2), ("oldest newest", 2), ("oldest", 0), ("newest", 0)]
)
def test_make_refuses_versions_that_it_does_not_know(versions: str, code: int):
    done = subprocess.run(
        ["make", "-n", "test", f"VERSIONS={versions}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    said = f"VERSIONS={versions} is unknown: oldest or newest is right, or nothing"
    assert [said in line for line in done.stderr.splitlines()] == [True] * (code != 0)


@pytest.mark.parametrize("version", ["2.11", "2.11.0", "2.13.0+cpu", "2.14.1", "2.14.9.post1"])
def test_a_version_within_the_range_needs_no_warning(version: str):
    assert TORCH.beyond(version) is None


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("2.10.2", "torch 2.10.2 is older than 2.11, the oldest tested"),
        ("2.11.0rc1", "torch 2.11.0rc1 is older than 2.11, the oldest tested"),
        ("2.15.0", "torch 2.15.0 is newer than 2.14, the newest tested"),
        ("2.15.0.dev20261130+cpu", "torch 2.15.0.dev20261130+cpu is newer than 2.14, the newest tested"),
        ("2.15.0rc2", "torch 2.15.0rc2 is newer than 2.14, the newest tested"),
        ("3.0", "torch 3.0 is newer than 2.14, the newest tested"),
        ("git-5e3b", "torch git-5e3b is no version number; tested from 2.11 to 2.14"),
    ],
)
def test_a_version_beyond_the_range_is_named_in_one_line(version: str, said: str):
    assert TORCH.beyond(version) == said


def test_a_kernel_library_without_versions_of_its_own_goes_by_what_ships_it():
    library = VersionRange(name="FlashMLA", oldest="0.33.0", newest="0.33.0", shipped_by="vLLM")
    assert library.beyond("0.33.0") is None
    assert library.beyond("0.34.0") == "FlashMLA of vLLM 0.34.0 is newer than 0.33.0, the newest tested"


def test_packages_are_found_under_the_names_that_a_run_records():
    far = {
        "torch": "99",
        "triton": "99",
        "transformers": "99",
        "lm_eval": "99",
        "flashinfer-python": "99",
        "vllm": "99",
    }
    assert [line.split()[0] for line in versions.untested({**far, "numpy": "99"})] == [
        "torch", "triton", "transformers", "lm-eval", "flashinfer-python", "vLLM",
    ]  # fmt: skip
    assert versions.untested({one.name.lower(): one.newest for one in TESTED}) == []


def test_packages_that_changed_are_named_and_those_that_came_or_went():
    before, after = (
        environment(torch="2.13.0", scipy="1.17"),
        environment(torch="2.14.1", vllm="0.33.0", scipy="1.17"),
    )
    assert list(versions.changed(before, after)) == [("torch", "2.13.0", "2.14.1"), ("vllm", None, "0.33.0")]


def test_a_run_from_before_triton_was_recorded_does_not_differ_by_it():
    old, now = (
        replace(environment(torch="2.13.0"), untested=None),
        environment(torch="2.13.0", triton="3.8.0"),
    )
    assert list(versions.changed(old, now)) == list(versions.changed(now, old)) == []
    none = environment(torch="2.13.0")
    assert list(versions.changed(none, now)) == [("triton", None, "3.8.0")]


def test_an_environment_from_before_untested_packages_were_recorded_is_read():
    values = json.loads(to_line(environment(torch="2.13.0")))
    del values["untested"]
    assert from_values(values, "here") == replace(environment(torch="2.13.0"), untested=None)
