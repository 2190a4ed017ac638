"""Small random models of both architectures, shared by every test that runs one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

# Test workers share the cores: more threads than cores would wait for each other.
torch.set_num_threads(1)

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32,
    "beta_slow": 1,
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


def random_model(
    architecture: str = "deepseek_v32", *, yarn: bool = False, seed: int = 0, **changes: Any
) -> Any:
    """A transformers model of four layers with the real row geometry and random weights, in float32 and eager."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 48,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "index_n_heads": 16,
        "index_head_dim": 128,
        "index_topk": 32,
        "vocab_size": 128,
        "max_position_embeddings": 512,
        "first_k_dense_replace": 1,
        "initializer_range": 0.1,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "rope_parameters": YARN if yarn else PLAIN,
    }
    if architecture == "glm_moe_dsa":
        options["indexer_types"] = ["full", "shared", "full", "shared"]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, **(options | changes))
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.fixture(params=["deepseek_v32", "glm_moe_dsa"])
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_model() -> Any:
    """`make_model(architecture, yarn=..., **config)`: see `random_model`."""
    return random_model
