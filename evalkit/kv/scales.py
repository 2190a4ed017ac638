"""Per-tensor scales, what calibration makes of a range, and how readers round a scale before they multiply by it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from evalkit.errors import InputError
from evalkit.kv.numerics.e4m3 import E4M3_MAX

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
