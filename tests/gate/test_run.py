"""A run made for a policy: what it stores before it scores, the damage that it plants, and its verdict."""

import json
import shutil
from pathlib import Path

import pytest

from evalkit import cli, environment, pipeline
from evalkit.arm_names import damage_arm
from evalkit.config import RunConfig
from evalkit.errors import InputError
from evalkit.gate.contradictions import WORDS
from evalkit.gate.evidence import Evidence
from evalkit.gate.policy import load
from evalkit.gate.verdict import judge
from evalkit.model.checkpoint import EMBEDDED
from evalkit.records import EnvironmentRecord, PolicyRecord, RunDirectory, StageRecord, only
from evalkit.report import bundle
from tests.conftest import random_model

POLICIES = Path(__file__).parents[2] / "tasks" / "policies"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    directory = tmp_path_factory.mktemp("checkpoint")
    random_model(
        vocab_size=1024,
        num_hidden_layers=1,
        first_k_dense_replace=1,
        max_position_embeddings=2048,
        index_topk=64,
    ).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / "dsa-nano" / name, directory)
    policy = tmp_path_factory.mktemp("policy") / "policy.toml"
    text = (POLICIES / "default.toml").read_text()
    (listed,) = load(POLICIES / "default.toml").scope.checkpoints.values()
    (endpoint,) = load(POLICIES / "default.toml").endpoints
    text = text.replace(listed, environment.sha256(directory)).replace(endpoint.task, "evalkit_needle_1024")
    policy.write_text(text.replace('"fp8_e4m3:calibrated", ', ""))
    return RunConfig(
        checkpoint=str(directory), device="cpu", candidates=("bf16", "fp8_ds_mla"), layers_prompt_tokens=96,
        layers_decode_tokens=2, tasks=("evalkit_multi_key_384", "evalkit_needle_1024"), task_documents=2, batch_size=2, policy=str(policy),
        out=tmp_path_factory.mktemp("out") / "runs",
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(config: RunConfig) -> Path:
    return pipeline.run(config)


def test_the_policy_is_stored_before_anything_is_scored(run: Path, config: RunConfig):
    kinds = [type(record) for record in RunDirectory(run).read()]
    assert kinds.index(PolicyRecord) < kinds.index(StageRecord)
    assert config.policy is not None
    assert Evidence.read(run).policy_sha256 == load(config.policy).sha256


def test_every_word_that_a_run_records_may_be_selected_by(run: Path):
    for record in RunDirectory(run).read():
        for field, words in WORDS.items():
            assert getattr(record, field, words[0]) in words


def test_damage_is_planted_into_the_baseline_on_the_same_documents(run: Path, config: RunConfig):
    assert config.policy is not None
    noise = load(config.policy).damage.noise
    evidence = Evidence.read(run)
    whole, arm = evidence.damaged("bf16@reference", noise)
    assert (whole, arm) == ("bf16@reference", damage_arm("bf16@reference", noise))
    asked = [s for s in evidence.samples if s.task == "evalkit_needle_1024"]
    prompts = [
        [s.prompt_sha256 for s in asked if s.candidate == name]
        for name in (whole, arm, "fp8_ds_mla@reference")
    ]
    assert prompts[0] == prompts[1] == prompts[2]
    answers = [[s.response for s in asked if s.candidate == name] for name in (whole, arm)]
    assert answers[0] != answers[1]
    assert all(s.generated_tokens is not None and s.truncated is not None for s in evidence.samples)


def test_damage_is_scored_on_the_tasks_of_the_endpoints_alone(run: Path):
    arms: dict[str, set[str]] = {}
    for sample in Evidence.read(run).samples:
        arms.setdefault(sample.candidate, set()).add(sample.task)
    endpoint, every = {"evalkit_needle_1024"}, {"evalkit_needle_1024", "evalkit_multi_key_384"}
    assert len(arms) == 4
    assert all(tasks == (endpoint if "rows times" in name else every) for name, tasks in arms.items())


def test_a_random_model_is_anomalous_for_its_answers_never_end(run: Path, config: RunConfig):
    assert config.policy is not None
    judgement = judge(run, load(config.policy))
    assert not judgement.post_hoc
    assert judgement.exit_code == 12
    assert "cut off at their length limit" in judgement.candidates[0].deciding[0].reason


def test_a_run_does_not_go_on_under_another_policy(run: Path, config: RunConfig):
    assert config.policy is not None
    policy = Path(config.policy)
    before = policy.read_text()
    path = run / "records.jsonl"
    whole = path.read_text()
    path.write_text("".join(line for line in whole.splitlines(True) if '"stage": "report"' not in line))
    policy.write_text(before.replace("margin = 0.05", "margin = 0.06"))
    try:
        with pytest.raises(InputError, match="was begun with policy"):
            pipeline.run(config, resume=run)
    finally:
        policy.write_text(before)
        path.write_text(whole)


def test_a_run_goes_on_from_another_folder_under_its_policy(
    run: Path, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It was named by a path within the folder where the run began."""
    assert config.policy is not None
    stopped = RunDirectory(shutil.copytree(run, tmp_path / "stopped"))
    # The checkout may change while the test runs.
    monkeypatch.setattr(environment, "commit", lambda: only(stopped.read(), EnvironmentRecord)[0].commit)
    monkeypatch.chdir(Path(config.policy).parent)
    begun = json.loads((stopped.path / "run.json").read_text())
    begun["config"]["policy"] = RunConfig.load(None, policy=Path(config.policy).name).policy
    (stopped.path / "run.json").write_text(json.dumps(begun))
    records = stopped.path / "records.jsonl"
    kept = [line for line in records.read_text().splitlines(True) if '"stage": "report"' not in line]
    records.write_text("".join(kept))
    (stopped.path / "report.html").unlink()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", "--resume", "stopped"])
    assert ended.value.code == 0
    assert (stopped.path / "report.html").exists()


def test_a_bundle_is_judged_as_its_run_and_stays_as_it_was_signed(
    run: Path, config: RunConfig, tmp_path: Path
):
    signed = tmp_path / "signed.zip"
    before = bundle.write(run, signed)
    codes = []
    for what in (run, signed):
        with pytest.raises(SystemExit) as caught:
            cli.main(["gate", str(what), "--policy", config.policy])
        codes.append(caught.value.code)
    assert codes == [12, 12]
    assert bundle.sha256(signed) == before
