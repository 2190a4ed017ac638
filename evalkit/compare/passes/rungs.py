"""The three rungs of one attention call: format gap, kernel gap, total.

With `exact(rows)` exact attention of the same queries over the same selection:
format gap = exact(candidate's rows) against exact(reference's rows); kernel gap = the candidate's kernel
against exact(candidate's rows), these read with that kernel's rounding of scales; total = the kernel against
the reference's own attention. Where the queries are the same, which isolated mode ensures, the first two make
up the third, except for what a different selection adds to the total.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evalkit.attention import backends
from evalkit.attention.backends.reference import Reference

if TYPE_CHECKING:
    from evalkit.attention.state import AttentionCall


@dataclass(frozen=True, eq=False)
class Rungs:
    """(got, ref) pairs [T, H, C] of each rung."""

    format: tuple[Tensor, Tensor]
    kernel: tuple[Tensor, Tensor]
    total: tuple[Tensor, Tensor]


def rungs(ref: AttentionCall, got: AttentionCall, backend: str, rounded: Callable[[Tensor], Tensor]) -> Rungs:
    """Split a candidate's attention error.

    Args:
        ref: the reference's call, [T, H, ...]. got: the candidate's, of the same tokens and queries.
        backend: the candidate's backend. The reference's own kernel is exact attention, so its kernel gap is
            zero by definition and is not computed twice.
        rounded: what the path does to an attention output, where it computes wider than the server's dtype.

    Raises:
        ValueError: the queries differ, so that no rung is defined.
    """
    if not (torch.equal(ref.q_latent, got.q_latent) and torch.equal(ref.q_rope, got.q_rope)):
        raise ValueError(
            "the candidate's queries are not the reference's: rungs are defined in isolated mode only"
        )
    on_ref = ref.out if torch.equal(ref.indices, got.indices) else rounded(exact(ref, got.indices))
    on_got = got.out if backend == "reference" else rounded(exact(got, got.indices, backend))
    return Rungs(format=(on_got, on_ref), kernel=(got.out, on_got), total=(got.out, ref.out))


def exact(call: AttentionCall, indices: Tensor, reader: str = "reference") -> Tensor:
    """Exact attention [T, H, C] of a call's queries over its own rows, read as `reader` reads them."""
    reference = backends.get("reference")
    assert isinstance(reference, Reference)  # for the reader's rounding, which other backends do not take
    out, _ = reference.attend(
        call.q_latent,
        call.q_rope,
        call.cache,
        call.format,
        indices,
        call.sm_scale,
        call.scales,
        reader=backends.get(reader),
    )
    return out
