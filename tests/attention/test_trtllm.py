"""The real SM100 kernel's arguments, held against FlashInfer's source, and what is made of its answer."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from evalkit import kv
from evalkit.attention import backends
from evalkit.attention.backends.sm100 import arithmetic, trtllm
from evalkit.attention.backends.sm100.arithmetic import Operands, ProbModel
from evalkit.errors import InputError
from evalkit.kv import Scales
from tests.attention.test_emulated import given, relative

CALL = "trtllm_batch_decode_with_kv_cache_mla"
COUNTS = (0, 1, 70, 201)  # 201 is no multiple of the four slots that the kernel copies at once


def kernel(
    *,
    query: Tensor,
    kv_cache: Tensor,
    workspace_buffer: Tensor,
    qk_nope_head_dim: int,
    kv_lora_rank: int,
    qk_rope_head_dim: int,
    block_tables: Tensor,
    seq_lens: Tensor,
    max_seq_len: int,
    sparse_mla_top_k: int,
    bmm1_scale: float,
    bmm2_scale: float,
    backend: str,
    return_lse: bool,
    return_lse_base: str,
) -> tuple[Tensor, Tensor]:
    """What FlashInfer documents, in float64; a slot past a query's length is not looked at."""
    assert query.dtype == kv_cache.dtype
    assert query.is_contiguous()
    assert (kv_lora_rank, qk_rope_head_dim, qk_nope_head_dim) == (512, 64, 128)
    assert kv_cache.shape[1:] in ((32, 576), (64, 576))
    assert block_tables.shape == (len(query), 1, sparse_mla_top_k)
    assert sparse_mla_top_k == max_seq_len
    assert sparse_mla_top_k % 4 == 0
    assert block_tables.dtype == seq_lens.dtype == torch.int32
    assert seq_lens.shape == (len(query),)
    assert (seq_lens > 0).all()
    assert workspace_buffer.dtype == torch.uint8
    assert not workspace_buffer.any()
    assert (backend, return_lse, return_lse_base) == ("trtllm-gen", True, "basee")
    out = torch.empty(*query.shape[:3], 512, dtype=torch.bfloat16)
    lse = torch.empty(query.shape[0], query.shape[2])
    for t, count in enumerate(seq_lens.tolist()):
        slots = block_tables[t, 0, :count].long()
        assert (slots >= 0).all()
        keys = kv_cache.flatten(0, 1)[slots].double()
        scores = query[t, 0].double() @ keys.T * bmm1_scale
        out[t, 0] = (scores.softmax(-1) @ keys[:, :512] * bmm2_scale).bfloat16()
        lse[t] = scores.logsumexp(-1)
    return out, lse


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    package, module = ModuleType("flashinfer"), ModuleType("flashinfer.mla")
    setattr(module, CALL, kernel)
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.mla", module)
    monkeypatch.setattr(trtllm, "WORKSPACE_BYTES", 1024)
    monkeypatch.setattr(trtllm, "_workspaces", {})


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("name", ["fp8_e4m3", "bf16"])
def test_the_kernel_is_asked_for_what_the_arithmetic_computes(name: str) -> None:
    operands, indices = given(name, 3, counts=COUNTS, slots=320)
    operands.rows.view(torch.uint8)[0] = 0x7F  # NaN, which stands in for the empty row's slot
    indices[indices == 0] = 1
    out, lse = trtllm.attend(operands, indices)
    want, want_lse = arithmetic.attend(operands, indices, ProbModel())
    empty = (indices < 0).all(-1)
    assert empty.any()
    assert (out[empty] == 0).all()
    assert (lse[empty] == -torch.inf).all()
    assert float(relative(out[~empty], want[~empty]).max()) <= 6e-2
    torch.testing.assert_close(lse[~empty], want_lse[~empty], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("fake")
def test_on_sm100_the_backend_calls_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trtllm, "runs_on", lambda device: True)
    calls: list[dict[str, Any]] = []
    record: Callable[..., Any] = lambda **arguments: (calls.append(arguments), kernel(**arguments))[1]
    monkeypatch.setattr(sys.modules["flashinfer.mla"], CALL, record)
    format, emulated = kv.get("fp8_e4m3"), backends.get("emulated")
    cache = format.allocate(64)
    scales = Scales(latent=0.25, rope=0.25, query=2.0)
    format.store(cache, torch.tensor([3]), torch.full((1, 512), 0.5), torch.zeros(1, 64), scales)
    out, lse = emulated.attend(
        torch.ones(1, 2, 512),
        torch.ones(1, 2, 64),
        cache,
        format,
        torch.tensor([[-1, 3]], dtype=torch.int32),
        0.125,
        scales,
    )
    (call,) = calls
    assert (call["bmm1_scale"], call["bmm2_scale"]) == (0.125 * 2.0 * 0.25, 0.25)
    assert call["query"].shape == (1, 1, 2, 576)
    assert (call["query"].float() == 0.5).all()
    assert call["block_tables"].tolist() == [[[3, -1, -1, -1]]]
    assert call["seq_lens"].tolist() == [1]
    assert out.dtype == torch.float32
    assert (out == 0.5).all()
    assert lse.tolist() == [[pytest.approx(0.125 * 512 * 0.5)] * 2]
    assert emulated.kernel_on(torch.device("cuda")) == f"flashinfer {CALL} trtllm-gen"


def test_slots_are_packed_in_their_order() -> None:
    slots, counts = trtllm.packed(torch.tensor([[-1, 7, -1, 2], [-1] * 4, [5, 4, 3, 2]], dtype=torch.int32))
    assert slots.tolist() == [[7, 2, -1, -1], [0, -1, -1, -1], [5, 4, 3, 2]]
    assert counts.tolist() == [2, 1, 4]


@pytest.mark.parametrize(("tokens", "pages"), [(128, (2, 64)), (96, (3, 32))])
def test_pages_are_of_64_or_32_tokens(tokens: int, pages: tuple[int, int]) -> None:
    assert trtllm.arguments(*asked(tokens))["kv_cache"].shape == (*pages, 576)


def test_a_cache_of_other_pages_is_refused() -> None:
    with pytest.raises(InputError, match="a cache of 100 slots: the SM100 kernel needs whole pages"):
        trtllm.arguments(*asked(100))


def asked(tokens: int) -> tuple[Operands, Tensor, Tensor]:
    rows = torch.zeros(tokens, 576, dtype=torch.bfloat16)
    operands = Operands(query=rows[:1, None], rows=rows, score_scale=1.0, value_scale=1.0)
    return operands, torch.zeros(1, 8, dtype=torch.int32), torch.zeros(8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("heads", "reason"),
    [(16, None), (64, None), (128, None), (96, "takes up to 64"), (256, "takes up to 64")],
)
def test_heads_that_the_kernel_does_not_take_are_refused(
    monkeypatch: pytest.MonkeyPatch, heads: int, reason: str | None
) -> None:
    monkeypatch.setattr(trtllm, "runs_on", lambda device: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    where = (kv.get("fp8_e4m3"), torch.device("cuda"), heads, 2048)
    found = backends.get("emulated").unavailable_because(*where)
    assert (found is None) if reason is None else (reason in str(found))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "flashinfer-python is not installed" in str(backends.get("emulated").unavailable_because(*where))


def test_flashinfer_takes_these_arguments() -> None:
    """Read from the installed source, which imports only on a machine with CUDA."""
    spec = importlib.util.find_spec("flashinfer")
    if spec is None:
        pytest.skip("the package flashinfer-python is not installed")
    (place,) = spec.submodule_search_locations or [""]
    module = ast.parse((Path(place) / "mla" / "_core.py").read_text(encoding="utf-8"))
    (function,) = (node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == CALL)
    names = [argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)]
    required = names[: len(function.args.args) - len(function.args.defaults)]
    given_names = trtllm.arguments(*asked(64)).keys()
    assert given_names <= set(names)
    assert set(required) <= given_names


@pytest.mark.gpu
def test_what_is_modelled_is_near_the_kernel() -> None:
    if not torch.cuda.is_available() or not trtllm.runs_on(torch.device("cuda")):
        pytest.skip("this machine has no SM100 GPU")
    operands, indices = given("fp8_e4m3", 128, device="cuda")
    out, lse = trtllm.attend(operands, indices)
    want, want_lse = arithmetic.attend(operands, indices, ProbModel())
    some = (indices >= 0).any(-1)
    # Half of what P's rounding costs: a kernel that rounds it elsewhere is no nearer than that.
    assert float(relative(out[some], want[some]).max()) <= 1e-2
    torch.testing.assert_close(lse[some], want_lse[some], rtol=1e-4, atol=1e-3)
