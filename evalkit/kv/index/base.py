"""What an indexer key format is. A new one is its file here (`encode`) and its bytes in a test.

A page holds its tokens' codes and then their float32 scales, where there are any. Formats are stateless. Shapes:
T tokens, P tokens a page.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from evalkit.errors import InputError
from evalkit.kv import pages
from evalkit.registry import Registry

WIDTH = 128
SCALE_BYTES = 4


class Keys(NamedTuple):
    """codes [..., 128], and scale [...] float32 where a code times its scale is the value."""

    codes: Tensor
    scale: Tensor | None


class IndexFormat(ABC):
    """One way to store an indexer key: 128 codes of `dtype`, and a scale where `scaled`; `what` is it in a phrase."""

    name: str
    what: str = ""
    dtype: torch.dtype
    scaled: bool = False

    @abstractmethod
    def encode(self, keys: Tensor) -> Keys:
        """keys [..., 128] as they are stored; queries are sent the same way."""

    @property
    def code_bytes(self) -> int:
        """Bytes of a token's codes."""
        return WIDTH * self.dtype.itemsize

    @property
    def key_bytes(self) -> int:
        """Bytes of a token, its scale included."""
        return self.code_bytes + SCALE_BYTES * self.scaled

    def allocate(self, slots: int, page_size: int = 64, device: str | torch.device = "cpu") -> Tensor:
        """A zeroed cache, uint8 [pages, page_bytes], of at least that many slots.

        Raises:
            InputError: slots or page_size is below 1.
        """
        return pages.allocate(slots, self.key_bytes, page_size, device)

    def byte_planes(self, cache: Tensor) -> tuple[Tensor, ...]:
        """Views of the cache as uint8 [pages, P, width]: the codes, and the scales where there are any.

        Raises:
            InputError: the cache is not contiguous uint8 pages of whole keys.
        """
        page_size = len(pages.rows_of(cache, self.key_bytes)) // max(1, len(cache))
        widths = [self.code_bytes, SCALE_BYTES] if self.scaled else [self.code_bytes]
        parts = cache.split_with_sizes([page_size * width for width in widths], 1)
        return tuple(part.unflatten(1, (page_size, width)) for part, width in zip(parts, widths, strict=True))

    def planes(self, cache: Tensor) -> Keys:
        """Typed views of the cache, sharing its memory: codes [pages, P, 128], scale [pages, P]."""
        codes, *scale = self.byte_planes(cache)
        return Keys(codes.view(self.dtype), scale[0].view(torch.float32).squeeze(-1) if scale else None)

    def store(self, cache: Tensor, slots: Tensor, keys: Tensor) -> None:
        """Write key t to slots[t]; -1 is skipped. slots [T] int32 or int64, keys [T, 128].

        Raises:
            InputError: a shape or dtype does not fit, or, on CPU, a slot is outside the cache.
        """
        planes = self.byte_planes(cache)
        page_size = planes[0].shape[1]
        pages.check_slots(slots, capacity=len(cache) * page_size, lowest=-1)
        if keys.shape != (len(slots), WIDTH) or not keys.is_floating_point():
            raise InputError(
                f"keys are {keys.dtype} {list(keys.shape)}: floating point [{len(slots)}, {WIDTH}] is right"
            )
        if not slots.numel():
            return
        codes, scale = self.encode(keys.contiguous())
        # Bytes are moved, since not every device indexes float8.
        parts = [codes.view(torch.uint8)] + ([] if scale is None else [scale[:, None].view(torch.uint8)])
        if slots.device.type == "cpu" and int(slots.min()) >= 0:  # the usual case, and a third of the time
            place = (slots.long() // page_size, slots.long() % page_size)
            for plane, part in zip(planes, parts, strict=True):
                plane[place] = part
            return
        source, target = pages.without_skipped(slots)
        home = target.clamp(min=0)
        place = (home // page_size, home % page_size)
        for plane, part in zip(planes, parts, strict=True):
            plane[place] = torch.where(target[:, None] >= 0, part[source], plane[place])

    def load(self, cache: Tensor, slots: Tensor) -> Tensor:
        """The values in slots [T], all of them valid: [T, 128] float32.

        Raises:
            InputError: a shape or dtype does not fit, or, on CPU, a slot is outside the cache.
        """
        planes = self.byte_planes(cache)
        page_size = planes[0].shape[1]
        pages.check_slots(slots, capacity=len(cache) * page_size, lowest=0)
        place = (slots.long() // page_size, slots.long() % page_size)
        codes, *scale = (plane[place] for plane in planes)
        values = codes.view(self.dtype).float()
        return values * scale[0].view(torch.float32) if scale else values


index_formats: Registry[IndexFormat] = Registry("indexer key format")
