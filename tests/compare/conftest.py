"""Tiny random models of both architectures, whose context goes beyond their top-k."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM, GlmMoeDsaConfig, GlmMoeDsaForCausalLM

from evalkit.attention.backends.base import backends
from evalkit.model.graft import graft
from tests.compare.planted import Plant, Planted

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "q_lora_rank": 64,
    "index_n_heads": 4,
    "index_head_dim": 128,
    "index_topk": 32,
    "vocab_size": 128,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "intermediate_size": 96,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
CLASSES: dict[str, Any] = {
    "deepseek_v32": (DeepseekV32Config, DeepseekV32ForCausalLM, {}),
    "glm_moe_dsa": (GlmMoeDsaConfig, GlmMoeDsaForCausalLM, {"indexer_types": ["full", "shared", "full"]}),
}


def tiny(architecture: str) -> Any:
    config, model, extra = CLASSES[architecture]
    torch.manual_seed(5)  # transformers initialises from the global generator only
    return graft(model(config(**SIZES, **extra)).eval(), rounding=torch.bfloat16)


@pytest.fixture(scope="session", params=sorted(CLASSES))
def model(request: pytest.FixtureRequest) -> Any:
    return tiny(request.param)


@pytest.fixture(scope="session")
def documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(0, 128, (length,), generator=generator) for length in (96, 80)]


@pytest.fixture
def plant() -> Iterator[Plant]:
    """Registers a subclass of `Planted` as the backend `planted`."""

    def planted(bug: type[Planted]) -> None:
        backends.register(bug)

    yield planted
    backends.remove("planted")
