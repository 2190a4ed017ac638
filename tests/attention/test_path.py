"""What the path gives to the writer of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import evalkit
from evalkit import kv
from evalkit.compare.passes.capture import Capture
from evalkit.kv import Scales
from tests.conftest import random_model

IDS = torch.arange(3, 35)[None]


@pytest.fixture(scope="module", params=["deepseek_v32", "glm_moe_dsa"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Computes as on any CPU: in float32, and rounds to bf16 what a server holds in bf16."""
    directory = tmp_path_factory.mktemp(request.param)
    random_model(request.param).bfloat16().save_pretrained(directory)
    return evalkit.load(directory, device="cpu")


def stored(model: Any, candidate: str) -> tuple[Tensor, Tensor]:
    """Latent [T, C] and rope [T, R] of the first layer, as they are read back."""
    cache = model.evalkit.new_cache(candidate)
    cache.state.observer = capture = Capture(frozenset({"latent", "rope"}), keep_calls=False)
    with torch.inference_mode():
        model(input_ids=IDS, use_cache=True, **cache.argument)
    latent, rope = (capture.parts[probe][0].float() for probe in ("latent", "rope"))
    return latent, rope


def rows(format: str, values: tuple[Tensor, Tensor]) -> Tensor:
    return kv.get(format).encode(*values, Scales())


@pytest.mark.parametrize("format", ["bf16", "fp8_e4m3", "fp8_ds_mla"])
def test_a_fused_writer_rounds_once_from_float32(model: Any, format: str) -> None:
    exact = stored(model, "fp32@reference+write=fused")
    assert all(value.bfloat16().ne(value).any() for value in exact), "nothing has rounded them"
    want = kv.get(format).decode(rows(format, exact), Scales(), kv.identity)
    for got, part in zip(stored(model, f"{format}@reference+write=fused"), want, strict=True):
        assert torch.equal(got, part)


def test_what_a_fused_writer_is_given_is_what_others_round_to_bf16_first(model: Any) -> None:
    """In the first layer, whose input no stored row has changed."""
    exact, rounded = (stored(model, f"fp32@reference+write={write}") for write in ("fused", "rounded"))
    for got, ref in zip(exact, rounded, strict=True):
        assert torch.equal(ref, got.bfloat16().float())
    codes = [rows("fp8_e4m3", values) for values in (exact, rounded)]
    assert codes[0].ne(codes[1]).any(), "some values round otherwise when they are rounded twice"
