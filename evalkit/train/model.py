"""DeepSeek-V3.2 for training: transformers' maths and parameter names, laid out to be fast and differentiable.

Differs from `DeepseekV32ForCausalLM` in form only: attention is dense, the indexer's own top-k, or a random
selection of that size; all experts are computed as one wide matrix product and weighted by the router (at 8 experts
of 256 that beats gathering); the indexer is differentiable and gets its gradient through `indexer_kl` alone.

Letters: B rows, T tokens, Q query rows of the indexer's loss, H heads, I indexer heads, D hidden, E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from evalkit.train.config import ModelConfig

Selection = Literal["dense", "own", "random"]
SELECTION_CHUNK = 256


@dataclass(frozen=True)
class Kernels:
    """Attention kernels in order of preference, chosen by `probe_kernels`; empty leaves the choice to torch."""

    causal: tuple[SDPBackend, ...] = ()
    masked: tuple[SDPBackend, ...] = ()


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kernels: tuple[SDPBackend, ...]) -> Tensor:
    """Softmax attention, [B, H, T, ·]; causal where no mask [B, 1, T, T] (True: attended) is given."""
    if not kernels:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    with sdpa_kernel(list(kernels), set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def probe_kernels(config: ModelConfig, device: torch.device) -> Kernels:
    """The fastest kernels that take this model's unequal query and value widths, tried forward and backward."""
    if device.type != "cuda":
        return Kernels()

    heads, tokens = config.num_attention_heads, 2432
    wide = config.qk_nope_head_dim + config.qk_rope_head_dim
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(2, tokens, heads, width, device=device, generator=generator).bfloat16().transpose(1, 2)
        for width in (wide, wide, config.v_head_dim)
    )
    mask = (
        torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril().expand(2, 1, -1, -1).contiguous()
    )

    def run(backend: SDPBackend, masked: bool) -> list[Tensor]:
        inputs = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
        out = attend(inputs[0], inputs[1], inputs[2], mask if masked else None, (backend,))
        out.float().square().sum().backward()
        return [out.detach(), *(tensor.grad for tensor in inputs if tensor.grad is not None)]

    def works(backend: SDPBackend, masked: bool) -> bool:
        try:
            results = run(backend, masked)
        except RuntimeError:
            return False
        pairs = zip(results, run(SDPBackend.MATH, masked), strict=True)
        return all(bool((got - ref).float().norm() <= 0.02 * ref.float().norm()) for got, ref in pairs)

    order = {
        False: (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
        True: (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH),
    }
    causal, masked = (tuple(b for b in order[kind] if works(b, kind)) for kind in (False, True))
    return Kernels(causal=causal, masked=masked)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)
        # One cast here instead of one in each of the projections that read it.
        device = x.device.type
        return normed.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else normed


def rope_tables(config: ModelConfig, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, [T, rope / 2] each."""
    half = config.qk_rope_head_dim // 2
    inverse = config.rope_theta ** -(torch.arange(half, device=device, dtype=torch.float32) / half)
    angles = torch.arange(tokens, device=device, dtype=torch.float32)[:, None] * inverse
    return angles.cos(), angles.sin()


def rotate(even: Tensor, odd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = even.float(), odd.float()
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], -1)


def rotate_to_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs (x0, x1), (x2, x3), … of x [..., R] and returns their first members, then their second.

    Query and key are turned alike, so their products are those of pairs left in place.
    """
    return rotate(x[..., 0::2], x[..., 1::2], cos, sin).to(x.dtype)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first `2 * cos.shape[-1]` dimensions of x, paired across their two halves."""
    half = cos.shape[-1]
    turned = rotate(x[..., :half], x[..., half : 2 * half], cos, sin)
    return torch.cat([turned.to(x.dtype), x[..., 2 * half :]], -1)


class Indexer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.width = config.index_n_heads, config.index_head_dim
        self.wq_b = nn.Linear(config.q_lora_rank, self.heads * self.width, bias=False)
        self.wk = nn.Linear(config.hidden_size, self.width, bias=False)
        self.k_norm = nn.LayerNorm(self.width, eps=1e-6)
        self.weights_proj = nn.Linear(config.hidden_size, self.heads, bias=False)

    def keys(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, width], in the dtype of the matrix products."""
        projected = self.wk(x)
        return rotate_halves(self.k_norm(projected).to(projected.dtype), cos, sin)

    def scores(self, x: Tensor, q_resid: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Scores of queries against keys, not masked: x [B, Q, D], keys [B, S, width] -> [B, Q, S] float32."""
        q = self.wq_b(q_resid).unflatten(-1, (self.heads, self.width))  # [B, Q, I, width]
        q = rotate_halves(q, cos.unsqueeze(-2), sin.unsqueeze(-2)).transpose(1, 2)
        products = F.relu(q @ keys.unsqueeze(1).transpose(-1, -2))  # [B, I, Q, S]
        weights = self.weights_proj(x).float() * (self.heads**-0.5 * self.width**-0.5)
        weighted: Tensor = products * weights.transpose(1, 2).unsqueeze(-1).to(products.dtype)
        return weighted.sum(1, dtype=torch.float32)


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x [B, T, ...], rows [B, Q] -> [B, Q, ...]."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], rows]


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        heads, nope, rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
        self.heads, self.nope, self.rope, self.v = heads, nope, rope, config.v_head_dim
        self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=False)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, 1e-6)
        self.q_b_proj = nn.Linear(config.q_lora_rank, heads * (nope + rope), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, config.kv_lora_rank + rope, bias=False)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, 1e-6)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, heads * (nope + self.v), bias=False)
        self.o_proj = nn.Linear(heads * self.v, config.hidden_size, bias=False)
        self.indexer = Indexer(config)
        self.kernels = Kernels()

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, selection: Selection, rows: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, T, D] -> (output [B, T, D], the indexer's KL on `rows` [B, Q], if given)."""
        q_resid = self.q_a_layernorm(self.q_a_proj(x))
        q = self.q_b_proj(q_resid).unflatten(-1, (self.heads, self.nope + self.rope))
        q_nope, q_rope = q.split([self.nope, self.rope], -1)
        q = torch.cat([q_nope, rotate_to_halves(q_rope, cos[:, None], sin[:, None])], -1).transpose(1, 2)

        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.config.kv_lora_rank, self.rope], -1)
        k_rope = rotate_to_halves(k_rope, cos, sin).unsqueeze(2).expand(-1, -1, self.heads, -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (self.heads, self.nope + self.v))
        k_nope, v = kv.split([self.nope, self.v], -1)
        k, v = torch.cat([k_nope, k_rope], -1).transpose(1, 2), v.transpose(1, 2)

        mask = self.select(x, q_resid, cos, sin, selection)
        kernels = self.kernels.causal if mask is None else self.kernels.masked
        attended = attend(q, k, v, mask, kernels).transpose(1, 2).flatten(2)
        kl = None
        if rows is not None:
            with torch.no_grad():
                target = self.attention_of(q, k, rows)
            with torch.enable_grad():
                kl = self.indexer_kl(x.detach(), q_resid.detach(), cos, sin, rows, target)
        return self.o_proj(attended), kl

    @torch.no_grad()
    def select(
        self, x: Tensor, q_resid: Tensor, cos: Tensor, sin: Tensor, selection: Selection
    ) -> Tensor | None:
        """The keys each query may attend to, [B, 1, T, T], or None where that is all of them."""
        batch, tokens = x.shape[:2]
        topk = self.config.index_topk
        if selection == "dense" or tokens <= topk:
            return None
        mask = torch.zeros(batch, tokens, tokens, dtype=torch.bool, device=x.device)
        keys = self.indexer.keys(x, cos, sin) if selection == "own" else None
        positions = torch.arange(tokens, device=x.device)
        for start in range(0, tokens, SELECTION_CHUNK):
            stop = min(start + SELECTION_CHUNK, tokens)
            causal = positions[:stop] <= positions[start:stop, None]
            if stop <= topk:
                mask[:, start:stop, :stop] = causal
                continue
            part = slice(start, stop)
            if keys is None:
                scores = torch.rand(batch, stop - start, stop, device=x.device)
            else:
                scores = self.indexer.scores(
                    x[:, part], q_resid[:, part], keys[:, :stop], cos[part], sin[part]
                )
            chosen = scores.masked_fill(~causal, -math.inf).topk(topk, sorted=False).indices
            mask[:, part, :stop] = (
                torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True) & causal
            )
        return mask.unsqueeze(1)

    def attention_of(self, q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
        """Dense attention of the query rows, averaged over heads: [B, Q, T]."""
        scores = gather_rows(q.transpose(1, 2), rows).transpose(1, 2) @ k.transpose(-1, -2)  # [B, H, Q, T]
        later = torch.arange(k.shape[2], device=k.device) > rows[:, :, None]
        scores = scores.float() * (self.nope + self.rope) ** -0.5
        shares: Tensor = scores.masked_fill(later[:, None], -math.inf).softmax(-1)
        return shares.mean(1)

    def indexer_kl(
        self, x: Tensor, q_resid: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, target: Tensor
    ) -> Tensor:
        """KL(target || softmax of the index scores), a mean over query rows."""
        keys = self.indexer.keys(x, cos, sin)
        scores = self.indexer.scores(
            gather_rows(x, rows), gather_rows(q_resid, rows), keys, cos[rows], sin[rows]
        )
        later = torch.arange(x.shape[1], device=x.device) > rows[:, :, None]
        log_scores = scores.masked_fill(later, -1e30).log_softmax(-1)
        # Clamped, so that a target of zero contributes nothing, whatever the score.
        kl: Tensor = (target * (target.clamp(min=1e-20).log() - log_scores)).sum(-1)
        return kl.mean()


class MLP(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return down


class Router(nn.Module):
    e_score_correction_bias: Tensor
    load: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k, self.scaling = config.num_experts_per_tok, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))
        self.register_buffer("load", torch.zeros(config.n_routed_experts), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, D] -> weights of every expert, zero for those not chosen: [N, E] float32."""
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.weight.float()).sigmoid()
        chosen = (scores.detach() + self.e_score_correction_bias).topk(self.top_k, sorted=False).indices
        kept = torch.zeros_like(scores).scatter_(-1, chosen, 1.0)
        if self.training:
            self.load += kept.sum(0)
        weights = scores * kept
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.scaling

    @torch.no_grad()
    def balance(self, step: float) -> None:
        """Moves every expert's bias by `step` towards an equal load, and starts counting anew."""
        self.e_score_correction_bias += step * (self.load.mean() - self.load).sign()
        self.load.zero_()


class Experts(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """x [N, D], weights [N, E] -> [N, D]."""
        experts, hidden, inner = self.down_proj.shape
        gate, up = F.linear(x, self.gate_up_proj.flatten(0, 1)).unflatten(-1, (experts, 2, inner)).unbind(2)
        active = F.silu(gate) * up * weights.unsqueeze(-1).to(up.dtype)
        return F.linear(active.flatten(1), self.down_proj.transpose(0, 1).reshape(hidden, experts * inner))


class MoE(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.experts = Experts(config)
        self.gate = Router(config)
        self.shared_experts = MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        routed: Tensor = self.experts(flat, self.gate(flat))
        shared: Tensor = self.shared_experts(x)
        return routed.view_as(x) + shared


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        dense = index < config.first_k_dense_replace
        self.mlp = MLP(config.hidden_size, config.intermediate_size) if dense else MoE(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, selection: Selection, rows: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        attended, kl = self.self_attn(self.input_layernorm(x), cos, sin, selection, rows)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), kl


class Backbone(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Nano(nn.Module):
    """The whole model. `state_dict` has transformers' in-memory names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """N(0, 1 / fan_in); what writes to the residual stream divided by sqrt(2 L); head a scaled embedding."""
        generator = torch.Generator().manual_seed(seed)
        depth = (2 * self.config.num_hidden_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2 or name == "lm_head.weight":
                continue
            std = 0.5 if "embed_tokens" in name else parameter.shape[-1] ** -0.5
            if "o_proj" in name or "down_proj" in name:
                std *= depth
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        self.lm_head.weight.copy_(self.model.embed_tokens.weight * (0.5 * self.config.hidden_size**-0.5))

    def use(self, kernels: Kernels) -> None:
        for module in self.modules():
            if isinstance(module, Attention):
                module.kernels = kernels

    def routers(self) -> list[Router]:
        return [module for module in self.modules() if isinstance(module, Router)]

    def forward(
        self, tokens: Tensor, selection: Selection = "dense", rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """tokens [B, T] -> (normalised hidden states [B, T, D], the indexers' summed KL on `rows`)."""
        cos, sin = rope_tables(self.config, tokens.shape[1], tokens.device)
        x = self.model.embed_tokens(tokens)
        total: Tensor | None = None
        for layer in self.model.layers:
            x, kl = layer(x, cos, sin, selection, rows)
            if kl is not None:
                total = kl if total is None else total + kl
        return self.model.norm(x), total

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(hidden)
        return logits.float()
