"""Sizes, budgets and the curriculum of a training run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from tasks import documents


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shapes of a DeepSeek-V3.2 model, under transformers' names. The defaults are dsa-nano."""

    vocab_size: int = 1024
    hidden_size: int = 256
    intermediate_size: int = 768
    moe_intermediate_size: int = 256
    num_hidden_layers: int = 4
    first_k_dense_replace: int = 1
    num_attention_heads: int = 4
    q_lora_rank: int = 96
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    n_routed_experts: int = 8
    num_experts_per_tok: int = 2
    n_shared_experts: int = 1
    routed_scaling_factor: float = 2.0
    index_n_heads: int = 32
    index_head_dim: int = 128
    index_topk: int = 512
    max_position_embeddings: int = 8192
    rope_theta: float = 1e4
    rms_norm_eps: float = 1e-6

    def to_hf(self) -> dict[str, Any]:
        """config.json as transformers' DeepseekV32Config and vLLM read it."""
        shapes = asdict(self)
        theta = shapes.pop("rope_theta")
        return {
            "architectures": ["DeepseekV32ForCausalLM"],
            "model_type": "deepseek_v32",
            "dtype": "bfloat16",
            **shapes,
            "num_key_value_heads": self.num_attention_heads,
            "head_dim": self.qk_rope_head_dim,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "rope_theta": theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> ModelConfig:
        return cls(**{name: config[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the curriculum: row length, tokens a step, the longest share of the dense phase it may take."""

    length: int
    tokens: int
    share: float


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that a run depends on, besides the clock.

    Phases are bounded by seconds, or by steps where `steps` gives them (a test's way, since then no clock matters).
    Rows of the last stages leave room for an answer behind a prompt of 2,048 or 4,096 tokens.
    """

    model: ModelConfig = ModelConfig()
    stages: tuple[Stage, ...] = (
        Stage(length=256, tokens=16_384, share=0.25),
        Stage(length=512, tokens=32_768, share=0.12),
        Stage(length=1024, tokens=49_152, share=0.12),
        Stage(length=2432, tokens=65_664, share=1.0),
    )
    long_length: int = 4480
    long_share: float = 0.2
    shorter_share: float = 0.25
    indexer_tokens: int = 17_024
    joint_tokens: int = 31_616
    query_rows: int = 256
    seed: int = 1
    workers: int = 11
    seconds: tuple[float, float, float] = (220.0, 62.0, 68.0)
    steps: tuple[int, int, int] | None = None
    check_steps: int = 40
    advance_steps: int = 200
    advance_loss: float = 0.12
    advance_register_loss: float = 0.05
    muon_lr: float = 3e-3
    adam_lr: float = 3e-3
    indexer_lr: float = 1e-3
    joint_lr: float = 2e-4
    mixture: tuple[tuple[str, float], ...] = tuple(documents.TRAINING_MIXTURE.items())
    lm_coefficient: float = 0.1
    value_weight: float = 1.0  # of a register trace's values, against its other tokens
    warmup_steps: int = 100
    bias_step: float = 0.002
    report_seconds: float = 4.0
    save_seconds: float = 60.0


PHASES = ("dense", "indexer", "joint")


def refine(config: TrainConfig) -> TrainConfig:
    """A second run: from trained weights, mostly on register traces, which are learnt last.

    There a trace's values weigh more than what the facts say verbatim, and the filler's language-model loss, which is
    all that is left of the other tasks' gradient, weighs less.
    """
    first, last = config.stages[0], config.stages[-1]
    return replace(
        config,
        stages=(replace(first, share=0.5), last),
        mixture=(
            ("registers", 0.60),
            ("walk", 0.10),
            ("multi_key", 0.10),
            ("siblings", 0.08),
            ("variables", 0.07),
            ("copy", 0.05),
        ),
        lm_coefficient=0.02,
        value_weight=8.0,
        advance_register_loss=0.0,
        muon_lr=2e-3,
        adam_lr=1.5e-3,
    )


TINY = TrainConfig(
    model=ModelConfig(
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        q_lora_rank=16,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        n_routed_experts=4,
        index_n_heads=4,
        index_head_dim=16,
        index_topk=64,
    ),
    stages=(Stage(length=128, tokens=1024, share=0.5), Stage(length=256, tokens=2048, share=1.0)),
    long_length=320,
    indexer_tokens=512,
    joint_tokens=512,
    query_rows=16,
    workers=1,
    check_steps=5,
    advance_steps=10,
    warmup_steps=5,
    report_seconds=1.0,
    save_seconds=4.0,
)
