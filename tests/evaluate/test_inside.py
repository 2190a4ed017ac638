"""What is kept of a layer inside vLLM before its writer rounds it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from evalkit.evaluate.engines import inside

HEADS, LATENT, ROPE = 2, 8, 4


def fused_norm_rope(hidden, cache, *, kv_c_out, k_pe_out):
    """As vLLM's writer: computes in float32, stores at once as the cache's dtype, and gives its values to the caller."""
    latent, rope = hidden[:, :LATENT].float() / 3, hidden[:, LATENT : LATENT + ROPE].float() / 7
    cache.copy_(torch.cat([latent, rope], -1))
    kv_c_out.copy_(latent)
    k_pe_out.copy_(rope)
    return hidden


class MLAAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.o_proj, self.layer_name, self.given = nn.Identity(), "0", []

    def forward(self, positions, hidden_states):
        tokens = len(hidden_states)
        self.kv_cache = torch.zeros(1, tokens, LATENT + ROPE, dtype=torch.bfloat16)
        latent, rope = (hidden_states.new_empty(tokens, width) for width in (LATENT, ROPE))
        fused_norm_rope(hidden_states, self.kv_cache[0], kv_c_out=latent, k_pe_out=rope)
        query = torch.arange(tokens * HEADS * (LATENT + ROPE)).view(tokens, HEADS, -1).bfloat16()
        self.given.append((latent, rope))
        out = torch.zeros(tokens, HEADS * LATENT)
        self._sparse_indexer_and_attn(positions, query[..., :LATENT], query[..., LATENT:], out)
        return self.o_proj(out)

    def _sparse_indexer_and_attn(self, positions, latent, rope, out):
        out += latent.flatten(1).float()
        self.impl = SimpleNamespace(topk_indices_buffer=positions[:, None])


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(
        inside, "_stored", lambda module, tokens: {"rows": module.kv_cache[0, :tokens].view(torch.uint8)}
    )
    layers = nn.ModuleList(nn.ModuleDict({"attention": MLAAttention()}) for _ in range(2))
    model = nn.ModuleDict({"model": nn.ModuleDict({"layers": layers})})
    yield model
    inside.forget(model)


def run(model):
    hidden = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    layers = [layer["attention"] for layer in model["model"]["layers"]]
    return hidden, layers, [layer(torch.arange(5), hidden) for layer in layers]


def test_operands_are_what_the_writer_rounds_and_what_the_kernel_is_given(model):
    inside.watch(model, layers=True, operands=True)
    hidden, layers, _ = run(model)
    kept = {name: torch.cat(parts) for name, parts in inside.KEPT.items()}
    for number, layer in enumerate(layers):
        latent, rope, query = (kept[f"{number}.{name}"] for name in ("latent", "rope", "query"))
        assert torch.equal(latent, hidden[:, :LATENT].float() / 3)
        assert torch.equal(rope, hidden[:, LATENT : LATENT + ROPE].float() / 7)
        assert query.shape == (5, HEADS * (LATENT + ROPE))
        rows = torch.cat([latent, rope], -1).bfloat16().view(torch.uint8)
        assert torch.equal(kept[f"{number}.rows"], rows)
        # The layer itself goes on with what it would have had.
        assert torch.equal(layer.given[0][0], latent.bfloat16())


def test_a_query_outside_latent_space_is_refused(model):
    inside.watch(model, layers=True, operands=True)
    run(model)
    (layer, *_) = (layer["attention"] for layer in model["model"]["layers"])
    dense = torch.zeros(5, HEADS, LATENT // 2), torch.zeros(5, HEADS, ROPE)
    with pytest.raises(ValueError, match=r"layer 0: .* the query is not in latent space"):
        layer._sparse_indexer_and_attn(torch.arange(5), *dense, torch.zeros(5, HEADS * LATENT))


def test_nothing_of_vllms_is_left_replaced(model):
    own, (_, layers, without) = fused_norm_rope, run(model)
    inside.watch(model, layers=True, operands=True)
    _, _, watched = run(model)
    assert all(map(torch.equal, without, watched))
    inside.forget(model)
    assert globals()["fused_norm_rope"] is own
    assert not any("_sparse_indexer_and_attn" in vars(layer) for layer in layers)
    run(model)
    assert not inside.KEPT


def test_operands_are_not_kept_unless_they_are_asked_for(model):
    inside.watch(model, layers=True)
    run(model)
    assert "0.rows" in inside.KEPT
    assert not {"0.latent", "0.query"} & set(inside.KEPT)
