"""What each backend can read on this machine, proved by a small attention: `evalkit doctor`.

A self-check compares a backend with attention in float64 over the rows as that backend reads them, so that what a
format loses is no part of it. Indexer keys are checked the same way.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from evalkit import environment, kv
from evalkit.attention import backends, indexer
from evalkit.attention.backends import Backend, flashmla
from evalkit.attention.indexer import Scorer, deepgemm
from evalkit.kv import RowFormat, Scales
from evalkit.kv.index import IndexFormat
from evalkit.versions import TESTED, VersionRange

SLOTS = 256
COUNTS = (0, 1, 100, 192)  # slots that each query selects
SM_SCALE = 192**-0.5
EXACT, KERNEL, MODELLED = 1e-5, 3e-3, 0.05  # relative L2: float32; bf16 operands and output; fp8 query and P
INDEX_SHAPE = (2, 5, 200)  # sequences, queries, keys
INDEX_BOUNDS = {"torch": EXACT, "triton": EXACT, "deepgemm": 1e-3}
# Of packages whose modules have other names.
MODULES = {"lm-eval": "lm_eval", "flashinfer-python": "flashinfer"}
LIBRARIES: dict[str, Callable[[], Path | None]] = {"FlashMLA": flashmla.library, "DeepGEMM": deepgemm.library}


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package on this machine.

    version: the package's own. Where it has none, the version of the package that ships it; None if that has none either.
    """

    tested: VersionRange
    installed: bool
    version: str | None

    @property
    def words(self) -> str:
        """What was found."""
        if not self.installed:
            return "not installed"
        if self.version is None:
            return "found, version unknown"
        return (
            self.version if self.tested.shipped_by is None else f"in {self.tested.shipped_by} {self.version}"
        )

    @property
    def warning(self) -> str | None:
        """A line where the version found was not tested."""
        return self.tested.beyond(self.version) if self.installed and self.version is not None else None


def packages() -> list[Package]:
    """The packages that decide numbers, as they are here."""
    return [
        Package(
            tested=tested,
            installed=_is_installed(tested.name),
            version=environment.version_of(tested.shipped_by or tested.name),
        )
        for tested in TESTED
    ]


def _is_installed(name: str) -> bool:
    if name in LIBRARIES:
        return LIBRARIES[name]() is not None
    return importlib.util.find_spec(MODULES.get(name, name.lower())) is not None


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What is known of one thing and one format here.

    subject: a backend, or what scores indexer keys. how: `native`, `decoded`, `emulated` or `no`. why: the reason
    where it is `no`, else what is worth knowing. of_keys: whether it is of indexer keys. error, bound: relative L2 of
    the self-check, None where none was made. broken: why it could not be measured.
    """

    subject: str
    format: str
    how: str
    why: str = ""
    of_keys: bool = False
    error: float | None = None
    bound: float | None = None
    broken: str = ""

    @property
    def failed(self) -> bool:
        """Whether a self-check was made and not passed; NaN passes none."""
        if self.error is None or self.bound is None:
            return bool(self.broken)
        return not self.error <= self.bound

    @property
    def words(self) -> str:
        """The outcome and what is worth knowing, FAILED first where a self-check did not pass."""
        parts = [f"FAILED: {self.broken}" if self.broken else "", self.why]
        if self.error is not None and self.bound is not None:
            failed = "FAILED: " if self.failed else ""
            parts.insert(0, f"{failed}relative L2 {self.error:.1e}, at most {self.bound:.0e}")
        return "; ".join(filter(None, parts))


def examine(
    device: torch.device, heads: int, topk: int, index_heads: int, *, check: bool
) -> Iterator[Finding]:
    """A finding for every backend and format, then one for every format of indexer keys.

    A failed self-check is a finding, not an error.
    """
    for name in backends.names():
        for row_format in map(kv.get, kv.names()):
            yield _examine_rows(name, row_format, device, heads, topk, check=check)
    for key_format in map(kv.index.get, kv.index.names()):
        scorer, why = indexer.choose(key_format, index_heads, device)
        found = Finding(subject=scorer.name, format=key_format.name, how="native", why=why, of_keys=True)
        if check:
            found = _checked(
                found, INDEX_BOUNDS[scorer.name], partial(_score, scorer, key_format, device, index_heads)
            )
        yield found


def count() -> int:
    """How many findings `examine` makes."""
    return len(backends.names()) * len(kv.names()) + len(kv.index.names())


def _examine_rows(
    name: str, row_format: RowFormat, device: torch.device, heads: int, topk: int, *, check: bool
) -> Finding:
    backend = backends.reading(name)
    modelled = backend.kernel_on(device).startswith("modelled")
    how, why = "emulated" if modelled else "native", ""
    if reason := backend.unavailable_because(row_format, device, heads, topk):
        backend, how, why = backends.reading(name, read="decoded"), "decoded", "with +read=decoded"
        if backend.unavailable_because(row_format, device, heads, topk) is not None:
            return Finding(subject=name, format=row_format.name, how="no", why=reason)
        why += ", emulated" if modelled else ""
    found = Finding(subject=name, format=row_format.name, how=how, why=why)
    if not check:
        return found
    bound = MODELLED if modelled else EXACT if device.type == "cpu" else KERNEL
    return _checked(found, bound, partial(_attend, backend, row_format, device, heads, bound))


def _checked(found: Finding, bound: float, measure: Callable[[], float]) -> Finding:
    """The finding with its self-check's outcome; what a kernel raises is an outcome too."""
    try:
        return replace(found, error=measure(), bound=bound)
    except Exception as error:  # noqa: BLE001 -- a compiler, a driver or a kernel may raise anything
        return replace(found, broken=f"{type(error).__name__}: {' '.join(str(error).split())}")


@torch.no_grad()
def _attend(backend: Backend, row_format: RowFormat, device: torch.device, heads: int, bound: float) -> float:
    """Relative L2 of a backend's attention over random rows of a format.

    Raises:
        ValueError: the log-sum-exp is off, or a query without a row does not give 0 and -inf.
    """
    draw = torch.Generator().manual_seed(0)
    latent, rope, q_latent, q_rope = (
        torch.randn(*shape, generator=draw).bfloat16().to(device)
        for shape in ((SLOTS, 512), (SLOTS, 64), (len(COUNTS), heads, 512), (len(COUNTS), heads, 64))
    )
    if device.type == "cpu":  # as a model on a CPU computes
        q_latent, q_rope = q_latent.float(), q_rope.float()
    scales = Scales()
    if row_format.uses_scales:
        scales = row_format.calibrate(float(latent.abs().max()), float(rope.abs().max()))
    indices = torch.full((len(COUNTS), max(COUNTS)), -1, dtype=torch.int32)
    for query, number in enumerate(COUNTS):
        indices[query, :number] = torch.randperm(SLOTS, generator=draw)[:number].int()
    indices, slots = indices.to(device), torch.arange(SLOTS, device=device)
    cache = row_format.allocate(SLOTS, device=device)
    row_format.store(cache, slots, latent, rope, scales)
    out, lse = backend.attend(q_latent, q_rope, cache, row_format, indices, SM_SCALE, scales)

    read = backend.read(row_format, cache, slots, scales)
    value = read[0].double()  # [S, C]
    scores = torch.cat([q_latent, q_rope], -1).double() @ torch.cat(read, -1).double().T * SM_SCALE
    chosen = torch.zeros(len(COUNTS), SLOTS + 1, dtype=torch.bool, device=device)
    chosen.scatter_(1, indices.long().where(indices >= 0, SLOTS), True)
    scores = scores.masked_fill(~chosen[:, None, :SLOTS], -torch.inf)[1:]  # [T - 1, H, S]
    want, want_lse = scores.softmax(-1) @ value, scores.logsumexp(-1)
    if not (bool((out[0] == 0).all()) and bool((lse[0] == -torch.inf).all())):
        raise ValueError("a query without a row must give 0 and -inf")
    off = float((lse[1:].double() - want_lse).abs().max())
    if not off <= 10 * bound:
        raise ValueError(f"the log-sum-exp is off by {off:.2g}")
    return _relative_l2(out[1:], want)


@torch.no_grad()
def _score(scorer: Scorer, key_format: IndexFormat, device: torch.device, heads: int) -> float:
    """Relative L2 of index scores over random keys.

    Raises:
        ValueError: a key after its query is scored, or one before is not.
    """
    batch, length, cached = INDEX_SHAPE
    draw = torch.Generator().manual_seed(0)
    query, keys = (
        torch.randn(batch, *shape, 128, generator=draw).bfloat16().to(device)
        for shape in ((length, heads), (cached,))
    )
    stored, (sent, scale) = key_format.encode(keys), key_format.encode(query)
    weights = torch.rand(batch, length, heads, generator=draw).to(device)
    weights = weights if scale is None else weights * scale
    got = scorer.scores(sent, stored.codes, weights, stored.scale)
    dots = torch.einsum("btid,bsd->btis", sent.double(), stored.codes.double()).relu()
    want = torch.einsum("btis,bti->bts", dots, weights.double())
    want = want if stored.scale is None else want * stored.scale[:, None]
    columns = torch.arange(cached, device=device)
    seen = (columns <= columns[cached - length :, None]).expand_as(want)
    if not torch.equal(got.isneginf(), ~seen):
        raise ValueError("keys up to the query's own must be scored, and no others")
    return _relative_l2(got[seen], want[seen])


def _relative_l2(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())  # NaN where `got` has one
