"""Which versions of the packages that decide numbers evalkit was tested with.

pyproject.toml bounds those that it asks for by the same ranges, and requirements/oldest.txt pins their lower ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from evalkit.schema import EnvironmentRecord

# Recorded since `untested` is.
LATER = ("triton",)


@dataclass(frozen=True, kw_only=True)
class VersionRange:
    """A package and the versions tested: any from `oldest` to what begins with `newest`, 2.14.1 with 2.14.

    shipped_by: the package that brings it and whose versions these are, where it has none of its own.
    """

    name: str
    oldest: str
    newest: str
    shipped_by: str | None = None

    @property
    def bounds(self) -> str:
        """The range as pyproject.toml writes it: `>=2.11,<2.15`."""
        *front, last = self.newest.split(".")
        return f">={self.oldest},<{'.'.join([*front, str(int(last) + 1)])}"

    def beyond(self, version: str) -> str | None:
        """What to warn of where a version was not tested, in one line; None where it was."""
        what = (
            f"{self.name} {version}"
            if self.shipped_by is None
            else f"{self.name} of {self.shipped_by} {version}"
        )
        try:
            found = Version(version)
        except InvalidVersion:
            return f"{what} is no version number; tested from {self.oldest} to {self.newest}"
        # A release candidate of 2.15 is none of 2.14.
        if SpecifierSet(self.bounds).contains(found, prereleases=True):
            return None
        if found < Version(self.oldest):
            return f"{what} is older than {self.oldest}, the oldest tested"
        return f"{what} is newer than {self.newest}, the newest tested"


TESTED = (
    VersionRange(name="torch", oldest="2.11", newest="2.14"),
    VersionRange(name="triton", oldest="3.6", newest="3.8"),
    VersionRange(name="transformers", oldest="5.17", newest="5.24"),
    VersionRange(name="lm-eval", oldest="0.4.13", newest="0.4.13"),
    VersionRange(name="flashinfer-python", oldest="0.7.2", newest="0.7.4"),
    VersionRange(name="vLLM", oldest="0.33.0", newest="0.33.0"),
    VersionRange(name="FlashMLA", oldest="0.33.0", newest="0.33.0", shipped_by="vLLM"),
    VersionRange(name="DeepGEMM", oldest="0.33.0", newest="0.33.0", shipped_by="vLLM"),
)


def untested(packages: Mapping[str, str]) -> list[str]:
    """A line for each package whose version lies outside of the range tested; `packages` as a run records them."""
    found = {name.replace("_", "-"): version for name, version in packages.items()}
    lines = (one.beyond(found[one.name.lower()]) for one in TESTED if one.name.lower() in found)
    return [line for line in lines if line is not None]


def changed(
    before: EnvironmentRecord, after: EnvironmentRecord
) -> Iterator[tuple[str, str | None, str | None]]:
    """Name and both versions of each package that differs; None where it was not installed.

    A run from before a package was recorded says nothing of it.
    """
    silent = LATER if None in (before.untested, after.untested) else ()
    for name in sorted((before.packages.keys() | after.packages.keys()) - set(silent)):
        old, new = before.packages.get(name), after.packages.get(name)
        if old != new:
            yield name, old, new
