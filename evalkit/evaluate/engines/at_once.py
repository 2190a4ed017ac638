"""Engines side by side, a thread each, and their end where one of them fails, or who waits is interrupted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from threading import Lock
from typing import Any

from evalkit.errors import EngineDiedError


class Running:
    """Engines that may start at any moment; once all are ended, none is taken any more."""

    def __init__(self) -> None:
        self._engines: list[Any] = []
        self._ended, self._lock = False, Lock()

    def take(self, engines: Sequence[Any]) -> None:
        """Add engines, before they start.

        Raises:
            EngineDiedError: all were ended meanwhile.
        """
        with self._lock:
            if self._ended:
                raise EngineDiedError("all engines are being ended: no other is started")
            self._engines.extend(engines)

    def end(self) -> None:
        """Close all: a thread that waits for answers fails."""
        with self._lock:
            self._ended = True
        for engine in self._engines:
            engine.close()


def at_once(count: int, tasks: Sequence[Callable[[], None]], end: Callable[[], None]) -> None:
    """Do all, `count` at a time.

    Args:
        end: called where one fails, or who waits is interrupted; it has the others fail soon. The first failure is the
            one that is raised.
    """
    if count == 1:
        for task in tasks:
            task()
        return
    with ThreadPoolExecutor(count) as pool:
        try:
            for future in as_completed([pool.submit(task) for task in tasks]):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            end()
            raise
