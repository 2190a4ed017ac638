"""Where an answer ends: at an end-of-text token, or at the token that completes a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# A stop string of n bytes touches at most n tokens that print something; some tokens print nothing.
SILENT_TOKENS = 8
REPLACEMENT = "\ufffd"  # what part of a character decodes to


class Stops:
    """Finds the end of answers that share their stop strings.

    Text is decoded only where a token may complete a stop string: where it prints the last character of one, or part
    of a character. A space may be printed by tokens that alone do not print it, so a stop string that ends in one
    leaves every token suspect.
    """

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int], until: Sequence[str]) -> None:
        self._tokenizer, self._ids, self._until = tokenizer, frozenset(stop_ids), tuple(until)
        self._window = max((len(stop.encode()) for stop in until), default=0) + SILENT_TOKENS
        self._last = frozenset(stop[-1] for stop in until)
        self._suspect: dict[int, bool] = {}

    def end(self, ids: Sequence[int], start: int = 0) -> int | None:
        """The place of the first token from `start` on that ends the answer `ids`, or None where none does."""
        for place in range(start, len(ids)):
            token = ids[place]
            suspect = self._suspect.get(token)
            if suspect is None:
                suspect = self._suspect[token] = token in self._ids or self._may_complete(token)
            if suspect and (token in self._ids or self._completes(ids, place)):
                return place
        return None

    def _may_complete(self, token: int) -> bool:
        if not self._until:
            return False
        text = self._tokenizer.decode([token])
        return " " in self._last or REPLACEMENT in text or not self._last.isdisjoint(text)

    def _completes(self, ids: Sequence[int], place: int) -> bool:
        tail = self._tokenizer.decode(ids[max(0, place + 1 - self._window) : place + 1])
        return any(stop in tail for stop in self._until)
