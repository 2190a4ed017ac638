"""What a checkpoint's safetensors files store and where, read from their headers only."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from evalkit.errors import InputError
from evalkit.model.checkpoint import weight_files

DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
SAMPLE_BYTES: Final = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor on disk: `nbytes` from byte `offset` of `file`, row-major."""

    name: str
    file: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint by name.

    Raises:
        InputError: a file is missing or truncated, or its header is not what safetensors writes.
    """
    return {tensor.name: tensor for file in weight_files(directory) for tensor in _header(file)}


def sampled_identity(directory: Path) -> str:
    """A hash that names a checkpoint without reading its weights whole.

    Over every other file's bytes, and each weights file's size, header, and 64 KiB from eight places of it. Two
    checkpoints that differ in other bytes only have the same; it starts with `sampled:` to say so.
    """
    total = hashlib.sha256()
    weights = set(weight_files(directory))
    for path in sorted(path for path in directory.rglob("*") if path.is_file() and path.suffix != ".md"):
        size = path.stat().st_size
        total.update(f"{path.relative_to(directory).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            if path not in weights:
                total.update(file.read())
                continue
            data = _data_start(path)
            total.update(file.read(data))
            for part in range(8):
                file.seek(data + part * max(0, size - data - SAMPLE_BYTES) // 7)
                total.update(file.read(SAMPLE_BYTES))
    return f"sampled:{total.hexdigest()}"


def _data_start(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def _header(path: Path) -> list[Stored]:
    size = path.stat().st_size
    start = _data_start(path)
    try:
        with path.open("rb") as file:
            file.seek(8)
            entries = json.loads(file.read(start - 8)) if start <= size else None
        if not isinstance(entries, dict):
            raise TypeError("no header")  # noqa: TRY301 -- as good as a header that is no JSON
        entries.pop("__metadata__", None)
        found = [_stored(name, path, start, entry) for name, entry in entries.items()]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is truncated or not safetensors: {error}") from None
    end = max((tensor.offset + tensor.nbytes for tensor in found), default=start)
    if end > size:
        raise InputError(
            f"{path} is truncated or not safetensors: its tensors end at byte {end}, it has {size}"
        )
    return found


def _stored(name: str, path: Path, start: int, entry: dict[str, Any]) -> Stored:
    if entry["dtype"] not in DTYPES:
        raise InputError(f"{path} stores {name} as {entry['dtype']}; evalkit reads {', '.join(DTYPES)}")
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    first, end = entry["data_offsets"]
    if end - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} takes {end - first} bytes, which {list(shape)} of {dtype} do not")
    return Stored(name=name, file=path, offset=start + first, nbytes=end - first, dtype=dtype, shape=shape)
