"""The native engine: which sequences share a step, what they compute, and that nothing else does."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import evalkit
from evalkit import kv
from evalkit.attention.backends.reference import Reference
from evalkit.attention.cache import ARGUMENT
from evalkit.evaluate.damage import DamagedFormat, generators
from evalkit.evaluate.engines import decoding
from evalkit.evaluate.engines.base import Label, Prompt, Span
from evalkit.evaluate.engines.decoding import Decoder
from evalkit.evaluate.engines.native import NativeEngine, auto_batch_size
from evalkit.evaluate.lm import EvalkitLM
from evalkit.kv import Scales

TOPK = 16  # of the fixture's model
CANDIDATES = ("bf16@reference", "fp8_e4m3:one@reference", "fp8_ds_mla@reference")


def asked(count, until=(), max_new=9, beginning=()):
    """Prompts of random tokens, of other lengths and budgets."""
    draw = torch.Generator().manual_seed(3)
    return [
        Prompt(
            label=Label("t", i),
            ids=[*beginning, *torch.randint(3, 99, (10 + 9 * (i % 4),), generator=draw).tolist()],
            max_new=max_new - i % 3,
            until=until,
        )
        for i in range(count)
    ]


def answers(engine, requests):
    found = dict(engine.generate(requests))
    assert sorted(found) == list(range(len(requests)))
    return [(list(found[i].ids), found[i].ended) for i in range(len(requests))]


@pytest.fixture
def engine(grafted_model, tokenizer):
    def make(candidate=None, model=grafted_model, **options):
        return NativeEngine(model, candidate, tokenizer=tokenizer, **{"batch_size": 3} | options)

    return make


def test_prompts_that_wait_are_answered_as_each_alone(engine, tokenizer):
    alone = [answers(engine(), [one])[0] for one in asked(7)]
    said = [set(ids) for ids, _ in alone]
    until = (
        tokenizer.decode(
            [min(token for token in set.union(*said) if not all(token in some for some in said))]
        ),
    )
    requests = asked(7, until=until)
    alone = [answers(engine(), [one])[0] for one in requests]
    assert {ended for _, ended in alone} == {"stop", "length"}
    assert answers(engine(), requests) == alone


def test_one_long_answer_keeps_nobody_waiting(engine, monkeypatch):
    """Its own steps are all that there are: six others come and go beside it."""
    requests = [replace(one, ids=one.ids[:10], max_new=2 if i else 20) for i, one in enumerate(asked(7))]
    alone = [answers(engine(), [one])[0] for one in requests]
    assert [len(ids) for ids, _ in alone] == [20] + [2] * 6
    steps = []
    advance = Decoder._advance
    monkeypatch.setattr(Decoder, "_advance", lambda self, visible: (steps.append(1), advance(self, visible)))
    assert answers(engine(batch_size=2), requests) == alone
    assert len(steps) == 19  # its first token comes from the pass over the prompt


@pytest.mark.parametrize("at_once", [1, 4, 64])
def test_answers_do_not_depend_on_how_many_steps_are_fetched_at_once(engine, tokenizer, monkeypatch, at_once):
    want = answers(engine(), asked(5))
    until = (tokenizer.decode(want[2][0][2:3]),)
    requests = asked(5, until=until)
    want = [answers(engine(), [one])[0] for one in requests]
    monkeypatch.setitem(decoding.STEPS_AT_ONCE, "cpu", at_once)
    assert answers(engine(), requests) == want


def test_a_beginning_that_all_share_changes_no_answer(engine, monkeypatch):
    requests = asked(5, beginning=[7, 8, 9, 10] * 85)
    filled = []
    pass_ = Decoder._pass
    monkeypatch.setattr(
        Decoder,
        "_pass",
        lambda self, ids, *rest: (filled.append(tuple(ids.shape)), pass_(self, ids, *rest))[1],
    )
    together = answers(engine(), requests)
    assert filled[0] == (1, 320)
    assert all(width < 320 for _, width in filled[1:])
    filled.clear()
    assert together == [answers(engine(), [one])[0] for one in requests]
    assert all(width > 320 for _, width in filled)


def test_planted_noise_is_each_documents_own_also_in_a_beginning_that_all_share(engine, monkeypatch):
    made = []
    begin = Decoder.__init__
    monkeypatch.setattr(Decoder, "__init__", lambda self, *given: (made.append(self), begin(self, *given))[1])
    answers(engine(damage=0.3), asked(3, beginning=[7, 8, 9, 10] * 85))
    layer = made[0]._cache.layers[0]
    latents = [layer.format.load(layer.rows, slots[:320], Scales())[0] for slots in made[0]._ragged._slots]
    assert all(latent.abs().sum() > 0 for latent in latents)
    assert not any(torch.equal(latents[a], latents[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_candidates_do_not_change_each_others_answers(engine, checkpoint):
    """Each alone in a model of its own, and all in turn on one, in both orders."""
    requests = asked(5)
    alone = {}
    for candidate in CANDIDATES:
        model = evalkit.load(checkpoint, device="cpu", dtype=torch.float32)
        alone[candidate] = answers(engine(candidate, model), requests)
    assert len({str(one) for one in alone.values()}) > 1
    for order in (CANDIDATES, CANDIDATES[::-1]):
        assert {candidate: answers(engine(candidate), requests) for candidate in order} == alone


def test_shapes_are_those_of_the_requests_for_every_candidate(engine, grafted_model, monkeypatch):
    shapes = []
    forward = grafted_model.base_model.forward

    def spy(**inputs):
        shapes.append((tuple(inputs["input_ids"].shape), inputs[ARGUMENT].state.candidate.format))
        return forward(**inputs)

    monkeypatch.setattr(grafted_model.base_model, "forward", spy)
    for candidate in CANDIDATES:
        answers(engine(candidate), asked(8, max_new=6))
    by_format = {}
    for shape, name in shapes:
        by_format.setdefault(name, []).append(shape)
    first, *others = by_format.values()
    assert len(others) == 2
    assert all([s for s in other if s[1] > 1] == [s for s in first if s[1] > 1] for other in others)
    assert {s for s in first if s[1] == 1} == {(3, 1)}


def test_damage_repeats_itself_where_prompts_wait(engine):
    requests = asked(7)
    whole = answers(engine(), requests)
    first, again = (answers(engine(damage=0.7), requests) for _ in range(2))
    assert first == again
    assert first != whole


def test_many_spans_are_scored_in_bounded_passes(engine, tokenizer, grafted_model, monkeypatch):
    spans = [
        Span(label=Label("t", i), context=tokenizer("x" * 100)["input_ids"], continuation=[5 + i, 6])
        for i in range(9)
    ]
    tokens = []
    forward = grafted_model.base_model.forward

    def spy(**inputs):
        tokens.append(inputs["input_ids"].shape)
        return forward(**inputs)

    alone = [dict(engine().score([one]))[0] for one in spans]
    monkeypatch.setattr(grafted_model.base_model, "forward", spy)
    found = dict(engine(batch_size=4).score(spans))
    assert [found[i][0] for i in range(9)] == pytest.approx([nats for nats, _ in alone], rel=1e-5)
    assert all(shape.numel() <= 4 * 256 for shape in tokens)


def test_steps_are_recorded_where_the_backend_does_not_wait(engine, monkeypatch):
    """Without a GPU a recording is the step itself; which steps it stands for, and on what, is the same."""
    steady = Reference()
    monkeypatch.setattr(Reference, "steady", lambda self, full: steady if full else None)
    monkeypatch.setitem(decoding.STEPS_AT_ONCE, "cuda", 2)
    ran, contexts = [], []
    begin, step, advance = Decoder.__init__, Decoder._step, Decoder._advance

    def record(self):
        return SimpleNamespace(replay=lambda: (ran.append("replay"), step(self, self._ragged.columns)))

    def stepped(self, visible):
        ran.append("steady" if self._cache.state.backend is steady else "step")
        step(self, visible)

    def advanced(self, visible):
        contexts.append(min(self._column) + 1)
        advance(self, visible)

    def begun(self, *given):
        begin(self, *given)
        self._records = True

    requests = asked(7, max_new=14)  # one of them shorter than top-k
    want = answers(engine(), requests)
    for name, new in (("__init__", begun), ("_step", stepped), ("_record", record), ("_advance", advanced)):
        monkeypatch.setattr(Decoder, name, new)
    assert answers(engine(), requests) == want
    assert ran[:4] == ["step", "step", "steady", "replay"]
    assert ran.count("steady") == 1
    assert all(
        (kind == "step") == (n < 2 or context < TOPK)
        for n, (kind, context) in enumerate(zip(ran, contexts, strict=True))
    )


def test_a_pool_is_no_larger_than_kernels_can_count(engine, monkeypatch):
    requests = asked(7)
    want = answers(engine(), requests)
    made = []
    begin = Decoder.__init__
    monkeypatch.setattr(
        Decoder, "__init__", lambda self, *given: (made.append(given[2]), begin(self, *given))[1]
    )
    monkeypatch.setattr("evalkit.evaluate.engines.native.MOST_SLOTS", 400)
    assert answers(engine(), requests) == want
    assert made == [2]


@pytest.mark.parametrize("size", [2, 4, 5, 7])
def test_half_a_batch_has_other_shapes_also_where_all_of_it_finds_no_room(size, engine, monkeypatch):
    """Else the control would be the baseline once more to the bit, and its floor zero."""
    spans = [
        Span(label=Label("t", i), context=one.ids, continuation=[5, 6]) for i, one in enumerate(asked(9))
    ]
    monkeypatch.setattr("evalkit.evaluate.engines.native.MOST_SLOTS", 110 * 3)
    monkeypatch.setattr("evalkit.evaluate.engines.schedule.PREFILL_TOKENS_PER_SEQUENCE", 1)
    made, shapes = [], []
    begin, pad = Decoder.__init__, NativeEngine._left_pad
    monkeypatch.setattr(
        Decoder, "__init__", lambda self, *given: (made.append(given[2]), begin(self, *given))[1]
    )

    def padded(self, *given):
        shapes.append(pad(self, *given)[0].shape)
        return pad(self, *given)

    monkeypatch.setattr(NativeEngine, "_left_pad", padded)
    found, scores = [], []
    for batch_size in (size, size // 2):
        found.append(answers(engine(batch_size=batch_size), asked(9)))
        scores.append([nats for _, (nats, _) in sorted(engine(batch_size=batch_size).score(spans))])
    assert made[0] != made[1]
    assert found[0] == found[1]
    whole, half = shapes[:9], shapes[9:]
    assert all(len(shape) == 2 and shape[0] == 1 for shape in shapes)
    assert not set(whole) & set(half)
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


def test_nothing_to_generate_is_nothing(engine):
    assert list(engine().generate([])) == []


def test_prompts_are_tokenised_once_for_all_candidates(grafted_model, tokenizer, ask, monkeypatch):
    texts = [f"The code of river {i}" for i in range(4)]
    wanted = {"until": [], "do_sample": False, "max_gen_toks": 2}
    requests = ask("generate_until", *[(text, wanted) for text in texts])
    monkeypatch.setattr("evalkit.evaluate.lm._PROMPTS", {})
    calls = []
    encode = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda self, some, **k: (calls.append(some), encode(self, some, **k))[1]
    )
    first = EvalkitLM(grafted_model, tokenizer=tokenizer).generate_until(requests)
    assert calls == [texts]
    again = EvalkitLM(grafted_model, tokenizer=tokenizer, candidate=CANDIDATES[1])
    again.generate_until(requests)
    assert calls == [texts]
    assert first


@pytest.mark.parametrize(
    ("gigabytes", "layers", "columns", "wanted"),
    [(141, 4, 8192, 512), (141, 78, 131072, 64), (24, 78, 131072, 8), (141, 61, 4096, 128)],
)
def test_a_batch_is_what_half_of_the_memory_holds(gigabytes, layers, columns, wanted, monkeypatch):
    """A row of 8,192 tokens is 11.5 MB a layer; a model that fits badly still gets a batch."""
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=gigabytes * 10**9)
    )
    config = SimpleNamespace(max_position_embeddings=columns, num_hidden_layers=layers)
    weights = [torch.empty(10**9, dtype=torch.uint8, device="meta")]
    model = SimpleNamespace(device="cuda:0", config=config, parameters=lambda: weights)
    assert auto_batch_size(model) == wanted
    model.device = "cpu"
    assert auto_batch_size(model) == 8


@pytest.mark.gpu
@pytest.mark.parametrize(
    "candidate",
    ["bf16@flashinfer", "fp8_e4m3:one@flashinfer", "fp8_ds_mla@flashmla", "bf16@flashmla",
     "nvfp4_ds_mla@flashmla+read=decoded", "fp8_ds_mla@flashmla+index=fp8"],
)  # fmt: skip
def test_recorded_steps_are_the_steps(candidate):
    """A CUDA graph gives the tokens that the same steps give one by one, also after new prompts came in."""
    model = evalkit.load("dsa-nano", device="cuda")
    length = model.config.index_topk + 60
    requests = [
        Prompt(
            label=Label("t", i),
            ids=[3 + (i * 7 + j * j) % 900 for j in range(length - i)],
            max_new=40 + 8 * i,
        )
        for i in range(9)
    ]
    replayed = []
    recorded, one_by_one = (
        answers(NativeEngine(model, candidate, batch_size=4, graphs=graphs), requests)
        for graphs in (True, False)
    )
    with pytest.MonkeyPatch.context() as patch:
        replay = torch.cuda.CUDAGraph.replay
        patch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replayed.append(1), replay(graph))[1])
        again = answers(NativeEngine(model, candidate, batch_size=4), requests)
    assert len(replayed) > 60
    assert recorded == again == one_by_one


@pytest.mark.gpu
def test_recorded_stores_draw_fresh_damage():
    """A graph that replayed the same noise would plant another dose than was asked for."""
    format = DamagedFormat(kv.get("bf16"), 0.1, seed=1)
    cache, slots = format.allocate(64, device="cuda"), torch.arange(2, device="cuda")
    latent, rope = torch.ones(2, 512, device="cuda"), torch.ones(2, 64, device="cuda")
    format.store(cache, slots, latent, rope, Scales())
    graph = torch.cuda.CUDAGraph()
    for generator in generators(format):
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        format.store(cache, slots, latent, rope, Scales())
    drawn = []
    for _ in range(3):
        graph.replay()
        drawn.append(format.load(cache, slots, Scales())[0].clone())
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])
    assert torch.stack(drawn).std().item() == pytest.approx(0.1, rel=0.1)


@pytest.mark.gpu
def test_damaged_answers_repeat_themselves_where_steps_are_recorded():
    model = evalkit.load("dsa-nano", device="cuda")
    ids = [3 + (j * j) % 900 for j in range(600)]
    requests = [Prompt(label=Label("t", i), ids=[*ids, 5 + i], max_new=60) for i in range(4)]
    first, again = (
        answers(NativeEngine(model, "bf16", batch_size=4, damage=0.3), requests) for _ in range(2)
    )
    assert first == again


@pytest.mark.gpu
def test_short_contexts_are_answered_by_steps_that_are_not_recorded():
    """FlashInfer has to be told how many slots a query has, as long as it has fewer than top-k."""
    model = evalkit.load("dsa-nano", device="cuda")
    requests = [
        Prompt(label=Label("t", i), ids=[3 + (i + j * j) % 900 for j in range(480 + 10 * i)], max_new=80)
        for i in range(4)
    ]
    with_graphs, without = (
        answers(NativeEngine(model, "bf16@flashinfer", batch_size=4, graphs=graphs), requests)
        for graphs in (True, False)
    )
    assert with_graphs == without
