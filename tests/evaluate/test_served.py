"""A run's tasks on serving engines: the stand-in of vLLM in processes of its own, and a real HTTP server."""

import json
import shutil
import threading
from pathlib import Path

import pytest

from evalkit import cli, environment, pipeline, prepare
from evalkit.config import RunConfig
from evalkit.errors import InputError
from evalkit.evaluate.engines import endpoint, on_vllm
from evalkit.evaluate.engines.endpoint import UNSEEN
from evalkit.evaluate.engines.on_endpoints import EndpointScorer
from evalkit.evaluate.engines.on_vllm import VllmScorer
from evalkit.evaluate.engines.vllm import ANSWERS, PROOF
from evalkit.model.checkpoint import EMBEDDED
from evalkit.records import (
    CandidateRecord,
    EnvironmentRecord,
    RunDirectory,
    SampleRecord,
    StageRecord,
    TaskRecord,
    file_name,
    only,
    read_samples,
    to_line,
)
from evalkit.report import starts, tables
from tests.conftest import random_model
from tests.evaluate.test_endpoint import Server

STAND_IN = str(Path(__file__).parent / "stand_in")
BASELINE, OTHER = "bf16@flash_attn", "fp8_ds_mla@flashmla"
CONTROL = f"{BASELINE}, batches of 1"
STARTS = [f"{name}, start 2" for name in (BASELINE, OTHER)]
TASK, DOCUMENTS, TOPK = "evalkit_multi_key_384", 2, 64


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_checkpoint(tmp_path_factory.mktemp("small"), 1)


def small_checkpoint(directory, layers):
    """A checkpoint that a stand-in answers from in a moment."""
    random_model(
        vocab_size=1024,
        num_hidden_layers=layers,
        max_position_embeddings=2048,
        index_topk=TOPK,
        eos_token_id=2,
    ).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / "dsa-nano" / name, directory)
    return directory


@pytest.fixture(scope="module")
def settings(small):
    return {"checkpoint": str(small), "tasks": TASK, "task_documents": str(DOCUMENTS)}


@pytest.fixture(scope="module")
def stand_in():
    """The stand-in is what `import vllm` finds in a worker."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", STAND_IN)
        patch.setenv("STAND_IN_VERSION", "0.33.0")
        patch.setattr(environment, "commit", lambda: "of the run")  # the checkout may change meanwhile
        yield patch


def tasks(out, settings, **more):
    """`evalkit tasks`, and the run it leaves behind."""
    given = settings | {"out": str(out)} | more
    with pytest.raises(SystemExit) as ended:
        cli.main(["tasks", *(f"--set={key}={value}" for key, value in given.items())])
    assert ended.value.code == 0
    (path,) = out.iterdir()
    return RunDirectory(path)


def answered(run, *arms):
    """What matters of the samples of some arms, without their names."""
    samples = read_samples(run.path)
    return [
        [(s.doc_id, s.prompt_sha256, s.generated_ids, s.score) for s in samples if s.candidate == arm]
        for arm in arms
    ]


def seconds(path, arm):
    """What each of an arm's engines took for the answers that it got itself."""
    files = sorted((path / "engines" / file_name(arm)).rglob(ANSWERS))
    return [sum(json.loads(line)["seconds"] for line in file.read_text().splitlines()[1:]) for file in files]


def counting(folder, python):
    """An interpreter that writes a line of each start to `folder / "starts"`."""
    counts = folder / "python"
    line = '"$CUDA_VISIBLE_DEVICES $(date +%s.%N) ${PYTHONPATH%%:*}"'
    counts.write_text(f'#!/bin/sh\necho {line} >> {folder}/starts\nexec {python} "$@"\n')
    counts.chmod(0o755)
    return counts


@pytest.fixture(scope="module")
def run(stand_in, settings, tmp_path_factory, warm_python):
    """Two candidates, each started twice, on two GPUs, vLLM being in an environment of its own."""
    folder = tmp_path_factory.mktemp("vllm")
    python = counting(folder, warm_python)
    return tasks(
        folder / "runs",
        settings,
        engine="vllm",
        engine_python=str(python),
        candidates=f"{OTHER},{BASELINE}",
        engine_starts="2",
        gpus="4,7",
    )


def test_every_arm_is_an_engine_whose_samples_are_kept_apart(run):
    stages = [record.stage for record in only(run.read(), StageRecord)]
    arms = [CONTROL, BASELINE, OTHER, *STARTS]
    assert stages == ["environment", *(f"tasks {arm}" for arm in arms), "answers", "report"]
    same = answered(run, *arms)
    assert all(len(one) == DOCUMENTS for one in same)
    assert [[one[:2] for one in arm] for arm in same] == [[one[:2] for one in same[0]]] * len(arms)
    # The stand-in does not depend on what runs together, as vLLM does.
    assert same[1] == same[3]
    assert same[2] == same[4]
    assert len(list((run.path / "samples").iterdir())) == len(arms)


def test_what_ran_is_recorded_by_the_engines_own_account(run):
    first, second = only(run.read(), CandidateRecord)
    assert (first.candidate, first.requested) == (BASELINE, BASELINE)
    assert first.kernel == (
        "vLLM 0.33.0 FLASH_ATTN_MLA_SPARSE (SimpleNamespace), cache bfloat16 as bfloat16; index scores: vLLM's own"
    )
    assert second.kernel.startswith("vLLM 0.33.0 FLASHMLA_SPARSE")
    assert "cache fp8_ds_mla as uint8" in second.kernel
    assert (first.bytes_per_token_read_back, second.bytes_per_token_read_back) == (1152, 656)
    assert (second.row_bytes_per_token, second.index, second.heads) == (656, "fp8", 4)
    assert second.note == (
        f"k_scale 1 to 1 over 1 layers, as vLLM says; a step whose prompts have at most {TOPK} tokens attends past the cache"
    )
    proof = json.loads((run.path / "engines" / BASELINE / PROOF).read_text())
    assert proof["layers"][0]["backend"] == "FLASH_ATTN_MLA_SPARSE"


def test_candidates_are_paired_with_the_baseline_and_starts_with_their_first(run):
    records = only(run.read(), TaskRecord)
    pairs = [(BASELINE, CONTROL), (OTHER, BASELINE), (STARTS[0], BASELINE), (STARTS[1], OTHER)]
    assert [(r.candidate, r.baseline) for r in records] == pairs
    assert {r.n for r in records} == {DOCUMENTS}
    assert all(r.wall_s > 0.1 for r in records), "the time that fetching took counts"
    assert {r.share_stored_rows for r in records} == {1.0}


def test_the_spread_over_starts_is_a_table_of_its_own(run):
    rows = starts.scores(run.read()).rows
    assert [(row[1], row[3], row[-1]) for row in rows] == [(BASELINE, "2", "0"), (OTHER, "2", "0")]
    assert [row[1] for row in tables.tasks(run.read()).rows] == [BASELINE, OTHER]
    assert "Fresh starts" in (run.path / "report.html").read_text()
    assert "## Fresh starts" in (run.path / "summary.md").read_text()


def test_engines_run_side_by_side_on_the_gpus_that_are_named(run):
    lines = (run.path.parents[1] / "starts").read_text().split("\n")[:-1]
    gpus, times, paths = zip(*(line.split(" ") for line in lines), strict=True)
    assert len(lines) == 5
    assert set(gpus[:2]) == {"4", "7"}
    assert set(gpus) == {"4", "7"}
    ended = [path.stat().st_mtime for path in (run.path / "engines").glob(f"*/{ANSWERS}")]
    assert float(times[1]) < min(ended)
    # Another environment must not see what else is installed beside this package.
    assert all(Path(path).name.startswith("evalkit-") for path in paths)


def test_a_run_goes_on_from_the_answers_that_are_there(run, stand_in, tmp_path):
    """It was killed with an arm's answers fetched and not scored: that arm starts no engine."""
    stopped = tmp_path / run.path.name
    shutil.copytree(run.path, stopped)
    records = run.read()
    kept = records[: next(i for i, r in enumerate(records) if getattr(r, "candidate", None) == OTHER)]
    (stopped / "records.jsonl").write_text("".join(map(to_line, kept)))
    for name in ("report.html", "summary.md"):
        (stopped / name).unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STAND_IN_SCRIPT", json.dumps({"fail_start": "it was asked again"}))
        pipeline.run(RunConfig.from_json(RunDirectory(stopped).config), stopped)

    def timeless(found):
        return [
            {key: value for key, value in vars(one).items() if key not in ("wall_s", "started_utc")}
            for one in found
        ]

    assert timeless(RunDirectory(stopped).read()) == timeless(records)
    assert timeless(read_samples(stopped)) == timeless(read_samples(run.path))
    resumed = [one for one in only(RunDirectory(stopped).read(), TaskRecord) if one.candidate != BASELINE]
    assert len(resumed) == 1 + len(STARTS)
    for record in resumed:
        (took,) = seconds(stopped, record.candidate)
        assert record.wall_s > took > 0.1, "what the process that was stopped had spent on asking counts"


def test_a_run_does_not_go_on_with_another_version_of_vllm(run, stand_in, tmp_path):
    """Nor with other arms than those that had begun: what two versions make is no candidate's loss."""
    stopped = tmp_path / run.path.name
    shutil.copytree(run.path, stopped)
    records = run.read()
    kept = records[: next(i for i, r in enumerate(records) if getattr(r, "candidate", None) == STARTS[0])]
    (stopped / "records.jsonl").write_text("".join(map(to_line, kept)))
    for name in STARTS:
        shutil.rmtree(stopped / "engines" / file_name(name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STAND_IN_VERSION", "0.34.0")
        with pytest.raises(InputError, match=r"vLLM 0\.33\.0, 0\.34\.0") as error:
            pipeline.run(RunConfig.from_json(RunDirectory(stopped).config), stopped)
    assert "\n" not in str(error.value)
    assert len(RunDirectory(stopped).read()) == len(kept)


def test_a_worker_that_dies_and_shares_of_the_documents_change_no_answer(
    run, stand_in, settings, tmp_path, warm_python
):
    """Two engines a candidate take a document each; one of them dies once."""
    with pytest.MonkeyPatch.context() as patch:
        script = {"die_at": 3, "once": str(tmp_path / "died")}
        patch.setenv("STAND_IN_SCRIPT", json.dumps(script))
        alone = tasks(
            tmp_path / "runs",
            settings,
            engine="vllm",
            candidates=BASELINE,
            engine_starts="1",
            engine_python=str(counting(tmp_path, warm_python)),
            data_parallel="2",
        )
    assert (tmp_path / "died").exists()
    assert len((tmp_path / "starts").read_text().splitlines()) == 2 * 2 + 1, "scoring starts none"
    assert answered(alone, CONTROL, BASELINE) == answered(run, CONTROL, BASELINE)
    shares = [alone.path / "engines" / BASELINE / name / ANSWERS for name in ("", "share-1")]
    assert [len(path.read_text().splitlines()) - 1 for path in shares] == [DOCUMENTS, 1]
    (proved,) = only(alone.read(), CandidateRecord)
    assert proved.note.endswith("data_parallel 2")
    (record,) = only(alone.read(), TaskRecord)
    assert record.wall_s > max(seconds(alone.path, BASELINE)) > 0.1
    took = [[json.loads(line)["seconds"] for line in path.read_text().splitlines()[1:]] for path in shares]
    assert [[one > 0 for one in each] for each in took] == [[True, False], [True]], (
        "adopted answers took no time"
    )


def test_an_engine_that_cannot_start_ends_the_run_in_one_line(stand_in, settings, tmp_path, capfd):
    stand_in.setenv("STAND_IN_SCRIPT", json.dumps({"fail_start": "CUDA out of memory. Tried to"}))
    given = settings | {"engine": "vllm", "candidates": BASELINE, "out": str(tmp_path / "runs")}
    with pytest.raises(SystemExit) as ended:
        cli.main(["tasks", *(f"--set={key}={value}" for key, value in given.items())])
    stand_in.delenv("STAND_IN_SCRIPT")
    assert ended.value.code == 64
    assert "too little GPU memory: lower memory_share or max_length" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("more", "refused"),
    [
        ({"engine": "vlm"}, "engine is 'vlm': give native, vllm, endpoint"),
        ({"tensor_parallel": "2"}, "tensor_parallel is given, and engine is native: it is for engine=vllm"),
        ({"endpoint": "http://a"}, "endpoint is given, and engine is native: it is for engine=endpoint"),
        ({"engine": "vllm", "memory_share": "1.5"}, "memory_share is 1.5"),
        ({"engine": "vllm", "memory_share": "much"}, "memory_share is 'much': it takes a number"),
        ({"engine": "vllm", "tensor_parallel": "0"}, "tensor_parallel is 0: it must be at least 1"),
        ({"engine": "vllm", "engine_python": "nowhere"}, "engine_python is nowhere, which is no program"),
        ({"engine": "endpoint", "endpoint": "http://a", "stages": "layers,tasks"}, "scores tasks and nothing else: run `evalkit tasks`"),
        ({"engine": "vllm", "profile": "glm-5.2"}, "profile=glm-5.2 is engine=native's"),
        ({"engine": "vllm", "batch_size": "1"}, "batch_size is 1, and half of it is for the control"),
        ({"engine": "vllm", "max_length": "4096"}, "max_length is 4096, the checkpoint holds 2048"),
        ({"engine": "vllm", "max_length": "300"}, "over max_length 298"),
        ({"engine": "vllm", "candidates": "bf16@reference"}, "vLLM has no backend 'reference'"),
        ({"engine": "vllm", "candidates": "fp8_e4m3:calibrated"}, "no scales are found on engine=vllm"),
        ({"engine": "vllm", "candidates": "bf16,auto@flashmla"}, "candidates name bf16@flashmla twice"),
        ({"engine": "vllm", "gpus": "0,1,2", "tensor_parallel": "2", "data_parallel": "2"}, "= 4 GPUs, there are 3"),
        ({"engine": "vllm", "gpus": "0,0", "tensor_parallel": "2"}, "gpus names 0 twice for one engine"),
        ({"engine": "native", "candidates": BASELINE}, "flash_attn"),
        ({"engine": "endpoint", "endpoint": "http://a", "candidates": "bf16,fp8_ds_mla"}, "names 1 servers, candidates are bf16, fp8_ds_mla"),
        ({"engine": "endpoint", "endpoint": "http://a", "candidates": "fp8_ds_mla"}, "candidates are bf16, fp8_ds_mla"),
        ({"engine": "endpoint", "endpoint": "http://127.0.0.1:9"}, "no server answers at http://127.0.0.1:9"),
        ({"engine": "endpoint", "gpus": "0"}, "gpus is given, and engine is endpoint: it is for engine=vllm"),
    ],
)  # fmt: skip
def test_what_an_engine_cannot_do_is_refused_before_anything_is_written(settings, more, refused, tmp_path):
    given = {"out": str(tmp_path / "runs"), "stages": "tasks"} | settings | more
    with pytest.raises(InputError) as error:
        prepare.prepare(RunConfig.load(None, [f"{key}={value}" for key, value in given.items()]))
    assert refused in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("sizes", "rooms"),
    [
        ({}, [[("0",)], [("1",)], [("2",)], [("5",)]]),
        ({"tensor_parallel": 2}, [[("0", "1")], [("2", "5")]]),
        ({"pipeline_parallel": 3}, [[("0", "1", "2")]]),
        ({"data_parallel": 2}, [[("0",), ("1",)], [("2",), ("5",)]]),
        ({"tensor_parallel": 2, "data_parallel": 2}, [[("0", "1"), ("2", "5")]]),
    ],
)
def test_gpus_are_shared_out_to_arms_and_their_engines(small, sizes, rooms, monkeypatch):
    config = RunConfig(engine="vllm", stages=("tasks",), tasks=(TASK,), task_documents=1, **sizes)
    monkeypatch.setattr(on_vllm.torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,5")
    scorer = VllmScorer(config, small, ["bf16"])
    assert scorer.rooms() == rooms
    assert scorer.launch(scorer.candidates[0], 64).max_length == 1024


def test_a_gpu_that_is_named_several_times_takes_as_many_engines_at_once(small):
    """Each engine has a fixed cache size. vLLM cannot measure the free memory while another engine starts."""
    config = RunConfig(
        engine="vllm", stages=("tasks",), tasks=(TASK,), task_documents=1, gpus=("0", "0", "1")
    )
    scorer = VllmScorer(config, small, ["bf16"])
    assert scorer.rooms() == [[("0",)], [("0",)], [("1",)]]
    shared, alone = (scorer.launch(scorer.candidates[0], 64, (gpu,)) for gpu in "01")
    assert (alone.shared, alone.cache_bytes) == (False, None)
    assert shared.cache_bytes == 64 * (1024 + 64) * (1152 + 132)  # of one layer
    assert shared.fingerprint == alone.fingerprint


@pytest.fixture
def serve(tokenizer_of_small):
    servers = []

    def served(**faults):
        server = Server(tokenizer_of_small, card={"max_model_len": 1024}, **faults)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server

    yield served
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def tokenizer_of_small(small):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(small)


def test_servers_are_asked_in_their_candidates_order_and_layers_are_said_to_be_unseen(
    serve, settings, tmp_path, capfd
):
    fp8, bf16 = serve(), serve()
    run = tasks(
        tmp_path / "runs",
        settings,
        engine="endpoint",
        candidates="fp8_ds_mla@flashmla,bf16",
        endpoint=f"{fp8.url},{bf16.url}",
    )
    assert f"ATTENTION: {fp8.url}, {bf16.url}: {UNSEEN}" in capfd.readouterr().err
    first, second = only(run.read(), CandidateRecord)
    assert first.candidate == "bf16@endpoint"
    assert first.kernel == f'unseen: {bf16.url} says {{"version": "0.33.0"}}'
    assert second.kernel.startswith(f"unseen: {fp8.url}")
    assert second.note == f"ATTENTION: {UNSEEN}"
    assert second.bytes_per_token_read_back is None
    assert only(run.read(), EnvironmentRecord)[0].dtype == "unseen"
    arms = ["bf16@endpoint, batches of 1", "bf16@endpoint", "fp8_ds_mla@flashmla"]
    assert [len(arm) for arm in answered(run, *arms)] == [DOCUMENTS] * 3
    # The control asks the baseline's server the same once more, and nobody asks anything twice.
    assert (len(bf16.asked), len(fp8.asked)) == (2 * DOCUMENTS, DOCUMENTS)
    sample = only(read_samples(run.path), SampleRecord)[0]
    assert sample.generated_text == "so it goes"


@pytest.mark.parametrize(
    ("faults", "code", "said"),
    [
        ({"reads": 100}, 12, "evalkit: ANOMALOUS: {task} document 0: {url} read 100 prompt tokens"),
        ({"fails": 10**6}, 70, "evalkit: {url} gives no answer after 4 tries: HTTP 503"),
    ],
)
def test_a_server_that_fails_ends_the_run_in_one_line_and_the_run_goes_on_when_it_is_back(
    serve, settings, tmp_path, capfd, monkeypatch, faults, code, said
):
    monkeypatch.setattr(endpoint, "WAIT_S", 0.01)
    server = serve(**faults)
    given = settings | {
        "out": str(tmp_path), "engine": "endpoint", "candidates": "bf16", "endpoint": server.url, "batch_size": "2",
    }  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        cli.main(["tasks", *(f"--set={key}={value}" for key, value in given.items())])
    assert ended.value.code == code
    err, (run,) = capfd.readouterr().err, tmp_path.iterdir()
    (line,) = (line for line in err.splitlines() if line.startswith("evalkit: "))
    assert line.startswith(said.format(url=server.url, task=TASK))
    assert "Traceback" not in err
    assert f"to go on: evalkit run --resume {run}" in err

    server.faults.clear()
    server.faults["card"] = {"max_model_len": 1024}
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", "--resume", str(run)])
    assert ended.value.code == 0
    assert [len(arm) for arm in answered(RunDirectory(run), "bf16@endpoint")] == [DOCUMENTS]


def test_a_server_that_is_gone_once_the_run_exists_is_no_bad_input(
    serve, settings, tmp_path, capfd, monkeypatch
):
    """All of its answers were fetched; what it says of itself was not."""
    server = serve()
    fetch = EndpointScorer.fetch

    def fetch_and_go(self, *given, **named):
        found = fetch(self, *given, **named)
        server.shutdown()
        server.server_close()
        return found

    monkeypatch.setattr(EndpointScorer, "fetch", fetch_and_go)
    given = settings | {
        "out": str(tmp_path),
        "engine": "endpoint",
        "candidates": "bf16",
        "endpoint": server.url,
    }
    with pytest.raises(SystemExit) as ended:
        cli.main(["tasks", *(f"--set={key}={value}" for key, value in given.items())])
    assert ended.value.code == 70
    err, (run,) = capfd.readouterr().err, tmp_path.iterdir()
    assert f"evalkit: no server answers at {server.url}" in err
    assert f"to go on: evalkit run --resume {run}" in err
