"""A path of which some components are a candidate's and the others the reference's.

`latent`, `rope`: that part of a row, stored and read back by the candidate. `query`, `prob`: rounded as `emulated` models
them. `scale_rule`: how the candidate's reader rounds scales and their products with the codes; on a part that is not the
candidate's, the reference's values are multiplied by what that rule makes of the candidate's, rounded over exact.
`index`: indexer keys and queries in the candidate's format. All else is the reference's: bf16 rows and exact attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from evalkit import kv
from evalkit.attention import backends
from evalkit.attention.backends.base import Backend
from evalkit.attention.backends.decoded import Decoded
from evalkit.attention.backends.emulated import Emulated
from evalkit.attention.backends.readers import Reader
from evalkit.attention.backends.sm100 import arithmetic
from evalkit.attention.state import PathState
from evalkit.candidate import Candidate
from evalkit.compare.passes.variants import REFERENCE
from evalkit.kv import RowFormat, Scales
from evalkit.kv.base import Rows
from evalkit.kv.scales import ReadScale

COMPONENTS: Final = ("latent", "rope", "query", "prob", "scale_rule", "index")
STORED: Final = ("latent", "rope")


def components(candidate: Candidate) -> tuple[str, ...]:
    """What a resolved candidate does otherwise than the reference, in the order of `COMPONENTS`."""
    backend, stored = _backend(candidate), candidate.format != REFERENCE.format
    models = _emulated(backend) is not None
    has = {
        "latent": stored,
        "rope": stored,
        "query": models,
        "prob": models,
        "scale_rule": _rounds_scales(backend, kv.get(candidate.format)),
        "index": candidate.index != REFERENCE.index,
    }
    return tuple(name for name in COMPONENTS if has[name])


def mix(state: PathState, enabled: frozenset[str]) -> None:
    """Leave of a candidate's path, before anything is stored, the `enabled` components; the rest is the reference's."""
    candidate = state.candidate
    state.format = MixedRows(state.format, state.backend, enabled)
    state.backend = MixedAttention(state.backend, kv.get(candidate.format), enabled)
    for layer in state.layers:
        layer.format = state.format
        layer.index = candidate.index if "index" in enabled else REFERENCE.index


class MixedRows(RowFormat):
    """fp32 rows of what is read back, each part by the candidate or by the reference. Not a format of any server."""

    name, row_bytes = "mixed", kv.get("fp32").row_bytes

    def __init__(self, stored: RowFormat, reader: Reader, enabled: frozenset[str]) -> None:
        self.stored, self.reader, self.enabled = stored, reader, enabled

    def encode(self, latent: Tensor, rope: Tensor, scales: Scales) -> Tensor:
        slots = torch.arange(len(latent), device=latent.device)
        plain = _read_back(kv.get(REFERENCE.format), Reader(), slots, latent, rope, Scales())
        exact = _read_back(self.stored, Reader(), slots, latent, rope, scales)
        read = (
            _read_back(self.stored, self.reader, slots, latent, rope, scales)
            if "scale_rule" in self.enabled
            else exact
        )
        mixed = [self._part(name, *values) for name, *values in zip(STORED, plain, exact, read, strict=True)]
        return kv.get("fp32").encode(mixed[0], mixed[1], scales)

    def _part(self, name: str, plain: Tensor, exact: Tensor, read: Tensor) -> Tensor:
        if name in self.enabled:
            return read
        # Where the rule has nothing to act on, it changes nothing.
        factor = torch.where((exact != 0) & exact.isfinite() & read.isfinite(), read / exact, 1.0)
        return plain * factor

    def decode(self, rows: Tensor, scales: Scales, read_scale: ReadScale) -> tuple[Tensor, Tensor]:
        return kv.get("fp32").decode(rows, scales, read_scale)

    def planes(self, cache: Tensor) -> Rows:
        """View rows [N, 576] float32."""
        rows: Rows = kv.get("fp32").planes(cache)
        return rows


@dataclass(frozen=True, kw_only=True, eq=False)
class _RoundedP(arithmetic.Operands):
    """Operands in float32 of which P alone is rounded, as a kernel rounds it whose rows are e4m3 or bf16."""

    fp8: bool

    @property
    def is_fp8(self) -> bool:
        return self.fp8


class MixedAttention(Backend):
    """Exact attention over mixed rows, with the query and P rounded where they are enabled and `emulated` rounds them."""

    name, kernel, takes_float32 = "mixed", "torch: exact attention on mixed rows", True

    def __init__(self, backend: Backend, stored: RowFormat, enabled: frozenset[str]) -> None:
        self.model, self.enabled = _emulated(backend), enabled
        self.read_as = kv.get("bf16") if isinstance(backend, Decoded) else stored

    def unavailable_because(
        self, format: RowFormat, device: torch.device, heads: int, topk: int
    ) -> str | None:
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
        dtype, width = q_latent.dtype, q_latent.shape[-1]
        if self.model is None or not self.enabled & {"query", "prob"}:
            return backends.get("reference").attend(
                q_latent, q_rope, cache, format, indices, sm_scale, scales
            )
        # What the kernel would be given; of its rows, none is needed.
        spare = self.read_as.allocate(1, device=q_latent.device)
        given = arithmetic.operands(q_latent, q_rope, spare, self.read_as, 1.0, scales)
        query = torch.cat([q_latent, q_rope], -1).float()
        if "query" in self.enabled:
            query = given.query.float() * (given.score_scale / given.value_scale)
        if "prob" in self.enabled:
            rounded = _RoundedP(
                query=query,
                rows=format.planes(cache).rows,
                score_scale=sm_scale,
                value_scale=1.0,
                fp8=given.is_fp8,
            )
            out, lse = arithmetic.attend(rounded, indices, self.model.prob)
        else:
            parts = query[..., :width], query[..., width:]
            out, lse = backends.get("reference").attend(*parts, cache, format, indices, sm_scale, scales)
        return out.to(dtype), lse


def _backend(candidate: Candidate) -> Backend:
    return backends.reading(candidate.backend, candidate.reader, candidate.read)


def _emulated(backend: Backend) -> Emulated | None:
    """The kernel model that a backend is, or hands its decoded rows to."""
    inner = backend.inner if isinstance(backend, Decoded) else backend
    return inner if isinstance(inner, Emulated) else None


def _rounds_scales(reader: Reader, stored: RowFormat) -> bool:
    """Whether rows have scales, and a reader that does not take them as they are."""
    third = torch.tensor([1 / 3])
    asked = []

    def seen(scale: Tensor) -> Tensor:
        asked.append(scale)
        return scale

    one = torch.ones(1, stored.latent_dim), torch.ones(1, stored.rope_dim)
    stored.decode(stored.encode(*one, Scales()), Scales(), seen)
    return bool(asked) and not torch.equal(reader.read_scale(third), third)


def _read_back(
    stored: RowFormat, reader: Reader, slots: Tensor, latent: Tensor, rope: Tensor, scales: Scales
) -> tuple[Tensor, Tensor]:
    """What a reader sees of latent [T, C] and rope [T, R] in a format, float32."""
    cache = stored.allocate(len(slots), device=latent.device)
    stored.store(cache, slots, latent, rope, scales)
    return reader.read(stored, cache, slots, scales)
