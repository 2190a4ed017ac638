"""Planted damage: rows of any format multiplied by 1 + noise when they are stored, which tasks ought to notice.

What a kernel reads is a row of the format itself, with other values in it. Registered nowhere: no candidate can name it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any, get_type_hints

import torch
from torch import Tensor

from evalkit.attention.cache import PagedCache
from evalkit.errors import InputError
from evalkit.kv import RowFormat, Scales
from evalkit.kv.scales import ReadScale


class DamagedFormat(RowFormat):
    """Another format, whose writer multiplies latent and rope by 1 + noise * N(0, 1), element by element."""

    def __init__(self, inner: RowFormat, noise: float, seed: int) -> None:
        self.inner, self.noise, self.seed = inner, noise, seed
        for name in get_type_hints(RowFormat):
            setattr(self, name, getattr(inner, name))
        self._generators: dict[torch.device, torch.Generator] = {}

    def encode(self, latent: Tensor, rope: Tensor, scales: Scales) -> Tensor:
        return self.inner.encode(self._disturbed(latent), self._disturbed(rope), scales)

    def decode(self, rows: Tensor, scales: Scales, read_scale: ReadScale) -> tuple[Tensor, Tensor]:
        return self.inner.decode(rows, scales, read_scale)

    def planes(self, cache: Tensor) -> Any:
        return self.inner.planes(cache)

    def byte_planes(self, cache: Tensor) -> tuple[Tensor, ...]:
        return self.inner.byte_planes(cache)

    def allocate(self, slots: int, page_size: int = 64, device: str | torch.device = "cpu") -> Tensor:
        return self.inner.allocate(slots, page_size, device)

    def _disturbed(self, x: Tensor) -> Tensor:
        generator = self._generators.get(x.device)
        if generator is None:
            generator = self._generators[x.device] = torch.Generator(x.device).manual_seed(self.seed)
        drawn = torch.randn(x.shape, generator=generator, device=x.device, dtype=torch.float32)
        return (x.float() * (1 + self.noise * drawn)).to(x.dtype)


def generators(format: RowFormat) -> list[torch.Generator]:
    """What rows of this format draw noise from so far; nothing where none is planted."""
    return list(format._generators.values()) if isinstance(format, DamagedFormat) else []


def damaging(new_cache: Callable[[], Any], noise: float) -> Callable[[], PagedCache]:
    """`new_cache` whose caches store damaged rows; each draws its own noise, the same ones in every run.

    Raises:
        InputError: on calling it, if the caches are not the sparse MLA path's.
    """
    seeds = count()

    def made() -> PagedCache:
        cache = new_cache()
        if not isinstance(cache, PagedCache):
            raise InputError("damage is planted into a PagedCache: load the model with evalkit.load")
        cache.state.format = DamagedFormat(cache.state.format, noise, next(seeds))
        for layer in cache.state.layers:
            layer.format = cache.state.format
        return cache

    return made
