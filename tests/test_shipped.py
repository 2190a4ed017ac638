import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import evalkit
from evalkit import shipped
from evalkit.errors import InputError

CHECKOUT = Path(evalkit.__file__).parents[1]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, in which the test works."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_files_of_a_checkout_go_before_a_copy_beside_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    package = tmp_path / "evalkit"
    for folder in (package, tmp_path):  # the second is somebody else's
        (folder / "tasks" / "policies").mkdir(parents=True)
        (folder / "configs").mkdir()
        (folder / "configs" / "eval-fp8.toml").touch()
        (folder / "tasks" / "policies" / "default.toml").touch()
    (package / "__init__.py").touch()
    monkeypatch.setattr(evalkit, "__file__", str(package / "__init__.py"))
    monkeypatch.chdir(package)
    with pytest.raises(InputError, match="no task files"):
        shipped.tasks_dir()
    for folder in (package, tmp_path):
        (folder / "tasks" / shipped.MARKER).touch()
        assert shipped.tasks_dir() == folder / "tasks"
        assert shipped.find("configuration", "eval-fp8") == folder / "configs" / "eval-fp8.toml"
        assert shipped.find("policy", "default") == folder / "tasks" / "policies" / "default.toml"


@pytest.mark.parametrize("given", ["default", "default.toml", Path("default")])
def test_a_name_is_the_file_that_evalkit_ships_from_every_folder(given: str | Path, elsewhere: Path):
    assert shipped.find("policy", given) == CHECKOUT / "tasks" / "policies" / "default.toml"


@pytest.mark.parametrize("name", ["eval-fp8", "eval-fp8.toml"])
def test_a_file_here_goes_before_one_that_evalkit_ships(name: str, elsewhere: Path):
    (elsewhere / name).touch()
    assert shipped.find("configuration", name) == Path(name)


def test_a_folder_here_hides_no_name(elsewhere: Path):
    (elsewhere / "nightly").mkdir()
    assert shipped.find("configuration", "nightly") == CHECKOUT / "configs" / "nightly.toml"


def test_a_path_with_a_folder_is_never_a_name(elsewhere: Path):
    """Who writes ./default.toml means a file, and gets no other where it is missing."""
    for given in ("./default", "./default.toml", "configs/default", str(elsewhere / "default.toml")):
        with pytest.raises(InputError, match="did you mean 'default'"):
            shipped.find("policy", given)


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        ("configuration", "eval-fp9", "no configuration 'eval-fp9', neither a file nor a name that evalkit ships: did"),
        ("configuration", "eval-fp9", "ships: did you mean 'eval-fp8'? Give eval-fp8, nightly, or a TOML file"),
        ("policy", "defualt.toml", "no policy 'defualt.toml', neither a file nor a name that evalkit ships: did you"),
        ("policy", "defualt.toml", "mean 'default'? Give deepseek-v3.2-gsm8k-5shot, default, "),
        ("configuration", "nowhere", "ships: Give eval-fp8, nightly, or a TOML file"),
        ("configuration", "configs/eval-fp8.toml", "no configuration 'configs/eval-fp8.toml'"),
        ("policy", "default\0", "no policy 'default\\x00'"),
    ],
)  # fmt: skip
def test_what_is_neither_a_file_nor_a_name_is_met_with_the_names(
    kind: shipped.Kind, given: str, said: str, elsewhere: Path
):
    with pytest.raises(InputError) as caught:
        shipped.find(kind, given)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_kept_of_a_policy_stands_for_it_in_every_folder(elsewhere: Path):
    (elsewhere / "mine.toml").touch()
    (elsewhere / "link.toml").symlink_to(CHECKOUT / "tasks" / "policies" / "default.toml")
    (elsewhere / "circle.toml").symlink_to("circle.toml")
    for given, kept in (
        ("default", "default"),
        ("default.toml", "default"),
        (CHECKOUT / "tasks" / "policies" / "default.toml", "default"),
        ("link.toml", "default"),
        ("mine.toml", str(elsewhere / "mine.toml")),
        ("circle.toml", str(elsewhere / "circle.toml")),
    ):
        assert shipped.lasting("policy", given) == kept
    (elsewhere / "default").touch()
    assert shipped.lasting("policy", "default") == str(elsewhere / "default")


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a wheel holds, laid out as pyproject.toml tells: building one would ask a network for the builder."""
    told = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    told, folder = told["targets"]["wheel"], tmp_path_factory.mktemp("wheel")
    left_out = {CHECKOUT / one.removeprefix("/") for one in told["exclude"]}
    left_out.add(CHECKOUT / "evalkit" / "checkpoints")  # 23 MB that no test here reads

    def ignored(place: str, inside: list[str]) -> set[str]:
        return {one for one in inside if Path(place) / one in left_out or one == "__pycache__"}

    for package in told["packages"]:
        shutil.copytree(CHECKOUT / package, folder / package, ignore=ignored)
    for source, place in told["force-include"].items():
        shutil.copytree(CHECKOUT / source, folder / place, ignore=ignored)
    return folder


def in_wheel(wheel: Path, where: Path, *arguments: str) -> str:
    """What Python prints in a folder, with the wheel's files and without the checkout's."""
    alone = os.environ | {"PYTHONPATH": str(wheel), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=where, env=alone, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_wheel_has_its_configurations_and_policies_by_name(wheel: Path, elsewhere: Path):
    asked = """
import evalkit
from evalkit import shipped
from evalkit.config import RunConfig
from evalkit.gate import policy

print(shipped.root())
for name in shipped.names("configuration"):
    print(RunConfig.load(name, policy="default").name)
print(RunConfig.load("eval-fp8", ["policy=default"]).policy, policy.load("default").name)
print(len(shipped.names("policy")))
"""
    root, *configurations, stored, count = in_wheel(wheel, elsewhere, "-c", asked).splitlines()
    assert root == str(wheel / "evalkit")
    assert configurations == sorted(path.stem for path in (CHECKOUT / "configs").glob("*.toml"))
    assert stored == "default dsa-nano"
    assert int(count) == len(list((CHECKOUT / "tasks" / "policies").glob("*.toml")))
    assert list(elsewhere.iterdir()) == []


def test_a_wheel_plans_by_a_policys_name(wheel: Path, elsewhere: Path):
    said = in_wheel(wheel, elsewhere, "-m", "evalkit.cli", "plan", "default", "--discordance", "0.02")
    assert "documents" in said


def test_the_source_distribution_has_all_that_the_wheel_is_built_from():
    told = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    wheel, source = told["targets"]["wheel"], told["targets"]["sdist"]
    assert {f"/{one}" for one in (*wheel["packages"], *wheel["force-include"])} <= set(source["include"])


def test_the_distribution_has_a_name_of_its_own_and_the_version_of_the_package():
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == "evalkit-kv"
    assert project["version"] == evalkit.__version__
    assert list(project["scripts"]) == ["evalkit"]
