"""The scales that a checkpoint carries: read from its files, and written under the same names.

A layer's scale is `model.layers.<i>.self_attn.attn.k_scale`, vLLM's name, one float32. It serves latent and rope;
`v_scale` is neither read nor written, since in MLA the value is the latent. Whether a version of vLLM takes the scale
over for MLA depends on its loader and on the checkpoint's quantization config: it logs "Found k_scale in the
checkpoint … is not loaded" where it does not, and then stores at scale 1.0.
"""

import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from evalkit.errors import InputError
from evalkit.kv.scales import Scales

INDEX = "model.safetensors.index.json"
SCALES_FILE = "kv-scales.safetensors"
KV_SCALES = {"k_scale", "kv_scale"}

SCALE_KEY = re.compile(
    r"model\.layers\.(?P<layer>\d+)\.self_attn\.(?:attn\.|k_proj\.)?(?P<which>k_scale|kv_scale|q_scale|prob_scale)"
)


def from_checkpoint(path: str | Path) -> dict[int, Scales]:
    """The scales that a checkpoint directory carries, by layer.

    Reads `model.layers.<i>.self_attn.attn.k_scale`, else `.kv_scale` (also without `.attn` and as `.k_proj.k_scale`),
    for latent and rope alike, and `q_scale` and `prob_scale` where they exist. `v_scale` is ignored: in MLA the value
    is the latent. Layers past `num_hidden_layers` (multi-token prediction) are left out.

    Raises:
        InputError: no such checkpoint, an unreadable file, a scale that is not one positive number, or layers without
            a scale; vLLM reads these at 1.0 with only a warning.
    """
    directory = Path(path)
    stored = _stored(directory)
    layers = len(stored)
    missing = [layer for layer, scales in stored.items() if not scales.keys() & KV_SCALES]
    if missing:
        where = (
            "any layer" if len(missing) == layers else f"layers {', '.join(map(str, missing))} of {layers}"
        )
        raise InputError(
            f"{directory} stores no attn.k_scale or attn.kv_scale for {where}: use the scales 'one' or 'calibrated'"
        )
    return {layer: _as_scales(scales) for layer, scales in stored.items()}


def carried(path: str | Path) -> dict[int, float]:
    """The scale of latent and rope of those layers that a checkpoint directory carries one for.

    Raises:
        InputError: as `from_checkpoint`, but for layers without a scale.
    """
    found = _stored(Path(path))
    return {layer: _as_scales(scales).latent for layer, scales in found.items() if scales.keys() & KV_SCALES}


def _stored(directory: Path) -> dict[int, dict[str, float]]:
    """Every layer's scales by the name that a checkpoint gives them."""
    stored: dict[int, dict[str, float]] = {layer: {} for layer in range(_layer_count(directory))}
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise InputError(
            f"{directory} holds no *.safetensors file: a checkpoint in Hugging Face layout is needed"
        )
    for file in files:
        for layer, which, value in _scales_of(file):
            if layer in stored:
                stored[layer][which] = value
    return stored


def write_scales(
    file: Path, scales: Mapping[int, Scales], metadata: Mapping[str, str], *, replace: bool = False
) -> None:
    """Write scales by layer as a safetensors file, whole or not at all. A scale is stored as float32.

    Raises:
        InputError: see `refuse_file`; or it cannot be written, or a layer's scales differ for latent and rope, which
            one `k_scale` cannot say.
    """
    refuse_file(file, replace=replace)
    partial = file.with_name(f".{file.name}.partial")
    try:
        partial.write_bytes(_serialised(scales, metadata))
        partial.replace(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"{file} cannot be written: {error.strerror}") from error


def write_overlay(
    checkpoint: Path,
    into: Path,
    scales: Mapping[int, Scales],
    metadata: Mapping[str, str],
    *,
    replace: bool = False,
) -> None:
    """Make `into` a checkpoint that is `checkpoint` with these scales, in links to its files: whole or not at all.

    Its own are the file of scales and an index that lists every tensor, since loaders that find an index read no
    file that it does not name.

    Raises:
        InputError: see `refuse_overlay`; or a directory cannot be made there.
    """
    refuse_overlay(checkpoint, into, replace=replace)
    places = _tensor_places(checkpoint)
    places["weight_map"] |= dict.fromkeys(map(_key, scales), SCALES_FILE)
    partial = into.with_name(f".{into.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for entry in sorted(checkpoint.iterdir()):
            if entry.name not in (INDEX, SCALES_FILE):
                (partial / entry.name).symlink_to(entry.resolve())
        (partial / SCALES_FILE).write_bytes(_serialised(scales, metadata))
        (partial / INDEX).write_text(json.dumps(places, indent=2) + "\n", encoding="utf-8")
        if into.exists():
            shutil.rmtree(into)
        partial.rename(into)
    except OSError as error:
        raise InputError(f"no checkpoint can be made in {into}: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_file(file: Path, *, replace: bool) -> None:
    """Raise InputError where `write_scales` would: before anything costly is done."""
    if not file.parent.is_dir():
        raise InputError(f"{file} cannot be written: {file.parent} is no directory")
    if file.is_dir():
        raise InputError(f"{file} is a directory: name a file")
    if file.exists() and not replace:
        raise InputError(f"{file} exists: name another file, or --force replaces it")


def refuse_overlay(checkpoint: Path, into: Path, *, replace: bool) -> None:
    """Raise InputError where `write_overlay` would: before anything costly is done.

    `into` may be absent or empty, or, with `replace`, an overlay made before. The checkpoint stores no scales itself:
    a loader that reads two of one name keeps either.
    """
    if into.exists():
        held = {entry.name for entry in into.iterdir()} if into.is_dir() else {""}
        overlaid = into.is_dir() and (into / SCALES_FILE).is_file() and not (into / SCALES_FILE).is_symlink()
        if held and not overlaid:
            raise InputError(f"{into} holds something else: name a directory that does not exist")
        if held and not replace:
            raise InputError(f"{into} exists: name another directory, or --force replaces it")
        if into.resolve() == checkpoint.resolve():
            raise InputError(f"{into} is the checkpoint itself: name a directory that does not exist")
    for file in sorted(checkpoint.glob("*.safetensors")):
        if found := [name for _, name, _ in _scales_of(file) if name in KV_SCALES]:
            raise InputError(
                f"{file} stores {found[0]} already: calibrate a checkpoint without scales, or write them to a file"
            )


def _key(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.attn.k_scale"


def _serialised(scales: Mapping[int, Scales], metadata: Mapping[str, str]) -> bytes:
    for layer, both in scales.items():
        if both.latent != both.rope:
            raise InputError(
                f"layer {layer} has scale {both.latent:g} for the latent and {both.rope:g} for the rope: "
                "a checkpoint stores one for both"
            )
    tensors = {_key(layer): torch.tensor(both.latent, dtype=torch.float32) for layer, both in scales.items()}
    return bytes(save(tensors, metadata={**metadata, "format": "pt"}))


def _tensor_places(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's index, or what it would say where a single file needs none."""
    index = checkpoint / INDEX
    if index.exists():
        return dict(json.loads(index.read_text(encoding="utf-8")))
    file = checkpoint / "model.safetensors"
    with safe_open(file, framework="pt") as tensors:
        return {"metadata": {}, "weight_map": dict.fromkeys(tensors.keys(), file.name)}


def _as_scales(stored: dict[str, float]) -> Scales:
    k_scale = stored.get("k_scale", stored.get("kv_scale", 1.0))
    return Scales(
        latent=k_scale, rope=k_scale, query=stored.get("q_scale", 1.0), prob=stored.get("prob_scale", 1.0)
    )


def _layer_count(directory: Path) -> int:
    config = directory / "config.json"
    try:
        layers = json.loads(config.read_text())["num_hidden_layers"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{config} gives no num_hidden_layers ({error}): a checkpoint directory is needed"
        ) from error
    if not isinstance(layers, int) or layers < 1:
        raise InputError(f"{config} has num_hidden_layers {layers!r}: a positive integer is needed")
    return layers


def _scales_of(file: Path) -> list[tuple[int, str, float]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            keys = [match for key in tensors.keys() if (match := SCALE_KEY.fullmatch(key))]  # noqa: SIM118 -- no iterator
            found = [(match, tensors.get_tensor(match[0])) for match in keys]
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read as safetensors ({error}): fetch it again") from error
    for match, tensor in found:
        if tensor.numel() != 1 or not 0 < tensor.item() < math.inf:
            shape = list(tensor.shape)
            raise InputError(
                f"{match[0]} in {file} has shape {shape}, value {tensor.tolist()}: one positive number is right"
            )
    return [(int(match["layer"]), match["which"], float(tensor.item())) for match, tensor in found]
