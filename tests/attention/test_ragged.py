import pytest
import torch

from evalkit.attention.ragged import Ragged
from evalkit.model.graft import graft

LENGTHS = (40, 33, 70)  # more than the models' top-k of 32
COLUMNS = 90


@pytest.fixture
def model(make_model, architecture):
    return graft(make_model(architecture), "fp32@reference")


def tokens(length, seed):
    return torch.randint(2, 128, (1, length), generator=torch.Generator().manual_seed(seed))


def alone(model, candidate, ids):
    with torch.inference_mode():
        cache = model.evalkit.new_cache(candidate)
        return model.base_model(input_ids=ids, **cache.argument).last_hidden_state[0]


def in_company(model, candidate, texts, prompts, width, shared=0):
    """The last hidden state of every prompt, then of every token that follows, all sequences a token at a time."""
    cache = model.evalkit.new_cache(candidate)
    ragged = Ragged(cache, len(texts), COLUMNS, torch.device("cpu"), spare=1)
    found = [[] for _ in texts]
    with torch.inference_mode():
        if shared:
            ragged.prefill(torch.tensor([len(texts)]), 0)
            model.base_model(input_ids=texts[0][:, :shared], **cache.argument)
        for one in ([2, 0], [1]):
            if shared:
                ragged.copy(len(texts), torch.tensor(one), shared)
            ragged.prefill(torch.tensor(one), shared)
            ids = torch.full((len(one), width), 5)
            for row, n in enumerate(one):
                ids[row, : prompts[n] - shared] = texts[n][0, shared : prompts[n]]
            hidden = model.base_model(input_ids=ids, **cache.argument).last_hidden_state
            for row, n in enumerate(one):
                found[n].append(hidden[row, prompts[n] - shared - 1])
                ragged.column[n] = prompts[n]
        for step in range(min(text.shape[1] - n for text, n in zip(texts, prompts, strict=True))):
            mask, places = ragged.step(COLUMNS)
            ids = torch.cat([text[:, n + step] for text, n in zip(texts, prompts, strict=True)])[:, None]
            hidden = model.base_model(
                input_ids=ids, attention_mask=mask, position_ids=places, **cache.argument
            )
            for n, row in enumerate(hidden.last_hidden_state):
                found[n].append(row[0])
            ragged.advance()
    return [torch.stack(rows) for rows in found]


@pytest.mark.parametrize("candidate", ["fp32@reference", "fp8_ds_mla@reference+index=fp8"])
def test_a_sequence_computes_what_it_computes_alone(model, candidate):
    """Of other lengths, prefilled in other company, its padding behind it, and decoded at its own place."""
    texts = [tokens(length + 6, seed) for seed, length in enumerate(LENGTHS)]
    for text, length, got in zip(
        texts, LENGTHS, in_company(model, candidate, texts, LENGTHS, 72), strict=True
    ):
        want = alone(model, candidate, text)[length - 1 :]
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_a_shared_beginning_is_computed_once_and_copied(model):
    shared = 20  # not a whole block: what follows it in the block is overwritten
    first = tokens(shared, 9)
    texts = [torch.cat([first, tokens(length - shared + 6, seed)], 1) for seed, length in enumerate(LENGTHS)]
    got = in_company(model, "fp32@reference", texts, LENGTHS, 64, shared)
    for text, length, rows in zip(texts, LENGTHS, got, strict=True):
        torch.testing.assert_close(
            rows, alone(model, "fp32@reference", text)[length - 1 :], rtol=1e-3, atol=1e-4
        )


def test_a_sequence_without_room_stays_in_its_last_column(make_model):
    model = graft(make_model(), "fp32@reference")
    ragged = Ragged(model.evalkit.new_cache(), 2, 70, torch.device("cpu"))
    ragged.column[0] = 68
    for _ in range(3):
        ragged.advance()
    assert ragged.column.tolist() == [69, 69]
    mask, places = ragged.step(70)
    assert (mask.sum(1).tolist(), places.tolist()) == ([70, 70], [[69], [69]])
