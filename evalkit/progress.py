"""What shows that something still works: a bar on a terminal, gone at the end; elsewhere a line every half minute."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

EVERY_S: Final = 30.0  # between two lines of a log, whichever work they are of
WORTH_A_LINE_S: Final = 2.0  # work that took longer is named when it ends

_part: ContextVar[str] = ContextVar("part", default="")


@contextmanager
def part(title: str) -> Iterator[None]:
    """Name what the bars within are a part of, as in `arm 2 of 6, bf16@flashinfer`."""
    token = _part.set(f"{title}: ")
    try:
        yield
    finally:
        _part.reset(token)


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar of `total` steps on stderr; gives what is called after each."""
    console, title = Console(stderr=True), _part.get() + title
    if not console.is_terminal:
        lines = _Lines(title, total)
        yield lines.advance
        lines.end()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)


class _Lines:
    """How far the work is, for a log: no more often than every `EVERY_S` seconds, and once more when it has ended.

    Short pieces of work share the half minute: a log that is silent for longer means that nothing advances.
    """

    said = time.monotonic()  # of all lines, the last

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done = title, total, 0
        self.began = time.monotonic()

    def advance(self) -> None:
        self.done += 1
        now = time.monotonic()
        if self.done < self.total and now - _Lines.said >= EVERY_S:
            self._say(now)

    def end(self) -> None:
        """Name work that took a while."""
        now = time.monotonic()
        if now - self.began >= WORTH_A_LINE_S:
            self._say(now)

    def _say(self, now: float) -> None:
        _Lines.said = now
        print(
            f"{self.title}: {self.done} of {self.total} after {now - self.began:.0f} s",
            file=sys.stderr,
            flush=True,
        )
