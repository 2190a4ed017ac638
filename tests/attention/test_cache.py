"""The paged cache under generate(): turns, padding, beams, crops, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from evalkit import kv
from evalkit.attention.cache import ARGUMENT, OLD_ARGUMENT
from evalkit.errors import InputError
from evalkit.kv import Scales
from evalkit.model.graft import graft


def prompt(length: int = 90, batch: int = 2) -> Tensor:
    return torch.randint(2, 128, (batch, length), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def model(make_model: Any) -> Any:
    return graft(make_model(), "fp32@reference")


def logits(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **inputs).logits


def close(got: Tensor, want: Tensor) -> bool:
    return bool((got - want).norm() <= 1e-5 * want.norm())


def mostly_close(got: Tensor, want: Tensor) -> bool:
    """Another GEMM shape moves a value by an ulp, and an ulp can move a stored code: the typical token is compared."""
    error = (got - want).norm(dim=-1) / want.norm(dim=-1)
    return bool(error.median() <= 1e-4)


@pytest.mark.parametrize("name", kv.names())
def test_a_second_turn_reads_the_first_turns_rows(make_model: Any, name: str) -> None:
    model = graft(make_model(), f"{name}@reference")
    cache = model.evalkit.new_cache()
    logits(model, prompt()[:, :60], **cache.argument)
    second = logits(model, prompt()[:, 60:], **cache.argument)
    assert mostly_close(second, logits(model, prompt())[:, 60:])


@pytest.mark.parametrize("option", kv.index.OPTIONS)
def test_indexer_keys_are_stored_as_the_candidate_says(make_model: Any, option: str) -> None:
    """A second turn reads the first one's keys; reordered sequences take theirs along."""
    model = graft(make_model(), f"fp32@reference+index={option}")
    cache = model.evalkit.new_cache()
    logits(model, prompt()[:, :70], **cache.argument)
    layer, slots = cache.layers[0], cache.layers[0].slots(0, 70)
    assert layer.index_format is kv.index.get(kv.index.OPTIONS[option])
    assert layer.index_rows.numel() == layer.capacity * 64 * layer.index_format.key_bytes
    before = layer.index_format.load(layer.index_rows, slots[1])
    codes, scale = layer.stored_index()
    assert torch.equal(codes[1].float() * (1 if scale is None else scale[1, :, None]), before)
    second = logits(model, prompt()[:, 70:], **cache.argument)
    assert mostly_close(second, logits(model, prompt())[:, 70:])
    cache.reorder_cache(torch.tensor([1]))
    assert torch.equal(layer.index_format.load(layer.index_rows, layer.slots(0, 70)[0]), before)


@pytest.mark.parametrize("name", kv.names())
def test_growing_past_a_block_keeps_what_was_stored(make_model: Any, name: str) -> None:
    model = graft(make_model(), f"{name}@reference")
    cache = model.evalkit.new_cache()
    logits(model, prompt()[:, :9], **cache.argument)
    before = [_rows(layer) for layer in cache.layers]
    for start in range(9, 81, 9):  # blocks hold 64 tokens
        logits(model, prompt()[:, start : start + 9], **cache.argument)
    for layer, (latent, rope, keys) in zip(cache.layers, before, strict=True):
        after = _rows(layer)
        assert torch.equal(after[0], latent)
        assert torch.equal(after[1], rope)
        assert torch.equal(after[2], keys)
        assert latent.any()


def _rows(layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What the first nine columns hold: latent, rope and indexer keys."""
    slots = layer.slots(0, 9).flatten()
    return *layer.format.load(layer.rows, slots, Scales()), layer.index_format.load(layer.index_rows, slots)


def test_a_cropped_cache_goes_on_from_where_it_was_cut(model: Any) -> None:
    cache = model.evalkit.new_cache()
    logits(model, prompt(), **cache.argument)
    cache.crop(-40)
    assert cache.get_seq_length() == 50
    again = logits(model, prompt()[:, 50:], **cache.argument)
    assert close(again, logits(model, prompt())[:, 50:])


def test_a_length_to_keep_is_not_taken_for_a_number_to_remove(model: Any) -> None:
    cache = model.evalkit.new_cache()
    logits(model, prompt(), **cache.argument)
    with pytest.raises(ValueError, match="negative"):
        cache.crop(40)
    assert cache.get_seq_length() == 90


def test_reordered_sequences_take_their_rows_and_padding_along_and_diverge(model: Any) -> None:
    ids = prompt()
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[0, :20] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = model.evalkit.new_cache()
    logits(model, ids[:, :70], attention_mask=mask, position_ids=positions, **cache.argument)
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    tails = torch.stack([ids[0, 70:], ids[1, 70:], ids[0, 70:]])
    longer = torch.cat([mask[[1, 1, 0]], torch.ones(3, 20, dtype=torch.long)], 1)
    steps = (longer.cumsum(-1) - 1)[:, 70:]
    got = logits(model, tails, attention_mask=longer, position_ids=steps, **cache.argument)
    assert close(got[1], logits(model, ids[1:])[0, 70:])
    assert close(got[0], logits(model, torch.cat([ids[1:, :70], ids[:1, 70:]], 1))[0, 70:])
    assert close(got[2], logits(model, ids[:1, 20:])[0, 50:])


def test_a_reset_cache_is_as_good_as_new(model: Any) -> None:
    cache = model.evalkit.new_cache()
    logits(model, prompt(), **cache.argument)
    cache.reset()
    assert close(logits(model, prompt(40, 3), **cache.argument), logits(model, prompt(40, 3)))


def test_generate_makes_a_paged_cache_of_its_own(model: Any) -> None:
    ids = prompt(50)
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 12,
        "do_sample": False,
        "eos_token_id": None,
    }
    with torch.no_grad():
        got = model.generate(ids, **options)
        without = model.generate(ids, use_cache=False, **options)
        started_empty = model.generate(ids, **{ARGUMENT: DynamicCache()}, **options)
    step = torch.cat([ids, got[:, 50:]], 1)
    greedy = logits(model, step).argmax(-1)[:, 49:-1]
    assert torch.equal(got[:, 50:], greedy)
    assert torch.equal(without, got)
    assert torch.equal(started_empty, got)


def test_beam_search_returns_the_beam_that_its_own_scores_prefer(model: Any) -> None:
    ids = prompt(50, 1)
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, num_beams=3, do_sample=False,
            eos_token_id=None, return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
        )  # fmt: skip
    # A beam's score is the sum of its tokens' log-probabilities, recomputed here without any cache.
    found = out.sequences
    scores = logits(model, found).log_softmax(-1)[:, 49:-1].gather(-1, found[:, 50:, None]).sum()
    assert float(scores) == pytest.approx(float(out.sequences_scores[0]), abs=1e-3)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_a_cache_by_its_older_name_is_the_one_that_is_used(model: Any) -> None:
    cache, base = model.evalkit.new_cache(), model.evalkit.new_cache()
    logits(model, prompt(), **{OLD_ARGUMENT: cache})
    with torch.no_grad():
        model.base_model(input_ids=prompt(), **{ARGUMENT: None, OLD_ARGUMENT: base})
    assert cache.get_seq_length() == base.get_seq_length() == prompt().shape[1]


def test_a_foreign_cache_is_refused(model: Any, make_model: Any) -> None:
    plain = make_model()
    filled = DynamicCache(config=plain.config)
    with torch.no_grad():
        plain(prompt(), **{ARGUMENT: filled})
    with pytest.raises(InputError, match="DynamicCache, which the sparse MLA path cannot read"):
        logits(model, prompt(), **{ARGUMENT: filled})
    with pytest.raises(InputError, match="filled DynamicCache"):
        model.generate(prompt(), **{ARGUMENT: filled}, max_new_tokens=2)


def test_a_mask_of_another_length_is_refused(model: Any) -> None:
    with pytest.raises(InputError, match=r"attention_mask has shape \(2, 80\).*\(2, 90\)"):
        logits(model, prompt(), attention_mask=torch.ones(2, 80))


def test_a_context_longer_than_the_models_is_refused(model: Any) -> None:
    with pytest.raises(InputError, match="the context is 513 tokens, the model holds 512"):
        logits(model, prompt(513, 1))


def test_the_router_does_not_keep_a_finished_cache_alive(model: Any) -> None:
    import gc
    import weakref

    cache = model.evalkit.new_cache()
    logits(model, prompt(), **cache.argument)
    rows = weakref.ref(cache.state)
    del cache
    gc.collect()
    assert rows() is None


def test_left_padding_is_neither_stored_nor_attended_and_attends_nothing(model: Any) -> None:
    mask = torch.ones(2, 90, dtype=torch.long)
    mask[1, :30] = 0
    seen: dict[tuple[str, int], Tensor] = {}

    class Probes:
        probes = frozenset({"selection", "attention"})

        def tensor(self, probe: str, layer: int, value: Tensor) -> None:
            seen[probe, layer] = value.unflatten(0, (2, 90))

        def attention(self, layer: int, call: Any) -> None: ...

    cache = model.evalkit.new_cache()
    cache.state.observer = Probes()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits(model, prompt(), attention_mask=mask, position_ids=positions, **cache.argument)
    for number, layer in enumerate(cache.layers):
        slots = layer.slots(0, 90)
        latent, rope = layer.format.load(layer.rows, slots[1, :30], Scales())
        assert not latent.any()  # pages start zeroed
        assert not rope.any()
        chosen = seen["selection", number][1]
        assert (chosen[:30] == -1).all()
        assert (chosen[30:].flatten()[chosen[30:].flatten() >= 0] >= 30).all()
        assert (seen["attention", number][1, :30] == 0).all()
        assert seen["attention", number][1, 30:].any(-1).all()
