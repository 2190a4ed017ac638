"""The embedded checkpoint: small enough to ship, loadable without evalkit, and able to do what it is there for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import evalkit
from evalkit.evaluate.lm import EvalkitLM
from evalkit.evaluate.tasks import run_tasks
from evalkit.model.checkpoint import EMBEDDED

DIRECTORY = EMBEDDED / "dsa-nano"


@pytest.fixture(scope="module")
def model() -> Any:
    return evalkit.load("dsa-nano", device="cpu")


def test_it_is_at_most_24_mb_in_files_of_at_most_16_mb() -> None:
    sizes = [file.stat().st_size for file in DIRECTORY.iterdir()]
    assert sum(sizes) <= 24e6
    assert max(sizes) <= 16e6


def test_its_dimensions_are_those_that_real_kernels_and_vllm_take(model: Any) -> None:
    config = model.config
    assert (config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim) == (512, 64, 128)
    assert (config.v_head_dim, config.index_head_dim, config.index_topk) == (128, 128, 512)
    assert config.index_n_heads in (32, 64)
    assert config.topk_method == "noaux_tc"


def test_transformers_loads_it_and_agrees_with_the_path(model: Any) -> None:
    plain = AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(DIRECTORY)(
        "Facts: The code of river is 47.", return_tensors="pt"
    ).input_ids
    exact = evalkit.load("dsa-nano", "fp32@reference", device="cpu", dtype=torch.float32)
    with torch.no_grad():
        want, got = plain(ids).logits, exact(ids).logits
    assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("task", ["evalkit_needle_1024", "evalkit_multi_key_1024"])
def test_it_retrieves_what_its_indexer_must_find_among_twice_as_many_tokens(model: Any, task: str) -> None:
    (run,) = run_tasks(EvalkitLM(model, batch_size=4), [task], 8, seed=5, candidate="bf16@reference")
    assert run.share_over(512) == 1.0
    assert sum(sample.score for sample in run.samples) >= 7
