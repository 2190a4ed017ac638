"""What a row format is. A new one is its file here (`encode`, `decode`, `planes`) and its row of bytes in a test.

Formats are stateless. Shapes: T tokens, N slots, C latent (512), R rope (64).
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evalkit.errors import InputError
from evalkit.kv import pages
from evalkit.kv.layout import Layout
from evalkit.kv.scales import ReadScale, Scales, calibrate, identity
from evalkit.registry import Registry


class Rows(NamedTuple):
    """The planes of a format that keeps each token's bytes together."""

    rows: Tensor


class RowFormat(ABC):
    """One way to store a token: `row_bytes` bytes in all, its own scales included.

    `value_dim` leading elements of what `load` returns are what attention sums. `uses_scales` is True where
    `Scales.latent` or `Scales.rope` change the bytes. `four_bit` is True where the latent is e2m1: coarse, and without
    a code for NaN. `what` says in a phrase what a row is. `layout` is `decode` as data, by which one kernel decodes
    rows; without it, torch.compile fuses `decode`.
    """

    name: str
    what: str = ""
    row_bytes: int
    latent_dim: int = 512
    rope_dim: int = 64
    value_dim: int = 512
    uses_scales: bool = False
    four_bit: bool = False
    layout: Layout | None = None

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        if "decode" in vars(cls) and "layout" not in vars(cls):
            cls.layout = None  # an inherited one is not this decode

    @abstractmethod
    def encode(self, latent: Tensor, rope: Tensor, scales: Scales) -> Tensor:
        """The rows [T, row_bytes] uint8 that the real writer makes of latent [T, C] and rope [T, R]."""

    @abstractmethod
    def decode(self, rows: Tensor, scales: Scales, read_scale: ReadScale) -> tuple[Tensor, Tensor]:
        """What rows [T, row_bytes] uint8 hold: latent [T, C], rope [T, R] float32.

        float32 scales, stored or given, pass through `read_scale`.
        """

    @abstractmethod
    def planes(self, cache: Tensor) -> Any:
        """Typed views for kernels, a named tuple of the format's own, sharing the cache's memory."""

    def byte_planes(self, cache: Tensor) -> tuple[Tensor, ...]:
        """The cache as uint8 [N, width] planes, whose widths add up to a row in `encode`'s order."""
        return (pages.rows_of(cache, self.row_bytes),)

    def calibrate(self, latent_amax: float, rope_amax: float) -> Scales:
        """The per-tensor scales that suit tokens of these max|x|.

        Raises:
            InputError: an amax is negative or not finite, or both are zero.
        """
        return calibrate(latent_amax, rope_amax)

    def allocate(self, slots: int, page_size: int = 64, device: str | torch.device = "cpu") -> Tensor:
        """A zeroed cache, uint8 [pages, page_bytes], of at least that many slots.

        Raises:
            InputError: slots or page_size is below 1.
        """
        return pages.allocate(slots, self.row_bytes, page_size, device)

    def store(self, cache: Tensor, slots: Tensor, latent: Tensor, rope: Tensor, scales: Scales) -> None:
        """Write token t to slots[t]; -1 is skipped, and its bytes stay. NaN is stored as NaN.

        slots [T] int32 or int64, latent [T, C], rope [T, R]. A slot given twice ends with either token.

        Raises:
            InputError: a shape, dtype or device does not fit, or, on CPU, a slot is outside the cache.
        """
        planes = self.byte_planes(cache)
        pages.check_slots(slots, capacity=len(planes[0]), lowest=-1)
        for part, got, dim in (("latent", latent, self.latent_dim), ("rope", rope, self.rope_dim)):
            if got.shape != (len(slots), dim) or not got.is_floating_point():
                raise InputError(
                    f"{part} is {got.dtype} {list(got.shape)}: floating point [{len(slots)}, {dim}] is right"
                )
        self._check_devices(cache, slots=slots, latent=latent, rope=rope)
        pages.put_rows(planes, slots, self.encode(latent, rope, scales))

    def load(
        self, cache: Tensor, slots: Tensor, scales: Scales, read_scale: ReadScale = identity
    ) -> tuple[Tensor, Tensor]:
        """The values a reader sees in slots [T], all of them valid: latent [T, C], rope [T, R] float32.

        `read_scale` is the rounding that the reader applies to a stored or given scale.

        Raises:
            InputError: a shape, dtype or device does not fit, or, on CPU, a slot is outside the cache.
        """
        planes = self.byte_planes(cache)
        pages.check_slots(slots, capacity=len(planes[0]), lowest=0)
        self._check_devices(cache, slots=slots)
        return self.decode(pages.take_rows(planes, slots), scales, read_scale)

    def _check_devices(self, cache: Tensor, **tensors: Tensor) -> None:
        for what, tensor in tensors.items():
            if tensor.device != cache.device:
                raise InputError(
                    f"{self.name}: {what} on {tensor.device}, cache on {cache.device}: one device is right"
                )


class PlanarFormat(RowFormat):
    """A format whose kernel wants each part of a row contiguous over all slots: a cache is one page of planes.

    `plane_bytes` are the parts' bytes per token, in `encode`'s order.
    """

    plane_bytes: tuple[int, ...]

    def allocate(self, slots: int, page_size: int = 64, device: str | torch.device = "cpu") -> Tensor:
        """One page of exactly that many slots, whatever the page size asked for."""
        return super().allocate(slots, page_size=max(slots, 1), device=device)

    def byte_planes(self, cache: Tensor) -> tuple[Tensor, ...]:
        slots = len(pages.rows_of(cache, self.row_bytes))
        if len(cache) != 1:
            raise InputError(f"{self.name}: a cache of {len(cache)} pages: its planes need exactly one")
        parts = cache.view(-1).split_with_sizes([slots * width for width in self.plane_bytes])
        return tuple(part.view(slots, width) for part, width in zip(parts, self.plane_bytes, strict=True))


formats: Registry[RowFormat] = Registry("KV format")


def as_bytes(*parts: Tensor) -> Tensor:
    """The parts' bytes side by side: each [T, n] of any dtype -> [T, bytes] uint8."""
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], -1)
