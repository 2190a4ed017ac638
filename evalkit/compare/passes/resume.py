"""Keeps on disk what the layer comparison carries from layer to layer, so that one that was killed can go on.

One safetensors file, replaced by the next layer's: hidden states and shared selections of every arm, each token's
trace, the scales found so far, and how many bytes of the records' file belong to the layers it follows. It is written
by a thread while the next layer runs; a kill in between goes on one layer earlier.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from evalkit.compare.found.token_trace import Watch
from evalkit.compare.found.worst_tokens import Trace
from evalkit.compare.passes.variants import Arm
from evalkit.kv import RowFormat, Scales


class Stream(Protocol):
    """What lives from layer to layer, as `compare.layers.LayerStream` says."""

    model: Any
    arms: list[Arm]
    inputs: list[Tensor]
    hidden: dict[tuple[Arm, int], Tensor]
    selections: dict[tuple[Arm | None, int], Tensor]
    calibrated: list[tuple[RowFormat, dict[int, Scales]]]
    watch: Watch

    @property
    def calibration(self) -> Stream | None: ...


class Keeper(Protocol):
    """What is told of each layer that is done, and may have a comparison begin behind some."""

    def restore(self, stream: Stream) -> int:
        """Give the stream what was kept; returns the layer to go on with."""

    def keep(self, stream: Stream, layer: int) -> None:
        """Note that a layer is done."""


class LayerState:
    """The file and what it holds.

    records_bytes: of the records' file, what belongs to the layers that are done; 0 without a state to go on from.
    sync: puts the records' file on disk, and returns its bytes.
    """

    def __init__(self, path: Path, records: Path, asked: str) -> None:
        """Look for the state at `path` of the comparison `asked` (see `signature`), its records in `records`."""
        self.path, self.signature = path, asked
        self.sync: Callable[[], int] = lambda: 0
        self._held = _metadata(path)
        self.records_bytes = int(self._held.get("records_bytes", 0))
        whole = records.exists() and records.stat().st_size >= self.records_bytes
        if not whole or self._held.get("signature") != asked:
            self._held, self.records_bytes = {}, 0
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="layer-state")
        self._writing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._writer.shutdown(wait=True)

    def restore(self, stream: Stream) -> int:
        """Give the stream what the file holds; returns the layer to go on with, 0 without a state."""
        if not self.records_bytes:
            return 0
        device = stream.model.device
        with safe_open(self.path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- no iterator
        traced = {name: tensors.pop(name) for name in list(tensors) if name.startswith("trace ")}
        for name, value in tensors.items():
            holder, key = _place(stream, name)
            holder[key] = value.to(device)
        _restore_traces(stream, traced, json.loads(self._held["limits"]))
        for (_, scales), found in zip(stream.calibrated, json.loads(self._held["scales"]), strict=True):
            scales |= {int(layer): Scales(**one) for layer, one in found.items()}
        return int(self._held["layer"]) + 1

    def keep(self, stream: Stream, layer: int) -> None:
        """Note that a layer is done. Its records have been given to the file that `sync` puts on disk."""
        if self._writing is not None:
            self._writing.result()
        metadata = {
            "signature": self.signature,
            "layer": str(layer),
            "records_bytes": str(self.sync()),
            "limits": json.dumps({name: trace.limits for name, trace in stream.watch.traces.items()}),
            "scales": json.dumps([{n: asdict(one) for n, one in s.items()} for _, s in stream.calibrated]),
        }
        tensors = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in _named(stream)}
        self._writing = self._writer.submit(self._write, tensors, metadata)

    def remove(self) -> None:
        """The comparison has ended: leave nothing."""
        if self._writing is not None:
            self._writing.result()
        self.path.unlink(missing_ok=True)

    def _write(self, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        partial = self.path.with_name(self.path.name + ".partial")
        save_file(tensors, partial, metadata=metadata)
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        partial.replace(self.path)


def signature(documents: Sequence[Tensor], *parts: object) -> str:
    """What tells one comparison from another: its token ids, and whatever else it depends on, as text."""
    total = hashlib.sha256("\n".join(map(str, parts)).encode())
    for ids in documents:
        total.update(str(ids.tolist()).encode())
    return total.hexdigest()


def _metadata(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError:
        return {}


def _named(stream: Stream) -> list[tuple[str, Tensor]]:
    """All tensors that live from layer to layer, by a name that `_place` understands."""
    found = [(f"inputs {number}", value) for number, value in enumerate(stream.inputs)]
    found += [
        (f"hidden {_number(stream, arm)} {number}", value) for (arm, number), value in stream.hidden.items()
    ]
    found += [
        (f"selections {_number(stream, arm)} {number}", value)
        for (arm, number), value in stream.selections.items()
    ]
    for candidate, trace in stream.watch.traces.items():
        for kind in ("errors", "dropped"):
            found += [
                (f"trace {candidate} {kind} {layer} {number}", torch.from_numpy(values))
                for layer, parts in getattr(trace, kind).items()
                for number, values in enumerate(parts)
            ]
    if stream.calibration is not None:
        found += [(f"calibration {name}", value) for name, value in _named(stream.calibration)]
    return found


def _restore_traces(stream: Stream, tensors: Mapping[str, Tensor], limits: Any) -> None:
    for candidate, by_layer in limits.items():
        trace = stream.watch.traces.setdefault(candidate, Trace())
        for layer, limit in by_layer.items():
            trace.limits[int(layer)] = None if limit is None else (limit[0], limit[1])
            for kind in ("errors", "dropped"):
                start = f"trace {candidate} {kind} {layer} "
                count = sum(name.startswith(start) for name in tensors)
                parts = [tensors[f"{start}{number}"].numpy() for number in range(count)]
                getattr(trace, kind)[int(layer)] = parts


def _place(stream: Stream, name: str) -> tuple[Any, Any]:
    """The container and the key in it of what `_named` called so."""
    kind, _, rest = name.partition(" ")
    if kind == "calibration":
        assert stream.calibration is not None
        return _place(stream.calibration, rest)
    if kind == "inputs":
        return stream.inputs, int(rest)
    arm, number = map(int, rest.split())
    return getattr(stream, kind), (stream.arms[arm] if arm >= 0 else None, number)


def _number(stream: Stream, arm: Arm | None) -> int:
    """An arm's place among the stream's; -1 is the reference."""
    return -1 if arm is None else stream.arms.index(arm)
