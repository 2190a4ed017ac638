"""The sparse MLA path of one layer: projections, ropes, cache write, indexer, top-k, absorbed attention, output.

It replaces a transformers `deepseek_v32` or `glm_moe_dsa` attention module and keeps that module's submodules, so a
state dict does not change. The module holds weights only. What belongs to a candidate (rows, scales, last selection)
is a `PathState`, which arrives with the cache; many candidates advance through one set of weights.

Rows hold the rope interleaved, as the checkpoints' projections emit it and as vLLM stores it.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from evalkit.attention.cache import ARGUMENT, PagedCache
from evalkit.attention.indexer import choose
from evalkit.attention.paged_layer import PagedLayer
from evalkit.attention.selection import select
from evalkit.attention.state import AttentionCall, PathState
from evalkit.kv import Scales


class SparseMLA(nn.Module):
    """The path's weights. Built from a transformers attention module, whose submodules it takes over."""

    # Taken over from the transformers module; `indexer` is absent where a layer shares another's selection.
    q_a_proj: nn.Linear
    q_a_layernorm: nn.Module
    q_b_proj: nn.Linear
    kv_a_proj_with_mqa: nn.Linear
    kv_a_layernorm: nn.Module
    kv_b_proj: nn.Linear
    o_proj: nn.Linear

    def __init__(self, attention: Any) -> None:
        super().__init__()
        config = attention.config
        self.config = config
        self.layer_idx = int(attention.layer_idx)
        for name, child in attention.named_children():
            self.add_module(name, child)
        self.heads = config.num_attention_heads
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.latent = config.kv_lora_rank
        self.sm_scale = float(attention.scaling)
        self.is_glm = config.model_type == "glm_moe_dsa"
        # State and first column of the step in progress: the router that follows asks for them. The reference is
        # weak, so that a cache ends with its owner.
        self.step: tuple[weakref.ref[PathState], int] | None = None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **given: Any,
    ) -> tuple[Tensor | None, ...]:
        """hidden_states [B, T, D] -> output [B, T, D]; the rows of these T tokens are appended to the cache.

        `attention_mask` is ignored: causality and padding come from the cache's columns and `PathState.valid`.
        """
        cache = given.get(ARGUMENT)
        if not isinstance(cache, PagedCache):
            raise TypeError("SparseMLA needs a PagedCache; call the model, or pass model.evalkit.new_cache()")
        state = cache.state
        rows = state.layers[self.layer_idx]
        batch, length = hidden_states.shape[:2]
        start = rows.length
        slots = rows.extend(batch, length, hidden_states.device)  # [B, T]
        written = rows.written(slots, state.valid)
        self.step = (weakref.ref(state), start)

        q_resid, q_latent, q_rope, latent, rope = self._project(hidden_states, position_embeddings, state)
        self._write(state, rows, written.flatten(), latent, rope)
        columns = self._select(hidden_states, q_resid, position_embeddings, state, slots, start)
        indices = _slots_of(columns, rows.slots(0, rows.length))

        assert rows.rows is not None
        scales = state.scales.get(self.layer_idx, Scales())
        q_latent, q_rope = (
            q_latent.flatten(0, 1),
            q_rope.flatten(0, 1),
        )  # [B * T, H, C | R], views of one query
        out, lse = state.backend.attend(
            q_latent, q_rope, rows.rows, state.format, indices, self.sm_scale, scales
        )
        out = state.round(out)
        if state.observer is not None:
            state.observer.attention(
                self.layer_idx,
                AttentionCall(
                    q_latent=q_latent,
                    q_rope=q_rope,
                    cache=rows.rows,
                    format=state.format,
                    indices=indices,
                    sm_scale=self.sm_scale,
                    scales=scales,
                    out=out,
                    lse=lse,
                ),
            )
        values = torch.einsum("thc,hvc->thv", out, self._up_projections()[1])
        output = self.o_proj(values.reshape(batch, length, -1))

        for probe, value in (("selection", columns), ("attention", out.unflatten(0, (batch, length)))):
            state.emit(probe, self.layer_idx, value)
        state.emit("values", self.layer_idx, values.unflatten(0, (batch, length)))
        state.emit("output", self.layer_idx, output)
        return (output, None, None) if self.is_glm else (output, None)

    def _up_projections(self) -> tuple[Tensor, Tensor]:
        """kv_b's two halves, views of its weight: W_UK [H, nope, C] and W_UV [H, V, C]."""
        up = self.kv_b_proj.weight.view(self.heads, self.nope + self.value, self.latent)
        return up[:, : self.nope], up[:, self.nope :]

    def _project(
        self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], state: PathState
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q_resid [B, T, Q], q_latent [B, T, H, C], q_rope [B, T, H, R]; latent [B, T, C] and rope [B, T, R] to write."""
        cos, sin = position_embeddings
        q_resid = self.q_a_layernorm(self.q_a_proj(hidden))
        query = self.q_b_proj(q_resid).unflatten(-1, (self.heads, self.nope + self.rope))
        q_nope, q_rope = query.split([self.nope, self.rope], -1)
        query = self._absorbed(q_nope, rotate_interleaved(q_rope, cos[:, :, None], sin[:, :, None]))
        latent, rope = self.kv_a_proj_with_mqa(hidden).split([self.latent, self.rope], -1)
        return (
            q_resid,
            *state.round(query).split([self.latent, self.rope], -1),
            *self._to_write(latent, rope, cos, sin, state),
        )

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor) -> Tensor:
        """The query in latent space with its rope beside it, [B, T, H, C + R], as some kernels take it."""
        up = self._up_projections()[0]
        if torch.is_grad_enabled() or q_nope.device.type != "cuda":
            return torch.cat([torch.einsum("bthn,hnc->bthc", q_nope, up), q_rope], -1)
        query = q_nope.new_empty(*q_nope.shape[:3], self.latent + self.rope)
        place = (
            query[..., : self.latent].flatten(0, 1).transpose(0, 1)
        )  # [H, B * T, C]: written to without a copy
        torch.bmm(q_nope.flatten(0, 1).transpose(0, 1), up, out=place)
        query[..., self.latent :] = q_rope
        return query

    def _to_write(
        self, latent: Tensor, rope: Tensor, cos: Tensor, sin: Tensor, state: PathState
    ) -> tuple[Tensor, Tensor]:
        """Latent [B, T, C] and rope [B, T, R] as the candidate's writer is given them, from what kv_a projects."""
        norm: Any = self.kv_a_layernorm
        if state.candidate.write == "rounded":
            return state.round(norm(latent)), state.round(rotate_interleaved(rope, cos, sin))
        latent, rope = latent.float(), rope.float()
        latent = latent * torch.rsqrt(latent.square().mean(-1, keepdim=True) + float(norm.variance_epsilon))
        return latent * norm.weight.float(), rotate_interleaved(rope, cos.float(), sin.float())

    def _write(self, state: PathState, rows: PagedLayer, slots: Tensor, latent: Tensor, rope: Tensor) -> None:
        assert rows.rows is not None
        scales = state.scales.get(self.layer_idx, Scales())
        state.format.store(rows.rows, slots, latent.flatten(0, 1), rope.flatten(0, 1), scales)
        if state.wants("latent") or state.wants("rope"):
            read = state.backend.read(state.format, rows.rows, slots.clamp(min=0), scales)
            for probe, value in zip(("latent", "rope"), read, strict=True):
                state.emit(probe, self.layer_idx, value.unflatten(0, latent.shape[:2]))

    def _select(
        self,
        hidden: Tensor,
        q_resid: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        state: PathState,
        slots: Tensor,
        start: int,
    ) -> Tensor:
        """Columns [B, T, K] that each query attends, ascending, -1 where it has fewer."""
        length = hidden.shape[1]
        forced = (state.forced_selection or {}).get(self.layer_idx)
        indexer = getattr(self, "indexer", None)
        if indexer is not None:
            query, weights = self._index(indexer, hidden, q_resid, position_embeddings, state, slots)
            if forced is None or state.wants("index_scores"):
                columns = self._best(query, weights, state)
        if forced is not None:
            columns = forced[:, start : start + length]
        if indexer is not None:
            state.keep_selection(self.layer_idx, start, columns)
        elif forced is None:  # GLM: this layer shares the last full layer's selection
            if start not in state.selections:
                raise ValueError(f"layer {self.layer_idx} shares a selection that no earlier layer made")
            return state.selections[start]
        return columns

    def _index(
        self,
        indexer: Any,
        hidden: Tensor,
        q_resid: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        state: PathState,
        slots: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Indexer queries [B, T, I, 128] and head weights [B, T, I]; this step's keys join the layer's."""
        rows = state.layers[self.layer_idx]
        rotate = rotate_interleaved if self.is_glm else rotate_halves
        cos, sin = position_embeddings
        query = indexer.wq_b(q_resid).unflatten(-1, (self.config.index_n_heads, -1))  # [B, T, I, 128]
        query = torch.cat(
            [rotate(query[..., : self.rope], cos[:, :, None], sin[:, :, None]), query[..., self.rope :]], -1
        )
        keys = indexer.k_norm(indexer.wk(hidden))  # [B, T, 128]
        keys = torch.cat([rotate(keys[..., : self.rope], cos, sin), keys[..., self.rope :]], -1)
        weights = indexer.weights_proj(hidden.to(indexer.weights_proj.weight.dtype)).float()
        weights = weights * (self.config.index_n_heads**-0.5 * self.config.index_head_dim**-0.5)
        rows.store_index(slots.flatten(), keys.flatten(0, 1))
        assert rows.index_format is not None
        sent, scale = rows.index_format.encode(query)
        return sent, weights if scale is None else weights * scale

    def _best(self, query: Tensor, weights: Tensor, state: PathState) -> Tensor:
        """The columns [B, T, K] that the indexer scores best, padding left out; shows the scores."""
        rows = state.layers[self.layer_idx]
        keys, scale = rows.stored_index()
        assert rows.index_format is not None
        columns, scores = select(
            query,
            keys,
            weights,
            scale,
            self.config.index_topk,
            scorer=choose(rows.index_format, query.shape[2], query.device).scorer,
            valid=None if state.valid is None else state.valid[:, : rows.length],
            keep_scores=state.wants("index_scores"),
        )
        if scores is not None:
            state.emit("index_scores", self.layer_idx, scores)
        return columns


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (x0, x1), (x2, x3), … of x [..., R]; cos and sin [..., R] repeat their first half.

    The result stays interleaved; transformers' helper returns even dimensions first, then odd ones.
    """
    half = cos.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (x0, x32), (x1, x33), … of x [..., R]: DeepSeek-V3.2's indexer."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _slots_of(columns: Tensor, slots: Tensor) -> Tensor:
    """columns [B, T, K] and slots [B, S] -> [B * T, K] int32 slots, -1 kept."""
    batch, length, selected = columns.shape
    flat = columns.clamp(min=0).view(batch, -1)
    found = slots.gather(1, flat).view(batch, length, selected)
    return found.where(columns >= 0, -1).flatten(0, 1).int()
