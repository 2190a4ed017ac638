"""lm-eval only warns when it fails to save: the rows of what it wrote are counted."""

import json
from functools import partial

import pytest
from lm_eval.tasks import TaskManager

from evalkit.evaluate.lm import lm_eval_main


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run(tasks, *arguments)`: `evalkit lm-eval run` with saved samples; the results and the rows by task."""
    # Reading lm-eval's own thousands of tasks and listing this machine's packages takes 15 seconds.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    # The dummy model's tokenizer, which nothing here uses, lies on the hub.
    monkeypatch.setattr("lm_eval.evaluator.add_tokenizer_info", lambda results, lm: None)

    def run(tasks, *arguments):
        out = tmp_path / "out"
        saved = ["--output_path", str(out), "--log_samples"]
        lm_eval_main(["run", "--model", "dummy", "--tasks", tasks, *arguments, *saved])
        (results,) = out.glob("**/results_*.json")
        rows = {
            path.name.removeprefix("samples_").rpartition("_")[0]: [
                json.loads(line) for line in path.read_text().splitlines()
            ]
            for path in out.glob("**/samples_*.jsonl")
        }
        return json.loads(results.read_text()), rows

    return run


def test_every_document_of_every_task_is_saved(run):
    names = ("evalkit_needle", "evalkit_multi_query", "evalkit_registers_steps")
    results, rows = run(",".join(names), "--metadata", '{"documents": 9, "seed": 3}')
    assert {name: len(saved) for name, saved in rows.items()} == dict.fromkeys(names, 9)
    for name in names:
        assert {row["doc_id"] for row in rows[name]} == set(range(9))
        assert results["n-samples"][name] == {"original": 9, "effective": 9}
        assert results["results"][name]["exact_match,answer"] == 0.0
    assert len(rows["evalkit_multi_query"][0]["resps"]) == 4


def test_a_group_is_summed_up_over_its_tasks(run):
    results, rows = run("smoke", "--metadata", '{"documents": 2}')
    assert len(rows) == 8
    assert {len(saved) for saved in rows.values()} == {2}
    assert results["groups"]["smoke"]["exact_match,answer"] == 0.0


def test_a_limit_takes_every_length(run):
    _, rows = run("evalkit_needle", "--limit", "4", "--metadata", '{"documents": 12}')
    assert [row["doc"]["rung"] for row in rows["evalkit_needle"]] == [0, 1, 2, 3]
    sizes = [len(row["doc"]["prompt"]) for row in rows["evalkit_needle"]]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 8 * sizes[0]
