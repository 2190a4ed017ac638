import pytest
import torch

import evalkit
from evalkit import kv
from evalkit.errors import InputError
from evalkit.evaluate.damage import DamagedFormat, damaging
from evalkit.evaluate.lm import EvalkitLM
from evalkit.kv import Scales
from evalkit.kv.scales import identity


@pytest.mark.parametrize("name", kv.names())
def test_rows_of_every_format_hold_the_noise_that_was_asked_for(name):
    inner, noise = kv.get(name), 0.2
    damaged = DamagedFormat(inner, noise, seed=1)
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(64, inner.latent_dim, generator=generator)
    rope = torch.randn(64, inner.rope_dim, generator=generator)
    loaded = []
    for row_format in (inner, damaged):
        cache = row_format.allocate(64)
        row_format.store(cache, torch.arange(64), latent, rope, Scales())
        loaded.append(inner.load(cache, torch.arange(64), Scales(), identity)[0])
    whole, broken = loaded
    assert (broken - whole).norm() / whole.norm() == pytest.approx(noise, rel=0.25)


def test_a_damaged_format_is_registered_nowhere():
    assert not any("amage" in name for name in kv.names())
    with pytest.raises(InputError):
        kv.get("damaged")


def test_damage_changes_answers_repeats_itself_and_leaves_the_model_alone(grafted_model, tokenizer, ask):
    requests = ask("loglikelihood", ("abcdefgh" * 8, "xyz"), ("stuvw" * 9, "ab"))
    whole = EvalkitLM(grafted_model, tokenizer=tokenizer).loglikelihood(requests)
    first, again = (
        EvalkitLM(grafted_model, tokenizer=tokenizer, damage=0.5).loglikelihood(requests) for _ in range(2)
    )
    assert first == again
    assert all(a[0] != b[0] for a, b in zip(first, whole, strict=True))
    assert EvalkitLM(grafted_model, tokenizer=tokenizer).loglikelihood(requests) == whole


def test_damage_needs_the_path(plain_model, tokenizer, ask):
    lm = EvalkitLM(plain_model, tokenizer=tokenizer, damage=0.5)
    with pytest.raises(InputError, match="load the model with"):
        lm.loglikelihood(ask("loglikelihood", ("abc", "d")))


def test_each_cache_draws_its_own_noise(checkpoint):
    model = evalkit.load(checkpoint, "fp32@reference", device="cpu", dtype=torch.float32)
    make = damaging(model.evalkit.new_cache, 0.5)
    seeds = [make().state.format.seed for _ in range(3)]
    assert seeds == [0, 1, 2]


@pytest.mark.gpu
@pytest.mark.parametrize("candidate", ["bf16@flashinfer", "bf16@flashmla"])
def test_kernels_read_damaged_rows(candidate, ask):
    model = evalkit.load("dsa-nano", candidate, device="cuda")
    requests = ask("loglikelihood", ("The value of the key is " * 40, "blue"))
    whole, first, again = (
        EvalkitLM(model, damage=damage).loglikelihood(requests) for damage in (0.0, 0.5, 0.5)
    )
    assert first == again
    assert first[0][0] != whole[0][0]
