"""The training model is transformers' model, and its export loads there."""

from dataclasses import replace

import pytest
import torch

from evalkit.attention import path
from evalkit.train import checkpoint
from evalkit.train.config import TINY, ModelConfig
from evalkit.train.model import Nano, rope_tables, rotate_to_halves

SMALL = replace(TINY.model, index_topk=24)


def a_model(seed: int = 0, config: ModelConfig = SMALL) -> Nano:
    model = Nano(config).eval()
    model.initialise(seed)
    generator = torch.Generator().manual_seed(seed)
    for router in model.routers():
        router.e_score_correction_bias.copy_(0.1 * torch.randn(config.n_routed_experts, generator=generator))
    return model


def hf_model(directory, dtype=torch.float32):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager"
    )
    return model.eval()


@pytest.mark.parametrize("tokens", [16, 96], ids=["within top-k", "beyond top-k"])
def test_its_logits_are_those_of_transformers(tmp_path, tokens):
    checkpoint.export(a_model(), tmp_path)
    model = checkpoint.load(tmp_path).eval()
    ids = torch.randint(3, SMALL.vocab_size, (2, tokens), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ref = hf_model(tmp_path)(ids).logits
        got = model.logits(model(ids, "own")[0])
    assert (got - ref).norm() <= 1e-5 * ref.norm()


def test_its_own_selection_matters_beyond_topk():
    """Otherwise the comparison with transformers would say nothing about the indexer."""
    model = a_model()
    ids = torch.randint(3, SMALL.vocab_size, (1, 96), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        dense, own = model(ids, "dense")[0], model(ids, "own")[0]
    torch.testing.assert_close(own[:, : SMALL.index_topk], dense[:, : SMALL.index_topk])
    assert (own[:, -1] - dense[:, -1]).norm() > 1e-3 * dense[:, -1].norm()


def test_an_export_holds_the_weights_in_bf16_and_the_router_bias_in_float32(tmp_path):
    model = a_model()
    checkpoint.export(model, tmp_path)
    loaded = checkpoint.load(tmp_path).state_dict()
    for name, tensor in model.state_dict().items():
        want = tensor if name.endswith("e_score_correction_bias") else tensor.bfloat16().float()
        torch.testing.assert_close(loaded[name], want, rtol=0, atol=0, msg=name)


def test_the_embedded_shape_fits_into_24_megabytes():
    with torch.device("meta"):
        model = Nano(ModelConfig())
    assert 2 * sum(parameter.numel() for parameter in model.parameters()) < 23.8e6


def test_the_indexer_learns_from_its_own_loss_alone():
    model = a_model().train()
    ids = torch.randint(3, SMALL.vocab_size, (1, 64), generator=torch.Generator().manual_seed(1))
    rows = torch.tensor([[10, 40, 63]])
    _, kl = model(ids, "own", rows)
    kl.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".indexer." in name), name
    model.zero_grad(set_to_none=True)
    model(ids, "own", rows)[0].sum().backward()
    assert all(p.grad is None for name, p in model.named_parameters() if ".indexer." in name)


def test_an_indexer_that_scores_like_the_attention_has_no_loss():
    attention = a_model().model.layers[0].self_attn
    x = torch.randn(1, 8, SMALL.hidden_size, generator=torch.Generator().manual_seed(2))
    rows = torch.tensor([[0, 0]])
    cos = sin = torch.ones(8, SMALL.qk_rope_head_dim // 2)
    q_resid = torch.zeros(1, 8, SMALL.q_lora_rank)
    only_itself = torch.zeros(1, 2, 8)
    only_itself[:, :, 0] = 1
    loss = attention.indexer_kl(x, q_resid, cos, sin, rows, only_itself)
    torch.testing.assert_close(loss, torch.zeros(()))


def test_a_rotation_to_halves_is_the_paths_with_first_members_before_second():
    cos, sin = rope_tables(SMALL, 8, torch.device("cpu"))
    x = torch.randn(8, SMALL.qk_rope_head_dim, generator=torch.Generator().manual_seed(3))
    ref = path.rotate_interleaved(x, cos.repeat(1, 2), sin.repeat(1, 2))
    want = torch.cat([ref[:, 0::2], ref[:, 1::2]], -1)
    torch.testing.assert_close(rotate_to_halves(x, cos, sin), want)
