"""Prints what pyproject.toml asks for without its upper bounds, a line each: `make test VERSIONS=newest` installs it."""

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def newest(extras: str) -> list[str]:
    """The requirements of evalkit and of its extras (`cuda,dev`), with lower bounds and markers alone."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    further = (project["optional-dependencies"][extra] for extra in extras.split(","))
    asked = [*project["dependencies"], *(one for some in further for one in some)]
    return [re.sub(r",<[^,;]*", "", one) for one in asked]


if __name__ == "__main__":
    print(*newest(sys.argv[1]), sep="\n")
