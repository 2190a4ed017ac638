"""vLLM as an engine, against a stand-in of its recorded signatures in a process of its own."""

import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
import torch
from safetensors.torch import load_file

from evalkit.errors import EngineDiedError, InputError
from evalkit.evaluate.engines import adapter, inside, vllm
from evalkit.evaluate.engines.base import Label, Prompt, Span
from evalkit.evaluate.engines.launch import launch
from evalkit.evaluate.engines.native import NativeEngine
from evalkit.evaluate.engines.process import Worker
from evalkit.evaluate.engines.vllm import ANSWERS, PROOF, VllmEngine, refuse_other_path

STAND_IN = str(Path(__file__).parent / "stand_in")
LENGTH = 256


@pytest.fixture
def start(checkpoint, tmp_path, monkeypatch, warm_python):
    """An engine of the stand-in; `script` says what goes wrong in it."""
    engines = []
    monkeypatch.setenv("PYTHONPATH", STAND_IN)

    def started(candidate="bf16@flashmla", version="0.33.0", script=None, folder="engine", **options):
        logprobs = options.pop("logprobs", None)
        python = options.pop("python", warm_python)
        engine = VllmEngine(
            launch(checkpoint, candidate, max_length=LENGTH, **options),
            tmp_path / folder,
            logprobs=logprobs,
            environment={"STAND_IN_VERSION": version, "STAND_IN_SCRIPT": json.dumps(script or {})},
            python=python,
        )
        engines.append(engine)
        return engine

    yield started
    for engine in engines:
        engine.close()


@pytest.fixture
def prompts(tokenizer):
    def prompt(number, text, max_new=6, until=()):
        return Prompt(
            label=Label("some_task", number), ids=tokenizer(text)["input_ids"], max_new=max_new, until=until
        )

    return [prompt(0, "one two three"), prompt(1, "4 5 6 7 8 9", 9), prompt(2, "one two three")]


@pytest.fixture(scope="module")
def native(checkpoint):
    import evalkit

    return NativeEngine(evalkit.load(checkpoint, "bf16@reference+index=fp8", device="cpu"), batch_size=1)


def kept(folder):
    return [json.loads(line) for line in (folder / ANSWERS).read_text().splitlines()[1:]]


def test_it_answers_and_scores_as_this_projects_own_engine(start, prompts, native, tokenizer):
    wanted = dict(native.generate(prompts))
    # A stop string in the middle of what it writes anyway.
    text = tokenizer.decode(wanted[1].ids)
    stopping = Prompt(label=Label("some_task", 9), ids=prompts[1].ids, max_new=9, until=[text[3:5]])
    engine = start(logprobs=2, python=None)  # a process of its own, as ever
    found = dict(engine.generate([*prompts, stopping]))
    wanted[3] = next(native.generate([stopping]))[1]
    assert {place: list(answer.ids) for place, answer in found.items()} == {
        place: list(answer.ids) for place, answer in wanted.items()
    }
    assert found[3].ended == "stop"
    assert len(found[3].ids) < 9
    assert {place: one.ended for place, one in found.items()} == {
        place: one.ended for place, one in wanted.items()
    }
    assert [len(one.logprobs) for one in found.values()] == [len(one.ids) for one in found.values()]

    spans = [
        Span(label=Label(None, None), context=prompts[0].ids, continuation=wanted[0].ids),
        Span(label=Label(None, None), context=prompts[0].ids, continuation=[5, 6, 7]),
    ]
    scored, ours = dict(engine.score(spans)), dict(native.score(spans))
    assert {place: greedy for place, (_, greedy) in scored.items()} == {0: True, 1: False}
    for place, (nats, _) in scored.items():
        assert nats == pytest.approx(ours[place][0], rel=0.02)


def test_a_worker_that_dies_is_replaced_and_nothing_is_asked_twice(start, prompts, native, tmp_path):
    script = {"die_at": 8, "once": str(tmp_path / "died")}
    engine = start(script=script)
    found = list(engine.generate(prompts))
    assert engine.starts == 2
    assert sorted(place for place, _ in found) == [0, 1, 2]
    assert {place: list(one.ids) for place, one in found} == {
        place: list(one.ids) for place, one in native.generate(prompts)
    }
    keys = [one["key"] for one in kept(engine.folder)]
    assert len(keys) == len(set(keys)) == 3
    engine.close()

    before = {log.name: log.read_text() for log in engine.folder.glob("*.log")}
    assert "illegal memory access" in before["engine.log"]
    start().start()
    logs = {log.name: log.read_text() for log in engine.folder.glob("*.log")}
    assert {name: logs[name] for name in before} == before, "another process keeps the log of what died"
    assert sorted(logs) == ["engine-2.log", "engine-3.log", "engine.log"]


def test_a_killed_run_asks_for_the_rest_only(start, prompts, tmp_path):
    engine = start()
    whole = dict(engine.generate(prompts))
    lines = (engine.folder / ANSWERS).read_bytes().splitlines(keepends=True)
    (tmp_path / "again").mkdir()
    cut_off = lines[0] + lines[1] + lines[2][: len(lines[2]) // 2]
    (tmp_path / "again" / ANSWERS).write_bytes(cut_off)
    # One of three is answered, and the dead worker would tell of a question about it.
    again = start(folder="again")
    assert dict(again.generate(prompts)) == whole
    assert len(kept(again.folder)) == 3
    assert dict(again.generate(prompts)) == whole

    last = start(folder="again", script={"fail_start": "must not be started"})
    assert dict(last.generate(prompts)) == whole
    assert last.starts == 0


class Waiting:
    """A worker that starts and then answers nothing until it is killed, or, where `dead`, dies at once."""

    started = {
        "vllm": "0.33.0",
        "backend": "FLASHMLA_SPARSE",
        "layers": [{"layer": 0, "backend": "FLASHMLA_SPARSE", "row_bytes": 1152, "k_scale": 1.0}],
    }

    def __init__(self, dead=False):
        self.asked, self.killed, self.closing, self.may_close = Event(), Event(), Event(), Event()
        self.may_close.set()
        self.closed = 0
        if dead:
            self.killed.set()

    def ask(self, message):
        if message["do"] == "start":
            yield {"started": dict(self.started)}
            return
        self.asked.set()
        assert self.killed.wait(20), "nobody ended it"
        raise EngineDiedError("it ended with signal SIGKILL")

    def telling(self):
        return []

    def close(self):
        self.closed += 1
        self.killed.set()
        self.closing.set()
        assert self.may_close.wait(20)
        time.sleep(0.2)  # what is waited for, closed and deleted


@pytest.fixture
def waiting(monkeypatch):
    """The workers that an engine may start, one after the other; those that it started."""
    left, begun = [], []
    monkeypatch.setattr(vllm, "Worker", lambda *_: begun.append(left.pop(0)) or begun[-1])
    return left, begun


def test_an_engine_that_is_closed_while_it_is_asked_starts_no_other(start, prompts, waiting):
    """From another thread, as on Ctrl-C: the whole of another vLLM would start before a run ended."""
    left, begun = waiting
    first = Waiting()
    left += [first, Waiting(dead=True), Waiting(dead=True)]
    engine = start()
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(lambda: list(engine.generate(prompts)))
        assert first.asked.wait(20)
        engine.close()
        with pytest.raises(EngineDiedError):
            asking.result(20)
    assert [one.closed for one in begun] == [1]


def test_an_engine_that_is_closed_while_its_dead_worker_is_replaced_starts_no_other(start, prompts, waiting):
    left, begun = waiting
    first = Waiting(dead=True)
    first.may_close.clear()
    left += [first, Waiting(dead=True), Waiting(dead=True)]
    engine = start()
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(lambda: list(engine.generate(prompts)))
        assert first.closing.wait(20)
        engine.close()
        first.may_close.set()
        with pytest.raises(EngineDiedError, match="was closed"):
            asking.result(20)
    assert [one.closed for one in begun] == [1]


def test_a_closed_engine_gives_what_is_on_disk_and_asks_nothing(start, prompts):
    engine = start()
    found = dict(engine.generate(prompts[:1]))
    engine.close()
    assert dict(engine.generate(prompts[:1])) == found
    with pytest.raises(EngineDiedError, match="was closed"):
        list(engine.generate(prompts))
    assert engine.starts == 1


def test_a_worker_that_dies_in_the_middle_of_a_reply_has_died(monkeypatch, tmp_path):
    """What it had begun to say is no reply; a fresh one is asked again."""
    (tmp_path / "halves.py").write_text(
        """import os, sys
sys.stdin.readline()
os.write(1, b'{"number": 1, "answer": 1}\\n{"number": 1, "ans')
os._exit(9)
"""
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    worker = Worker("halves", tmp_path / "log", {})
    replies = worker.ask({})
    assert next(replies) == {"answer": 1}
    with pytest.raises(EngineDiedError, match="code 9"):
        next(replies)
    worker.close()
    with pytest.raises(EngineDiedError):
        list(worker.ask({}))


def test_another_engines_answers_are_not_taken(start, prompts, tmp_path):
    list(start().generate(prompts[:1]))
    with pytest.raises(InputError, match="holds the answers of another engine"):
        start("fp8_ds_mla@flashmla")


@pytest.mark.parametrize(
    ("said", "refused"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "too little GPU memory"),
        ("ValueError: No available memory for the cache blocks. Try", "too little GPU memory"),
        ("OSError: [Errno 98] Address already in use", "a port is in use"),
        ("ValueError: No valid attention backend found for cuda", "name another backend or format"),
    ],
)
def test_a_start_that_can_be_mended_ends_in_one_line(start, prompts, said, refused):
    engine = start(script={"fail_start": said})
    with pytest.raises(InputError, match=refused) as error:
        list(engine.generate(prompts))
    assert "\n" not in str(error.value)
    assert engine.starts == 1


def test_what_cannot_be_mended_says_its_last_line(start, prompts):
    engine = start(script={"die_at": 1, "say": "CUDA error: an illegal memory access was encountered"})
    with pytest.raises(EngineDiedError, match=r"code 1.*illegal memory access"):
        list(engine.generate(prompts))
    assert engine.starts == 3


def test_without_vllm_the_line_says_so(start, prompts, monkeypatch, tmp_path):
    broken = tmp_path / "broken" / "vllm"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('libcudart.so.13: no such file')")
    engine = start()
    monkeypatch.setenv("PYTHONPATH", str(broken.parent))
    with pytest.raises(InputError, match=r"cannot be imported here \(libcudart.so.13"):
        list(engine.generate(prompts))


@pytest.mark.parametrize(
    ("candidate", "script", "refused"),
    [
        ("fp8_e4m3@flashinfer", {"FLASHINFER_MLA_SPARSE_SM90": 10, "FLASHINFER_MLA_SPARSE": 10},
         "FLASHINFER_MLA_SPARSE_SM90 does not run on SM90; FLASHINFER_MLA_SPARSE does not run on SM90"),
        ("bf16@FLASHMLA_SPARSE_SM80", {}, r"vLLM 0\.33\.0 has no FLASHMLA_SPARSE_SM80"),
        ("nvfp4_ds_mla@flash_attn", {}, "FLASH_ATTN_MLA_SPARSE reads auto, float16, bfloat16, not nvfp4_ds_mla"),
        ("bf16@flashmla", {"backend": "FLASH_ATTN_MLA_SPARSE"}, "on FLASH_ATTN_MLA_SPARSE, not FLASHMLA"),
    ],
)  # fmt: skip
def test_what_vllm_or_the_gpu_lacks_is_refused(start, candidate, script, refused):
    with pytest.raises(InputError, match=refused):
        start(candidate, script=script).start()


@pytest.mark.parametrize("version", ["0.25.1", "0.33.0rc1"])
def test_a_vllm_that_is_too_old_is_refused_before_anything_is_loaded(start, version):
    engine = start(version=version, script={"fail_start": "must not be loaded"})
    with pytest.raises(InputError) as error:
        engine.start()
    assert str(error.value) == (
        f"vLLM {version} is installed here, and the oldest supported is 0.33.0: install that or a newer one"
    )


@pytest.mark.parametrize("version", ["0.33.0", "0.33.0+cu130", "0.34.0", "1.0.0rc2", "dev"])
def test_newer_versions_and_builds_without_a_number_are_not_refused(version):
    adapter.refuse_older(version)


def test_a_newer_vllm_runs_and_proves_its_path(start):
    engine = start("fp8_ds_mla@flashmla", "0.34.0")
    engine.start()
    proof = json.loads((engine.folder / PROOF).read_text())
    assert proof["vllm"] == "0.34.0"
    assert {layer["row_bytes"] for layer in proof["layers"]} == {656}
    assert {layer["backend"] for layer in proof["layers"]} == {"FLASHMLA_SPARSE"}


def test_short_prompts_are_attended_past_the_cache_unless_it_is_forced(start, tokenizer):
    topk = 16
    short, long = (tokenizer("x" * length)["input_ids"] for length in (topk - 2, topk + 3))
    label = Label(None, None)
    spans = [Span(label=label, context=ids, continuation=ids[:1]) for ids in (short, long)]
    first, more = (Prompt(label=label, ids=short, max_new=count) for count in (1, 2))
    engine = start()
    assert [engine.stored(one) for one in (*spans, first, more)] == [False, True, False, True]
    forced = start(folder="forced", force_stored=True)
    assert [forced.stored(one) for one in (*spans, first, more)] == [True] * 4


def test_scales_are_set_and_what_vllm_uses_is_told(start):
    engine = start("fp8_e4m3:calibrated@flashinfer", scales={0: 0.25, 1: 0.5})
    proof = engine.start()
    assert [layer["k_scale"] for layer in proof["layers"]] == [0.25, 0.5]
    assert proof["loaded_k_scales"] == [1.0, 1.0]
    assert not any(layer["loads_scales"] for layer in proof["layers"])
    proof["layers"][1]["k_scale"] = 1.0
    with pytest.raises(InputError, match=r"layer 1 uses k_scale 1, not 0\.5"):
        refuse_other_path(engine.launch, proof)


@pytest.mark.parametrize("candidate", ["bf16@flashmla", "fp8_ds_mla@flashmla"])
def test_layers_and_logits_are_kept_as_the_engine_computed_them(start, tokenizer, candidate):
    documents = [tokenizer("the first of them " * 3)["input_ids"], tokenizer("another")["input_ids"]]
    engine = start(candidate)
    files = engine.keep(documents)
    for ids, file in zip(documents, files, strict=True):
        logits = load_file(file)["logits"]
        assert logits.shape == (len(ids), len(tokenizer))
        assert logits.dtype == torch.bfloat16
        told = json.loads(file.with_suffix(".json").read_text())["chosen"]
        ours = logits[:-1].float().log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(told), ours, rtol=0, atol=1e-5)

    before = files[0].stat().st_mtime_ns
    assert engine.keep(documents) == files
    assert files[0].stat().st_mtime_ns == before

    (file,) = engine.keep(documents[:1], layers=True)
    found, tokens = load_file(file), len(documents[0])
    for layer in range(2):
        assert found[f"{layer}.hidden"].shape == (tokens, 32)
        assert found[f"{layer}.output"].shape == (tokens, 32)
        assert found[f"{layer}.values"].shape == (tokens, 2 * 16)
        selection = found[f"{layer}.selection"]
        assert ((selection >= 0).sum(1) == torch.arange(1, tokens + 1).clamp(max=16)).all()
        rows = found[f"{layer}.rows"]
        assert rows.shape == (tokens, engine.launch.row_bytes)
        assert len(rows.unique(dim=0)) == tokens, "each token has a row of its own, by its place alone"


@pytest.mark.parametrize(
    ("candidate", "script"),
    [
        ("bf16@flashmla", {}),
        ("fp8_ds_mla@flashmla", {}),
        # A piece of one token, which is no step.
        ("bf16@flashmla", {"piece": 53}),
        ("bf16@flashmla", {"piece": 1}),
    ],
)
def test_decoded_tokens_are_the_documents_own_whatever_the_model_would_have_chosen(
    start, tokenizer, candidate, script
):
    ids, decode = tokenizer("the first of them " * 3)["input_ids"][:54], 5
    assert len(ids) == 54
    ids = [*ids, *start().stop_ids[:1], *ids[:4]]  # none of them ends a document
    engine = start(candidate, script=script, folder="decoded")
    (file,) = engine.keep([ids], decode=decode, layers=True)
    (whole,) = start(candidate, folder="prefilled").keep([ids], layers=True)
    found, wanted = load_file(file), load_file(whole)
    assert found.keys() == wanted.keys()
    chosen = found["logits"][-decode - 1 : -1].argmax(-1).tolist()
    assert chosen != ids[-decode:], "it would have chosen these anyway"
    for name, tensor in found.items():
        assert tensor.shape == wanted[name].shape
        # Alike in the stand-in, which computes everything anew at each step.
        torch.testing.assert_close(tensor.float(), wanted[name].float(), rtol=2e-2, atol=2e-2)
    assert len(json.loads(file.with_suffix(".json").read_text())["chosen"]) == len(ids) - decode - 1


def test_files_of_other_documents_are_not_handed_back(start, tokenizer):
    ids = tokenizer("the first of them")["input_ids"]
    engine = start()
    files = engine.keep([ids], decode=2)
    assert engine.keep([ids], decode=2) == files
    for others, decode in (([ids], 3), ([ids[:-1]], 2), ([[*ids[:-1], 5]], 2)):
        with pytest.raises(
            InputError, match="is of another document, or decodes another number of its tokens"
        ):
            engine.keep(others, decode=decode)


def test_what_is_asked_after_a_document_that_failed_is_not_forced(start, prompts, native):
    """Too little memory is told, and the worker lives on."""
    engine = start(script={"raise_at": 2, "say": "CUDA out of memory. Tried to allocate 2 GiB"})
    with pytest.raises(InputError, match="too little GPU memory"):
        engine.keep([[7] * 9], decode=4)
    found = dict(engine.generate(prompts))
    assert engine.starts == 1
    assert {place: list(one.ids) for place, one in found.items()} == {
        place: list(one.ids) for place, one in native.generate(prompts)
    }


def test_a_document_that_is_decoded_whole_is_refused(start):
    with pytest.raises(
        InputError, match="document 1 has 4 tokens, of which 4 are decoded: its prompt needs at least 1"
    ):
        start(script={"fail_start": "must not be started"}).keep([[1] * 5, [1] * 4], decode=4)


@pytest.fixture
def logits():
    """What a model's logits processor gives back of these rows, with hooks on it; each row is told by its number."""

    class LogitsProcessor(torch.nn.Identity):
        pass

    model = torch.nn.Sequential(LogitsProcessor())
    inside.watch(model, layers=False)
    yield lambda *rows: model(torch.tensor(rows, dtype=torch.float32)[:, None].expand(-1, 8))
    inside.forget(model)


def test_logits_go_in_the_order_of_their_tokens(logits, tmp_path):
    """Of a prompt of 4 tokens and 2 that are decoded: the last of the prompt comes first, and once more at the end."""
    inside.begin(None, [6, 7], 4)
    sampled = [logits(3)]
    assert torch.equal(logits(0, 1), torch.tensor([[0.0] * 8, [1.0] * 8])), "nothing is sampled from these"
    logits(2)
    logits(33)
    sampled += [logits(4), logits(5)]
    assert [int(one.argmax()) for one in sampled[:2]] == [6, 7]
    assert torch.equal(sampled[2], torch.full((1, 8), 5.0)), "the last one is free"
    inside.take(None, str(tmp_path / "file"), 4, 2)
    assert load_file(tmp_path / "file")["logits"][:, 0].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ([[3], [0, 1, 2, 3], [4]], "logits: pieces of [4, 1] rows were seen, [4, 1, 1] were expected"),
        ([[3], [0, 1, 2, 3], [4], [5], [6]], "logits: pieces of [4, 1, 1, 1] rows were seen, [4, 1, 1] were expected"),
        ([[3], [0, 1, 2, 2, 3], [4], [5]], "logits: pieces of [5, 1, 1] rows were seen"),
        ([[2, 3], [0, 1, 2, 3], [4], [5]], "logits: pieces of [5, 1, 1] rows were seen"),
        # The order of vLLM's first model runner, which gives the last of the prompt once.
        ([[3], [0, 1, 2], [4], [5]], "logits: pieces of [4, 1] rows were seen, [4, 1, 1] were expected"),
    ],
)  # fmt: skip
def test_logits_that_are_no_prompts_and_steps_are_refused(logits, tmp_path, pieces, said):
    inside.begin(None, [6, 7], 4)
    for rows in pieces:
        logits(*rows)
    with pytest.raises(ValueError, match=re.escape(said)):
        inside.take(None, str(tmp_path / "file"), 4, 2)
    assert not (tmp_path / "file").exists()


def test_layers_in_other_pieces_than_prompt_and_steps_are_refused(logits, monkeypatch, tmp_path):
    inside.begin(None, [6], 4)
    for rows in ([3], [0, 1, 2, 3], [4]):
        logits(*rows)
    monkeypatch.setattr(inside, "KEPT", {"0.values": [torch.zeros(rows, 2) for rows in (3, 1, 1)]})
    with pytest.raises(
        ValueError, match=re.escape("0.values: pieces of [3, 1, 1] rows were seen, [4, 1] were")
    ):
        inside.take(None, str(tmp_path / "file"), 4, 1)


def test_of_tensor_parallel_ranks_that_all_have_the_logits_the_first_writes_them(
    logits, monkeypatch, tmp_path
):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank in range(4):  # two stages of two
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        inside.begin(None, [], 2)
        inside.KEPT["0.values"] = [torch.full((2, 1), float(rank))]
        if rank >= 2:
            logits(1)
            logits(0, 1)
        inside.take(None, str(tmp_path / "file"), 2, 0, tensor_parallel=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "file",
        "file.rank0",
        "file.rank1",
        "file.rank3",
    ]
    assert load_file(tmp_path / "file")["0.values"].unique().tolist() == [2.0]
    assert "logits" not in load_file(tmp_path / "file.rank3")


def test_a_document_counts_as_shown_when_its_account_is_whole(start, tokenizer, monkeypatch):
    """The run is killed while it writes it."""
    documents, engine = [tokenizer("another")["input_ids"]], start()
    engine.start()

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            engine.keep(documents)
    assert not list((engine.folder / "logits").glob("*.json"))
    (file,) = engine.keep(documents)
    assert json.loads(file.with_suffix(".json").read_text())["shapes"]["logits"]


def test_documents_of_two_versions_do_not_lie_in_one_folder(start, tokenizer):
    """Nothing was answered yet: layers are shown before tasks are asked."""
    documents = [tokenizer(text)["input_ids"] for text in ("the first of them", "another of them")]
    first = start()
    first.keep(documents[:1])
    first.close()
    with pytest.raises(InputError, match=r"was begun with vllm 0\.33\.0, here it is 0\.34\.0"):
        start(version="0.34.0").keep(documents)


def test_layers_need_eager_mode(start):
    with pytest.raises(InputError, match="eager"):
        start(eager=False).keep([[1, 2]], layers=True)


@pytest.mark.parametrize(
    ("candidate", "options", "refused"),
    [
        ("bf16@reference", {}, "vLLM has no backend 'reference'; give flashmla, flash_attn, flashinfer"),
        ("fp8@flash_attn", {}, "no meaning of its own on backend 'FLASH_ATTN_MLA_SPARSE'"),
        ("fp8_group128@flashinfer", {}, "vLLM stores no fp8_group128"),
        ("bf16@flashmla+index=bf16", {}, "vLLM writes indexer keys as fp8"),
        ("bf16@flashmla+read=decoded", {}, "read and write in their own way"),
        ("bf16@flashmla+write=fused", {}, "leave read=, reader= and write= out"),
        ("fp8_e4m3:checkpoint@flashinfer", {}, "needs the scale of every layer"),
        ("bf16@flashmla", {"tensor_parallel": 2, "gpus": (0,)}, "takes 2 GPUs, 1 are named"),
        ("bf16@flashmla", {"memory_share": 1.5}, "memory_share is 1.5"),
        ("bf16@flashmla", {"extra": {"data_parallel_size": 2}}, "one engine for each GPU"),
    ],
)
def test_a_launch_says_what_vllm_cannot_be_asked(checkpoint, candidate, options, refused):
    with pytest.raises(InputError, match=refused):
        launch(checkpoint, candidate, max_length=LENGTH, **options)


def test_a_launch_resolves_vllms_aliases(checkpoint):
    def formats(candidate):
        made = launch(checkpoint, candidate, max_length=LENGTH)
        return made.candidate, made.cache_dtype, made.backends[0]

    assert formats("fp8@flashmla") == ("fp8_ds_mla@flashmla", "fp8_ds_mla", "FLASHMLA_SPARSE")
    assert formats("fp8@flashinfer") == ("fp8_e4m3:one@flashinfer", "fp8_e4m3", "FLASHINFER_MLA_SPARSE_SM90")
    assert formats("auto@flash_attn") == ("bf16@flash_attn", "bfloat16", "FLASH_ATTN_MLA_SPARSE")
    assert formats("bf16@FLASHMLA_SPARSE")[2] == "FLASHMLA_SPARSE"


def test_the_engine_runs_on_the_gpus_that_are_named(start):
    engine = start(gpus=(3,))
    assert engine._environment["CUDA_VISIBLE_DEVICES"] == "3"
    assert engine.launch.fingerprint == start(gpus=(1,), folder="other").launch.fingerprint
    assert engine.launch.fingerprint != start("fp8_ds_mla@flashmla", folder="fp8").launch.fingerprint
    assert "CUDA_VISIBLE_DEVICES" not in os.environ or os.environ["CUDA_VISIBLE_DEVICES"] != "3"
