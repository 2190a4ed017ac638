"""Tasks whose documents are read from a folder."""

import gzip
import json
import os
import uuid
from pathlib import Path
from random import Random

import pytest
from lm_eval.api.registry import get_model
from lm_eval.api.samplers import ContextSampler

from evalkit.config import RunConfig
from evalkit.errors import InputError
from evalkit.evaluate.tasks import load_tasks, run_tasks

real_files = pytest.mark.skipif(
    "EVALKIT_DATA" not in os.environ, reason="EVALKIT_DATA names no folder with the files of docs/tasks.md"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of the same layout, made up."""
    there = tmp_path_factory.mktemp("data")
    for split, count in (("train", 30), ("test", 6)):
        rows = [
            {
                "question": f"{split}: what is {i} + 1?",
                "answer": f"It is <<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}",
            }
            for i in range(count)
        ]
        (there / f"gsm8k_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rng = Random(0)

    def new():
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))

    rows = []
    for _ in range(5):
        pairs = [[new(), new()] for _ in range(75)]
        key, value = rng.choice(pairs)
        rows.append({"ordered_kv_records": pairs, "key": key, "value": value})
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    (there / "kv_retrieval_75.jsonl.gz").write_bytes(packed)
    return there


class Answering(get_model("dummy")):
    """Answers with what `answer` makes of a prompt."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def generate_until(self, requests, disable_tqdm=False):
        return [self.answer(request.args[0]) for request in requests]


def scores(answer, name, folder, documents=3):
    (run,) = run_tasks(Answering(answer), [name], documents, 0, candidate="a", data=folder)
    return {
        kept: [s.score for s in run.samples if s.filter == kept] for kept in {s.filter for s in run.samples}
    }


def sums(prompt):
    number = int(prompt.rpartition("what is ")[2].split()[0]) + 1
    return f" It is {number}.\n#### {number}\n\n"


@pytest.mark.parametrize("shots", [5, 20])
def test_gsm8k_shows_the_first_examples_and_scores_the_number(folder, shots):
    name = f"evalkit_gsm8k_{shots}shot"
    asked = []
    assert scores(lambda p: asked.append(p) or sums(p), name, folder) == {
        "strict-match": [1.0] * 3,
        "flexible-extract": [1.0] * 3,
    }
    assert scores(lambda p: sums(p).replace("####", ""), name, folder)["strict-match"] == [0.0] * 3
    assert scores(lambda p: sums(p) + "7", name, folder)["flexible-extract"] == [0.0] * 3
    for number, prompt in enumerate(asked):
        assert prompt.count("Question: train") == shots
        assert prompt.endswith(f"Question: test: what is {number} + 1?\nAnswer:")
        assert prompt.index("what is 0 + 1") < prompt.index(f"what is {shots - 1} + 1")


def look_up(prompt):
    pairs = json.loads(prompt[prompt.index("{") : prompt.index("}") + 1])
    return f' "{pairs[prompt.rpartition("Key: ")[2].split(chr(34))[1]]}"'


def test_key_values_score_the_value_of_the_key_that_is_asked(folder):
    assert scores(look_up, "evalkit_kv_retrieval", folder, 5) == {"uuid": [1.0] * 5}
    assert scores(lambda p: look_up(p)[:-5], "evalkit_kv_retrieval", folder, 5) == {"uuid": [0.0] * 5}


def test_drawn_examples_are_the_same_for_every_candidate(folder):
    name = "evalkit_gsm8k_5shot"
    (task,) = load_tasks((name,), 3, 0, folder)
    first_n, task.sampler = task.sampler, ContextSampler(list(task.dataset["train"]))
    try:
        runs = [run_tasks(Answering(sums), [name], 3, 0, candidate=c, data=folder)[0].samples for c in "ab"]
    finally:
        task.sampler = first_n
    assert [s.prompt_sha256 for s in runs[0]] == [s.prompt_sha256 for s in runs[1]]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "evalkit_gsm8k_5shot",
            "no gsm8k_train.jsonl in data=.*: put it there .*github.com/openai/grade-school-math",
        ),
        (
            "evalkit_kv_retrieval",
            "no kv_retrieval_75.jsonl.gz in data=.*github.com/nelson-liu/lost-in-the-middle",
        ),
    ],
)
def test_a_missing_file_is_met_with_where_to_get_it(tmp_path, name, message):
    with pytest.raises(InputError, match=message) as caught:
        load_tasks((name,), 2, 0, tmp_path)
    assert "\n" not in str(caught.value)


def test_without_a_folder_or_a_hub_the_line_says_which_files_do(monkeypatch):
    with pytest.raises(
        InputError, match=r"key-value retrieval needs data=FOLDER with kv_retrieval_75.jsonl.gz"
    ):
        load_tasks(("evalkit_kv_retrieval",), 2, 0)

    def unreachable(*_):
        raise ConnectionError("no network here")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(
        InputError, match=r"cannot be had from the hub; give data=FOLDER with gsm8k_train.jsonl"
    ):
        load_tasks(("evalkit_gsm8k_5shot",), 2, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "a"', "line 1 is not JSON"),
        ('{"question": "a"}', "line 1 wants the keys question, answer"),
        ("", "is empty"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, text, message):
    (tmp_path / "gsm8k_train.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        load_tasks(("evalkit_gsm8k_5shot",), 2, 0, tmp_path)


def test_only_a_newline_ends_a_row_and_empty_lines_are_none(tmp_path):
    """U+2028 and U+0085 end lines in Unicode and stand in JSON strings as they are."""
    rows = [{"question": f"one\u2028or\x85{number}?", "answer": "#### 1"} for number in range(5)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    for split in ("train", "test"):
        text = "\r\n".join([lines[0], "", *lines[1:], ""])
        (tmp_path / f"gsm8k_{split}.jsonl").write_bytes(text.encode())
    (task,) = load_tasks(("evalkit_gsm8k_5shot",), 5, 0, tmp_path)
    assert [dict(doc) for doc in task.eval_docs] == rows


def test_a_folder_that_is_not_there_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(InputError, match=r"data is .*nowhere, which is no folder"):
        RunConfig.load(overrides=[f"data={tmp_path / 'nowhere'}"])
    assert RunConfig.load(overrides=[f"data={tmp_path}"]).data == tmp_path


@real_files
def test_the_real_files_are_what_is_expected():
    data = Path(os.environ["EVALKIT_DATA"])
    (gsm8k,) = load_tasks(("evalkit_gsm8k_20shot",), 1319, 0, data)
    (pairs,) = load_tasks(("evalkit_kv_retrieval",), 500, 0, data)
    assert (len(gsm8k.eval_docs), len(gsm8k.dataset["train"]), len(pairs.eval_docs)) == (1319, 7473, 500)
    assert scores(look_up, "evalkit_kv_retrieval", data, 500) == {"uuid": [1.0] * 500}
