"""What one candidate carries from step to step, and what an observer sees of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from evalkit import kv
from evalkit.attention import backends
from evalkit.attention.paged_layer import PagedLayer
from evalkit.candidate import Candidate
from evalkit.kv import RowFormat, Scales


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """One backend call: its arguments as in `Backend.attend`, and what it returned."""

    q_latent: Tensor  # [T, H, C]
    q_rope: Tensor  # [T, H, R]
    cache: Tensor  # uint8 pages
    format: RowFormat
    indices: Tensor  # [T, K] int32 slots, -1 where none
    sm_scale: float
    scales: Scales
    out: Tensor  # [T, H, C]
    lse: Tensor  # [T, H] float32


class Observer(Protocol):
    """Sees the tensors that it names in `probes`, one call a layer and step, rows flattened to [B * T, ...]."""

    @property
    def probes(self) -> frozenset[str]: ...
    def tensor(self, probe: str, layer: int, value: Tensor) -> None: ...
    def attention(self, layer: int, call: AttentionCall) -> None: ...


@dataclass(kw_only=True, eq=False)
class PathState:
    """All that one candidate carries from step to step.

    rounding: dtype that query, latent, rope and attention output are rounded to while the model computes in a wider
        one; None where the model computes in its own.
    valid: [B, S] bool, False at padding; None where every column is a token.
    selections: the last full indexer's columns by first column of the step, for layers that share its selection.
    forced_selection: by layer, columns [B, S, K] to attend instead of the indexer's, one row for every column.
    forced_routing: by layer, experts [B, S, E] to use instead of the router's.
    """

    candidate: Candidate
    scales: Mapping[int, Scales]
    layer_count: int
    rounding: torch.dtype | None = None
    observer: Observer | None = None
    forced_selection: Mapping[int, Tensor] | None = None
    forced_routing: Mapping[int, Tensor] | None = None
    valid: Tensor | None = None
    selections: dict[int, Tensor] = field(default_factory=dict)
    selected_by: int = -1
    layers: list[PagedLayer] = field(init=False)

    def __post_init__(self) -> None:
        self.format = kv.get(self.candidate.format)
        self.backend = backends.reading(self.candidate.backend, self.candidate.reader, self.candidate.read)
        self.layers = [PagedLayer(self.format, self.candidate.index) for _ in range(self.layer_count)]

    def wants(self, probe: str) -> bool:
        """Whether someone looks at this probe: costly ones are computed only then."""
        return self.observer is not None and probe in self.observer.probes

    def emit(self, probe: str, layer: int, value: Tensor) -> None:
        """Hand a tensor [B, T, ...] to the observer, if it wants it, as rows."""
        if self.observer is not None and probe in self.observer.probes:
            self.observer.tensor(probe, layer, value.flatten(0, 1))

    def round(self, x: Tensor) -> Tensor:
        """x as the server's dtype would hold it."""
        return x if self.rounding is None else x.to(self.rounding).to(x.dtype)

    def keep_selection(self, layer: int, start: int, columns: Tensor) -> None:
        """Remember a full indexer's selection for the layers that share it."""
        if layer != self.selected_by:
            self.selections.clear()
            self.selected_by = layer
        self.selections[start] = columns
