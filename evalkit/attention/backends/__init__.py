"""Backends by name: `reference` (exact attention), `flashinfer` and `flashmla` (kernels of the same names), `emulated`
(SM100's fp8 arithmetic, modelled, on any device).

`reading` is how a candidate gets its own: the backend with the candidate's `reader` and `read`.
"""

from __future__ import annotations

import torch

from evalkit import kv
from evalkit.attention.backends.base import Backend, backends
from evalkit.attention.backends.decoded import Decoded
from evalkit.errors import InputError

__all__ = ["PREFERENCE", "Backend", "best", "get", "names", "reading", "refuse_unavailable"]

PREFERENCE = ("flashinfer", "flashmla", "reference")


def get(name: str) -> Backend:
    """The backend called `name`. Raises InputError, with the nearest name, where there is none."""
    backends.discover(__name__)
    return backends.get(name)


def names() -> list[str]:
    """Every backend's name."""
    backends.discover(__name__)
    return backends.names()


def reading(name: str, reader: str = "exact", read: str = "native") -> Backend:
    """The backend called `name` as a candidate's `reader=` and `read=` have it.

    Raises:
        InputError: no such backend, or it reads rows in its own way only.
    """
    backend = get(name)
    return (Decoded(backend) if read == "decoded" else backend).reading_as(reader)


def best(format: str, device: torch.device | str, heads: int, topk: int, read: str = "native") -> str:
    """The first of flashinfer, flashmla and reference that can read `format` (a name or alias) here."""
    device = torch.device(device)
    return next(
        name
        for name in PREFERENCE
        if reading(name, read=read).unavailable_because(kv.get(kv.resolve(format, name)), device, heads, topk)
        is None
    )


def refuse_unavailable(
    name: str, format: str, device: torch.device | str, heads: int, topk: int, read: str = "native"
) -> None:
    """Raise InputError where backend `name` cannot read `format` here; the line says why."""
    where = kv.get(format), torch.device(device), heads, topk
    reason = reading(name, read=read).unavailable_because(*where)
    if reason is None:
        return
    if read == "native" and reading(name, read="decoded").unavailable_because(*where) is None:
        reason += f"; {format}@{name}+read=decoded decodes its rows to bf16 first"
    option = "" if read == "native" else f"+read={read}"
    raise InputError(f"{format}@{name}{option} cannot run here: {reason}")
