"""Loading: what a checkpoint must be, what a candidate needs, and how dtype and scales are chosen."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging

import evalkit
from evalkit import environment, kv
from evalkit.errors import InputError
from evalkit.kv import Scales
from evalkit.model.checkpoint import resolve_checkpoint
from evalkit.model.graft import graft
from evalkit.model.load import load_reference
from evalkit.model.proof import bytes_per_token
from evalkit.model.weights.stream import stream


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.conftest import random_model

    directory = tmp_path_factory.mktemp("checkpoint")
    random_model().bfloat16().save_pretrained(directory, max_shard_size="300KB")
    return directory


def copy(saved: Path, to: Path) -> Path:
    for file in saved.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_on_a_cpu_bf16_weights_compute_in_float32_with_rows_rounded_to_bf16(saved: Path) -> None:
    model = evalkit.load(saved, device="cpu")
    assert model.dtype == torch.float32
    assert model.evalkit.rounding == torch.bfloat16
    assert evalkit.load(saved, device="cpu", dtype=torch.float32).evalkit.rounding is None


@pytest.mark.parametrize("opened", [evalkit.load, stream])
def test_a_model_computes_with_every_shortcut_off(saved: Path, opened: Callable[..., Any]) -> None:
    environment.exact_numerics()
    exact = environment.numerics_flags()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True
    loose = environment.numerics_flags()
    assert all(loose[name] != exact[name] for name in exact)
    opened(saved, device="cpu")
    assert environment.numerics_flags() == exact


@pytest.mark.parametrize("terminal", [True, False])
def test_a_command_shows_a_bar_of_loading_on_a_terminal_only(
    saved: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    shown = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    try:
        model = load_reference(saved, "cpu")
        assert logging.is_progress_bar_enabled() is terminal
    finally:
        if not shown:
            logging.disable_progress_bar()
    assert str(model.evalkit.candidate) == "bf16@reference"


def test_a_checkpoint_that_does_not_exist_names_the_embedded_ones() -> None:
    with pytest.raises(InputError, match=r"no checkpoint at nowhere: .* one of: dsa-nano"):
        resolve_checkpoint("nowhere")


def test_a_dot_is_the_directory_one_is_in(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved)
    assert resolve_checkpoint(".") == resolve_checkpoint(Path()) == saved.resolve()
    (tmp_path / "inside").mkdir()
    copy(saved, tmp_path)
    monkeypatch.chdir(tmp_path / "inside")
    assert resolve_checkpoint("..").name == tmp_path.name, "as records name it"


def test_a_path_beside_the_embedded_ones_is_no_name_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("..", "dsa-nano/..", ""):
        with pytest.raises(InputError, match="checkpoint") as refusal:
            resolve_checkpoint(path)
        assert "evalkit/checkpoints" not in str(refusal.value)


def test_a_directory_without_a_config_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"it has no config\.json"):
        resolve_checkpoint(tmp_path)


def test_another_architecture_is_refused(saved: Path, tmp_path: Path) -> None:
    directory = copy(saved, tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(InputError, match="model_type 'llama'; evalkit runs deepseek_v32, glm_moe_dsa"):
        evalkit.load(directory)


def test_rows_of_another_geometry_are_refused(saved: Path, tmp_path: Path) -> None:
    directory = copy(saved, tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"kv_lora_rank": 256}))
    with pytest.raises(InputError, match="kv_lora_rank 256; the row formats hold 512"):
        evalkit.load(directory)


def test_a_truncated_shard_is_named(saved: Path, tmp_path: Path) -> None:
    directory = copy(saved, tmp_path)
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(InputError, match=f"{shard.name} is truncated or not safetensors"):
        evalkit.load(directory)


def test_a_missing_shard_is_named(saved: Path, tmp_path: Path) -> None:
    directory = copy(saved, tmp_path)
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(InputError, match=f"lacks the weights file {shard.name}"):
        evalkit.load(directory)


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        ("fp9@reference", "fp9"),
        ("bf16@flashinfr", "did you mean 'flashinfer'"),
        ("fp8_ds_mla@flashinfer", "reads bf16, fp8_e4m3, fp8_group128, not fp8_ds_mla"),
        ("fp8_e4m3:calibrated@reference", "pass scales="),
        ("fp8_e4m3:checkpoint@reference", "scale"),
        ("fp8@reference", "fp8"),
    ],
)
def test_a_candidate_that_cannot_run_is_refused_in_one_line(
    saved: Path, candidate: str, message: str
) -> None:
    with pytest.raises(InputError, match=message) as refused:
        evalkit.load(saved, candidate, device="cpu")
    assert "\n" not in str(refused.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_kernels_say_that_they_need_a_gpu(saved: Path) -> None:
    for candidate in ("bf16@flashinfer", "fp8_ds_mla@flashmla"):
        with pytest.raises(InputError, match="needs an NVIDIA GPU, the device is cpu"):
            evalkit.load(saved, candidate, device="cpu")
    with pytest.raises(InputError, match="torch sees no GPU"):
        evalkit.load(saved, device="cuda")


def test_missing_scales_are_named_by_layer(make_model: Any) -> None:
    with pytest.raises(InputError, match="none given for layers 1-3"):
        graft(make_model(), "fp8_e4m3:calibrated@reference", scales={0: Scales(latent=0.1, rope=0.1)})


def test_scales_given_to_a_candidate_of_scale_one_are_refused(make_model: Any) -> None:
    with pytest.raises(InputError, match="name it fp8_e4m3:calibrated"):
        graft(make_model(), "fp8_e4m3@reference", scales={0: Scales(latent=0.1, rope=0.1)})


def test_each_layer_uses_its_own_scale(make_model: Any) -> None:
    scales = {layer: Scales(latent=0.01 * (layer + 1), rope=0.02 * (layer + 1)) for layer in range(4)}
    model = graft(make_model(), "fp8_e4m3:calibrated@reference", scales=scales)
    seen: dict[int, Scales] = {}

    class Calls:
        probes = frozenset[str]()

        def tensor(self, probe: str, layer: int, value: torch.Tensor) -> None: ...
        def attention(self, layer: int, call: Any) -> None:
            seen[layer] = call.scales

    cache = model.evalkit.new_cache()
    cache.state.observer = Calls()
    with torch.no_grad():
        model(torch.randint(2, 128, (1, 20)), **cache.argument)
    assert seen == scales


@pytest.mark.parametrize("name", kv.names())
def test_bytes_read_back_for_each_token_are_the_formats_row(make_model: Any, name: str) -> None:
    model = graft(make_model(), f"{name}@reference")
    assert bytes_per_token(model, model.evalkit.new_cache) == kv.get(name).row_bytes
