"""Per-tensor scales, where they come from, and how readers round a scale before they multiply by it."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from evalkit.errors import InputError
from evalkit.kv.e4m3 import E4M3_MAX

ReadScale = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Scales:
    """One layer's per-tensor scales: a stored code times its scale is the value.

    vLLM has a single `k_scale` for latent and rope; FlashInfer's kernel takes one for each, and so does this.
    """

    latent: float = 1.0
    rope: float = 1.0
    query: float = 1.0
    prob: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < value < math.inf:
                raise InputError(f"{field.name} scale is {value!r}: a scale is a positive finite number")


def identity(scale: Tensor) -> Tensor:
    """A reader that multiplies by the scale as it was stored."""
    return scale


def round_to_bf16(scale: Tensor) -> Tensor:
    """A reader that casts the float32 scale to bf16, as the SM90 kernels of FlashMLA and FlashInfer do."""
    return scale.bfloat16().float()


def truncate_to_e8m0(scale: Tensor) -> Tensor:
    """A reader that keeps the exponent of a positive float32 scale only, as some SM100 FlashMLA builds did (#184)."""
    return (scale.view(torch.int32) & 0x7F80_0000).view(torch.float32)


IDENTITY: ReadScale = identity


def calibrate(latent_amax: float, rope_amax: float) -> Scales:
    """The smallest scale that saturates neither part, given each part's max|x| over the calibration tokens.

    Raises:
        InputError: an amax is negative or not finite, or both are zero.
    """
    for part, amax in (("latent", latent_amax), ("rope", rope_amax)):
        if not 0 <= amax < math.inf:
            raise InputError(
                f"the calibration tokens have a {part} max|x| of {amax!r}: it must be finite and >= 0"
            )
    amax = max(latent_amax, rope_amax)
    if amax == 0:
        raise InputError("the calibration tokens have latent and rope of zeros only: nothing to calibrate on")
    return Scales(latent=amax / E4M3_MAX, rope=amax / E4M3_MAX)


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
    layers = _layer_count(directory)
    stored: dict[int, dict[str, float]] = {layer: {} for layer in range(layers)}
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise InputError(
            f"{directory} holds no *.safetensors file: a checkpoint in Hugging Face layout is needed"
        )
    for file in files:
        for layer, which, value in _scales_of(file):
            if layer in stored:
                stored[layer][which] = value
    missing = [layer for layer, scales in stored.items() if not scales.keys() & {"k_scale", "kv_scale"}]
    if missing:
        where = (
            "any layer" if len(missing) == layers else f"layers {', '.join(map(str, missing))} of {layers}"
        )
        raise InputError(
            f"{directory} stores no attn.k_scale or attn.kv_scale for {where}: use the scales 'one' or 'calibrated'"
        )
    return {layer: _as_scales(scales) for layer, scales in stored.items()}


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
