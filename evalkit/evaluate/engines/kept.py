"""Answers as they come, one JSON line each, so that a run that was killed asks for the others only."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from evalkit.errors import InputError


class Kept:
    """A file of answers by what was asked.

    Args:
        path: the file; made where it is not there.
        identity: of what answers. A file that another's answers are in is refused.

    Raises:
        InputError: the file is another engine's, or is no file of answers.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path = path
        self.answers: dict[str, Any] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_bytes() if path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]  # the last line of a killed run may be cut
        lines = whole.splitlines()
        if lines:
            self._read(lines, identity)
        with path.open("r+b" if text else "wb") as file:
            file.truncate(len(whole))
        if not lines:
            self._append({"identity": identity})

    def keep(self, key: str, answer: Any) -> None:
        """Add one answer; it is on disk when this returns."""
        if key in self.answers:
            raise ValueError(f"{self.path}: {key} is answered already")
        self.answers[key] = answer
        self._append({"key": key, "answer": answer})

    def _read(self, lines: list[bytes], identity: str) -> None:
        try:
            first, *others = map(json.loads, lines)
            found = first["identity"]
            self.answers = {one["key"]: one["answer"] for one in others}
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


def key_of(kind: str, request: dict[str, Any]) -> str:
    """The name of a question: what is asked, of whom it is, and how."""
    return hashlib.sha256(json.dumps([kind, request], sort_keys=True).encode()).hexdigest()[:32]
