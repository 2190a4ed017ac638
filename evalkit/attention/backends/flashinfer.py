"""FlashInfer's MLA kernel on SM90 (`BatchMLAPagedAttentionWrapper`, backend fa3), page size 1.

Sparse attention is expressed as pages of one token: every query is a request of its own whose pages are the slots it
selected. The kernel does not mask -1, so slots are packed. It multiplies by fp8 scales rounded to bf16 and keeps P in
bf16.

A plan depends on how many slots each query has, not on which, so the last few are kept: the kernel reads the slots
from a buffer of ours, which the next call overwrites. Prompts of one shape that are prefilled layer after layer and
batch after batch need the same few plans. To learn the lengths is to wait for the device; where a caller knows that
every query has all its slots, `steady` asks for neither. From 0.7.4 on, a plan remembers the largest slot that it was
made over and refuses a smaller cache later: the planner is shown slot 0 only, which every cache has.

The kernel cuts a query's slots into pieces where a call has too little work for all processors, and rounds each
piece's sum to bf16. `MLAPlan` (FlashInfer 0.7.2 to 0.7.4, scheduler.cuh) does so where a query has more slots than the average
of all work over its clusters of one or two processors, rounded up: to 32, 64, 128 or 192 up to an average of 8, 16, 32
or 64, then to a multiple of 256. A query's result would depend on the others in the call. Small calls are therefore
padded with queries that repeat the longest selection, until nothing is cut; the padding's results are dropped.
"""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache as once
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evalkit.attention.backends.base import Backend, BF16Operands, backends
from evalkit.kv import RowFormat, Scales

WORKSPACE_BYTES = 128 * 2**20
PLANS_KEPT = 32  # of each kernel; 8 MB of device memory each
WORK_ITEMS_PER_PLAN = 8192  # a plan holds at most 16384, and a query left to split may make two of each
# Slots of the longest query, and the average work of a cluster up to which it is cut.
CUT_UP_TO = ((32, 0), (64, 8), (128, 16), (192, 32), (256, 64))


@backends.register
class FlashInfer(BF16Operands):
    name = "flashinfer"
    kernel = "flashinfer BatchMLAPagedAttentionWrapper fa3"

    def __init__(self, pads: bool = True, full: bool = False) -> None:
        self._pads, self._full = pads, full
        self._plans: dict[tuple[Any, ...], _Plan] = {}

    def unavailable_because(
        self, format: RowFormat, device: torch.device, heads: int, topk: int
    ) -> str | None:
        if format.name not in _READS:
            return f"FlashInfer's SM90 kernel reads {', '.join(_READS)}, not {format.name}"
        if device.type != "cuda":
            return f"FlashInfer needs an NVIDIA GPU, the device is {device.type}"
        if importlib.util.find_spec("flashinfer") is None:
            return "the package flashinfer-python is not installed (pip install 'evalkit-kv[cuda]')"
        major, minor = torch.cuda.get_device_capability(device)
        if major != 9:
            return f"FlashInfer's fa3 MLA kernel needs SM90, this GPU is SM{major}{minor}"
        return None

    def steady(self, full: bool) -> Backend | None:
        """Only where queries have all their slots: else the lengths that a plan needs are the device's to tell."""
        return _steady() if full and self._pads else None

    def splitting(self) -> Backend | None:
        return _splitting()

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
        latent, rope, options = _READS[format.name](format.planes(cache), scales)
        tiles, _ = _grid(q_latent.shape[1], 1)
        step = max(1, WORK_ITEMS_PER_PLAN // tiles)
        parts = [slice(start, start + step) for start in range(0, max(1, len(indices)), step)]
        found = [
            self._attend(q_latent[part], q_rope[part], (latent, rope), indices[part], sm_scale, options)
            for part in parts
        ]
        if len(found) == 1:
            return found[0]
        outs, lses = zip(*found, strict=True)
        return torch.cat(outs), torch.cat(lses)

    def _attend(
        self,
        q_latent: Tensor,
        q_rope: Tensor,
        rows: tuple[Tensor, Tensor],
        indices: Tensor,
        sm_scale: float,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """The queries of one plan: out [t, H, C], lse [t, H]."""
        queries, heads = q_latent.shape[:2]
        key: tuple[Any, ...] = (q_latent.device, q_latent.dtype, rows[0].dtype, heads, sm_scale)
        # What a graph has recorded must stay where it is: other shapes have slots of their own.
        if self._full:
            key += tuple(indices.shape)
        plan = self._plans.setdefault(key, _Plan())
        lengths = plan.take(indices, self._full)
        if not any(lengths):
            return torch.zeros_like(q_latent), q_latent.new_full((queries, heads), -torch.inf).float()
        padding = 0
        if self._pads:
            processors = torch.cuda.get_device_properties(q_latent.device).multi_processor_count
            padding = padding_against_splits(lengths, heads, processors)
        wrapper = plan.prepared(indices, lengths, padding, q_latent, rows[0].dtype, sm_scale)
        if padding:
            q_latent, q_rope = (F.pad(part, (0, 0, 0, 0, 0, padding)) for part in (q_latent, q_rope))
        out = q_latent.new_empty(q_latent.shape)  # contiguous, which empty_like need not be
        lse = q_latent.new_empty(q_latent.shape[:2], dtype=torch.float32)
        wrapper.run(
            query=(q_latent, q_rope),
            kv_cache=rows,
            out=out,
            lse=lse,
            return_lse=True,
            return_lse_base_on_e=True,
            **options,
        )
        return out[:queries], lse[:queries]


@dataclass(eq=False)
class _Plan:
    """The last plans of one kernel: the lengths the last is of, padding included, and the slots that the kernel reads."""

    wrapper: Any = None
    lengths: list[int] = field(default_factory=list)
    slots: Tensor | None = None  # [at least the sum of lengths] int32
    kept: OrderedDict[tuple[int, ...], Any] = field(default_factory=OrderedDict)  # wrappers by lengths

    def take(self, indices: Tensor, full: bool = False) -> list[int]:
        """Put `indices` [T, K] into the slots, row after row, and say how many of each are valid.

        Waits for the device, unless all are valid and it is told so by `full`.
        """
        slots = self._room(indices.numel(), indices.device)
        if full:
            slots[: indices.numel()].view_as(indices).copy_(indices)
            return [indices.shape[1]] * len(indices)
        if indices.device.type == "cuda":
            from evalkit.attention.backends.kernels.packing import take_slots

            counts = take_slots(indices, slots)
        else:
            slots[: indices.numel()].view_as(indices).copy_(indices)
            counts = (indices >= 0).sum(-1)
        lengths: list[int] = counts.tolist()
        return lengths

    def prepared(
        self,
        indices: Tensor,
        lengths: list[int],
        padding: int,
        query: Tensor,
        dtype: torch.dtype,
        sm_scale: float,
    ) -> Any:
        """A wrapper planned for what `take` took, and for as many more queries of the longest, its slots in place."""
        longest, packed = max(lengths), sum(lengths)
        total = packed + padding * longest
        slots = self._room(total, indices.device, kept=packed)
        if packed < indices.numel():
            slots[:packed] = indices[indices >= 0]
        if padding:
            start = sum(lengths[: lengths.index(longest)])
            slots[packed:total].view(padding, longest)[:] = slots[start : start + longest]
        lengths = lengths + [longest] * padding
        if lengths != self.lengths:
            self.wrapper = self._kept(slots, lengths, query, dtype, sm_scale)
            self.lengths = lengths
        return self.wrapper

    def _kept(
        self, slots: Tensor, lengths: list[int], query: Tensor, dtype: torch.dtype, sm_scale: float
    ) -> Any:
        """The wrapper that was planned for these lengths, or a new one."""
        key = tuple(lengths)
        if key not in self.kept:
            self.kept[key] = _plan(slots, lengths, query, dtype, sm_scale)
            if len(self.kept) > PLANS_KEPT:
                self.kept.popitem(last=False)
        self.kept.move_to_end(key)
        return self.kept[key]

    def _room(self, needed: int, device: torch.device, kept: int = 0) -> Tensor:
        """Slots enough, the first `kept` as they were. Plans go with the slots they were made over."""
        if self.slots is None or len(self.slots) < needed:
            with torch.inference_mode(False):  # else they could be written to in inference mode only
                slots = torch.empty(needed, dtype=torch.int32, device=device)
            if self.slots is not None:
                slots[:kept] = self.slots[:kept]
            self.slots, self.lengths = slots, []
            self.kept.clear()
        return self.slots


@once
def _splitting() -> FlashInfer:
    return FlashInfer(pads=False)


@once
def _steady() -> FlashInfer:
    return FlashInfer(full=True)


@once
def _workspace(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _plan(slots: Tensor, lengths: list[int], query: Tensor, dtype: torch.dtype, sm_scale: float) -> Any:
    """Plan queries of these lengths over `slots`, which the wrapper reads whenever it runs.

    The slots are as they were afterwards. While the plan is made they are 0: which slots there are does not change a
    plan, and a plan that saw the slots of a large cache would refuse a smaller one.
    """
    from flashinfer.mla import BatchMLAPagedAttentionWrapper, MLAPlanMetadata

    wrapper = BatchMLAPagedAttentionWrapper(_workspace(query.device), backend="fa3")
    counts = torch.tensor(lengths, dtype=torch.int32)  # planned on the host, where these stay
    starts = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    planned = slots[: sum(lengths)]
    selected = planned.clone()
    planned.zero_()
    wrapper.plan(
        metadata=MLAPlanMetadata.csr(
            qo_indptr=torch.arange(len(lengths) + 1, dtype=torch.int32),
            kv_indptr=starts,
            kv_indices=slots,
            kv_len_arr=counts,
        ),
        num_heads=query.shape[1],
        head_dim_ckv=query.shape[2],
        head_dim_kpe=64,
        page_size=1,
        causal=False,
        sm_scale=sm_scale,
        q_data_type=query.dtype,
        kv_data_type=dtype,
        query_layout="split",
        kv_cache_layout="split",
        lse_mode="basee",
        scale_mode="default" if dtype == torch.bfloat16 else "kv-per-tensor",
    )
    planned.copy_(selected)
    return wrapper


def _grid(heads: int, processors: int) -> tuple[int, int]:
    """Tiles of heads that a query makes, and clusters of processors that share them out."""
    cluster = 2 if heads > 64 else 1
    return -(-heads // (64 * cluster)), processors // cluster


def padding_against_splits(lengths: Sequence[int], heads: int, processors: int) -> int:
    """How many more queries of the longest length keep FlashInfer's planner from cutting any."""
    longest = max(lengths, default=0)
    tiles, clusters = _grid(heads, processors)
    above = 256 * (-(-longest // 256) - 1)
    average = next((most for slots, most in CUT_UP_TO if longest <= slots), above)
    if average == 0:
        return 0
    missing = average * clusters + 1 - tiles * sum(lengths)
    return max(0, -(-missing // (tiles * longest)))


def _split(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [N, C + R] -> the kernel's pages of one token, latent [N, 1, C] and rope [N, 1, R], without a copy."""
    return rows[:, None, :512], rows[:, None, 512:]


def _bf16(planes: Any, _scales: Scales) -> tuple[Tensor, Tensor, dict[str, Any]]:
    return *_split(planes.rows), {}


def _fp8(planes: Any, scales: Scales) -> tuple[Tensor, Tensor, dict[str, Any]]:
    return *_split(planes.rows), {"ckv_scale": scales.latent, "kpe_scale": scales.rope}


def _fp8_groups(planes: Any, scales: Scales) -> tuple[Tensor, Tensor, dict[str, Any]]:
    options = {"ckv_scale_arr": planes.scale[:, None], "kpe_scale": scales.rope}
    return planes.latent[:, None], planes.rope[:, None], options


_READS = {"bf16": _bf16, "fp8_e4m3": _fp8, "fp8_group128": _fp8_groups}
