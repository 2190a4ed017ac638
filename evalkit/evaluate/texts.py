"""Text files as they are given on a command line: a file a text, or a text a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from evalkit.errors import InputError

TEXT_FIELDS = ("text", "prompt")


def read_texts(file: Path) -> Iterator[tuple[str, str]]:
    """A file's texts, each with where it stands; lines of a `.jsonl` file are strings, or objects with `text` or `prompt`.

    Raises:
        InputError: no such file, no text in it, or a line of another form.
    """
    try:
        whole = file.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text: {error}") from None
    if not whole.strip():
        raise InputError(f"{file} is empty: give text")
    if file.suffix != ".jsonl":
        yield str(file), whole
        return
    # Not splitlines(): JSON strings may hold U+2028 and other line ends of Unicode as they are.
    for number, line in enumerate(whole.split("\n"), 1):
        if line.strip():
            where = f"{file}, line {number}"
            yield where, text_of_line(line, where)


def text_of_line(line: str, where: str) -> str:
    """The text of one line of a `.jsonl` file.

    Raises:
        InputError: it is neither a string nor an object with one in `text` or `prompt`; `where` begins the message.
    """
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON: {error}") from None
    if isinstance(found, dict):
        found = next((found[name] for name in TEXT_FIELDS if name in found), None)
    if not isinstance(found, str) or not found.strip():
        raise InputError(f"{where}: a string or an object with the text in 'text' or 'prompt' is needed")
    return found
