"""Paged uint8 memory: its allocation, what a cache must look like, and rows in and out by slot.

Slot s is row s % page_size of page s // page_size; pages are contiguous, so that slot s is row s of the whole.
On CUDA nothing here synchronises: shapes are checked, slots are left to the device's own assertion.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from evalkit.errors import InputError


def allocate(slots: int, row_bytes: int, page_size: int, device: str | torch.device) -> Tensor:
    """A zeroed cache, uint8 [pages, page_bytes], of at least that many slots.

    Raises:
        InputError: slots or page_size is below 1.
    """
    if slots < 1 or page_size < 1:
        raise InputError(f"a cache of {slots} slots in pages of {page_size}: both must be at least 1")
    return torch.zeros(-(-slots // page_size), page_size * row_bytes, dtype=torch.uint8, device=device)


def rows_of(cache: Tensor, row_bytes: int) -> Tensor:
    """The rows [slots, row_bytes] of a cache [pages, page_bytes], sharing its memory.

    Raises:
        InputError: the cache is not contiguous uint8 pages of whole rows.
    """
    if (
        cache.dtype != torch.uint8
        or cache.dim() != 2
        or not cache.is_contiguous()
        or cache.shape[1] % row_bytes
    ):
        raise InputError(
            f"cache is {cache.dtype} {list(cache.shape)}, strides {list(cache.stride())}: contiguous torch.uint8 "
            f"[pages, page_bytes] with page_bytes a multiple of {row_bytes} is right"
        )
    return cache.view(-1, row_bytes)


def check_slots(slots: Tensor, capacity: int, lowest: int) -> None:
    """Refuse slots that are not [T] int32 or int64 or, on CPU, outside [lowest, capacity).

    Raises:
        InputError: with the token and the slot.
    """
    if slots.dim() != 1 or slots.dtype not in (torch.int32, torch.int64):
        raise InputError(f"slots are {slots.dtype} {list(slots.shape)}: int32 or int64 [T] is right")
    if slots.device.type == "cpu" and slots.numel():
        low, high = (int(end) for end in slots.aminmax())
        if low < lowest or high >= capacity:
            token = int(((slots < lowest) | (slots >= capacity)).int().argmax())
            raise InputError(
                f"slot {int(slots[token])} of token {token} is outside the cache: {lowest} to {capacity - 1} is right"
            )


def without_skipped(slots: Tensor) -> tuple[Tensor, Tensor]:
    """Which token to write, and to which slot, in place of each token of slots [T], T > 0: two [T] int64.

    Masking skipped tokens away would synchronise CUDA. Each repeats a written token instead, to the same slot with the
    same bytes; where none is written, the slot is -1 throughout, and slot 0 may receive its own bytes.
    """
    written = slots >= 0
    source = torch.where(written, torch.arange(len(slots), device=slots.device), written.int().argmax())
    return source, slots.long()[source]


def put_rows(planes: Sequence[Tensor], slots: Tensor, rows: Tensor) -> None:
    """Write row t of rows [T, row_bytes] to slot slots[t] of the planes [N, width], split by their widths; -1 skips.

    A slot given twice ends with either row.
    """
    if not slots.numel():
        return
    source, target = without_skipped(slots)
    home = target.clamp(min=0)
    parts = rows[source].split_with_sizes([plane.shape[1] for plane in planes], -1)
    for plane, part in zip(planes, parts, strict=True):
        plane.index_copy_(0, home, torch.where(target[:, None] >= 0, part, plane.index_select(0, home)))


def take_rows(planes: Sequence[Tensor], slots: Tensor) -> Tensor:
    """The planes' parts of each slot, side by side: [T, row_bytes]."""
    index = slots.long()
    return torch.cat([plane.index_select(0, index) for plane in planes], -1)
