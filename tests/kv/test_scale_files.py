"""Scales as files that a checkpoint would carry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from evalkit import kv
from evalkit.errors import InputError
from evalkit.kv import Scales
from evalkit.kv.scale_files import INDEX, write_overlay, write_scales

SCALES = {layer: Scales(latent=value, rope=value) for layer, value in enumerate((0.25, 1 / 3, 1e-6))}
ROUNDED = {
    layer: Scales(**dict.fromkeys(("latent", "rope"), float(torch.tensor(scale.latent))))
    for layer, scale in SCALES.items()
}


def checkpoint(directory: Path, *, sharded: bool) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"num_hidden_layers": 3}))
    tensors = {f"model.layers.{i}.weight": torch.full((2,), float(i)) for i in range(3)}
    if not sharded:
        save_file(tensors, directory / "model.safetensors")
        return directory
    places = {name: f"model-{number}.safetensors" for number, name in enumerate(tensors)}
    for name, file in places.items():
        save_file({name: tensors[name]}, directory / file)
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 24}, "weight_map": places}))
    return directory


def test_written_scales_read_back_as_float32_with_what_made_them(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 3}))
    write_scales(tmp_path / "scales.safetensors", SCALES, {"method": "max", "tokens": "7"})
    assert kv.from_checkpoint(tmp_path) == ROUNDED
    with safe_open(tmp_path / "scales.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == [f"model.layers.{i}.self_attn.attn.k_scale" for i in range(3)]
        assert file.metadata() == {"format": "pt", "method": "max", "tokens": "7"}
        assert [file.get_slice(name).get_shape() for name in file.keys()] == [[]] * 3  # noqa: SIM118 -- no iterator
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "scales.safetensors"]


def test_an_existing_file_stays_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    file = tmp_path / "scales.safetensors"
    file.write_text("mine")
    with pytest.raises(InputError, match=r"scales\.safetensors exists: .*--force"):
        write_scales(file, SCALES, {})
    assert file.read_text() == "mine"
    write_scales(file, SCALES, {}, replace=True)
    assert file.read_bytes()[:4] != b"mine"
    for path, says in ((tmp_path, "is a directory"), (tmp_path / "no" / "x", "is no directory")):
        with pytest.raises(InputError, match=says):
            write_scales(path, SCALES, {}, replace=True)


def test_a_scale_of_its_own_for_the_rope_is_refused_since_one_name_holds_both(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"layer 0 has scale 0\.5 for the latent and 1 for the rope"):
        write_scales(tmp_path / "x.safetensors", {0: Scales(latent=0.5)}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sharded", [True, False])
def test_an_overlay_is_the_checkpoint_by_links_and_its_index_names_every_tensor(
    tmp_path: Path, sharded: bool
) -> None:
    source = checkpoint(tmp_path / "source", sharded=sharded)
    write_overlay(source, tmp_path / "made", SCALES, {"method": "max"})
    made = tmp_path / "made"
    assert kv.from_checkpoint(made) == ROUNDED
    for entry in source.iterdir():
        if entry.name != INDEX:
            assert (made / entry.name).is_symlink()
            assert (made / entry.name).read_bytes() == entry.read_bytes()
    index = json.loads((made / INDEX).read_text())
    found = {}
    for file in set(index["weight_map"].values()):
        with safe_open(made / file, framework="pt") as tensors:
            found |= dict.fromkeys(tensors.keys(), file)
    assert index["weight_map"] == found
    assert len(found) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "source"]


def test_an_overlay_replaces_only_one_of_its_own_and_only_when_told(tmp_path: Path) -> None:
    source, made = checkpoint(tmp_path / "source", sharded=True), tmp_path / "made"
    before = sorted(path.name for path in source.iterdir())
    write_overlay(source, made, SCALES, {})
    with pytest.raises(InputError, match=r"made exists: .*--force"):
        write_overlay(source, made, SCALES, {})
    write_overlay(source, made, {layer: Scales(latent=2.0, rope=2.0) for layer in SCALES}, {}, replace=True)
    assert kv.from_checkpoint(made)[1] == Scales(latent=2.0, rope=2.0)
    for place in (source, tmp_path / "source" / "config.json"):
        with pytest.raises(InputError, match="holds something else"):
            write_overlay(source, place, SCALES, {}, replace=True)
    assert sorted(path.name for path in source.iterdir()) == before


def test_a_checkpoint_with_scales_of_its_own_is_not_overlaid(tmp_path: Path) -> None:
    """A loader that meets two tensors of one name keeps whichever comes last."""
    source = checkpoint(tmp_path / "source", sharded=True)
    save_file({"model.layers.0.self_attn.k_proj.k_scale": torch.tensor(0.5)}, source / "more.safetensors")
    with pytest.raises(InputError, match=r"more\.safetensors stores k_scale already"):
        write_overlay(source, tmp_path / "made", SCALES, {})
    assert not (tmp_path / "made").exists()
