import copy
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

import evalkit
from evalkit.errors import InputError
from evalkit.evaluate.lm import EvalkitLM, lm_eval_main

TEXTS = (
    ("The quick brown fox jumps over the lazy dog, and", " then it sleeps."),
    ("A", " b"),
    ("Facts: the code of river is 4729. Answer: the code of river is", " 4729."),
    ("", "Nothing before it."),
    ("Eight words stand before this continuation: ", "so it begins with their space"),
)
PROMPTS = (
    "The code of river is",
    "A",
    "A longer prompt, so that rows need padding of unequal length:",
    "Note ant",
    "x y z",
)


def generation(**options):
    return {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": 12} | options


def direct_logprobs(model, ids):
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def test_loglikelihood_equals_a_direct_computation(lm, model, tokenizer, ask):
    got = lm.loglikelihood(ask("loglikelihood", *TEXTS))
    for (context, continuation), (nats, greedy) in zip(TEXTS, got, strict=True):
        ids = tokenizer(context)["input_ids"] or [tokenizer.bos_token_id]
        if context.endswith(" "):
            ids, continuation = ids[:-1], " " + continuation
        wanted = tokenizer(continuation)["input_ids"]
        logprobs = direct_logprobs(model, ids + wanted)[len(ids) - 1 : -1]
        assert nats == pytest.approx(
            sum(row[t].item() for row, t in zip(logprobs, wanted, strict=True)), rel=1e-5
        )
        assert greedy == (logprobs.argmax(-1).tolist() == wanted)


def test_what_greedy_decoding_gives_is_called_greedy(lm, ask):
    (text,) = lm.generate_until(ask("generate_until", ("The code", generation(max_gen_toks=3))))
    ((_, greedy), (_, other)) = lm.loglikelihood(
        ask("loglikelihood", ("The code", text), ("The code", "###"))
    )
    assert greedy
    assert not other


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_score_does_not_depend_on_its_batch(make_lm, ask, batch_size):
    alone = [make_lm().loglikelihood(ask("loglikelihood", pair))[0] for pair in TEXTS]
    together = make_lm(batch_size=batch_size).loglikelihood(ask("loglikelihood", *TEXTS))
    assert [nats for nats, _ in together] == pytest.approx([nats for nats, _ in alone], rel=1e-5)
    assert [greedy for _, greedy in together] == [greedy for _, greedy in alone]


def test_the_head_in_pieces_gives_the_same_score(lm, ask, monkeypatch):
    whole = lm.loglikelihood(ask("loglikelihood", *TEXTS))
    monkeypatch.setattr("evalkit.evaluate.engines.native.HEAD_ROWS", 3)
    assert [n for n, _ in lm.loglikelihood(ask("loglikelihood", *TEXTS))] == pytest.approx(
        [n for n, _ in whole], rel=1e-6
    )


def test_rolling_equals_the_whole_sequences_loglikelihood(lm, model, tokenizer, ask):
    texts = ["The quick brown fox jumps over the lazy dog. " * 3, "short"]
    for text, nats in zip(
        texts, lm.loglikelihood_rolling(ask("rolling", *[(t,) for t in texts])), strict=True
    ):
        ids = tokenizer(text)["input_ids"]
        logprobs = direct_logprobs(model, [tokenizer.bos_token_id, *ids[:-1]])
        assert nats == pytest.approx(
            sum(row[t].item() for row, t in zip(logprobs, ids, strict=True)), rel=1e-5
        )


def test_rolling_over_several_windows_predicts_every_token_once(make_lm, ask):
    lm = make_lm(max_length=20)
    (nats,) = lm.loglikelihood_rolling(ask("rolling", ("x" * 50,)))
    assert nats < 0
    assert sum(span.scored_tokens for span in lm.coverage) == 50


def test_rolling_over_an_empty_text_is_zero(lm, ask):
    assert lm.loglikelihood_rolling(ask("rolling", ("",))) == [0.0]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_generation_is_transformers_own_token_by_token(make_lm, model, tokenizer, ask, batch_size):
    lm = make_lm(batch_size=batch_size)
    got = lm.generate_until(ask("generate_until", *[(prompt, generation()) for prompt in PROMPTS]))
    for prompt, text in zip(PROMPTS, got, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert text == tokenizer.decode(wanted[0, ids.shape[1] :], skip_special_tokens=True)


def test_generation_ends_at_the_first_stop_string_without_it(lm, ask):
    (whole,) = lm.generate_until(ask("generate_until", ("The code of", generation(max_gen_toks=20))))
    stop = whole[5:7]
    lm.coverage.clear()
    (cut,) = lm.generate_until(
        ask("generate_until", ("The code of", generation(max_gen_toks=20, until=[stop, "@@"])))
    )
    assert cut == whole.split(stop)[0]
    assert lm.coverage[0].scored_tokens < 20


def test_a_row_that_ended_does_not_change_the_others(lm, ask):
    whole = lm.generate_until(ask("generate_until", *[(prompt, generation()) for prompt in PROMPTS]))
    arguments = [(prompt, generation()) for prompt in PROMPTS]
    arguments[2] = (PROMPTS[2], generation(until=[whole[2][:1]]))
    stopped = lm.generate_until(ask("generate_until", *arguments))
    assert stopped[2] == ""
    assert [t for i, t in enumerate(stopped) if i != 2] == [t for i, t in enumerate(whole) if i != 2]


def test_the_end_of_text_token_ends_a_generation(lm, model, ask, monkeypatch):
    (whole,) = lm.generate_until(ask("generate_until", ("The code of", generation())))
    end = lm.tok_encode(whole)[3]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [0, end])
    lm.coverage.clear()
    lm.generate_until(ask("generate_until", ("The code of", generation())))
    assert lm.coverage[0].scored_tokens == 1 + lm.tok_encode(whole).index(end)


def test_each_request_keeps_its_own_budget_and_place(lm, ask):
    budgets = [3, 9, 5]
    arguments = [(prompt, generation(max_gen_toks=n)) for prompt, n in zip(PROMPTS, budgets, strict=False)]
    texts = lm.generate_until(ask("generate_until", *arguments))
    alone = [lm.generate_until(ask("generate_until", pair))[0] for pair in arguments]
    assert texts == alone


@pytest.mark.parametrize("prompt_tokens", [501, 600])
def test_a_prompt_that_is_too_long_is_refused_in_one_line(lm, ask, prompt_tokens):
    requests = ask("generate_until", ("x", generation()), ("x" * prompt_tokens, generation()))
    with pytest.raises(
        InputError, match=f"some_task document 1: prompt of {prompt_tokens} tokens . 12 .* 512"
    ) as error:
        lm.generate_until(requests)
    assert "\n" not in str(error.value)
    assert not lm.coverage


def test_the_longest_prompt_that_fits_is_answered(make_lm, ask):
    assert make_lm(max_length=40).generate_until(ask("generate_until", ("x" * 28, generation())))


def test_a_continuation_that_is_too_long_is_refused(make_lm, ask):
    lm = make_lm(max_length=10)
    assert lm.loglikelihood(ask("loglikelihood", ("x" * 8, "abc")))
    with pytest.raises(
        InputError, match=r"some_task document 0: context of 8 .* continuation of 4 .* 11 positions"
    ):
        lm.loglikelihood(ask("loglikelihood", ("x" * 8, "abcd")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": True, "temperature": 0.7}, "asks for sampling"),
        ({"do_sample": None, "temperature": 0.7}, "asks for sampling"),
        ({"repetition_penalty": 1.2}, "asks for repetition_penalty"),
        ({"max_gen_toks": 0}, "max_gen_toks of at least 1"),
    ],
)
def test_what_greedy_decoding_cannot_honour_is_refused(lm, ask, options, message):
    with pytest.raises(InputError, match=message):
        lm.generate_until(ask("generate_until", ("x", generation(**options))))


def test_an_empty_prompt_and_an_empty_continuation_are_refused(lm, ask):
    with pytest.raises(InputError, match="document 0 has an empty prompt"):
        lm.generate_until(ask("generate_until", ("", generation())))
    with pytest.raises(InputError, match="nothing to score"):
        lm.loglikelihood(ask("loglikelihood", ("x", "")))


def test_shapes_do_not_depend_on_what_is_answered(make_lm, model, ask, monkeypatch):
    """Shapes of every matrix product must be the same for every candidate; how many steps there are need not be."""
    shapes = []
    forward = model.base_model.forward

    def spy(*args, **kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.base_model, "forward", spy)
    whole = make_lm(batch_size=2).generate_until(ask("generate_until", *[(p, generation()) for p in PROMPTS]))
    first, shapes[:] = shapes[:], []
    until = [whole[0][:1]]
    arguments = [(p, generation(until=until if i == 0 else [])) for i, p in enumerate(PROMPTS)]
    make_lm(batch_size=2).generate_until(ask("generate_until", *arguments))
    prompts, again = ([shape for shape in some if shape[1] > 1] for some in (first, shapes))
    assert prompts
    assert again == prompts
    assert {shape for shape in first + shapes if shape[1] == 1} <= {(2, 1), (1, 1)}


def test_coverage_names_the_document_and_its_tokens(lm, ask):
    lm.loglikelihood(ask("loglikelihood", ("abc", "de")))
    lm.generate_until(ask("generate_until", ("abcd", generation(max_gen_toks=3))))
    scored, generated = lm.coverage
    assert (scored.task, scored.doc_id, scored.context_tokens, scored.scored_tokens) == ("some_task", 0, 3, 2)
    assert (generated.context_tokens, generated.scored_tokens) == (4, 3)


def test_the_response_cache_is_refused(lm, tmp_path):
    with pytest.raises(InputError, match="does not tell candidates apart"):
        CachingLM(lm, str(tmp_path / "cache"))


def test_the_model_is_registered_under_its_name():
    assert get_model("evalkit") is EvalkitLM


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"candidate": "bf16@reference"}, "lacks pretrained"),
        ({"pretrained": "x", "trust": 1}, "model_args has trust; evalkit takes"),
        ({"pretrained": "x", "batch_size": "many"}, "batch_size=many: want a whole number"),
        ({"pretrained": "x", "dtype": "float17"}, "dtype=float17: want one of torch's names"),
    ],
)
def test_bad_model_args_are_refused_in_one_line(arguments, message):
    with pytest.raises(InputError, match=message):
        EvalkitLM.create_from_arg_obj(arguments)


def test_model_args_go_before_the_commands_defaults_and_may_hold_equals_signs(monkeypatch):
    given = {}
    monkeypatch.setattr(EvalkitLM, "__init__", lambda self, **kwargs: given.update(kwargs))
    EvalkitLM.create_from_arg_string(
        "pretrained=here,candidate=fp8_e4m3:one@reference+index=fp8,batch_size=4",
        {"batch_size": 1, "device": "cpu", "max_batch_size": None},
    )
    assert given == {
        "pretrained": "here",
        "candidate": "fp8_e4m3:one@reference+index=fp8",
        "batch_size": "4",
        "device": "cpu",
    }


def test_a_candidate_on_a_plain_model_is_refused(plain_model, tokenizer):
    with pytest.raises(InputError, match="needs a model from evalkit"):
        EvalkitLM(plain_model, tokenizer=tokenizer, candidate="fp8_e4m3:one@reference")


def test_one_set_of_weights_serves_many_candidates(grafted_model, tokenizer, checkpoint, ask):
    """With the model's own candidate between two others, so that nothing of theirs can stay behind."""
    requests = ask("loglikelihood", *TEXTS)
    own = EvalkitLM(grafted_model, tokenizer=tokenizer).loglikelihood(requests)
    other = EvalkitLM(grafted_model, tokenizer=tokenizer, candidate="fp8_e4m3:one@reference").loglikelihood(
        requests
    )
    assert EvalkitLM(grafted_model, tokenizer=tokenizer).loglikelihood(requests) == own
    loaded = EvalkitLM(checkpoint, candidate="fp8_e4m3:one@reference", device="cpu", dtype="float32")
    assert other == loaded.loglikelihood(requests)
    assert other != own


def test_max_length_beyond_the_models_is_refused(make_lm):
    with pytest.raises(InputError, match="max_length 513 is over the model's 512"):
        make_lm(max_length=513)


def test_lm_evals_command_runs_our_model_on_our_tasks(plain_model, tmp_path, capsys, monkeypatch):
    config = copy.deepcopy(plain_model.config)
    config.max_position_embeddings, config.vocab_size = 2048, 1024
    type(plain_model)(config).save_pretrained(tmp_path / "checkpoint")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(evalkit.__file__).parent / "checkpoints/dsa-nano" / name, tmp_path / "checkpoint")
    monkeypatch.setattr(sys, "argv", ["untouched"])
    # Reading lm-eval's own thousands of tasks and listing this machine's packages takes 15 seconds.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    arguments = f"pretrained={tmp_path / 'checkpoint'},candidate=fp8_e4m3:one@reference+index=fp8,device=cpu"
    documents = ["--metadata", '{"documents": 2, "seed": 1}']
    saved = ["--output_path", str(tmp_path / "out"), "--log_samples"]
    lm_eval_main(["run", "--tasks", "evalkit_needle_1024", "--model_args", arguments, *documents, *saved])
    assert "|evalkit_needle_1024|" in capsys.readouterr().out
    (samples,) = (tmp_path / "out").glob("**/samples_*.jsonl")
    assert len(samples.read_text().splitlines()) == 2
    assert sys.argv == ["untouched"]


@pytest.mark.parametrize("flag", [["--use_cache", "somewhere"], ["--cache_requests", "true"]])
def test_lm_evals_caches_are_refused_at_the_command(flag):
    with pytest.raises(InputError, match=f"{flag[0]} does not tell candidates"):
        lm_eval_main(["run", "--model", "dummy", "--tasks", "evalkit_needle_1024", *flag])
