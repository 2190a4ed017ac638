"""Backends by name: `reference` (exact attention), `flashinfer` and `flashmla` (kernels of the same names)."""

from __future__ import annotations

import torch

from evalkit import kv
from evalkit.attention.backends.base import Backend, backends
from evalkit.errors import InputError

__all__ = ["Backend", "best", "get", "names", "reading", "refuse_unavailable"]

PREFERENCE = ("flashinfer", "flashmla", "reference")


def get(name: str) -> Backend:
    """The backend called `name`. Raises InputError, with the nearest name, where there is none."""
    backends.discover(__name__)
    return backends.get(name)


def names() -> list[str]:
    """Every backend's name."""
    backends.discover(__name__)
    return backends.names()


def reading(name: str, reader: str) -> Backend:
    """The backend called `name` on rows read as `reader`, a candidate's `reader=`.

    Raises:
        InputError: no such backend, or it reads rows in its own way only.
    """
    return get(name).reading_as(reader)


def best(format: str, device: torch.device | str, heads: int, topk: int) -> str:
    """The first of flashinfer, flashmla and reference that can read `format` (a name or alias) here."""
    device = torch.device(device)
    return next(
        name
        for name in PREFERENCE
        if get(name).unavailable_because(kv.get(kv.resolve(format, name)), device, heads, topk) is None
    )


def refuse_unavailable(name: str, format: str, device: torch.device | str, heads: int, topk: int) -> None:
    """Raise InputError where backend `name` cannot read `format` here; the line says why."""
    reason = get(name).unavailable_because(kv.get(format), torch.device(device), heads, topk)
    if reason is not None:
        raise InputError(f"{format}@{name} cannot run here: {reason}")
