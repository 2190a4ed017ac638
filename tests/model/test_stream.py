"""Streamed checkpoints: the weights and the records are those of the model that is wholly loaded, read once."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import evalkit
from evalkit import cli, environment, pipeline, prepare
from evalkit.candidate import Candidate
from evalkit.compare.layers import LayerStream, calibrate, compare
from evalkit.compare.passes import noise
from evalkit.config import RunConfig
from evalkit.errors import InputError
from evalkit.kv import get as row_format
from evalkit.model.synthetic.synth import synth, synth_config
from evalkit.model.weights import stream as streaming
from evalkit.model.weights.ahead import ReadAhead, chunks_of
from evalkit.model.weights.fp8 import dequantise, quantise
from evalkit.model.weights.shards import sampled_identity, stored_tensors
from evalkit.model.weights.stream import should_stream, stream
from evalkit.records import RunDirectory, StageRecord, only, to_line
from tests.conftest import random_model

DIMS = {"deepseek_v32": "nano", "glm_moe_dsa": "nano-glm"}
CANDIDATES = [
    Candidate.parse(text)
    for text in ("bf16@reference", "fp8_e4m3:calibrated@reference", "fp8_ds_mla@reference")
]
SMALL = {"hidden_size": 128, "q_lora_rank": 64, "intermediate_size": 200, "index_topk": 16}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both architectures in fp8 blocks, four layers; GLM's second and fourth share a selection."""
    made = {}
    for architecture, dims in DIMS.items():
        shared = {"indexer_types": ["full", "shared"] * 2} if dims == "nano-glm" else {}
        made[architecture] = synth(
            tmp_path_factory.mktemp(architecture) / "made",
            synth_config(dims, 4, SMALL | shared, "fp8"),
            seed=3,
        )
    return made


def documents(count: int = 2) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(4)
    return [torch.randint(2, 1024, (length,), generator=draw) for length in (48, 40, 36)[:count]]


def rewritten(checkpoint: Path, to: Path, change: Any) -> Path:
    """A copy whose tensors `change` has worked on, in one file."""
    tensors = {
        name: value for file in checkpoint.glob("*.safetensors") for name, value in load_file(file).items()
    }
    change(tensors)
    to.mkdir(exist_ok=True)
    save_file(tensors, to / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (to / name).write_bytes((checkpoint / name).read_bytes())
    return to


def assert_streams_as(model: Any, wanted: dict[str, torch.Tensor]) -> None:
    for number in range(model.config.num_hidden_layers):
        with model.evalkit.weights_of(number):
            for name, value in model.model.layers[number].state_dict().items():
                other = wanted[f"model.layers.{number}.{name}"]
                assert value.dtype == other.dtype, (number, name)
                assert torch.equal(value, other), (number, name)
    for name, value in model.state_dict().items():
        if ".layers." not in name:
            assert torch.equal(value, wanted[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_weights_are_those_that_transformers_loads(
    architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    random_model(architecture).bfloat16().save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = evalkit.load(tmp_path, device="cpu", dtype=dtype)
    assert_streams_as(stream(tmp_path, "cpu", dtype), loaded.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_blocks_are_multiplied_out_as_transformers_does(
    architecture: str, dtype: torch.dtype, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """transformers refuses blocks that are cut off at an edge: those matrices are stored in bf16 here."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    def widen_cut_blocks(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            weight, scale = tensors[name.removesuffix("_scale_inv")], tensors[name]
            if any(size % grid for size, grid in zip(weight.shape, scale.shape, strict=True)):
                tensors[name.removesuffix("_scale_inv")] = weight.float().bfloat16()
                del tensors[name]

    checkpoint = rewritten(checkpoints[architecture], tmp_path / "even", widen_cut_blocks)
    theirs = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=dtype, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    assert any(tensor.dtype == torch.float8_e4m3fn for tensor in stored_tensors(checkpoint).values())
    # In float32 it leaves what is stored in bf16 so, which float32 holds as well; and some it holds in float32 always.
    always = theirs._keep_in_fp32_modules_strict
    wanted = {
        name: value if any(part in name for part in always) else value.to(dtype)
        for name, value in theirs.state_dict().items()
    }
    assert theirs.model.layers[0].mlp.down_proj.weight.dtype == dtype
    assert_streams_as(stream(checkpoint, "cpu", dtype), wanted)


def test_a_block_that_is_cut_off_has_the_scale_of_its_place(checkpoints: dict[str, Path]) -> None:
    """The published kv_a_proj_with_mqa has 576 rows: four blocks of 128 and one of 64."""
    checkpoint = checkpoints["deepseek_v32"]
    name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    stored = {k: v for file in checkpoint.glob("*.safetensors") for k, v in load_file(file).items()}
    codes, scale = stored[name].float(), stored[name + "_scale_inv"]
    assert scale.shape == (5, 1)
    wanted = torch.stack([codes[row] * scale[row // 128, 0] for row in range(576)])
    loaded = evalkit.load(checkpoint, device="cpu")
    assert torch.equal(loaded.state_dict()[name], wanted)
    assert_streams_as(stream(checkpoint, "cpu"), loaded.state_dict())


@pytest.mark.parametrize("shape", [(256, 256), (192, 256), (256, 200), (7, 3)])
def test_blocks_read_back_within_half_a_step_of_e4m3(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, shape[1])
    codes, scale = quantise(weight, (128, 128))
    out = torch.empty(shape)
    dequantise(codes, scale, (128, 128), out)
    step = torch.maximum(weight.abs() * 2**-4, scale.max() * 2**-10)
    assert ((out - weight).abs() <= step).all()
    assert torch.equal(scale.log2(), scale.log2().round())


def test_records_are_those_of_the_loaded_model(architecture: str, checkpoints: dict[str, Path]) -> None:
    checkpoint = checkpoints[architecture]
    loaded, streamed = evalkit.load(checkpoint, device="cpu"), stream(checkpoint, "cpu")
    prompts, calibration = documents(2), documents(3)[2:]
    scales = {CANDIDATES[1]: calibrate(loaded, calibration, row_format("fp8_e4m3"))}
    floors = noise.floors(loaded)
    wanted = list(compare(loaded, prompts, CANDIDATES, scales=scales, decode_tokens=2, floors=floors))
    got = list(
        compare(streamed, prompts, CANDIDATES, calibration=calibration, decode_tokens=2, floors=floors)
    )
    assert list(map(to_line, got)) == list(map(to_line, wanted))
    weights = streamed.evalkit.weights
    assert (
        weights.bytes_read
        == weights.bytes_stored
        == sum(t.nbytes for t in stored_tensors(checkpoint).values())
    )


def test_only_one_layer_has_its_weights(checkpoints: dict[str, Path]) -> None:
    model = stream(checkpoints["deepseek_v32"], "cpu")
    for wanted in (0, 1, 3, 3, 0):
        with model.evalkit.weights_of(wanted):
            present = [
                not any(value.is_meta for value in layer.state_dict().values())
                for layer in model.model.layers
            ]
            assert present == [number == wanted for number in range(4)]


def test_what_is_read_ahead_is_bounded_and_comes_in_order(checkpoints: dict[str, Path]) -> None:
    tensors = stored_tensors(checkpoints["deepseek_v32"]).values()
    line = [chunk for tensor in tensors for chunk in chunks_of([tensor])]
    ahead = ReadAhead(limit=300_000, pinned=False)
    ahead.start(line)
    for chunk in line:
        waiting = sum(one.nbytes for one, _ in ahead._reading)
        assert waiting <= 300_000 or len(ahead._reading) == 1
        taken, content = ahead.take()
        assert taken is chunk
        stored = taken.tensors[0]
        with stored.file.open("rb") as file:
            file.seek(stored.offset)
            assert content.numpy().tobytes() == file.read(stored.nbytes)
    ahead.close()


def test_the_multi_token_prediction_layer_is_left_out(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = checkpoints["deepseek_v32"]
    plain = stream(checkpoint, "cpu").evalkit.weights.bytes_stored
    extra = {
        "model.layers.4.eh_proj.weight": torch.ones(4, 4),
        "model.layers.4.mlp.gate.weight": torch.ones(4),
    }
    more = rewritten(checkpoint, tmp_path, lambda tensors: tensors.update(extra))
    assert stream(more, "cpu").evalkit.weights.bytes_stored == plain


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        (
            "model.layers.2.mlp.experts.5.up_proj.weight",
            r"lacks the tensor model\.layers\.2\.mlp\.experts\.5\.up_",
        ),
        (
            "model.layers.1.self_attn.indexer.wk.weight",
            r"lacks the tensor model\.layers\.1\.self_attn\.indexer\.wk",
        ),
        ("model.norm.weight", r"lacks the tensor model\.norm\.weight"),
        (
            "model.layers.2.mlp.experts.5.up_proj.weight_scale_inv",
            r"up_proj\.weight_scale_inv is missing: .* \[1, 1\]",
        ),
    ],
)
def test_a_missing_tensor_is_named_before_anything_is_read(
    drop: str, message: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = rewritten(checkpoints["deepseek_v32"], tmp_path, lambda tensors: tensors.pop(drop))
    with pytest.raises(InputError, match=message) as refused:
        stream(checkpoint, "cpu")
    assert "\n" not in str(refused.value)


def test_a_tensor_of_another_shape_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    name = "model.layers.0.input_layernorm.weight"
    checkpoint = rewritten(
        checkpoints["deepseek_v32"],
        tmp_path,
        lambda tensors: tensors.update({name: torch.ones(7).bfloat16()}),
    )
    with pytest.raises(
        InputError, match=r"stores model\.layers\.0\.input_layernorm\.weight as \[7\], .* \[128\]"
    ):
        stream(checkpoint, "cpu")


def test_a_file_cut_off_in_its_tensors_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = rewritten(checkpoints["deepseek_v32"], tmp_path, lambda tensors: None)
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InputError, match="truncated"):
        stored_tensors(checkpoint)


def test_the_identity_follows_from_every_header_and_small_file(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = checkpoints["deepseek_v32"]
    copied = rewritten(checkpoint, tmp_path, lambda tensors: None)
    before = sampled_identity(copied)
    assert before.startswith("sampled:")
    assert sampled_identity(copied) == before
    (copied / "config.json").write_text((copied / "config.json").read_text() + " ")
    assert sampled_identity(copied) != before


def test_what_fits_is_loaded_and_what_does_not_is_streamed(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = checkpoints["deepseek_v32"]
    values = sum(
        t.nbytes // t.dtype.itemsize
        for n, t in stored_tensors(checkpoint).items()
        if not n.endswith("_scale_inv")
    )
    for free, streamed in ((4 * values * 2, False), (4 * values // 2, True)):
        monkeypatch.setattr(streaming, "_host_free", lambda free=free: free)
        assert should_stream(checkpoint, "cpu", None, "auto") is streamed
        assert should_stream(checkpoint, "cpu", None, True) is True
        assert should_stream(checkpoint, "cpu", None, False) is False


def config_of(checkpoint: Path, out: Path, **values: Any) -> RunConfig:
    return RunConfig(
        checkpoint=str(checkpoint),
        device="cpu",
        stages=("layers",),
        candidates=("bf16@reference", "fp8_e4m3:calibrated@reference"),
        layers_prompt_tokens=64,
        layers_decode_tokens=2,
        out=out,
        **values,
    )


def test_tasks_and_profiles_of_a_streamed_checkpoint_are_refused(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    config = config_of(checkpoints["deepseek_v32"], tmp_path, stream=True)
    tasks = config.with_values(stages=("layers", "tasks"), tasks=("evalkit_needle_1024",))
    with pytest.raises(InputError, match="is streamed, one layer's weights at a time: tasks take them all"):
        prepare.prepare(tasks)
    with pytest.raises(InputError, match="profile"):
        prepare.prepare(config.with_values(profile="glm-5.2"))


def compared(run: RunDirectory) -> list[str]:
    """All that the comparison found: what is left out holds times and commands."""
    return [to_line(r) for r in run.read() if r.kind not in ("environment", "stage")]


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "loaded"])
def test_a_comparison_killed_at_its_third_layer_goes_on_there(
    streamed: bool, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The checkout may change while the test runs.
    monkeypatch.setattr(environment, "commit", lambda: "of the run")
    config = config_of(checkpoints["glm_moe_dsa"], tmp_path, stream=streamed)
    whole = RunDirectory(pipeline.run(config))
    killed = RunDirectory.create(tmp_path, "killed", config.to_json(), "evalkit run")
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED_AT_THE_THIRD, str(killed.path)], stderr=subprocess.PIPE, text=True
    )
    _, err = process.communicate(timeout=240)
    assert process.returncode == -signal.SIGKILL, err
    assert [r.stage for r in only(killed.read(), StageRecord)] == ["environment"]

    ran: list[int] = []
    real = LayerStream.layer
    monkeypatch.setattr(LayerStream, "layer", lambda self, index: ran.append(index) or real(self, index))
    with pytest.raises(SystemExit) as caught:
        cli.main(["run", "--resume", str(killed.path)])
    assert caught.value.code == 0
    assert ran == [2, 3]
    assert compared(killed) == compared(whole)
    assert {p.name for p in killed.path.iterdir()} == {p.name for p in whole.path.iterdir()}


# Dies in the third layer, with the second one's state on disk and a record too many.
KILLED_AT_THE_THIRD = """
import os, signal, sys, time
from pathlib import Path
import torch
from safetensors import safe_open
from evalkit import environment, pipeline, records
from evalkit.compare.layers import LayerStream
from evalkit.config import RunConfig

torch.set_num_threads(1)
environment.commit = lambda: "of the run"
path = Path(sys.argv[1])
real = LayerStream.layer

def layer(self, index):
    found = real(self, index)
    if index == 2:
        def reached():
            with safe_open(path / "layers.safetensors", framework="pt") as file:
                return file.metadata()["layer"]
        while reached() != "1":
            time.sleep(0.05)
        with (path / "layers.jsonl.tmp").open("a") as file:
            file.write(records.to_line(found[0]))
        os.kill(os.getpid(), signal.SIGKILL)
    return found

LayerStream.layer = layer
pipeline.run(RunConfig.from_json(records.RunDirectory(path).config), path)
"""


def test_a_state_of_another_comparison_is_not_gone_on_with(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    from evalkit.compare.passes.resume import LayerState, signature

    model = evalkit.load(checkpoints["deepseek_v32"], device="cpu")
    records = tmp_path / "layers.jsonl.tmp"
    records.write_text("{}\n")
    asked = signature(documents(1), "this")
    with LayerState(tmp_path / "layers.safetensors", records, asked) as state:
        state.sync = lambda: 3
        list(compare(model, documents(1), CANDIDATES[:1], decode_tokens=0, floors=(), state=state))
    again = LayerState(tmp_path / "layers.safetensors", records, asked)
    assert again.records_bytes == 3
    other = LayerState(tmp_path / "layers.safetensors", records, signature(documents(1), "that"))
    assert other.records_bytes == 0
    records.write_text("{}")  # shorter than what the state counts on
    assert LayerState(tmp_path / "layers.safetensors", records, asked).records_bytes == 0


def test_the_record_says_that_the_weights_were_sampled_and_where_scales_are(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    config = config_of(checkpoints["deepseek_v32"], tmp_path, stream=True)
    lines = [json.loads(line) for line in (pipeline.run(config) / "records.jsonl").read_text().splitlines()]
    (environment,) = [line for line in lines if line["kind"] == "environment"]
    assert environment["checkpoint_sha256"].startswith("sampled:")
    notes = {line["candidate"]: line["note"] for line in lines if line["kind"] == "candidate"}
    assert "found layer by layer" in notes["fp8_e4m3:calibrated@reference"]
    scales = {line["scale"] for line in lines if line["kind"] == "range" and line["part"] == "latent"}
    assert len(scales) == 4


@pytest.mark.gpu
def test_on_a_gpu_it_streams_what_it_loads(architecture: str, checkpoints: dict[str, Path]) -> None:
    checkpoint = checkpoints[architecture]
    loaded = evalkit.load(checkpoint, device="cuda")
    streamed = stream(checkpoint, "cuda")
    assert_streams_as(streamed, loaded.state_dict())
    candidates = [CANDIDATES[0], CANDIDATES[2]]
    records = [
        list(map(to_line, compare(model, documents(1), candidates, decode_tokens=0, floors=())))
        for model in (loaded, streamed)
    ]
    assert records[0] == records[1]
    assert streamed.evalkit.weights.bytes_read == 2 * streamed.evalkit.weights.bytes_stored - sum(
        tensor.nbytes for tensor in streamed.evalkit.weights.resident.values()
    )
