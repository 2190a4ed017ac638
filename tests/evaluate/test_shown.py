"""A run on vLLM with layers, next tokens and tasks, all seen inside it: the stand-in in processes of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import date

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from evalkit import cli, environment, pipeline, prepare
from evalkit.config import RunConfig
from evalkit.errors import InputError
from evalkit.evaluate.engines.shown import Shown
from evalkit.gate.evidence import Evidence
from evalkit.gate.integrity import PASSED, layer_checks
from evalkit.gate.limits import check_limits
from evalkit.gate.policy import load as load_policy
from evalkit.gate.words import Verdict
from evalkit.records import (
    CandidateRecord,
    DivergenceRecord,
    FloorRecord,
    LayerRecord,
    MultipleRecord,
    PositionRecord,
    RunDirectory,
    SelectionRecord,
    StageRecord,
    TaskRecord,
    TokenRecord,
    WorstTokenRecord,
    only,
)
from evalkit.report import starts, tables, terminal
from evalkit.shipped import tasks_dir
from tests.evaluate.test_served import STAND_IN, TASK, TOPK, counting, small_checkpoint

BASELINE, FLOOR, FP8 = "bf16@flashmla", "bf16@flash_attn", "fp8_ds_mla@flashmla"
CANDIDATES = [BASELINE, FLOOR, FP8]
LATER = [f"{name}, start {start}" for start in (2, 3) for name in CANDIDATES]
LAYERS, DOCUMENTS = 2, 2
PHASES = {"prefill": slice(0, 160), "decode": slice(160, 164)}
TOKENS = 164  # of a document: a prompt, and what is decoded
POLICY = tasks_dir() / "policies" / "default.toml"


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Two layers, so that a selection depends on what was stored before."""
    return small_checkpoint(tmp_path_factory.mktemp("deep"), LAYERS)


@pytest.fixture(scope="module", autouse=True)
def stand_in():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", STAND_IN)
        patch.setenv("STAND_IN_VERSION", "0.33.0")
        patch.setenv("STAND_IN_SCRIPT", json.dumps({"drift": 1e-3}))
        patch.setattr(environment, "commit", lambda: "of the run")  # the checkout may change meanwhile
        yield patch


@pytest.fixture(scope="module")
def asked(deep):
    return {
        "engine": "vllm",
        "checkpoint": str(deep),
        "candidates": ",".join(CANDIDATES),
        "engine_starts": "3",
        "layers_documents": str(DOCUMENTS),
        "layers_prompt_tokens": str(PHASES["prefill"].stop),
        "layers_decode_tokens": str(TOKENS - PHASES["prefill"].stop),
        "tasks": TASK,
        "task_documents": "2",
    }


def config_of(asked, **more):
    return RunConfig.load(None, [f"{key}={value}" for key, value in (asked | more).items()])


@pytest.fixture(scope="module")
def made(asked, warm_python, tmp_path_factory):
    """A run, with a copy of every file that an engine left."""
    folder, files = tmp_path_factory.mktemp("shown"), {}
    forget = Shown.forget

    def copied_first(self):
        for path in self.folder.glob("*/*/*.safetensors"):
            files[path.parts[-3], path.parts[-2], int(path.stem)] = load_file(path)
        forget(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shown, "forget", copied_first)
        given = asked | {
            "out": str(folder / "runs"),
            "gpus": "0,1",
            "engine_python": str(counting(folder, warm_python)),
        }
        with pytest.raises(SystemExit) as ended:
            cli.main(["run", *(f"--set={key}={value}" for key, value in given.items())])
    assert ended.value.code == 0
    (path,) = (folder / "runs").iterdir()
    return RunDirectory(path), files


@pytest.fixture(scope="module")
def records(made):
    return made[0].read()


def of(files, name, document):
    """What a start left of a document, whichever of its folders it lies in."""
    folder = name.replace(", ", "--").replace(" ", "-")
    (found,) = (
        tensors for (arm, _, number), tensors in files.items() if number == document and arm in (name, folder)
    )
    return found


def probe_of(files, name, document, layer, probe):
    """What a file says of a probe; latent and rope are read from the rows that it holds."""
    found = of(files, name, document)
    if probe not in ("latent", "rope"):
        return found[f"{layer}.{probe}"]
    rows = found[f"{layer}.rows"].flatten(1)
    if rows.shape[1] == 1152:
        both = rows.contiguous().view(torch.bfloat16)
        return both[:, :512] if probe == "latent" else both[:, 512:]
    codes, scales, rope = rows[:, :512], rows[:, 512:528].contiguous(), rows[:, 528:].contiguous()
    if probe == "rope":
        return rope.view(torch.bfloat16)
    tiles = codes.contiguous().view(torch.float8_e4m3fn).float().unflatten(1, (4, 128))
    return (tiles * scales.view(torch.float32)[:, :, None]).flatten(1)


def divergences(files, name, phase):
    """KL divergence of every token of a phase from the baseline's first start, in nats."""
    found = []
    for document in range(DOCUMENTS):
        log_p, log_q = (
            of(files, one, document)["logits"][PHASES[phase]].double().log_softmax(-1)
            for one in (BASELINE, name)
        )
        found.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(found)


def test_one_run_has_layers_next_tokens_and_tasks(made, records, capsys):
    run, _ = made
    stages = [record.stage for record in only(records, StageRecord)]
    arms = [f"{BASELINE}, batches of 1", *CANDIDATES, *LATER]
    assert stages == [
        "environment", "layers", "divergence", *(f"tasks {arm}" for arm in arms), "answers", "report",
    ]  # fmt: skip
    assert [record.candidate for record in only(records, CandidateRecord)] == CANDIDATES
    assert {record.candidate for record in only(records, TaskRecord)} == {*CANDIDATES, *LATER}
    terminal.show(run.path)
    shown = (capsys.readouterr().out, *((run.path / n).read_text() for n in ("report.html", "summary.md")))
    for text in (" ".join(text.replace("\n", " ").split()) for text in shown):
        assert (
            "Seen inside vLLM 0.33.0, whose own bf16@flashmla (first start) is the reference, not bf16@reference"
            in text
        )
        for title in ("Candidates", "Fresh starts, next token", "Layers", "Tasks", "KL nats"):
            assert title in text, title
    row = {row[0]: row for row in tables.candidates(records).rows}[FP8]
    assert row[2] == "n/a", "no layer can be fed another's input inside an engine"
    assert "(layer" in row[3]
    assert row[4].endswith(f"({DOCUMENTS * 160:,})")


def test_every_arm_starts_one_engine(made):
    run, _ = made
    starts = (run.path.parents[1] / "starts").read_text().splitlines()
    assert len(starts) == 1 + len(CANDIDATES) + len(LATER)


def test_files_are_of_first_starts_and_of_the_baselines_second_and_go_when_records_are_made(made):
    run, files = made
    shown = {arm for arm, folder, _ in files if folder == "layers"}
    assert {name.split(",")[0].split("--")[0] for name in shown} == set(CANDIDATES)
    assert len(shown) == len(CANDIDATES) + 1
    assert len(files) == DOCUMENTS * (len(CANDIDATES) + len(LATER)), "the control shows nothing"
    assert not list((run.path / "engines").glob("*/*/*.safetensors"))
    assert not list((run.path / "engines").glob("*/l*s"))


@pytest.mark.parametrize("candidate", CANDIDATES)
@pytest.mark.parametrize("probe", ["values", "latent", "rope", "output"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_layers_error_is_what_the_files_say(made, records, candidate, probe, phase):
    _, files = made
    for layer in range(LAYERS):
        (record,) = (
            r
            for r in only(records, LayerRecord)
            if (r.candidate, r.layer, r.phase, r.probe, r.rung) == (candidate, layer, phase, probe, "total")
        )
        got, ref = (
            np.concatenate(
                [
                    probe_of(files, one, n, layer, probe)[PHASES[phase]].double().numpy()
                    for n in range(DOCUMENTS)
                ]
            )
            for one in (candidate, BASELINE)
        )
        assert (record.mode, record.frozen) == ("propagated", "none")
        assert record.relative_l2 == pytest.approx(np.linalg.norm(got - ref) / np.linalg.norm(ref), rel=1e-9)
        assert record.n == got.size
        assert (record.relative_l2 == 0) == (candidate == BASELINE or bool((got == ref).all()))


def test_a_selections_recall_is_what_the_files_say(made, records):
    _, files = made
    least = 1.0
    for record in only(records, SelectionRecord):
        shares = [
            len(set(one) & set(other) - {-1}) / len(set(other) - {-1})
            for n in range(DOCUMENTS)
            for one, other in zip(
                *(
                    of(files, name, n)[f"{record.layer}.selection"][PHASES[record.phase]].tolist()
                    for name in (record.candidate, BASELINE)
                ),
                strict=True,
            )
        ]  # fmt: skip
        assert record.recall_mean == pytest.approx(np.mean(shares), abs=1e-12)
        assert record.recall_min == pytest.approx(min(shares), abs=1e-12)
        assert record.n == DOCUMENTS * len(range(TOKENS)[PHASES[record.phase]])
        least = min(least, record.recall_mean)
    assert least < 1
    assert len(only(records, SelectionRecord)) == LAYERS * len(CANDIDATES) * len(PHASES)


def test_the_divergence_of_every_start_is_from_the_baselines_first(made, records):
    _, files = made
    found = {(r.candidate, r.phase): r for r in only(records, TokenRecord)}
    assert list(found) == [(name, phase) for name in (*CANDIDATES, *LATER) for phase in PHASES]
    for (name, phase), record in found.items():
        ours = divergences(files, name, phase)
        assert record.kl_mean_nats == pytest.approx(float(ours.mean()), rel=1e-9, abs=1e-15)
        assert record.kl_max_nats == pytest.approx(float(ours.max()), rel=1e-9, abs=1e-15)
        tokens = DOCUMENTS * len(range(TOKENS)[PHASES[phase]])
        # Nothing follows the last token that is decoded.
        targets = tokens - (DOCUMENTS if phase == "decode" else 0)
        assert (record.n, record.targets, record.documents) == (tokens, targets, DOCUMENTS)
    for phase in PHASES:
        assert found[BASELINE, phase].kl_mean_nats == 0
        assert found[f"{BASELINE}, start 2", phase].kl_mean_nats > 0


def test_the_spread_over_starts_is_a_table(made, records):
    _, files = made
    rows = {row[:2]: row for row in starts.next_tokens(records).rows}
    assert list(rows) == [(name, phase) for phase in PHASES for name in CANDIDATES]
    for name, phase in rows:
        of_candidate = [name, f"{name}, start 2", f"{name}, start 3"]
        # The baseline's first start is what all are told from.
        means = [float(divergences(files, one, phase).mean()) for one in of_candidate[name == BASELINE :]]
        assert rows[name, phase][2:4] == ("3", f"{tables.number(min(means))} to {tables.number(max(means))}")
    assert {row[0] for row in tables.tokens(records).rows} == set(CANDIDATES)


def test_the_floors_are_another_kernel_and_the_baseline_started_afresh(made, records):
    _, files = made
    floors = only(records, FloorRecord)
    assert [(r.rung, r.candidate, r.reason) for r in floors] == [
        ("floor:kernel", FLOOR, ""),
        ("floor:start", BASELINE, ""),
    ]
    values = {
        (r.rung, r.candidate, r.layer): r.relative_l2
        for r in only(records, LayerRecord)
        if (r.probe, r.phase) == ("values", "prefill")
    }
    for layer in range(LAYERS):
        assert values["floor:kernel", FLOOR, layer] == values["total", FLOOR, layer] > 0
        got, ref = (
            torch.cat([of(files, one, n)[f"{layer}.values"][:160].double() for n in range(DOCUMENTS)])
            for one in (f"{BASELINE}, start 2", BASELINE)
        )
        wanted = float((got - ref).norm() / ref.norm())
        assert values["floor:start", BASELINE, layer] == pytest.approx(wanted, rel=1e-9)
        (multiple,) = (
            r.multiple
            for r in only(records, MultipleRecord)
            if (r.candidate, r.layer, r.phase, r.probe, r.floor)
            == (FP8, layer, "prefill", "values", "floor:kernel")
        )
        assert multiple == pytest.approx(
            values["total", FP8, layer] / values["floor:kernel", FLOOR, layer], rel=1e-6
        )
    diverged = [r for r in only(records, DivergenceRecord) if r.candidate == FP8]
    assert [(r.phase, r.probe, r.mode, r.floor) for r in diverged] == [
        (phase, "values", "propagated", "floor:kernel") for phase in PHASES
    ]
    curves = [r for r in only(records, PositionRecord) if r.candidate == FP8]
    assert {(r.probe, r.axis, r.topk, r.n) for r in curves} == {
        (probe, axis, TOPK, DOCUMENTS * tokens)
        for probe in ("values", "kl")
        for axis, tokens in (("position", TOKENS), ("generated", TOKENS - 160))
    }
    worst = [r for r in only(records, WorstTokenRecord) if r.candidate == FP8]
    most = max(float(divergences(files, FP8, phase).max()) for phase in PHASES)
    assert worst[0].kl_nats == pytest.approx(most, rel=1e-9)


def test_a_policy_that_limits_isolated_errors_judges_such_a_run(made):
    """There is no such record: that is missing evidence, and not an unknown word."""
    run, _ = made
    records, policy = run.read(), load_policy(POLICY)
    first, *_, candidate = only(records, CandidateRecord)
    isolated, divergence, _ = check_limits(records, candidate, policy, date(2026, 1, 1))
    assert (isolated.name, isolated.verdict) == ("limit: attention, isolated", Verdict.INCONCLUSIVE)
    assert "was not recorded for this candidate" in isolated.reason
    assert divergence.verdict is not Verdict.INCONCLUSIVE
    assert [one.verdict for one in layer_checks(Evidence.read(run.path), candidate, [first])] == [PASSED] * 3


def test_layers_alone_record_what_ran(asked, warm_python, tmp_path):
    given = asked | {
        "out": str(tmp_path),
        "engine_python": str(warm_python),
        "engine_starts": "1",
        "candidates": f"{BASELINE},{FP8}",
    }
    with pytest.raises(SystemExit) as ended:
        cli.main(["layers", *(f"--set={key}={value}" for key, value in given.items())])
    assert ended.value.code == 0
    (path,) = tmp_path.iterdir()
    found = RunDirectory(path).read()
    assert [r.stage for r in only(found, StageRecord)] == ["environment", "layers", "divergence", "report"]
    assert [r.candidate for r in only(found, CandidateRecord)] == [BASELINE, FP8]
    assert [(r.rung, r.candidate, r.reason) for r in only(found, FloorRecord)] == [
        ("floor:kernel", None, "no candidate stores bf16 on another backend"),
        ("floor:start", BASELINE, "engine_starts is 1"),
    ]
    assert not starts.next_tokens(found).rows
    assert "not bf16@reference" in (path / "summary.md").read_text()


# Kills itself with some of the layers' records on disk; nothing is flushed, closed or tidied.
KILLED = """
import os, signal, sys
from pathlib import Path
from evalkit import environment, pipeline, records
from evalkit.config import RunConfig

environment.commit = lambda: "of the run"
write, left = records.RecordWriter.write, 9

def write_then_die(self, record):
    global left
    write(self, record)
    if self._file.name.endswith("layers.jsonl.tmp"):
        left -= 1
        if not left:
            self._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

records.RecordWriter.write = write_then_die
path = Path(sys.argv[1])
pipeline.run(RunConfig.from_json(records.RunDirectory(path).config), path)
"""


def begun(asked, python, out):
    config = config_of(
        asked, engine_python=str(python), engine_starts="2", candidates=f"{BASELINE},{FP8}", stages="layers"
    )
    return RunDirectory.create(out, "killed", config.to_json(), "evalkit layers")


def resumed(run):
    pipeline.run(RunConfig.from_json(run.config), run.path)
    return only(run.read(), TokenRecord), only(run.read(), LayerRecord)


def test_a_run_killed_while_layers_are_compared_starts_no_engine_again(asked, warm_python, tmp_path):
    run = begun(asked, counting(tmp_path, warm_python), tmp_path)
    process = subprocess.run([sys.executable, "-c", KILLED, str(run.path)], check=False, env=os.environ)
    assert process.returncode == -signal.SIGKILL
    assert (run.path / "layers.jsonl.tmp").exists()
    assert not only(run.read(), CandidateRecord)
    starts = (tmp_path / "starts").read_text()
    tokens, layers = resumed(run)
    assert (tmp_path / "starts").read_text() == starts
    names = [BASELINE, FP8, f"{BASELINE}, start 2", f"{FP8}, start 2"]
    assert [r.candidate for r in tokens] == [name for name in names for _ in PHASES]
    places = [(r.candidate, r.layer, r.phase, r.probe, r.rung) for r in layers]
    assert len(set(places)) == len(places) == (LAYERS * 5 + 1) * 3 * len(PHASES)
    assert not list((run.path / "engines").glob("*/*/*.safetensors"))


def test_a_run_killed_while_engines_show_asks_for_the_rest(asked, warm_python, tmp_path):
    run = begun(asked, counting(tmp_path, warm_python), tmp_path)
    here = "from evalkit import cli, environment; environment.commit = lambda: 'of the run'; cli.main()"
    command = [sys.executable, "-c", here, "run", "--resume", str(run.path)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        began = time.monotonic()
        while not (shown := list(run.path.glob("engines/*/layers/0000.json"))):
            assert process.poll() is None, "it ended before anything was shown"
            assert time.monotonic() - began < 120
            time.sleep(0.005)
        process.kill()
    before = shown[0].with_suffix(".safetensors").stat().st_mtime_ns
    (kept,) = shown
    times = []
    forget = Shown.forget

    def seen(self):
        times.append(kept.with_suffix(".safetensors").stat().st_mtime_ns)
        forget(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shown, "forget", seen)
        tokens, _ = resumed(run)
    assert times == [before]
    assert {(r.phase, r.n) for r in tokens} == {("prefill", DOCUMENTS * 160), ("decode", DOCUMENTS * 4)}


def test_a_run_whose_prompts_have_changed_does_not_go_on(asked, warm_python, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one two three four " * 200)
    given = asked | {"layers_prompts": str(prompts), "layers_documents": "1"}
    run = begun(given, warm_python, tmp_path / "runs")
    Shown([[1, 2, 3]], 0, run.path / "engines").refuse_others()
    with pytest.raises(InputError, match="holds layers of other prompts than layers_prompts gives now"):
        resumed(run)


def test_prompts_that_are_attended_past_the_cache_are_refused(asked, warm_python, tmp_path):
    run = begun(asked | {"layers_prompt_tokens": str(TOPK)}, warm_python, tmp_path)
    with pytest.raises(InputError) as error:
        resumed(run)
    assert not list((run.path / "engines").glob("*/l*s/*")), "gigabytes that nothing reads"
    assert f"layers_prompt_tokens is {TOPK}: vLLM 0.33.0 attends a prompt of at most {TOPK} tokens" in str(
        error.value
    )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("more", "refused"),
    [
        ({"eager": "false"}, "layers are seen without CUDA graphs only, and eager is false"),
        ({"tensor_parallel": "2"}, "layers are seen in one process, and tensor_parallel is 2"),
        ({"attribution": "true"}, "attribution is engine=native's"),
        ({"layers_frozen": "true"}, "layers_frozen is engine=native's"),
        ({"layers_prompt_tokens": "4096"}, "is 4100, the model holds 2046"),
        ({"kld_texts": "a.txt"}, "kld_texts and kld_run are engine=native's"),
        ({"stages": "kld"}, "kld_texts and kld_run are engine=native's"),
        ({"profile": "glm-5.2"}, "profile=glm-5.2 is engine=native's"),
        ({"device": "cpu"}, "device=cpu is engine=native's"),
    ],
)  # fmt: skip
def test_what_an_engine_cannot_show_is_refused_before_anything_is_written(asked, more, refused, tmp_path):
    with pytest.raises(InputError) as error:
        prepare.prepare(config_of(asked, out=str(tmp_path / "runs"), **more))
    assert refused in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_tasks_alone_take_cuda_graphs_and_several_gpus(asked):
    prepared = prepare.prepare(config_of(asked, stages="tasks", eager="false"))
    assert prepared.documents == []
