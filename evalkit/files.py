"""Files that several processes may want at once: locked for as long as a block lasts, and replaced whole."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a file, which is made where there is none and stays as it is; a process that dies lets go of it.

    A thread that holds it and asks again waits for itself.

    Raises:
        BlockingIOError: another process holds it, and `wait` is false.
        OSError: the file cannot be written to, or its file system has no locks.
    """
    held = _hold(path, wait)
    try:
        yield
    finally:
        os.close(held)


def _hold(path: Path, wait: bool) -> int:
    import fcntl  # not above: who only reads takes no lock, also on systems that lack this module

    while True:
        held = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(held, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who held it before may have removed the file, which is then no one else's lock.
            if os.path.samestat(os.fstat(held), path.stat()):
                return held
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(held)
            raise OSError(error.errno, error.strerror, str(path)) from None
        os.close(held)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file of another name beside `path`, which takes its place when the block ends, and goes where it fails."""
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new one, never a part."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
