import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch

from evalkit.calibrate import read_prompts
from evalkit.candidate import Candidate
from evalkit.compare.figures.tokens import kl_nats
from evalkit.errors import InputError
from evalkit.evaluate import kld
from evalkit.evaluate.kld import PROMPT, RESPONSE, TEXT, Passage, divergences, passages_of_files
from evalkit.evaluate.lm import EvalkitLM
from evalkit.evaluate.tasks import load_tasks
from evalkit.evaluate.texts import read_texts
from evalkit.model.checkpoint import EMBEDDED
from evalkit.model.graft import graft
from evalkit.records import CandidateRecord, EnvironmentRecord, RunDirectory, SampleRecord
from tests.conftest import random_model
from tests.test_records import example

REFERENCE, FP8 = Candidate.parse("bf16@reference"), Candidate.parse("fp8_e4m3:one@reference")


@pytest.fixture(scope="module")
def model():
    return graft(random_model(vocab_size=1024, max_position_embeddings=1024), rounding=torch.bfloat16)


def passages(count, length=40, source="book.txt"):
    generator = torch.Generator().manual_seed(3)
    return [
        Passage(
            source=source,
            document=document,
            ids=torch.randint(0, 1024, (length,), generator=generator),
            spans={TEXT: slice(0, length - 1)},
        )
        for document in range(count)
    ]


def logits(model, passage, candidate):
    with torch.no_grad():
        return model(
            input_ids=passage.ids[None],
            **model.evalkit.new_cache(candidate, {}).argument,
            use_cache=True,
        ).logits[0]


def test_divergence_is_that_of_the_models_own_logits(model):
    (passage,) = passages(1)
    got, ref = (logits(model, passage, candidate)[:-1] for candidate in (FP8, REFERENCE))
    expected, following = kl_nats(got, ref), passage.ids[1:]
    same, candidate = divergences(model, [passage], [REFERENCE, FP8])
    assert same.kl_max_nats == 0.0
    assert same.top1_agreement == 1.0
    assert candidate.kl_mean_nats == pytest.approx(float(expected.mean()), rel=1e-9)
    assert candidate.kl_max_nats == pytest.approx(float(expected.max()), rel=1e-9)
    change = (x.double().softmax(-1).gather(1, following[:, None]) for x in (got, ref))
    assert candidate.delta_p_mean == pytest.approx(float((next(change) - next(change)).mean()), rel=1e-6)
    assert (candidate.phase, candidate.source, candidate.n, candidate.targets) == (TEXT, "book.txt", 39, 39)


def test_logits_are_made_a_few_rows_at_a_time(model, monkeypatch):
    (whole,) = divergences(model, passages(1), [FP8])
    rows = []
    monkeypatch.setattr(kld, "ROWS", 7)
    hook = model.lm_head.register_forward_hook(lambda _module, given, _out: rows.append(len(given[0])))
    (parts,) = divergences(model, passages(1), [FP8])
    hook.remove()
    assert max(rows) == 7
    assert parts.kl_mean_nats == pytest.approx(whole.kl_mean_nats, rel=1e-6)
    assert parts.n == whole.n


def test_an_interval_needs_forty_documents(model):
    (few,) = divergences(model, passages(39, 8), [FP8])
    assert few.kl_mean_lower_nats is few.kl_mean_upper_nats is None
    assert few.interval_method == "none (39 documents, 40 are needed, 10 of them apart)"
    (enough,) = divergences(model, passages(40, 8), [FP8])
    assert enough.kl_mean_lower_nats < enough.kl_mean_nats < enough.kl_mean_upper_nats
    assert enough.kl_p99_nats is not None
    assert enough.kl_p999_nats is None, "the 99.9 percentile needs 100 documents and 25,000 tokens"


def test_a_windows_document_is_the_text_it_comes_from(tmp_path: Path):
    (tmp_path / "book.txt").write_text("abcdefghij\n")
    (tmp_path / "lines.jsonl").write_text('"abc"\n\n{"text": "defgh"}\n{"prompt": "ij"}\n')
    found = passages_of_files(
        [tmp_path / "book.txt", tmp_path / "lines.jsonl"], lambda text: list(map(ord, text)), 5
    )
    assert [(one.source, one.document, len(one.ids), one.spans[TEXT]) for one in found] == [
        ("book.txt", 0, 5, slice(0, 4)), ("book.txt", 0, 5, slice(0, 4)),  # the line end alone predicts nothing
        ("lines.jsonl", 0, 3, slice(0, 2)), ("lines.jsonl", 1, 5, slice(0, 4)), ("lines.jsonl", 2, 2, slice(0, 1)),
    ]  # fmt: skip


def test_files_of_one_name_are_texts_of_their_own(tmp_path: Path):
    files = [tmp_path / folder / "book.txt" for folder in "ab"]
    for file in files:
        file.parent.mkdir()
        file.write_text("abc")
    found = passages_of_files(files, lambda text: list(map(ord, text)), 5)
    assert [one.source for one in found] == list(map(str, files))
    with pytest.raises(InputError, match="is named 2 times"):
        passages_of_files([files[0]] * 2, lambda text: list(map(ord, text)), 5)


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\u0085"])
def test_a_line_of_json_may_hold_every_line_end_but_its_own(tmp_path: Path, end: str):
    """As `json.dumps(..., ensure_ascii=False)` writes them."""
    texts = [f"one{end}two", "three"]
    lines = "".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts)
    (tmp_path / "x.jsonl").write_text(lines, encoding="utf-8")
    assert [text for _, text in read_texts(tmp_path / "x.jsonl")] == texts
    assert read_prompts(tmp_path / "x.jsonl") == texts


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.txt", None, "cannot be read"),
        ("x.txt", b"\xff\xfe", "is not UTF-8"),
        ("x.txt", b" \n", "is empty"),
        ("x.txt", b"a", "a next token takes two at least"),
        ("x.jsonl", b'"fine"\n{"question": "?"}', "line 2: a string or an object"),
    ],
)
def test_a_text_that_is_none_is_named(tmp_path: Path, name: str, content: bytes | None, said: str):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        passages_of_files([tmp_path / name], lambda text: list(map(ord, text)), 5)


def test_nothing_to_compare_and_too_much_of_it_are_refused(model):
    with pytest.raises(InputError, match="no text to compare on"):
        list(divergences(model, [], [FP8]))
    with pytest.raises(InputError, match="document 0 has 1025 tokens, the model holds 1024"):
        list(divergences(model, passages(1, 1025), [FP8]))


TASK = "evalkit_needle_1024"


@pytest.fixture(scope="module")
def lm():
    from transformers import AutoTokenizer

    long = graft(random_model(vocab_size=1024, max_position_embeddings=2048), rounding=torch.bfloat16)
    return EvalkitLM(long, tokenizer=AutoTokenizer.from_pretrained(EMBEDDED / "dsa-nano"))


def made_run(folder: Path, **sample: object) -> RunDirectory:
    """A run of one document of one task, its baseline's answer being tokens 7, 8, 9."""
    config = {"tasks": [TASK], "task_documents": 1, "seed": 0}
    made = RunDirectory.create(folder, "made-up", config, "evalkit run")
    (task,) = load_tasks((TASK,), 1, 0)
    task.build_all_requests(limit=1, rank=0, world_size=1)
    prompt = task.instances[0].args[0]
    values = {"task": TASK, "doc_id": 0, "candidate": "bf16@reference", "generated_ids": [7, 8, 9]}
    values["prompt_sha256"] = hashlib.sha256(prompt.encode()).hexdigest()
    with made.stage("tasks") as write:
        write.write(example(EnvironmentRecord, checkpoint_sha256="c" * 64))
        write.write(example(CandidateRecord, candidate="bf16@reference"))
        write.write(dataclasses.replace(example(SampleRecord), **(values | sample)))
        write.write(
            dataclasses.replace(
                example(SampleRecord), **(values | {"candidate": "fp8", "generated_ids": [1]})
            )
        )
    return made


def test_transcripts_are_the_prompts_and_the_baselines_own_tokens(lm: EvalkitLM, tmp_path: Path):
    (found,) = kld.passages_of_run(made_run(tmp_path).path, lm, "c" * 64)
    prompt = len(found.ids) - 3
    assert found.ids[prompt:].tolist() == [7, 8, 9]
    assert prompt > 500
    assert (found.source, found.document) == (TASK, 0)
    assert found.spans == {PROMPT: slice(0, prompt - 1), RESPONSE: slice(prompt - 1, prompt + 2)}
    records = {record.phase: record for record in divergences(lm.engine.model, [found], [FP8])}
    assert {phase: record.n for phase, record in records.items()} == {PROMPT: prompt - 1, RESPONSE: 3}


@pytest.mark.parametrize(
    ("sample", "sha", "said"),
    [
        ({}, "d" * 64, "is of checkpoint cccccccccccc, this is dddddddddddd"),
        ({"generated_ids": None}, "c" * 64, "holds no generated tokens of bf16@reference"),
        ({"prompt_sha256": "e" * 64}, "c" * 64, "was asked something else"),
        ({"doc_id": 5}, "c" * 64, "document 5 was asked something else"),
    ],
)
def test_a_run_that_cannot_serve_is_refused(
    lm: EvalkitLM, tmp_path: Path, sample: dict[str, object], sha: str, said: str
):
    run = made_run(tmp_path, **sample)
    with pytest.raises(InputError, match=said):
        kld.passages_of_run(run.path, lm, sha)
