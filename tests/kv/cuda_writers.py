"""The CUDA writers of vLLM and FlashInfer, and evalkit's, on one stated set of rows: each leaves a cache of bytes.

Read from vLLM 0.33.0 and FlashInfer 0.7.2. Every cache has 256 slots, which all page sizes divide, and is filled with
0xA5 before it is written, so that a byte too many shows as well as a wrong one.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evalkit import kv
from evalkit.kv import RowFormat, Scales, index
from evalkit.kv.index import IndexFormat
from tests.kv.codes import E4M3

SLOTS, UNWRITTEN = 256, 0xA5
PAGE_SIZES = (1, 16, 64, 256)
PER_TENSOR = tuple(Scales(latent=k, rope=k) for k in (1.0, 0.0371, 11.3))
OWN_EACH = (Scales(), Scales(latent=0.00037, rope=0.0371), Scales(latent=11.3, rope=13.7))

Row = tuple[Tensor, Tensor]
Write = Callable[[Row, Tensor, Scales, int], Tensor]


def finite_rows() -> Row:
    """Rows of bf16 numbers whose bytes a wrong rule would change: latent [T, 512], rope [T, 64].

    Magnitudes 1e-4 to 3e38 by token and by element, zeros of both signs, tiles of zeros, one huge element in a tile,
    subnormals, ±448 and what saturates in units of every scale in use, and largest values whose scale lies on a power
    of two, or between two codes.
    """
    draw = torch.Generator().manual_seed(31)

    def normal(tokens: int) -> Tensor:
        return torch.randn(tokens, 576, generator=draw)

    huge, quiet = normal(4), normal(4)
    huge[:, 100::128] = torch.tensor([3e38, -3e38, 1e5, -60.0])[:, None]
    for token in range(4):
        quiet[token, 128 * token :][:128] = 0
    sparse = normal(8).where(torch.rand(8, 576, generator=draw) < 0.03, torch.tensor(0.0))
    by_element = 10 ** (torch.rand(24, 576, generator=draw) * 42.4 - 4) * normal(24).sign()
    edges = torch.tensor([448, -448, 446, 450, 464, -464, 466, 480, 1e4, 2**-6, 2**-9, -(2**-10), 3 * 2**-10])
    edges = edges.repeat(45)[:576]
    subnormal = torch.arange(576) * 2.0**-10 - 0.25
    scales = torch.tensor(sorted({s.latent for s in PER_TENSOR + OWN_EACH} | {13.7}))[:, None]
    # A tile's largest value v has v / 448 on a power of two, and one bf16 step above and below one.
    powers = torch.rand(6, 576, generator=draw) * 6 - 3
    powers[:, 5::128] = torch.tensor([7, 7.03125, 6.96875, 6, 7]) * torch.tensor([1.0, -1, 1, -1, 1])
    powers *= torch.tensor([-14.0, -9, -6, 0, 40, 120]).exp2()[:, None]
    # A group's largest value v has v / 6 on an e4m3 code, or half-way between two.
    table = torch.from_numpy(E4M3).float()
    sixths = torch.cat([table, (table[1:] + table[:-1]) / 2])[1:].reshape(7, 36)
    groups = (torch.rand(7, 36, 16, generator=draw) - 0.5) * 6 * sixths[:, :, None]
    groups[:, :, 7] = 6 * sixths
    parts = [
        normal(32) * torch.logspace(-4, 4, 32)[:, None],
        by_element,
        torch.tensor([[0.0], [-0.0]]).expand(2, 576),
        huge,
        quiet,
        sparse,
        edges * scales,
        subnormal * scales,
        torch.linspace(-464, 464, 576)[None],
        ((torch.arange(576) % 29) * 0.25 - 3.5)[None],  # e2m1's ties
        powers,
        groups.flatten(1),
        normal(3) * torch.tensor([1e-20, 1e-37, 1e-39])[:, None],
    ]
    return _split(torch.cat(parts).clamp(-3e38, 3e38))


def special_rows() -> Row:
    """Infinities and NaN of both signs, alone and in company, in tiles of their own: latent [7, 512], rope [7, 64]."""
    values = torch.randn(7, 576, generator=torch.Generator().manual_seed(32))
    for token, number in enumerate((torch.inf, -torch.inf, torch.nan, -torch.nan)):
        values[token, 130 + token :: 160] = number
    values[4, ::2], values[4, 1::2] = torch.inf, -torch.nan
    values[5] = torch.nan
    values[6, :256] = -torch.inf
    return _split(values)


def _split(values: Tensor) -> Row:
    latent, rope = values.bfloat16().split_with_sizes([512, 64], -1)
    return latent.contiguous(), rope.contiguous()


ROWS = {"finite": finite_rows, "special": special_rows}


def random_slots(count: int) -> Tensor:
    """Distinct slots [count] int64 in no order, every seventh of them -1."""
    slots = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(33))[:count]
    slots[::7] = -1
    return slots


def of_name(name: str) -> RowFormat | IndexFormat:
    """A row format or, where there is none of that name, an indexer key format."""
    return kv.get(name) if name in kv.names() else index.get(name)


def written_by_evalkit(
    format: RowFormat | IndexFormat, row: Row, slots: Tensor, scales: Scales, page_size: int
) -> Tensor:
    """The cache, flat uint8; indexer keys are the latent's first 128."""
    latent, rope = row
    cache = format.allocate(SLOTS, page_size, latent.device).fill_(UNWRITTEN)
    if isinstance(format, RowFormat):
        format.store(cache, slots, latent, rope, scales)
    else:
        format.store(cache, slots, latent[:, :128])
    return cache.flatten()


@once
def cache_ops_library() -> Path | None:
    """vLLM's library of cache writers, found without importing vLLM."""
    spec = importlib.util.find_spec("vllm")
    for place in (spec.submodule_search_locations or []) if spec else []:
        for file in Path(place).glob("_C_stable_libtorch*.so"):
            return file
    return None


@once
def _cache_ops() -> Any:
    torch.ops.load_library(str(cache_ops_library()))
    return torch.ops._C_cache_ops


def _unwritten(page_size: int, width: int, device: torch.device) -> Tensor:
    shape = (SLOTS // page_size, page_size, width)
    return torch.full(shape, UNWRITTEN, dtype=torch.uint8, device=device)


def _concat_and_cache_mla(kind: str, row_bytes: int, dtype: torch.dtype = torch.uint8) -> Write:
    def write(row: Row, slots: Tensor, scales: Scales, page_size: int) -> Tensor:
        cache = _unwritten(page_size, row_bytes, slots.device)
        scale = torch.tensor([scales.latent], dtype=torch.float32, device=slots.device)
        _cache_ops().concat_and_cache_mla(*row, cache.view(dtype), slots, kind, scale)
        return cache.flatten()

    return write


def _indexer_k_quant_and_cache(kind: str) -> Write:
    def write(row: Row, slots: Tensor, scales: Scales, page_size: int) -> Tensor:
        cache = _unwritten(page_size, 132, slots.device)
        _cache_ops().indexer_k_quant_and_cache(row[0][:, :128].contiguous(), cache, slots, 128, kind)
        return cache.flatten()

    return write


def _nvfp4_quantize_append(row: Row, slots: Tensor, scales: Scales, page_size: int) -> Tensor:
    """One request whose page i is page i of the cache, so that a position is a slot; it has no slot to skip."""
    from flashinfer import nvfp4_quantize_append_paged_mla_kv_cache as append

    latent, scale, rope = (_unwritten(page_size, width, slots.device) for width in (256, 32, 64))
    tokens = (slots >= 0).nonzero().flatten()
    pages = SLOTS // page_size
    as_int = {"dtype": torch.int32, "device": slots.device}
    append(
        row[0][tokens],
        row[1][tokens],
        torch.zeros(len(tokens), **as_int),
        slots[tokens].int(),
        latent,
        scale.view(torch.float8_e4m3fn),
        rope.view(torch.float8_e4m3fn),
        torch.arange(pages, **as_int),
        torch.tensor([0, pages], **as_int),
        torch.tensor([page_size], **as_int),
        scales.latent,
        scales.rope,
    )
    return torch.cat([latent.flatten(), scale.flatten(), rope.flatten()])


@dataclass(frozen=True, kw_only=True)
class Writer:
    """A CUDA writer: its call in words, and what scales it is run with; `sm` is the one it needs, if any."""

    call: str
    write: Write
    scales: tuple[Scales, ...] = (Scales(),)
    package: str = "vllm"
    sm: int | None = None

    def unavailable_because(self) -> str | None:
        if not torch.cuda.is_available():
            return "it needs an NVIDIA GPU"
        if self.package == "vllm" and cache_ops_library() is None:
            return "vLLM's library of cache writers (vllm/_C_stable_libtorch.abi3.so) is not installed"
        if importlib.util.find_spec(self.package) is None:
            return f"the package {self.package} is not installed"
        major, minor = torch.cuda.get_device_capability()
        if self.sm not in (None, major):
            return f"it runs on SM{self.sm}0 only, this GPU is SM{major}{minor}"
        return None


WRITERS = {
    "bf16": Writer(
        call='concat_and_cache_mla "auto"', write=_concat_and_cache_mla("auto", 1152, torch.bfloat16)
    ),
    "fp8_e4m3": Writer(
        call='concat_and_cache_mla "fp8"', write=_concat_and_cache_mla("fp8", 576), scales=PER_TENSOR
    ),
    "fp8_ds_mla": Writer(  # which ignores the scale given
        call='concat_and_cache_mla "fp8_ds_mla"',
        write=_concat_and_cache_mla("fp8_ds_mla", 656),
        scales=PER_TENSOR[::2],
    ),
    "nvfp4_ds_mla": Writer(
        call='concat_and_cache_mla "nvfp4_ds_mla"', write=_concat_and_cache_mla("nvfp4_ds_mla", 352), sm=10
    ),
    "nvfp4_flashinfer": Writer(
        call="nvfp4_quantize_append_paged_mla_kv_cache",
        write=_nvfp4_quantize_append,
        scales=OWN_EACH,
        package="flashinfer",
    ),
    "indexer_fp8_ue8m0": Writer(
        call='indexer_k_quant_and_cache "ue8m0"', write=_indexer_k_quant_and_cache("ue8m0")
    ),
    # Any name but "ue8m0" and "mxfp8" leaves the scale as it is.
    "indexer_fp8_fp32": Writer(
        call='indexer_k_quant_and_cache "fp32"', write=_indexer_k_quant_and_cache("fp32")
    ),
}
# The rules of these are checked by the second implementation in numpy only: test_writers.py and test_index.py.
WITHOUT_WRITER = sorted({*kv.names(), *index.names()} - WRITERS.keys())
