"""Imports point one way, along the data flow."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import evalkit

PACKAGE = Path(evalkit.__file__).parent
# A part may import itself, parts of lower rank, and nothing of its own rank but itself.
RANK = {
    "errors": 0,
    "files": 0,
    "arm_names": 0,
    "registry": 1,
    "progress": 1,
    "shipped": 1,
    "spans": 1,
    "schema": 1,
    "records": 2,
    "kv": 2,
    "config": 2,
    "stats": 2,
    "versions": 2,
    "candidate": 3,
    "environment": 3,
    "attention": 4,
    "model": 5,
    "train": 6,
    "compare": 6,
    "evaluate": 7,
    "gate": 6,
    "report": 6,
    "prepare": 8,
    "pipeline": 9,
    "calibrate": 8,
    "doctor": 8,
    "ranges": 9,
    "commands": 10,
    "cli": 11,
}
# Distributions whose modules have other names; torch brings triton along where there is CUDA.
DISTRIBUTIONS = {"flashinfer": "flashinfer-python", "triton": "torch"}
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Modules that a file names in imports, wherever in the file they stand."""
    for node in ast.walk(ast.parse((PACKAGE / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively: name the module in full"
            if node.module == "evalkit":
                yield from (f"evalkit.{name.name}" for name in node.names)
            else:
                yield node.module or ""


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.name != "__init__.py" or len(path.parts) > 1], ids=str
)
def test_imports_point_one_way(path: Path):
    assert part(path) in RANK, f"give {part(path)} its place in RANK"
    parts = {name.split(".")[1] for name in imported(path) if name.startswith("evalkit.")}
    upward = {other for other in parts & RANK.keys() - {part(path)} if RANK[other] >= RANK[part(path)]}
    assert not upward, f"{path} imports {upward}, which stand no lower than it"


def test_reports_and_records_are_read_without_torch_or_transformers():
    """Any run directory can be reported again on a machine without them."""
    modules = [
        "evalkit." + ".".join(path.with_suffix("").parts)
        for path in FILES
        if part(path) in ("report", "gate", "schema", "records", "config", "commands", "cli")
        and path.name != "__init__.py"
    ]
    assert modules
    # Judging computes; scipy is enough for it.
    for some, allowed in ((modules, {"scipy", "numpy"}), ([m for m in modules if ".gate." not in m], set())):
        names = {"torch", "transformers", "lm_eval", "datasets", "scipy", "numpy"} - allowed
        heavy = f"{names} & sys.modules.keys()"
        check = f"import importlib, sys\nfor name in {some}: importlib.import_module(name)\nassert not ({heavy}), {heavy}"
        subprocess.run([sys.executable, "-c", check], check=True)


def test_what_is_imported_is_declared_and_in_the_wheel():
    """What another package happens to bring along may be gone with its next version."""
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    extras = settings["project"]["optional-dependencies"]
    asked = [*settings["project"]["dependencies"], *extras["cuda"], *extras["vllm"]]
    declared = {re.split(r"[<>=!~ ;\[]", one)[0].replace("-", "_").lower() for one in asked}
    left_out = {Path(one).name for one in settings["tool"]["hatch"]["build"]["targets"]["wheel"]["exclude"]}
    for path in [*FILES, *(PACKAGE.parent / "tasks").glob("*.py")]:
        shipped = part(path) not in left_out
        for name in imported(path):
            module, *within = name.split(".")
            if module == "evalkit":
                assert not (shipped and within and within[0] in left_out), (
                    f"{path} imports {name}: no wheel has it"
                )
            elif module not in sys.stdlib_module_names and (shipped or module != "tasks"):
                distribution = DISTRIBUTIONS.get(module, module).replace("-", "_").lower()
                assert distribution in declared, (
                    f"{path} imports {module}: pyproject.toml does not ask for it"
                )
