"""The parent's end of a worker process: starts it, asks it, and says in one line what it died of."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import evalkit
from evalkit.errors import EngineDiedError, InputError

# What the log of an engine that cannot start says, and what would be right.
MENDABLE = (
    (
        r"CUDA out of memory|OutOfMemoryError|No available memory for the cache|Free memory on device|larger than the available KV cache",
        "too little GPU memory: lower memory_share or max_length, or give the engine more GPUs",
    ),
    (r"Address already in use|EADDRINUSE", "a port is in use: end the server that holds it, or name another"),
    (
        r"No valid attention backend|is not valid for this configuration",
        "no attention backend fits: name another backend or format",
    ),
    (r"No module named 'vllm'", "vLLM cannot be imported: install it, or put it on PYTHONPATH"),
)
# Lines of vLLM's log that say which path runs.
TELLING = re.compile(
    r"Using standard fp8 KV cache format|Using KV cache scaling factor|Using uncalibrated|is not loaded"
    r"|KV cache format for|Padding num_heads|Using bfloat16 kv-cache|backend out of potential|attention backend"
)
FRAME = re.compile(r"^\s*(File |at |During handling|Traceback)")


class Worker:
    """One process that runs `module`; replies are JSON objects, a line each.

    Args:
        module: what `python -m` runs.
        log: where its stderr goes; a fresh file.
        environment: added to this process's own.
        python: the interpreter; None is this one.
    """

    def __init__(
        self, module: str, log: Path, environment: Mapping[str, str], python: Path | None = None
    ) -> None:
        self.log, self.number = log, 0
        log.parent.mkdir(parents=True, exist_ok=True)
        package = Path(evalkit.__file__).resolve().parent
        self._alone = tempfile.TemporaryDirectory(prefix="evalkit-")
        if python is not None:
            # What else is installed beside this package must not take the place of what that environment has.
            Path(self._alone.name, package.name).symlink_to(package)
            package = Path(self._alone.name, package.name)
        paths = [str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [str(python.absolute()) if python is not None else sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
                start_new_session=True,  # so that what it starts ends with it
            )

    def ask(self, message: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What it answers to a message, as it comes.

        Raises:
            InputError: it refuses, or died of what the caller can mend.
            EngineDiedError: it failed or ended otherwise.
        """
        self.number += 1
        line = json.dumps(message | {"number": self.number}) + "\n"
        assert self._process.stdin is not None
        # It has ended, or was closed by another thread, which the missing reply tells.
        with suppress(OSError, ValueError):
            self._process.stdin.write(line)
            self._process.stdin.flush()
        for line in self._said():
            reply = json.loads(line)
            if reply.pop("number") != self.number:
                continue  # of a question that nobody listened to the end of
            if "done" in reply:
                return
            if "refused" in reply:
                raise InputError(reply["refused"])
            if "failed" in reply:
                raise self._death(reply["failed"])
            yield reply
        self._process.wait()
        raise self._death(f"it ended with {_ending(self._process.returncode)}")

    def _said(self) -> Iterator[str]:
        """Lines until it ends; one that it had not written to its end is none."""
        assert self._process.stdout is not None
        with suppress(ValueError):  # another thread has closed it
            for line in self._process.stdout:
                if line.endswith("\n"):
                    yield line

    def close(self) -> None:
        """End it and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        # After the kill: another thread may be reading, and holds the stream until it ends.
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(OSError):  # what was not yet sent
                    stream.close()
        self._alone.cleanup()

    def telling(self) -> list[str]:
        """The log's lines that say which path runs, each once, without time and place."""
        found = (line for line in self._lines() if TELLING.search(line))
        return list(dict.fromkeys(re.sub(r"^.*?\] ", "", line) for line in found))

    def _death(self, said: str) -> Exception:
        lines = self._lines()
        for pattern, right in MENDABLE:
            for line in (said, *reversed(lines)):
                if re.search(pattern, line):
                    return InputError(f"the engine did not start: {right} ({_short(line)}; {self.log})")
        last = next((line for line in reversed(lines) if line.strip() and not FRAME.match(line)), "")
        return EngineDiedError(f"{said}; its last line: {_short(last)} ({self.log})")

    def _lines(self) -> list[str]:
        return self.log.read_text(errors="replace").splitlines()


def _ending(code: int) -> str:
    return f"code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def _short(line: str) -> str:
    line = re.sub(r"^.*?\] ", "", line.strip())
    return line if len(line) <= 200 else line[:197] + "..."
