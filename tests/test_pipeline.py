"""The main line on a small random checkpoint: what a run leaves behind, and what a killed one comes to."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from evalkit import cli, environment, pipeline, prepare, versions
from evalkit.config import RunConfig
from evalkit.errors import InputError
from evalkit.evaluate.documents import CALIBRATION_DOCUMENTS, calibration_documents
from evalkit.model.checkpoint import EMBEDDED
from evalkit.records import (
    AnswerLengthRecord,
    AttributionRecord,
    CandidateRecord,
    DivergenceRecord,
    EnvironmentRecord,
    LayerRecord,
    MissingScaleRecord,
    PhaseRecord,
    PositionRecord,
    RangeRecord,
    Record,
    RunDirectory,
    SelectionRecord,
    StageRecord,
    TaskRecord,
    TokenRecord,
    WorstTokenRecord,
    only,
    read_samples,
)
from evalkit.report import tables
from tests.conftest import random_model

CANDIDATES = [
    "bf16@reference",
    "fp8_e4m3:one@reference",
    "fp8_e4m3:calibrated@reference",
    "fp8_ds_mla@reference",
]
CONTROL = "bf16@reference, batches of 1"
DOCUMENTS = 2


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    directory = tmp_path_factory.mktemp("checkpoint")
    random_model(
        vocab_size=1024, num_hidden_layers=2, max_position_embeddings=2048, index_topk=64
    ).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / "dsa-nano" / name, directory)
    return RunConfig(
        name="small",
        checkpoint=str(directory),
        device="cpu",
        layers_prompt_tokens=96,
        layers_decode_tokens=3,
        tasks=("evalkit_needle_1024",),
        task_documents=DOCUMENTS,
        batch_size=2,
        out=tmp_path_factory.mktemp("out") / "runs",
    )


@pytest.fixture(scope="module")
def run(config: RunConfig) -> RunDirectory:
    """A run that nothing disturbed."""
    return RunDirectory(pipeline.run(config))


def written(run: RunDirectory) -> dict[str, tuple[int, int]]:
    return {
        path.relative_to(run.path).as_posix(): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in run.path.rglob("*")
        if path.is_file()
    }


def stages(run: RunDirectory) -> list[str]:
    return [record.stage for record in only(run.read(), StageRecord)]


def without_times(records: Sequence[Record]) -> list[dict[str, Any]]:
    varying = ("wall_s", "started_utc", "command", "commit")
    return [
        {
            key: value
            for key, value in asdict(r).items()
            if key not in varying and not key.startswith("decode_step_")
        }
        for r in records
    ]


def test_every_stage_is_recorded_in_its_order(run: RunDirectory):
    assert stages(run)[:4] == ["environment", "layers", "divergence", "phases"]
    assert set(stages(run)[4:6]) == {f"tasks {name}" for name in (CANDIDATES[0], CONTROL)}
    assert stages(run)[6:] == [*(f"tasks {name}" for name in CANDIDATES[1:]), "answers", "report"]


def test_records_of_every_kind_are_there_for_every_candidate(run: RunDirectory):
    records = run.read()
    (where,) = only(records, EnvironmentRecord)
    assert where.packages.keys() >= {"torch", "transformers", "lm_eval"}
    assert ("triton" in where.packages) == environment.has_triton()
    assert where.untested == versions.untested(where.packages)
    for kind in (CandidateRecord, LayerRecord, SelectionRecord, TokenRecord, TaskRecord):
        assert list(dict.fromkeys(r.candidate for r in only(records, kind))) == CANDIDATES, kind
    scaled = [name for name in CANDIDATES if ":" in name]
    assert list(dict.fromkeys(r.candidate for r in only(records, RangeRecord))) == scaled
    layers = only(records, LayerRecord)
    assert {r.phase for r in layers} == {"prefill", "decode"}
    assert {r.mode for r in layers} == {"isolated", "propagated"}
    assert {r.rung for r in layers} >= {"total", "format", "kernel"}
    assert {r.layer for r in layers} == {None, 0, 1}
    for kind in (PhaseRecord, DivergenceRecord, PositionRecord, WorstTokenRecord):
        assert {CANDIDATES[-1]} <= {r.candidate for r in only(records, kind)}, kind
    assert {r.candidate for r in only(records, MissingScaleRecord)} == {c for c in CANDIDATES if ":one" in c}


def test_bf16_differs_from_itself_nowhere_and_fp8_does(run: RunDirectory):
    totals = {
        name: [
            r.relative_l2
            for r in only(run.read(), LayerRecord)
            if (r.candidate, r.probe, r.rung) == (name, "attention", "total")
        ]
        for name in CANDIDATES
    }
    assert set(totals[CANDIDATES[0]]) == {0.0}
    for name in CANDIDATES[1:]:
        assert all(0.005 < value < 0.2 for value in totals[name])


def test_what_was_read_back_is_what_the_format_takes(run: RunDirectory):
    for record in only(run.read(), CandidateRecord):
        assert record.bytes_per_token_read_back == record.row_bytes_per_token


def test_every_candidate_answered_the_same_documents(run: RunDirectory):
    samples = read_samples(run.path)
    asked = {
        name: [(s.doc_id, s.prompt_sha256, s.target_sha256) for s in samples if s.candidate == name]
        for name in (*CANDIDATES, CONTROL)
    }
    assert len(asked[CONTROL]) == DOCUMENTS
    assert all(documents == asked[CONTROL] for documents in asked.values())
    assert {r.n for r in only(run.read(), TaskRecord)} == {DOCUMENTS}


def test_the_baseline_is_held_against_itself_in_other_batches(run: RunDirectory):
    tasks = only(run.read(), TaskRecord)
    assert [record.baseline for record in tasks] == [CONTROL, *[CANDIDATES[0]] * 3]


def test_the_reports_show_what_was_recorded_with_bf16_first(run: RunDirectory):
    records = run.read()
    page = (run.path / "report.html").read_text(encoding="utf-8").replace("<wbr>", "")
    summary = (run.path / "summary.md").read_text(encoding="utf-8")
    rows = tables.candidates(records).rows
    assert [row[0] for row in rows] == CANDIDATES
    for row in (*rows, *tables.tasks(records).rows, *tables.tokens(records).rows):
        assert f"| {' | '.join(row)} |" in summary
        for cell in row:
            assert f">{cell}</td>" in page
    assert page.index(">bf16@reference</td>") < page.index(">fp8_e4m3:one@reference</td>")
    values = [r.relative_l2 for r in only(records, LayerRecord) if r.rung == "total" and r.layer == 1]
    assert all(value is None or not value or json.dumps(value) in page for value in values)


def test_a_run_that_has_ended_is_left_as_it_is(run: RunDirectory, monkeypatch: pytest.MonkeyPatch):
    before = written(run)
    monkeypatch.setattr(pipeline, "prepare", lambda config: pytest.fail("it was prepared again"))
    with pytest.raises(SystemExit) as caught:
        cli.main(["run", "--resume", str(run.path)])
    assert caught.value.code == 0
    assert written(run) == before


@pytest.mark.parametrize("stage", ["layers", f"tasks {CANDIDATES[1]}"])
def test_a_run_killed_in_a_stage_goes_on_to_the_same_records(
    stage: str, run: RunDirectory, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The kill comes when the stage has written some of its records, so that half a stage lies on disk."""
    # The checkout may change while the test runs.
    monkeypatch.setattr(environment, "commit", lambda: "of the run")
    killed = RunDirectory.create(tmp_path, "killed", config.to_json(), "evalkit run")
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED_IN, stage, str(killed.path)], stderr=subprocess.PIPE, text=True
    )
    _, err = process.communicate(timeout=200)
    assert process.returncode == -signal.SIGKILL, err
    assert stages(killed) == stages(run)[: stages(run).index(stage)]
    assert list(killed.path.glob("*.jsonl.tmp"))

    with pytest.raises(SystemExit) as caught:
        cli.main(["run", "--resume", str(killed.path)])
    assert caught.value.code == 0
    assert without_times(killed.read()) == without_times(run.read())
    assert without_times(read_samples(killed.path)) == without_times(read_samples(run.path))
    assert written(killed).keys() == written(run).keys()


# Kills itself with the third record of a stage on disk: nothing is flushed, closed or tidied.
KILLED_IN = """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace
import torch
from evalkit import environment, pipeline, records
from evalkit.config import RunConfig
from evalkit.errors import InputError

torch.set_num_threads(1)
environment.commit = lambda: "of the run"
stage, path = sys.argv[1], Path(sys.argv[2])
write, left = records.RecordWriter.write, 2

def write_then_die(self, record):
    global left
    write(self, record)
    if self._file.name.endswith(records.file_name(stage) + ".jsonl.tmp"):
        left -= 1
        if not left:
            self._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

records.RecordWriter.write = write_then_die
pipeline.run(RunConfig.from_json(records.RunDirectory(path).config), path)
"""


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        ({"torch": "2.13.0"}, {"torch": "2.13.0"}, None),
        ({"torch": "2.13.0"}, {"torch": "2.14.1"}, "was begun with torch 2.13.0, here it is 2.14.1"),
        ({"torch": "2.13.0"}, {"torch": "2.13.0", "vllm": "1"}, "was begun with vllm None, here it is 1"),
        ({"torch": "2.13.0"}, {"torch": "2.13.0", "triton": "1"}, "was begun with triton None, here it is 1"),
    ],
)
@pytest.mark.parametrize("old", [False, True])
def test_a_run_goes_on_with_the_packages_that_it_recorded(
    then: dict[str, str],
    now: dict[str, str],
    said: str | None,
    old: bool,
    run: RunDirectory,
    config: RunConfig,
    tmp_path: Path,
):
    """An old run recorded no triton, which may have been there."""
    (record,) = only(run.read(), EnvironmentRecord)
    begun = RunDirectory.create(tmp_path, "begun", config.to_json(), "evalkit run")
    with begun.stage("environment") as write:
        write.write(replace(record, packages=then, untested=None if old else []))
    if old:
        path = begun.path / "records.jsonl"
        path.write_text(path.read_text().replace(', "untested": null', ""))
    prepared: Any = SimpleNamespace(candidates=[], policy=None, ranges=[])
    refused = (
        pytest.raises(InputError, match=said) if said and not (old and "triton" in said) else nullcontext()
    )
    with refused:
        pipeline._refuse_other(begun, replace(record, packages=now, untested=[]), prepared)


@pytest.mark.parametrize(
    ("named", "leads"),
    [
        (("fp8_ds_mla@reference",), "bf16"),
        (("fp8_ds_mla@reference", "bf16@reference"), "bf16@reference"),
        (("bfloat16@reference", "fp8_ds_mla@reference"), "bfloat16@reference"),
        ("default", "bf16"),
    ],
)
def test_what_stores_bf16_leads_and_is_named_once(named: Any, leads: str):
    requested = prepare._requested(RunConfig(candidates=named))
    assert requested[0] == leads
    assert len(requested) == len(set(requested))


def test_layers_alone_go_on_as_layers_alone(config: RunConfig, tmp_path: Path):
    alone = config.with_values(stages=("layers",), candidates=("bf16@reference",), out=tmp_path)
    assert RunConfig.from_json(RunDirectory(pipeline.run(alone)).config) == alone
    (path,) = tmp_path.iterdir()
    assert stages(RunDirectory(path)) == ["environment", "layers", "divergence", "phases", "report"]


def test_attribution_is_a_stage_of_its_own_over_the_first_tokens(config: RunConfig, tmp_path: Path):
    asked = config.with_values(
        stages=("layers",),
        attribution=True,
        attribution_tokens=40,
        candidates=("bf16@reference", "fp8_ds_mla@reference"),
        out=tmp_path,
    )
    done = RunDirectory(pipeline.run(asked))
    assert stages(done) == ["environment", "layers", "divergence", "phases", "attribution", "report"]
    found = only(done.read(), AttributionRecord)
    assert {(r.candidate, r.n) for r in found if r.layer is None} == {("fp8_ds_mla@reference", 40)}
    assert {r.squared_relative_l2 for r in found if r.layer is not None and r.component == "rope"} >= {0.0}
    assert "comes from the stored latent" in (done.path / "summary.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("candidate", ["fp8_e4m4@reference", "fp8_e4m3@referense"])
def test_a_name_that_does_not_exist_is_refused_before_the_weights_are_loaded(
    candidate: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        prepare, "load_reference", lambda *_args, **_kwargs: pytest.fail("the weights were loaded")
    )
    with pytest.raises(InputError, match="did you mean"):
        prepare.prepare(RunConfig(candidates=(candidate,)))


def test_scales_are_calibrated_on_other_documents_than_those_compared(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
):
    """A scale fitted to the very document it is judged on would flatter the format."""
    calibrated: list[torch.Tensor] = []
    real = prepare.calibrate

    def calibrate(model: Any, documents: Sequence[torch.Tensor], *arguments: Any) -> Any:
        calibrated.extend(documents)
        return real(model, documents, *arguments)

    monkeypatch.setattr(prepare, "calibrate", calibrate)
    prepared = prepare.prepare(config)
    assert len(calibrated) == CALIBRATION_DOCUMENTS
    compared = [document.tolist() for document in prepared.documents]
    for document in calibrated:
        assert not any(document.tolist()[-90:] == other[-90:] for other in compared)


def test_answers_are_kept_with_their_tokens_and_compared(run: RunDirectory, config: RunConfig):
    tokenizer = AutoTokenizer.from_pretrained(config.checkpoint)
    samples = read_samples(run.path)
    for sample in samples:
        assert sample.generated_ids is not None
        assert sample.generated_chars is not None
        assert len(sample.generated_ids) == len(sample.generated_chars) == sample.generated_tokens
        whole = tokenizer.decode(sample.generated_ids, skip_special_tokens=True)
        assert whole.startswith(sample.generated_text or "")
        assert sum(sample.generated_chars) == len(whole.rstrip("\ufffd"))
        assert sample.target
        assert sample.prompt_end
    lengths = {(r.candidate, r.baseline, r.task): r for r in only(run.read(), AnswerLengthRecord)}
    pairs = {(r.candidate, r.baseline, r.task) for r in only(run.read(), TaskRecord)}
    assert lengths.keys() == pairs
    for (candidate, _, task), record in lengths.items():
        mine = [s.generated_tokens or 0 for s in samples if (s.candidate, s.task) == (candidate, task)]
        assert record.mean_tokens == pytest.approx(sum(mine) / len(mine))


def encode(text: str) -> list[int]:
    return [ord(character) % 1000 for character in text]


def test_layers_are_compared_on_as_many_documents_as_asked_for(tmp_path: Path):
    lm: Any = SimpleNamespace(tok_encode=encode, max_length=2048)
    asked = RunConfig(layers_documents=3, layers_prompt_tokens=60, layers_decode_tokens=4)
    documents = prepare._documents(asked, lm)
    used = [tuple(ids.tolist()) for ids in (*documents, *calibration_documents(encode, 64, asked.seed))]
    assert [len(ids) for ids in documents] == [64] * 3
    assert len(set(used)) == len(used), "scales are not fitted to what they are compared on"

    lines = tmp_path / "texts.jsonl"
    lines.write_text("".join(json.dumps({"text": letter * 70}) + "\n" for letter in "abc"))
    found = prepare._documents(asked.with_values(layers_prompts=lines), lm)
    assert [ids.unique().tolist() for ids in found] == [[97], [98], [99]]
    with pytest.raises(InputError, match="holds 3 texts, layers_documents is 4"):
        prepare._documents(asked.with_values(layers_prompts=lines, layers_documents=4), lm)
    with pytest.raises(
        InputError, match=r"texts\.jsonl, line 1 holds 70 tokens, the layer comparison takes 84"
    ):
        prepare._documents(asked.with_values(layers_prompts=lines, layers_prompt_tokens=80), lm)
