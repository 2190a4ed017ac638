"""Scales: where they come from and how readers round them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from evalkit import kv
from evalkit.errors import InputError
from evalkit.kv import Scales

PREFIX = "model.layers.{}.self_attn."


def checkpoint(directory: Path, layers: int, *files: dict[str, float]) -> Path:
    (directory / "config.json").write_text(json.dumps({"num_hidden_layers": layers}))
    for number, tensors in enumerate(files):
        save_file({k: torch.tensor(v) for k, v in tensors.items()}, directory / f"model-{number}.safetensors")
    return directory


def test_one_scale_fits_latent_and_rope_together():
    """A scale calibrated on the latent alone saturates the rope."""
    assert kv.calibrate(0.1, 8.96) == Scales(latent=0.02, rope=0.02)
    assert kv.calibrate(448.0, 1.0) == Scales(latent=1.0, rope=1.0)


@pytest.mark.parametrize(
    "amaxes", [(0.0, 0.0), (float("nan"), 1.0), (1.0, float("nan")), (float("inf"), 1.0)]
)
def test_a_calibration_that_saw_nothing_usable_is_refused(amaxes: tuple[float, float]):
    with pytest.raises(InputError, match="calibration tokens"):
        kv.calibrate(*amaxes)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_is_a_positive_finite_number(bad: float):
    with pytest.raises(InputError, match="rope scale is"):
        Scales(rope=bad)


def test_readers_round_scales_as_named():
    scale = torch.tensor([1.0, 1.00390625, 1.99, 0.75, 2.0**-126])
    assert torch.equal(kv.identity(scale), scale)
    assert kv.round_to_bf16(scale).tolist() == [1.0, 1.0, 1.9921875, 0.75, 2.0**-126]
    assert kv.truncate_to_e8m0(scale).tolist() == [1.0, 1.0, 1.0, 0.5, 2.0**-126]


def test_checkpoint_scales_are_read_across_files_and_spellings(tmp_path: Path):
    path = checkpoint(
        tmp_path,
        4,
        {PREFIX.format(0) + "attn.k_scale": 0.5, PREFIX.format(0) + "attn.v_scale": 9.0},
        {PREFIX.format(1) + "attn.kv_scale": 0.25, PREFIX.format(1) + "attn.q_scale": 3.0},
        {PREFIX.format(2) + "k_scale": 0.125, PREFIX.format(2) + "kv_a_proj_with_mqa.weight_scale": 7.0},
        {PREFIX.format(3) + "k_proj.k_scale": [2.0], PREFIX.format(4) + "attn.k_scale": 5.0},
    )
    assert kv.from_checkpoint(path) == {
        0: Scales(latent=0.5, rope=0.5),
        1: Scales(latent=0.25, rope=0.25, query=3.0),
        2: Scales(latent=0.125, rope=0.125),
        3: Scales(latent=2.0, rope=2.0),
    }


def test_layers_without_a_scale_are_named(tmp_path: Path):
    path = checkpoint(
        tmp_path, 4, {PREFIX.format(1) + "attn.k_scale": 0.5, PREFIX.format(2) + "attn.q_scale": 0.5}
    )
    with pytest.raises(InputError, match="for layers 0, 2, 3 of 4: use the scales 'one' or 'calibrated'"):
        kv.from_checkpoint(path)


def test_a_checkpoint_without_scales_says_so(tmp_path: Path):
    path = checkpoint(tmp_path, 2, {"model.norm.weight": 1.0})
    with pytest.raises(InputError, match=r"stores no attn\.k_scale or attn.kv_scale for any layer"):
        kv.from_checkpoint(path)


@pytest.mark.parametrize("bad", [0.0, -1.0, [1.0, 2.0], float("nan")])
def test_a_scale_that_is_no_scale_is_named(tmp_path: Path, bad: float):
    path = checkpoint(tmp_path, 1, {PREFIX.format(0) + "attn.k_scale": bad})
    with pytest.raises(
        InputError, match=r"layers.0.self_attn.attn.k_scale in .*one positive number is right"
    ):
        kv.from_checkpoint(path)


def test_unreadable_checkpoints_are_input_errors(tmp_path: Path):
    with pytest.raises(InputError, match="no num_hidden_layers"):
        kv.from_checkpoint(tmp_path / "nowhere")
    path = checkpoint(tmp_path, 1)
    with pytest.raises(InputError, match=r"holds no \*.safetensors file"):
        kv.from_checkpoint(path)
    checkpoint(tmp_path, 1, {PREFIX.format(0) + "attn.k_scale": 0.5})
    file = path / "model-0.safetensors"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(InputError, match=r"model-0\.safetensors cannot be read as safetensors"):
        kv.from_checkpoint(path)
