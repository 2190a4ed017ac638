"""Index scores: what computes them, and that every implementation gives the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evalkit.attention.indexer import SCORERS, choose, index_scores, kernel_for
from evalkit.attention.selection import select
from evalkit.kv import index
from tests.interpreter import interpret

INF = torch.inf
CPU = torch.device("cpu")
FORMATS = [name for name in index.names() if name not in ("fp16", "fp32")]


def problem(
    name: str, shape: tuple[int, int, int, int], device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Query [B, T, I, 128], keys [B, S, 128], weights [B, T, I] and key scale, encoded; shape is B, T, S, I.

    Keys differ in size by token and head weights in sign. Key 1 is zero: its scores tie with those of every key
    that no head likes.
    """
    batch, length, cached, heads = shape
    draw = torch.Generator().manual_seed(sum(shape))
    keys = torch.randn(batch, cached, 128, generator=draw) * torch.logspace(-3, 1, cached)[:, None]
    keys[:, 1] = 0
    query = torch.randn(batch, length, heads, 128, generator=draw)
    weights = torch.randn(batch, length, heads, generator=draw)
    key_format = index.get(name)
    stored = key_format.encode(keys.to(device).bfloat16())
    sent, scale = key_format.encode(query.to(device).bfloat16())
    weights = weights.to(device)
    return sent, stored.codes, weights if scale is None else weights * scale, stored.scale


def relative(got: Tensor, want: Tensor) -> float:
    """Relative L2 over the finite columns, which must be the same ones."""
    finite = want.isfinite()
    assert torch.equal(got.isneginf(), ~finite)
    return float((got - want)[finite].double().norm() / want[finite].double().norm())


@pytest.mark.parametrize("scaled", [False, True])
def test_a_score_is_the_sum_that_a_loop_computes(scaled: bool) -> None:
    name = "indexer_fp8_ue8m0" if scaled else "fp32"
    query, keys, weights, scale = problem(name, (2, 3, 5, 4))
    want = torch.full((2, 3, 5), -INF)
    for b in range(2):
        for t in range(3):
            for s in range(5 - 3 + t + 1):
                dots = [float(query[b, t, i].float() @ keys[b, s].float()) for i in range(4)]
                total = sum(float(w) * max(dot, 0.0) for w, dot in zip(weights[b, t], dots, strict=True))
                want[b, t, s] = total if scale is None else total * float(scale[b, s])
    assert relative(index_scores(query, keys, weights, scale), want) <= 1e-6


def test_a_nan_key_shows_in_its_scores_and_in_no_other() -> None:
    query, keys, weights, _ = problem("bf16", (1, 4, 4, 8))
    keys[0, 2] = torch.nan
    got = index_scores(query, keys, weights)
    assert got[0, :, 2].isnan().tolist() == [False, False, True, True]
    assert not bool(got[..., [0, 1, 3]].isnan().any())


def test_on_a_cpu_torch_scores_every_format_and_the_choice_says_why() -> None:
    for name in index.names():
        choice = choose(index.get(name), 64, CPU)
        assert choice.scorer.name == "torch"
        assert [part.split(":")[0] for part in choice.why.split("; ")] == ["not deepgemm", "not triton"]
    assert "needs an NVIDIA GPU" in choose(index.get("indexer_fp8_ue8m0"), 64, CPU).why
    assert kernel_for("fp8", torch.float32, 8, CPU) == "torch float32"


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_float32_keys_are_scored_by_torch_on_every_device(name: str) -> None:
    """float32 runs verify the path itself: no other arithmetic may stand in."""
    for scorer in SCORERS[:-1]:
        reason = scorer.unavailable_because(index.get(name), 64, torch.device("cuda"))
        assert reason is not None
        assert f"not {name}" in reason
    assert SCORERS[-1].name == "torch"


@pytest.mark.parametrize("heads", [8, 16, 128])
def test_deepgemm_is_not_asked_for_heads_that_it_refuses(heads: int) -> None:
    reason = SCORERS[0].unavailable_because(index.get("indexer_fp8_ue8m0"), heads, torch.device("cuda"))
    assert reason == f"DeepGEMM's SM90 kernel takes 32 or 64 indexer heads, the model has {heads}"


def test_the_triton_kernel_agrees_with_torch_under_its_interpreter() -> None:
    interpret("tests.attention.interpreted")


@pytest.fixture(params=["deepgemm", "triton"])
def scorer_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 4097, 64),
        (1, 300, 300, 64),
        (2, 5, 1000, 32),
        (3, 129, 517, 32),
        (2, 33, 700, 8),
        (1, 9, 9, 12),
    ],
    ids=str,
)
def test_on_a_gpu_every_scorer_agrees_with_torch(
    scorer_name: str, name: str, shape: tuple[int, int, int, int]
) -> None:
    scorer = next(scorer for scorer in SCORERS if scorer.name == scorer_name)
    reason = scorer.unavailable_because(index.get(name), shape[-1], torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)
    given = problem(name, shape, "cuda")
    got = scorer.scores(*given)  # before torch, so that freed memory cannot hold the answer
    want = index_scores(*given)
    assert relative(got, want) <= (1e-3 if scorer_name == "deepgemm" else 1e-5)
    assert bool(
        (got[..., 1][want[..., 1].isfinite()] == 0).all()
    )  # a zero key ties exactly, wherever it is scored


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "heads"), [("indexer_fp8_ue8m0", 64), ("indexer_fp8_ue8m0", 8), ("bf16", 64)]
)
def test_on_a_gpu_selections_differ_at_near_ties_only(scorer_name: str, name: str, heads: int) -> None:
    scorer = next(scorer for scorer in SCORERS if scorer.name == scorer_name)
    reason = scorer.unavailable_because(index.get(name), heads, torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)
    given, k = problem(name, (2, 200, 3000, heads), "cuda"), 512
    got, _ = select(*given, k, scorer=scorer)
    want, scores = select(*given, k, scorer=SCORERS[-1], keep_scores=True)
    assert scores is not None
    chosen = [
        torch.zeros(2, 200, 3000, dtype=torch.bool, device="cuda").scatter_(2, x, True) for x in (got, want)
    ]
    kth = torch.where(chosen[1], scores, INF).amin(-1, keepdim=True)
    size = torch.where(scores.isfinite(), scores, 0).abs().amax(-1, keepdim=True)
    assert bool((chosen[0] == chosen[1]).logical_or((scores - kth).abs() <= 2e-3 * size).all())
    assert float((chosen[0] & chosen[1]).sum() / chosen[1].sum()) >= 0.99


@pytest.mark.gpu
def test_on_a_gpu_a_score_does_not_depend_on_the_other_queries(scorer_name: str) -> None:
    scorer = next(scorer for scorer in SCORERS if scorer.name == scorer_name)
    reason = scorer.unavailable_because(index.get("indexer_fp8_ue8m0"), 64, torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)
    query, keys, weights, scale = problem("indexer_fp8_ue8m0", (1, 40, 700, 64), "cuda")
    assert scale is not None
    whole = scorer.scores(query, keys, weights, scale)
    for t in (0, 17, 39):
        seen = 700 - 40 + t + 1
        alone = scorer.scores(query[:, t : t + 1], keys[:, :seen], weights[:, t : t + 1], scale[:, :seen])
        assert torch.equal(alone[0, 0], whole[0, t, :seen])


@pytest.mark.gpu
def test_on_a_gpu_8192_queries_of_65536_keys_are_selected_in_8_gib() -> None:
    query = torch.randn(1, 8192, 64, 128, device="cuda", dtype=torch.bfloat16)
    keys = torch.randn(1, 65536, 128, device="cuda", dtype=torch.bfloat16)
    key_format = index.get("indexer_fp8_ue8m0")
    sent, scale = key_format.encode(query)
    stored = key_format.encode(keys)
    assert scale is not None
    weights = torch.randn(1, 8192, 64, device="cuda") * scale
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    scorer = choose(key_format, 64, torch.device("cuda")).scorer
    columns, _ = select(sent, stored.codes, weights, stored.scale, 2048, scorer=scorer)
    assert columns.shape == (1, 8192, 2048)
    assert torch.cuda.max_memory_allocated() - held <= 8 * 2**30
