"""Reads byte ranges of files ahead of their use, by threads, into host memory that a GPU can fetch from.

What is read and not yet taken never exceeds a limit. Ranges come back in the order they were asked for.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from evalkit.errors import InputError
from evalkit.model.weights.shards import Stored

CHUNK_BYTES: Final = 1 << 25
# One thread copies from the page cache at a tenth of what a PCIe link takes; beyond fourteen nothing is gained.
READERS: Final = max(4, min(14, (os.cpu_count() or 4) - 2))


@dataclass(frozen=True)
class Chunk:
    """Tensors that lie next to each other in one file: one read, one upload."""

    tensors: tuple[Stored, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def chunks_of(tensors: Iterable[Stored]) -> list[Chunk]:
    """Tensors in the order of the file they lie in, joined while they touch and a chunk has room."""
    found: list[list[Stored]] = []
    held = 0
    for tensor in sorted(tensors, key=lambda tensor: (tensor.file, tensor.offset)):
        last = found[-1][-1] if found else None
        touches = last is not None and last.file == tensor.file and last.offset + last.nbytes == tensor.offset
        if touches and held + tensor.nbytes <= CHUNK_BYTES:
            found[-1].append(tensor)
            held += tensor.nbytes
        else:
            found.append([tensor])
            held = tensor.nbytes
    return [Chunk(tuple(group)) for group in found]


class ReadAhead:
    """Reads chunks in the background in the order they are put in line, up to `limit` bytes before they are taken."""

    def __init__(self, limit: int, pinned: bool) -> None:
        self.limit, self.pinned = limit, pinned
        self.bytes_read = 0
        self._files: dict[Path, int] = {}
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="weights")
        self._line: Iterator[Chunk] = iter(())
        self._next: Chunk | None = None
        self._reading: deque[tuple[Chunk, Future[Tensor]]] = deque()
        self._outstanding = 0

    def start(self, line: Iterable[Chunk]) -> None:
        """Drop what was in line and begin with these."""
        for _, reading in self._reading:
            reading.cancel()
        self._reading.clear()
        self._outstanding = 0
        self._line = iter(line)
        self._next = next(self._line, None)
        self._fill()

    def take(self) -> tuple[Chunk, Tensor]:
        """The next chunk and its bytes, [nbytes] uint8 on the host; waits for the read."""
        chunk, reading = self._reading.popleft()
        content = reading.result()
        self.bytes_read += chunk.nbytes
        self._outstanding -= chunk.nbytes
        self._fill()
        return chunk, content

    def close(self) -> None:
        """Stop reading, close the files."""
        self._readers.shutdown(wait=True, cancel_futures=True)
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def _fill(self) -> None:
        while self._next is not None and (
            not self._reading or self._outstanding + self._next.nbytes <= self.limit
        ):
            chunk, self._next = self._next, next(self._line, None)
            self._outstanding += chunk.nbytes
            file = chunk.tensors[0].file
            if file not in self._files:
                self._files[file] = os.open(file, os.O_RDONLY)
            self._reading.append((chunk, self._readers.submit(self._read, chunk, self._files[file])))

    def _read(self, chunk: Chunk, descriptor: int) -> Tensor:
        content = torch.empty(chunk.nbytes, dtype=torch.uint8, pin_memory=self.pinned)
        view, offset = content.numpy().data, chunk.tensors[0].offset
        while view:
            got = os.preadv(descriptor, [view], offset)
            if got == 0:
                raise InputError(
                    f"{chunk.tensors[0].file} ends at byte {offset}: it was cut off while it was read"
                )
            view, offset = view[got:], offset + got
        return content
