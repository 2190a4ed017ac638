"""How large latent and rope are, channel by channel, as the bf16 reference stores them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evalkit.candidate import Candidate
from evalkit.errors import InputError
from evalkit.model.ranges.profile import PARTS, Range


@dataclass(frozen=True, kw_only=True, eq=False)
class Spread:
    """One part of one layer over `tokens` tokens.

    rms, max: [n] float64 on the CPU, of each of 512 latent channels or 32 rotated rope pairs, both members counting.
    """

    rms: Tensor
    max: Tensor
    tokens: int

    @property
    def zero_channels(self) -> int:
        """Channels that hold nothing but zeros."""
        return int((self.rms == 0).sum())

    def range(self) -> Range:
        """The part as a whole; the tail is over the channels that are not zero.

        Raises:
            InputError: every channel is zero.
        """
        alive = self.rms[self.rms > 0]
        if alive.numel() == 0:
            raise InputError("only zeros were stored: there is nothing to measure")
        return Range(
            rms=float(self.rms.square().mean().sqrt()),
            max=float(self.max.max()),
            tail=float(alive.log().std(correction=0)),
        )


@torch.no_grad()
def measure(
    model: Any, documents: Sequence[Tensor], advance: Callable[[], None] | None = None
) -> list[dict[str, Spread]]:
    """By layer, the spread of each part over these documents.

    Args:
        model: what `evalkit.load` returns.
        documents: token ids [T] int64, at least one.
        advance: called after each document, for a progress bar.

    Raises:
        InputError: there is no document, the model's weights are not in memory, or a layer stores a value that is not finite.
    """
    if not documents or not all(len(ids) for ids in documents):
        raise InputError("ranges are measured on documents of one token or more: give at least one")
    if any(path.kv_b_proj.weight.is_meta for path in model.evalkit.layers):
        raise InputError(
            "the checkpoint is read layer by layer (stream): only one that is held whole has its ranges measured or changed"
        )
    layers = [{part: _Sums() for part in PARTS} for _ in model.evalkit.layers]
    for ids in documents:
        cache = model.evalkit.new_cache(Candidate(format="bf16", backend="reference"), {})
        cache.state.observer = _Watch(layers)
        # The base model: logits of a whole document would take more memory than all else.
        model.model(input_ids=ids[None].to(model.device), **cache.argument)
        if advance is not None:
            advance()
    return [{part: sums.result() for part, sums in layer.items()} for layer in layers]


class _Watch:
    """An observer that adds up each layer's rows as they come."""

    probes = frozenset(PARTS)

    def __init__(self, layers: list[dict[str, _Sums]]) -> None:
        self.layers = layers

    def tensor(self, probe: str, layer: int, value: Tensor) -> None:
        if not bool(torch.isfinite(value).all()):
            raise InputError(f"layer {layer} stores {probe} values that are not finite: no range fits them")
        if probe == "rope":  # rows hold it interleaved: (0, 1), (2, 3), … are rotated together
            value = value.unflatten(-1, (-1, 2)).transpose(1, 2).flatten(0, 1)
        self.layers[layer][probe].add(value)

    def attention(self, layer: int, call: Any) -> None:
        """Nothing of it is needed."""


class _Sums:
    def __init__(self) -> None:
        self.squares: Tensor | None = None
        self.largest: Tensor | None = None
        self.rows = self.calls = 0

    def add(self, values: Tensor) -> None:
        """values [rows, channels]."""
        squares, largest = values.double().square().sum(0), values.double().abs().amax(0)
        self.squares = squares if self.squares is None else self.squares + squares
        self.largest = largest if self.largest is None else self.largest.maximum(largest)
        self.rows += len(values)

    def result(self) -> Spread:
        assert self.squares is not None
        assert self.largest is not None
        return Spread(rms=(self.squares / self.rows).sqrt().cpu(), max=self.largest.cpu(), tokens=self.rows)
