import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from lm_eval.api.registry import get_model

import evalkit
from evalkit.errors import InputError
from evalkit.evaluate import tasks
from evalkit.evaluate.documents import generated_text
from evalkit.evaluate.lm import Coverage
from evalkit.evaluate.tasks import (
    TaskRun,
    load_tasks,
    refuse_long_prompts,
    run_tasks,
    task_records,
)
from evalkit.shipped import tasks_dir
from evalkit.stats.paired import compare


class Knowing(get_model("dummy")):
    """Answers every prompt with what a table says, or with nothing."""

    def __init__(self, answers):
        super().__init__()
        self.answers = answers
        self.coverage = []

    def generate_until(self, requests, disable_tqdm=False):
        for request in requests:
            self.coverage.append(
                Coverage(task=request.task_name, doc_id=request.doc_id, context_tokens=1000, scored_tokens=5)
            )
        return [self.answers.get(request.args[0], "") for request in requests]


@pytest.fixture
def dummy():
    return get_model("dummy")()


def test_a_right_answer_scores_and_pairs_with_a_wrong_one():
    (task,) = load_tasks(("evalkit_walk_1024",), 4, 3)
    docs = list(task.eval_docs)
    right = Knowing({doc["prompt"]: " " + doc["answer"] for doc in docs})
    partly = Knowing({doc["prompt"]: " " + doc["answer"] for doc in docs[1:]})
    (baseline,) = run_tasks(right, ["evalkit_walk_1024"], 4, 3, candidate="bf16@reference")
    (candidate,) = run_tasks(partly, ["evalkit_walk_1024"], 4, 3, candidate="fp8_e4m3:one@reference")
    (result,) = compare(baseline.samples, candidate.samples)
    assert (result.baseline_score, result.score, result.lost, result.gained) == (1.0, 0.75, 1, 0)
    assert [s.response for s in candidate.samples] == ["", *(doc["answer"] for doc in docs[1:])]
    (record,) = task_records(
        "fp8_e4m3:one@reference", "bf16@reference", baseline.samples, candidate.samples,
        wall_s=1.5, mean_context_tokens=1000.0, share_over_topk=0.25, share_stored_rows=0.5,
    )  # fmt: skip
    interval, of_score = result.loss_interval, result.score_interval
    assert interval is not None
    assert of_score is not None
    assert (record.candidate, record.baseline, record.task) == (
        "fp8_e4m3:one@reference",
        "bf16@reference",
        "evalkit_walk_1024",
    )
    assert (record.n, record.baseline_score, record.score, record.loss) == (4, 1.0, 0.75, 0.25)
    assert (record.lost, record.gained, record.mcnemar_p) == (1, 0, result.mcnemar_p)
    assert (record.loss_lower, record.loss_upper) == (interval.lower, interval.upper)
    assert (record.score_lower, record.score_upper) == (of_score.lower, of_score.upper)
    assert (record.wall_s, record.mean_context_tokens) == (1.5, 1000.0)
    assert (record.share_over_topk, record.share_stored_rows, record.decode_step_ms) == (0.25, 0.5, None)


def test_the_prompts_hash_is_that_of_what_was_sent(dummy):
    (task,) = load_tasks(("evalkit_needle_1024",), 3, 0)
    (run,) = run_tasks(dummy, ["evalkit_needle_1024"], 3, 0, candidate="a")
    sent = [hashlib.sha256(doc["prompt"].encode()).hexdigest() for doc in task.eval_docs]
    assert [s.prompt_sha256 for s in run.samples] == sent


def test_documents_depend_on_the_seed_and_nothing_else(dummy):
    def keys(seed, documents=4):
        load_tasks.cache_clear()
        (run,) = run_tasks(dummy, ["evalkit_variables_1024"], documents, seed, candidate="a")
        return [(s.doc_id, s.prompt_sha256, s.target_sha256) for s in run.samples]

    first = keys(0)
    assert keys(0) == first
    assert keys(0, documents=6)[:4] == first
    assert not {prompt for _, prompt, _ in keys(1)} & {prompt for _, prompt, _ in first}


def test_coverage_is_kept_by_task():
    lm = Knowing({})
    lm.coverage.append(Coverage(task="earlier", doc_id=0, context_tokens=1, scored_tokens=1))
    run, _ = run_tasks(lm, ["evalkit_needle_1024", "evalkit_walk_1024"], 3, 0, candidate="a")
    assert len(run.coverage) == 3
    assert (run.mean_context_tokens, run.share_over(512), run.share_over(1001)) == (
        1000.0,
        1.0,
        pytest.approx(3 / 5),
    )
    assert run.wall_s > 0


def test_without_coverage_there_is_no_share():
    run = TaskRun(task="t", samples=(), coverage=(), wall_s=0.0)
    assert (run.mean_context_tokens, run.share_over(512)) == (None, None)


def test_samples_that_went_missing_are_an_error(dummy, monkeypatch):
    evaluate = tasks.evaluate

    def losing(*args, **kwargs):
        results = evaluate(*args, **kwargs)
        results["samples"]["evalkit_needle_1024"].pop()
        return results

    monkeypatch.setattr(tasks, "evaluate", losing)
    with pytest.raises(RuntimeError, match="filter answer: 2 documents came back, 3 were asked for"):
        run_tasks(dummy, ["evalkit_needle_1024"], 3, 0, candidate="a")


def test_a_typing_error_in_a_tasks_name_is_met_with_the_name(dummy, monkeypatch):
    manager = tasks.TaskManager
    # Reading lm-eval's own thousands of tasks would take ten seconds.
    monkeypatch.setattr(tasks, "TaskManager", lambda **k: manager(**(k | {"include_defaults": False})))
    with pytest.raises(InputError, match="unknown task evalkit_wolk_1024; did you mean evalkit_walk_1024"):
        run_tasks(dummy, ["evalkit_wolk_1024"], 3, 0, candidate="a")


def test_nothing_to_ask_is_refused(dummy):
    with pytest.raises(InputError, match="0 documents: want at least 1"):
        run_tasks(dummy, ["evalkit_needle_1024"], 0, 0, candidate="a")


def test_a_changed_candidate_name_does_not_break_the_pairing(dummy):
    (run,) = run_tasks(dummy, ["evalkit_needle_1024"], 2, 0, candidate="a")
    (result,) = compare(run.samples, [replace(sample, candidate="b") for sample in run.samples])
    assert (result.n, result.loss) == (2, 0.0)


def test_tasks_run_without_a_network(tmp_path):
    """In a process of its own, where every connection fails."""
    code = """
import json, socket
def refuse(*a, **k): raise OSError("no network here")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from lm_eval.api.registry import get_model
from evalkit.evaluate.tasks import run_tasks, task_records
(run,) = run_tasks(get_model("dummy")(), ["evalkit_needle_1024"], 2, 0, candidate="a")
print(json.dumps([s.prompt_sha256 for s in run.samples]))
"""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": str(Path(evalkit.__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    here = run_tasks(get_model("dummy")(), ["evalkit_needle_1024"], 2, 0, candidate="a")[0].samples
    assert json.loads(done.stdout) == [s.prompt_sha256 for s in here]


def test_a_task_too_long_for_the_model_is_refused_before_anything_is_scored(make_lm):
    lm = make_lm()
    with pytest.raises(InputError, match=r"evalkit_needle_1024 document 0: prompt of \d+ tokens"):
        refuse_long_prompts(lm, load_tasks(("evalkit_needle_1024",), 2, 0), 2)
    assert not lm.coverage


def test_generated_text_is_a_prompt_with_its_answer():
    text = generated_text("walk", 1024, seed=5)
    assert text.startswith("Facts:")
    assert text.endswith(".")
    assert text != generated_text("walk", 1024, seed=6)
    with pytest.raises(InputError, match="a walk document of 64 tokens"):
        generated_text("walk", 64, seed=5)


GRADING = """
def grade(doc, results):
    right = sum(a == b for a, b in zip(results[0].split(), doc["answer"].split(), strict=False))
    return {"share": right / len(doc["answer"].split()), "wrong": float(results[0] != doc["answer"])}
"""
GRADED = """
include: _evalkit_walk_yaml
task: evalkit_graded
dataset_kwargs: {generate: {generator: walk, length: [384], steps: [8]}}
process_results: !function grading.grade
metric_list:
"""
SHARE = "  - {metric: share, aggregation: mean, higher_is_better: true}\n"
WRONG = "  - {metric: wrong, aggregation: mean, higher_is_better: false}\n"


@pytest.fixture
def graded(tmp_path, monkeypatch):
    """Write a task that grades, with these metrics."""
    for name in ("lm_eval_docs.py", "documents", "_evalkit_yaml", "_evalkit_walk_yaml"):
        (tmp_path / name).symlink_to(tasks_dir() / name)
    (tmp_path / "grading.py").write_text(GRADING)
    monkeypatch.setattr(tasks, "tasks_dir", lambda: tmp_path)
    load_tasks.cache_clear()

    def write(*metrics: str) -> None:
        (tmp_path / "graded.yaml").write_text(GRADED + "".join(metrics))

    yield write
    load_tasks.cache_clear()


def test_graded_scores_are_recorded_and_compared(graded, capsys):
    graded(SHARE, WRONG)
    (task,) = load_tasks(("evalkit_graded",), 4, 3)
    docs = list(task.eval_docs)
    right = Knowing({doc["prompt"]: " " + doc["answer"] for doc in docs})
    half = Knowing(
        {
            doc["prompt"]: " " + " ".join(doc["answer"].split()[: len(doc["answer"].split()) // 2])
            for doc in docs
        }
    )
    (before,) = run_tasks(right, ["evalkit_graded"], 4, 3, candidate="bf16@reference")
    (after,) = run_tasks(half, ["evalkit_graded"], 4, 3, candidate="fp8_e4m3:one@reference")
    assert {s.metric for s in after.samples} == {"share"}
    assert (
        "evalkit_graded: wrong is left out: it is no mean over documents of which more is better"
        in capsys.readouterr().err
    )
    wanted = [len(doc["answer"].split()) // 2 / len(doc["answer"].split()) for doc in docs]
    assert [s.score for s in after.samples] == wanted
    (record,) = task_records(
        "fp8_e4m3:one@reference", "bf16@reference", before.samples, after.samples,
        wall_s=1.0, mean_context_tokens=None, share_over_topk=None, share_stored_rows=None,
    )  # fmt: skip
    assert (record.baseline_score, record.score) == (1.0, pytest.approx(sum(wanted) / 4))
    assert (record.lost, record.gained, record.mcnemar_p, record.loss_lower) == (None, None, None, None)


def test_a_task_without_a_metric_to_pair_is_refused_before_it_runs(graded):
    graded(WRONG)
    with pytest.raises(
        InputError, match="evalkit_graded: wrong: no mean over documents of which more is better"
    ):
        load_tasks(("evalkit_graded",), 4, 3)
