"""Checkpoints of random weights: the published file layout, sane activations, whole or not at all."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from evalkit import cli
from evalkit.compare.layers import LayerStream
from evalkit.errors import InputError
from evalkit.model.checkpoint import resolve_checkpoint
from evalkit.model.synthetic import synth as module
from evalkit.model.synthetic.dims import DIMS
from evalkit.model.synthetic.synth import changes_of, synth, synth_bytes, synth_config
from evalkit.model.weights.shards import stored_tensors
from evalkit.model.weights.stream import stream

SMALL = {"hidden_size": 128, "q_lora_rank": 64, "intermediate_size": 200}


def made(out: Path, dims: str = "nano", layers: int = 3, dtype: str = "fp8", **changes: Any) -> Path:
    return synth(out, synth_config(dims, layers, SMALL | changes, dtype), device="cpu")


def test_files_are_laid_out_as_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 400_000)
    out = made(tmp_path / "out")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    assert len(names) > 2
    assert names == [f"model-{n:05}-of-{len(names):05}.safetensors" for n in range(1, len(names) + 1)]
    for file in names:
        with safe_open(out / file, framework="pt") as tensors:  # safetensors' own reader
            assert {name for name, where in index["weight_map"].items() if where == file} == set(
                tensors.keys()
            )
    stored = stored_tensors(out)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())
    expert = stored["model.layers.2.mlp.experts.7.gate_proj.weight"]
    assert (expert.dtype, expert.shape) == (torch.float8_e4m3fn, (128, 128))
    assert stored["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (5, 1)
    for name in ("embed_tokens", "norm", "layers.1.mlp.gate", "layers.0.self_attn.indexer.weights_proj"):
        assert stored[f"model.{name}.weight"].dtype == torch.bfloat16
        assert f"model.{name}.weight_scale_inv" not in stored
    assert stored["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert "model.layers.0.mlp.experts.0.up_proj.weight" not in stored  # the first layer is dense
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    assert config["num_hidden_layers"] == 3


def test_scales_are_powers_of_two_that_keep_codes_in_range(tmp_path: Path) -> None:
    (file,) = made(tmp_path / "out").glob("*.safetensors")
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 -- no iterator
            value = tensors.get_tensor(name).float()
            assert value.isfinite().all(), name
            if name.endswith("_scale_inv"):
                assert torch.equal(value.log2(), value.log2().round())
                codes = tensors.get_tensor(name.removesuffix("_scale_inv")).float()
                assert 224 < codes.abs().max() <= 448


@pytest.mark.parametrize("dims", ["nano", "nano-glm"])
@pytest.mark.parametrize("dtype", ["fp8", "bf16"])
def test_activations_neither_vanish_nor_explode(dims: str, dtype: str, tmp_path: Path) -> None:
    model = stream(made(tmp_path / "out", dims, 6, dtype), "cpu")
    ids = torch.randint(2, 1024, (64,), generator=torch.Generator().manual_seed(0))
    through = LayerStream(model, [ids], [], 0, lambda: None)
    sizes = []
    for layer in range(6):
        before = through.inputs[0]
        through.magnitudes(layer)
        sizes.append(float((through.inputs[0] - before).pow(2).mean().sqrt()))
    assert all(0.1 < size < 3 for size in sizes), sizes


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    config = synth_config("nano", 1, SMALL, "fp8")
    files = [
        next(synth(tmp_path / name, config, seed, device="cpu").glob("*.safetensors")).read_bytes()
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize(("dims", "parameters"), [("deepseek-v3.2", 671.0e9), ("glm-5", 744e9)])
def test_published_sizes_are_the_published_models(dims: str, parameters: float) -> None:
    """One byte a value, but for embeddings, gates and scales: 671 B and 744 B parameters, indexers apart."""
    assert synth_bytes(synth_config(dims, None, {}, "fp8")) == pytest.approx(parameters, rel=0.02)


def test_a_directory_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(InputError, match="is not empty: name a directory to be made"):
        made(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(InputError, match="is a file"):
        made(tmp_path / "mine")


def test_too_little_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1000))
    with pytest.raises(InputError, match=r"takes 0\.0 GB, .* has 0\.0 GB free"):
        made(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_one_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write", fail)
    with pytest.raises(InputError, match="cannot be written: No space left"):
        made(tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("micro", 2, {}, "fp8"), f"dims is 'micro': give one of {', '.join(DIMS)}"),
        (("nano", 0, {}, "fp8"), "layers is 0"),
        (("nano", 2, {"hidden": 4}, "fp8"), "--set hidden: nano has no such key"),
        (("nano", 2, {}, "fp4"), "dtype is 'fp4': give fp8 or bf16"),
    ],
)
def test_what_is_not_known_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        synth_config(*arguments)


def test_a_vocabulary_without_room_for_the_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="vocab_size is 100: the tokenizer"):
        made(tmp_path / "out", vocab_size=100)
    assert not list(tmp_path.iterdir())


def test_values_are_json_or_text() -> None:
    assert changes_of(["a=3", "b=[1, 2]", "c=word"]) == {"a": 3, "b": [1, 2], "c": "word"}
    with pytest.raises(InputError, match="give it as key=value"):
        changes_of(["a"])


def test_the_command_makes_a_checkpoint_and_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = [
        "synth",
        str(out),
        "--dims",
        "nano",
        "--layers",
        "2",
        "--set",
        "n_routed_experts=4",
        "--seed",
        "5",
    ]
    with pytest.raises(SystemExit) as caught:
        cli.main(command)
    assert caught.value.code == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert resolve_checkpoint(out) == out
    with pytest.raises(SystemExit) as caught:
        cli.main(command)
    assert caught.value.code == cli.BAD_INPUT


@pytest.mark.gpu
def test_a_gpu_makes_the_same_layout(tmp_path: Path) -> None:
    config = synth_config("nano", 2, SMALL, "fp8")
    kinds = [
        {
            name: (tensor.dtype, tensor.shape)
            for name, tensor in stored_tensors(synth(tmp_path / device, config, device=device)).items()
        }
        for device in ("cpu", "cuda")
    ]
    assert kinds[0] == kinds[1]
