"""A run that its policy could not be judged by is refused before anything is computed."""

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from evalkit import cli
from evalkit.config import RunConfig
from evalkit.errors import InputError
from evalkit.evaluate.engines.choose import DEFAULT_CANDIDATES
from evalkit.evaluate.tasks import load_tasks, scored
from evalkit.gate.beforehand import Scored, refuse_absent, refuse_unmeasured, refuse_unscored, unplanned
from evalkit.gate.policy import Limit, Policy, load
from evalkit.gate.verdict import judge
from evalkit.gate.words import Verdict

POLICY = Path(__file__).parents[2] / "tasks" / "policies" / "default.toml"
TASKS = {"needle": Scored(metrics=["exact_match"], filters=["answer"])}
RESOLVED = {"bf16": "bf16@flashmla", "fp8_ds_mla": "fp8_ds_mla@flashmla"}


def test_what_a_run_has_is_not_refused(policy: Policy):
    refuse_unscored(policy, "p.toml", TASKS)
    refuse_unmeasured(policy, "p.toml", RunConfig())
    refuse_absent(policy, "p.toml", RESOLVED)
    refuse_absent(replace(policy, decide=("fp8_ds_mla@flashmla",)), "p.toml", RESOLVED)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task": "neddle"}, "task neddle is not scored, did you mean needle?; this run scores needle: add it to tasks"),
        ({"metric": "acc"}, "needle has no metric 'acc'; there are exact_match"),
        ({"filter": "anwser"}, "needle has no filter 'anwser', did you mean answer?; there are answer"),
    ],
)  # fmt: skip
def test_an_endpoint_that_is_not_scored_is_refused(policy: Policy, change: dict[str, str], said: str):
    (endpoint,) = policy.endpoints
    asked = replace(policy, endpoints=(endpoint, replace(endpoint, **change)))
    with pytest.raises(InputError) as refused:
        refuse_unscored(asked, "p.toml", TASKS)
    assert str(refused.value).startswith(f"p.toml: endpoints[1]: {said}")


def test_without_tasks_no_endpoint_is_scored(policy: Policy):
    with pytest.raises(InputError, match="this run scores no tasks: add it to tasks, or leave --policy out"):
        refuse_unscored(policy, "p.toml", {})


@pytest.mark.parametrize(
    ("figure", "config", "said"),
    [
        ("layer.relative_l2", {"stages": ("tasks",)}, "add layers to stages"),
        ("kld.kl_mean_nats", {"stages": ("kld", "tasks")}, "add layers to stages"),
        ("kld.kl_mean_nats", {"stages": ("kld", "tasks"), "kld_texts": ("a.txt",)}, None),
        ("kld.kl_mean_nats", {}, None),
        ("attribution.kl_mean_nats", {}, "set attribution=true"),
        ("attribution.kl_mean_nats", {"attribution": True}, None),
        ("phase.multiple", {"phase_tokens": 0}, "set phase_tokens"),
        ("phase.multiple", {}, None),
        ("task.loss_upper", {"stages": ("tasks",)}, None),
    ],
)
def test_a_limit_on_what_no_stage_records_is_refused(
    policy: Policy, figure: str, config: dict[str, object], said: str | None
):
    limited = replace(policy, limits=(Limit(name="one", figure=figure, at_most=1.0),))
    if said is None:
        refuse_unmeasured(limited, "p.toml", RunConfig(**config))
        return
    with pytest.raises(InputError) as refused:
        refuse_unmeasured(limited, "p.toml", RunConfig(**config))
    assert f"p.toml: limits[0] (one) is on {figure}, which this run does not record: {said}" in str(
        refused.value
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"decide": ("fp8_ds_mla@flashmal",)}, "decide[0]: fp8_ds_mla@flashmal is no candidate of this run, did you mean"),
        ({"baselines": ("bf16", "fp8_e4m3")}, "baselines[1]: fp8_e4m3 is no candidate of this run"),
        ({"baselines": ("bf16", "fp8_ds_mla@flashmla")}, "are both fp8_ds_mla@flashmla here"),
        ({"decide": ("bf16@flashmla",)}, "are both bf16@flashmla here"),
    ],
)  # fmt: skip
def test_a_candidate_that_is_not_there_or_is_its_own_baseline_is_refused(
    policy: Policy, changes: dict[str, tuple[str, ...]], said: str
):
    with pytest.raises(InputError) as refused:
        refuse_absent(replace(policy, **changes), "p.toml", RESOLVED)
    assert said in str(refused.value)


def test_documents_that_were_not_planned_are_told_before_they_are_scored(with_policy: Callable[..., Policy]):
    assert unplanned(with_policy(), 24) == ""
    assert unplanned(with_policy(documents=24), 24) == ""
    assert "plans 100 documents, and task_documents is 24" in unplanned(with_policy(documents=100), 24)
    assert unplanned(with_policy(documents=12, looks=2), 24) == ""
    assert "plans 12 documents a look, up to 24," in unplanned(with_policy(documents=12, looks=2), 36)


def test_tasks_say_what_their_samples_will_name():
    tasks = load_tasks(("evalkit_registers_forced", "evalkit_needle_1024"), 2, 0)
    assert scored(tasks) == {
        "evalkit_registers_forced": Scored(metrics=["acc"], filters=["answer"]),
        "evalkit_needle_1024": Scored(metrics=["exact_match"], filters=["answer"]),
    }
    own = copy.copy(tasks[0])
    own._config = copy.copy(own.config)
    own.config.process_results = lambda document, results: {"what it likes": 1.0}
    assert scored([own])["evalkit_registers_forced"].metrics is None


def test_what_make_nightly_runs_is_what_its_policy_asks_for():
    nightly = RunConfig.load(POLICY.parents[2] / "configs" / "nightly.toml")
    policy = load(POLICY)
    refuse_unscored(policy, str(POLICY), scored(load_tasks(nightly.tasks, 2, 0)))
    refuse_unmeasured(policy, str(POLICY), nightly)
    refuse_absent(policy, str(POLICY), {name: name for name in DEFAULT_CANDIDATES[nightly.engine]})
    assert unplanned(policy, nightly.task_documents) == ""


@pytest.mark.parametrize(
    ("change", "settings", "said"),
    [
        (("", ""), ["tasks=nightly"], "task evalkit_registers_2048 is not scored"),
        (("", ""), ["stages=layers"], "this run scores no tasks"),
        (('filter = "answer"', 'filter = "anwser"'), [], "has no filter 'anwser', did you mean answer?"),
        (("", ""), ["stages=tasks"], "limits[0] (attention, isolated) is on layer.relative_l2"),
        (("", ""), ["candidates=bf16,fp8_ds_mla"], "decide[0]: fp8_e4m3:calibrated is no candidate of this run"),
        (('["bf16"]', '["bf16", "fp8_ds_mla@reference"]'), ["candidates=bf16@reference,fp8_ds_mla,fp8_e4m3:calibrated"],
         "baselines[0]: bf16 is no candidate"),
        (('["bf16"]', '["bf16", "fp8_ds_mla@reference"]'), [], "are both fp8_ds_mla@reference here"),
    ],
)  # fmt: skip
def test_such_a_run_ends_in_a_line_and_leaves_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: tuple[str, str],
    settings: list[str],
    said: str,
):
    file = tmp_path / "policy.toml"
    file.write_text(POLICY.read_text().replace(*change, 1))
    given = [
        "device=cpu",
        f"out={tmp_path / 'runs'}",
        "tasks=evalkit_registers_2048",
        "task_documents=2",
        *settings,
    ]
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", "--policy", str(file), *(f"--set={one}" for one in given)])
    assert ended.value.code == 64
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"evalkit: policy {file}: ")
    assert said in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("change", [{"filter": "anwser"}, {"metric": "acc"}, {"task": "neddle"}])
def test_an_endpoint_that_was_not_scored_anyway_is_missing_and_no_anomaly(
    make_run: Callable[..., Path], policy: Policy, change: dict[str, str]
):
    (endpoint,) = policy.endpoints
    asked = replace(policy, endpoints=(endpoint, replace(endpoint, **change)))
    run = make_run(stored=asked)
    (judged,) = judge(run, asked).candidates
    assert judged.verdict is Verdict.INCONCLUSIVE
    assert f"{run.name} did not score {asked.endpoints[1]}." in [check.reason for check in judged.deciding]
    assert all(check.needs for check in judged.deciding)


def test_an_endpoint_whose_samples_are_gone_is_an_anomaly(make_run: Callable[..., Path], policy: Policy):
    """What was recorded of them is left."""
    run = make_run()
    shutil.rmtree(run / "samples")
    (judged,) = judge(run, policy).candidates
    assert judged.verdict is Verdict.ANOMALOUS
