"""Answers as they come, one JSON line each, so that a run that was killed asks for the others only."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from evalkit.errors import InputError
from evalkit.evaluate.engines.base import Prompt, Span
from evalkit.files import locked


class Kept:
    """A file of answers by what was asked, each with the seconds that it took; older files have none, which are 0.

    Several processes may keep theirs in one file; each sees those that were there when it opened it, and its own.

    Args:
        path: the file; made where it is not there.
        identity: of what answers. A file that another's answers are in is refused.

    Raises:
        InputError: the file is another engine's, or is no file of answers.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path = path
        self.answers: dict[str, Any] = {}
        self._seconds: dict[str, float] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path):
            text = path.read_bytes()
            # Of a process that was killed the last line may be cut.
            whole = text[: text.rfind(b"\n") + 1]
            lines = whole.splitlines()
            if lines:
                self._read(lines, identity)
            with path.open("r+b") as file:
                file.truncate(len(whole))
            if not lines:
                self._append({"identity": identity})

    def keep(self, key: str, answer: Any, seconds: float = 0.0) -> None:
        """Add one answer; it is on disk when this returns."""
        if key in self.answers:
            raise ValueError(f"{self.path}: {key} is answered already")
        self.answers[key], self._seconds[key] = answer, seconds
        with locked(self.path):
            self._append({"key": key, "answer": answer, "seconds": seconds})

    def seconds(self, requests: Sequence[Prompt | Span]) -> float:
        """What the answers to these took, in whichever processes: of one that was killed, up to its last answer."""
        return sum(self._seconds.get(key, 0.0) for key in {key_of(*question(one)) for one in requests})

    def _read(self, lines: list[bytes], identity: str) -> None:
        try:
            first, *others = map(json.loads, lines)
            found = first["identity"]
            self.answers = {one["key"]: one["answer"] for one in others}
            self._seconds = {one["key"]: float(one.get("seconds", 0.0)) for one in others}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path} is no file of answers: {error}") from None
        if found != identity:
            raise InputError(
                f"{self.path} holds the answers of another engine ({found}, not {identity}): name a fresh folder"
            )

    def _append(self, entry: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())


class Questions:
    """Requests by what they ask: those that ask alike are asked once.

    Args:
        kept: where their answers are, and go.
        requests: of one kind.
    """

    def __init__(self, kept: Kept, requests: Sequence[Prompt | Span]) -> None:
        self._kept = kept
        self._asked: dict[str, dict[str, Any]] = {}
        self._places: dict[str, list[int]] = {}
        self._before: float | None = None
        for place, request in enumerate(requests):
            kind, asked = question(request)
            key = key_of(kind, asked)
            self._asked[key] = asked
            self._places.setdefault(key, []).append(place)

    def known(self) -> Iterator[tuple[int, Any]]:
        """Places and answers of those that were answered before."""
        for key, places in self._places.items():
            if key in self._kept.answers:
                yield from ((place, self._kept.answers[key]) for place in places)

    def missing(self) -> dict[str, dict[str, Any]]:
        """What is to be asked, by its key."""
        return {key: asked for key, asked in self._asked.items() if key not in self._kept.answers}

    def begin(self) -> None:
        """Asking begins, or begins again."""
        self._before = time.perf_counter()

    def keep(self, key: str, answer: Any) -> list[tuple[int, Any]]:
        """Keep one answer with the seconds since the one before it, or since asking began; returns its places."""
        assert self._before is not None, "begin() says when asking begins"
        now = time.perf_counter()
        self._kept.keep(key, answer, now - self._before)
        self._before = now
        return [(place, answer) for place in self._places[key]]


def question(request: Prompt | Span) -> tuple[str, dict[str, Any]]:
    """Of which kind a request is, and what it asks."""
    label = {"label": str(request.label)}
    if isinstance(request, Prompt):
        return "generate", label | {
            "ids": list(request.ids),
            "max_new": request.max_new,
            "until": list(request.until),
        }
    return "score", label | {"context": list(request.context), "continuation": list(request.continuation)}


def key_of(kind: str, asked: dict[str, Any]) -> str:
    """The name of a question: what is asked, of whom it is, and how."""
    return hashlib.sha256(json.dumps([kind, asked], sort_keys=True).encode()).hexdigest()[:32]
