"""What was said, as samples keep it: the answer's text, its tokens, and how much text each of them adds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict
from weakref import WeakKeyDictionary

PROMPT_END = 240  # characters of the prompt that a sample keeps
UNFINISHED = "\ufffd"
WINDOW = 8  # tokens before one that its text may depend on

# What every token decodes to alone, by tokenizer.
_PIECES: WeakKeyDictionary[Any, dict[int, str]] = WeakKeyDictionary()


class Transcript(TypedDict):
    """The fields of a `SampleRecord` that hold what was said."""

    target: str | None
    prompt_end: str | None
    generated_text: str | None
    generated_ids: list[int] | None
    generated_chars: list[int] | None


def transcript(row: dict[str, Any], ids: Sequence[int] | None, tokenizer: Any) -> Transcript:
    """Of one of lm-eval's sample rows.

    Args:
        row: as lm-eval gives it, with `arguments`, `resps` and `target`.
        ids: the generated tokens, their stop included; None where nothing was generated.
        tokenizer: transformers' own, which they are of.
    """
    target = row["target"]
    if ids is None:
        return Transcript(
            target=None, prompt_end=None, generated_text=None, generated_ids=None, generated_chars=None
        )
    return Transcript(
        target=target if isinstance(target, str) else None,
        prompt_end=str(row["arguments"][0][0])[-PROMPT_END:],
        generated_text=str(row["resps"][0][0]),
        generated_ids=list(ids),
        generated_chars=characters(ids, tokenizer),
    )


def characters(ids: Sequence[int], tokenizer: Any) -> list[int]:
    """How many characters each token adds to the text; a token that ends within a character adds none."""
    pieces = [_piece(token, tokenizer) for token in ids]
    text = "".join(pieces)
    if UNFINISHED not in text and text == tokenizer.decode(ids, skip_special_tokens=True):
        return [len(piece) for piece in pieces]
    return _characters_in_context(ids, tokenizer)


def _piece(token: int, tokenizer: Any) -> str:
    """The text of one token alone."""
    known = _PIECES.setdefault(tokenizer, {})
    if token not in known:
        known[token] = tokenizer.decode([token], skip_special_tokens=True)
    return known[token]


def _characters_in_context(ids: Sequence[int], tokenizer: Any) -> list[int]:
    """The same where a token's text depends on the tokens before it."""
    added, start, shown = [], 0, 0  # `shown` characters of the text since token `start` were counted
    for stop in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:stop], skip_special_tokens=True)
        whole = not text.endswith(UNFINISHED)
        added.append(max(0, len(text) - shown) if whole else 0)
        if whole:
            shown = max(shown, len(text))
            if stop - start >= WINDOW:  # a later token's text never depends on one that is whole before it
                start, shown = stop - 1, len(tokenizer.decode(ids[stop - 1 : stop], skip_special_tokens=True))
    return added
