"""A table of named, stateless plug-ins: formats and backends each have one.

A plug-in is a class with a `name`, decorated with `registry.register`, in a module of the discovered package.
Nothing else is edited to add one.
"""

import difflib
import importlib
import pkgutil
from typing import Generic, Protocol, TypeVar

from evalkit.errors import InputError


class Named(Protocol):
    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Named)


class Registry(Generic[T]):
    """Plug-ins of one kind by name; `kind` is the word that its messages use."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, cls: type[T]) -> type[T]:
        """Class decorator: instantiate `cls` and enter it under its name.

        Raises:
            InputError: the name is taken.
        """
        entry = cls()
        if entry.name in self._entries:
            taken_by = type(self._entries[entry.name])
            raise InputError(
                f"{self.kind} {entry.name!r} of {cls.__module__}.{cls.__qualname__} is already registered by "
                f"{taken_by.__module__}.{taken_by.__qualname__}: give one of them another name"
            )
        self._entries[entry.name] = entry
        return cls

    def remove(self, name: str) -> None:
        """Take an entry out again, so that a test can register one of its own.

        Raises:
            InputError: there is no such entry.
        """
        self.get(name)
        del self._entries[name]

    def get(self, name: str) -> T:
        """The entry of that name.

        Raises:
            InputError: there is none; the message names the closest.
        """
        if name in self._entries:
            return self._entries[name]
        close = difflib.get_close_matches(name, self._entries, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise InputError(f"unknown {self.kind} {name!r}: {hint}There are {', '.join(self.names()) or 'none'}")

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._entries)

    def discover(self, package: str) -> None:
        """Import every module of the package named, so that each enters what it defines."""
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
            importlib.import_module(f"{package}.{module.name}")
