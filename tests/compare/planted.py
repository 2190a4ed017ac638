"""A backend for tests to break: exact attention, which the fixture `plant` registers for as long as a test runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from evalkit.attention import backends
from evalkit.attention.backends.base import Backend
from evalkit.kv import RowFormat, Scales


class Planted(Backend):
    """Exact attention; a test's subclass breaks one argument of it."""

    name = kernel = "planted"
    takes_float32 = True

    def unavailable_because(self, *_: Any) -> str | None:
        return None

    def attend(
        self,
        q_latent: Tensor,
        q_rope: Tensor,
        cache: Tensor,
        format: RowFormat,
        indices: Tensor,
        sm_scale: float,
        scales: Scales,
    ) -> tuple[Tensor, Tensor]:
        scales = self.scales_for(indices, scales)
        return backends.get("reference").attend(q_latent, q_rope, cache, format, indices, sm_scale, scales)

    def scales_for(self, indices: Tensor, scales: Scales) -> Scales:
        return scales


Plant = Callable[[type[Planted]], None]
