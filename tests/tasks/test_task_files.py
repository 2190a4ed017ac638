"""What every task file promises, and what each group holds."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer

import evalkit
from evalkit.errors import InputError
from evalkit.evaluate.tasks import load_tasks, run_tasks
from evalkit.shipped import tasks_dir
from tests.tasks.solver import solve

FILES = sorted(path.stem for path in tasks_dir().glob("*.yaml"))
FROM_FILES = ["evalkit_gsm8k_20shot", "evalkit_gsm8k_5shot", "evalkit_kv_retrieval"]
IN_ONE_PASS = "evalkit_registers_forced"
GENERATED = [name for name in FILES if name.startswith("evalkit_") and name not in [*FROM_FILES, IN_ONE_PASS]]
GROUPS = ["nightly", "signoff", "signoff_hub", "signoff_models", "smoke"]
TOPK = 512
DOCUMENTS = 8  # as many as the longest ladder has rungs

each_task = pytest.mark.parametrize("name", GENERATED)


class Knowing(get_model("dummy")):
    """Answers every prompt with what a table says, or with nothing."""

    def __init__(self, answers):
        super().__init__()
        self.answers = answers

    def generate_until(self, requests, disable_tqdm=False):
        return [self.answers.get(request.args[0], "") for request in requests]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(Path(evalkit.__file__).parent / "checkpoints/dsa-nano/tokenizer.json"))


@pytest.fixture
def without_lm_evals_own(monkeypatch):
    """Reading lm-eval's own thousands of tasks takes ten seconds."""
    manager = evalkit.evaluate.tasks.TaskManager
    monkeypatch.setattr(
        evalkit.evaluate.tasks, "TaskManager", lambda **k: manager(**(k | {"include_defaults": False}))
    )


def task_of(name, documents=DOCUMENTS, seed=0):
    (task,) = load_tasks((name,), documents, seed)
    return task


def length_of(task, doc):
    length = task.config.dataset_kwargs["generate"]["length"]
    return length[doc["rung"]] if isinstance(length, list) else length


def group(name):
    return yaml.safe_load((tasks_dir() / f"{name}.yaml").read_text())["task"]


def test_every_file_is_a_task_or_a_group():
    assert sorted([*GENERATED, *FROM_FILES, IN_ONE_PASS, *GROUPS]) == FILES
    assert len(GENERATED) >= 30


@each_task
def test_a_task_renders_its_documents_and_scores_them(name):
    (run,) = run_tasks(get_model("dummy")(), [name], documents=5, seed=0, candidate="bf16@reference")
    assert [(s.task, s.doc_id, s.metric, s.filter) for s in run.samples] == [
        (name, i, "exact_match", "answer") for i in range(5)
    ]
    assert [s.score for s in run.samples] == [0.0] * 5
    assert len({s.prompt_sha256 for s in run.samples}) == 5


@each_task
def test_right_answers_score_and_one_wrong_one_does_not(name):
    docs = list(task_of(name, 4).eval_docs)
    answers = {q["prompt"]: f" {q['answer']}" for doc in docs for q in doc["queries"]}
    wrong = docs[2]["queries"][0 if name.startswith("evalkit_multi_query") else -1]
    (right,) = run_tasks(Knowing(answers), [name], 4, 0, candidate="a")
    (partly,) = run_tasks(Knowing(answers | {wrong["prompt"]: " 1"}), [name], 4, 0, candidate="b")
    assert [s.score for s in right.samples] == [1.0] * 4
    assert [s.score for s in partly.samples] == [1.0, 1.0, 0.0, 1.0]


@each_task
def test_prompts_and_answers_are_what_the_file_says(tokenizer, name):
    def tokens(text):
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    task = task_of(name)
    settings = task.config.generation_kwargs
    assert settings["until"] == ["."]
    longest = 0
    for doc in task.eval_docs:
        length = length_of(task, doc)
        assert 0.95 * length <= tokens(doc["prompt"]) <= length
        assert doc["prompt"] == doc["queries"][-1]["prompt"]
        for query in doc["queries"]:
            assert solve(query["prompt"]) == f" {query['answer']}."
            assert "." not in query["answer"]
            longest = max(longest, tokens(f" {query['answer']}."))
    assert longest <= settings["max_gen_toks"] <= max(32, 2 * 11 * 72)


@each_task
def test_the_first_documents_take_every_length(name):
    task = task_of(name)
    spec = task.config.dataset_kwargs["generate"]
    rungs = max([len(value) for value in spec.values() if isinstance(value, list)], default=1)
    assert [doc["rung"] for doc in task.eval_docs] == [i % rungs for i in range(DOCUMENTS)]
    seen = {length_of(task, doc) for doc in list(task.eval_docs)[:rungs]}
    lengths = spec["length"]
    assert seen == set(lengths if isinstance(lengths, list) else [lengths])
    if "steps" in spec and isinstance(spec["steps"], list):
        steps = [doc["answer"].count("makes") for doc in task.eval_docs]
        assert steps == (spec["steps"] * DOCUMENTS)[:DOCUMENTS]


class Greedy(get_model("dummy")):
    """Would decode the continuations of a table greedily, and no others."""

    def __init__(self, continuations):
        super().__init__()
        self.continuations = continuations

    def loglikelihood(self, requests, disable_tqdm=False):
        return [(-1.0, self.continuations.get(r.args[0]) == r.args[1]) for r in requests]


def test_what_is_scored_in_one_pass_is_the_document_that_is_generated():
    docs = list(task_of("evalkit_registers_576", 4).eval_docs)
    assert list(task_of(IN_ONE_PASS, 4).eval_docs) == docs
    traces = {doc["prompt"]: f" {doc['answer']}." for doc in docs}
    assert all(trace == solve(prompt) for prompt, trace in traces.items())
    wrong = traces | {docs[2]["prompt"]: " 1."}
    for table, scores in ((traces, [1.0, 1.0, 1.0, 1.0]), (wrong, [1.0, 1.0, 0.0, 1.0])):
        (run,) = run_tasks(Greedy(table), [IN_ONE_PASS], 4, 0, candidate="a")
        assert [(s.metric, s.filter, s.score) for s in run.samples] == [("acc", "answer", x) for x in scores]
    (made,) = run_tasks(get_model("dummy")(), ["evalkit_registers_576"], 4, 0, candidate="b")
    assert [s.prompt_sha256 for s in made.samples] == [s.prompt_sha256 for s in run.samples]


def test_nightly_and_signoff_ask_below_and_above_the_top_k():
    for name in group("nightly"):
        lengths = task_of(name).config.dataset_kwargs["generate"]["length"]
        assert min(lengths) < TOPK < max(lengths)
        assert lengths[0] == 384
        assert lengths[-1] == 4096


def test_groups_hold_what_they_say():
    assert set(group("nightly")) < set(group("signoff")) <= set(GENERATED)
    assert set(group("smoke")) <= set(GENERATED)
    assert set(FROM_FILES) < set(group("signoff_models"))
    for name in ("smoke", "nightly", "signoff"):
        tasks = load_tasks((name,), 2, 0)
        assert [task.task_name for task in tasks] == group(name)
    assert (
        max(length_of(task, doc) for task in load_tasks(("smoke",), 2, 0) for doc in task.eval_docs) == 1024
    )


@pytest.mark.slow
def test_tasks_of_the_hub_are_known_to_lm_eval():
    known = set(TaskManager(include_path=str(tasks_dir())).all_tasks)
    assert set(group("signoff_hub")) <= known
    assert not set(group("signoff_hub")) & set(FILES)


def test_a_group_of_lm_evals_tasks_is_looked_up_among_lm_evals(monkeypatch):
    asked = []
    manager = evalkit.evaluate.tasks.TaskManager

    def watched(**options):
        asked.append(options.get("include_defaults", True))
        return manager(**(options | {"include_defaults": False}))

    monkeypatch.setattr(evalkit.evaluate.tasks, "TaskManager", watched)
    evalkit.evaluate.tasks._manager(("smoke",), {})
    assert asked == [False]
    evalkit.evaluate.tasks._manager(("signoff_hub",), {})
    assert asked == [False, False, True]


def test_documents_are_the_same_in_every_process_and_for_every_number_asked_for():
    """Hash seeds differ from process to process, and with them the order of sets."""
    code = """
import sys, json
from evalkit.evaluate.tasks import load_tasks
names, documents = json.loads(sys.argv[1]), int(sys.argv[2])
print(json.dumps({task.task_name: [d["prompt"] + d["answer"] for d in task.eval_docs][:3]
    for task in load_tasks(tuple(names), documents, 5)}))
"""
    made = []
    for hash_seed, documents in (("1", 3), ("2", 5)):
        environment = os.environ | {
            "PYTHONHASHSEED": hash_seed,
            "PYTHONPATH": os.pathsep.join(
                [str(Path(evalkit.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
            ),
        }
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(GENERATED), str(documents)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        made.append(json.loads(done.stdout))
    assert sorted(made[0]) == GENERATED
    assert made[0] == made[1]
    here = [d["prompt"] + d["answer"] for d in task_of("evalkit_registers_steps", 3, 5).eval_docs]
    assert made[0]["evalkit_registers_steps"] == here


def test_candidates_are_asked_the_same(monkeypatch):
    first = run_tasks(get_model("dummy")(), ["evalkit_multi_query"], 4, 0, candidate="a")
    load_tasks.cache_clear()
    second = run_tasks(get_model("dummy")(), ["evalkit_multi_query"], 4, 0, candidate="b")
    hashes = [[(s.prompt_sha256, s.target_sha256) for s in run[0].samples] for run in (first, second)]
    assert hashes[0] == hashes[1]
    (doc, *_) = task_of("evalkit_multi_query", 4).eval_docs
    texts = [part for q in doc["queries"] for part in (q["prompt"], str(GREEDY))]
    assert hashes[0][0][0] == hashlib.sha256("\0".join(texts).encode()).hexdigest()


GREEDY = {"until": ["."], "do_sample": False, "temperature": 0.0, "max_gen_toks": 8}


@pytest.mark.parametrize(
    ("generate", "message"),
    [
        ({"generator": "walk", "length": 1024, "step": 8}, "document 0: task 'walk' has no option 'step'"),
        ({"generator": "wolk", "length": 1024}, "unknown task 'wolk'"),
        ({"generator": "walk"}, "generate says no length; it says generator"),
        (
            {"generator": "walk", "length": [384, 1024], "steps": [1, 2, 3]},
            "equally long, and not empty: length 2, steps 3",
        ),
        ({"generator": "walk", "length": []}, "not empty: length 0"),
        (
            {"generator": "walk", "length": [1024, 100], "steps": 32},
            "document 1: .* does not fit into 100 tokens",
        ),
    ],
)
def test_a_task_file_that_says_what_cannot_be_made_is_refused(tmp_path, monkeypatch, generate, message):
    for name in ("lm_eval_docs.py", "documents", "_evalkit_yaml", "_evalkit_walk_yaml"):
        (tmp_path / name).symlink_to(tasks_dir() / name)
    (tmp_path / "own.yaml").write_text(
        yaml.safe_dump(
            {"include": "_evalkit_walk_yaml", "task": "evalkit_own", "dataset_kwargs": {"generate": generate}}
        )
    )
    monkeypatch.setattr("evalkit.evaluate.tasks.tasks_dir", lambda: tmp_path)
    with pytest.raises(InputError, match=message):
        load_tasks(("evalkit_own",), 2, 0)


def test_a_second_word_beside_generate_is_no_part_of_a_document():
    """lm-eval passes on metadata of every kind; what makes a document stands in one place, where all is checked."""
    for name in GENERATED:
        kwargs = task_of(name, 2).config.dataset_kwargs
        assert list(kwargs) == ["generate"]
