"""Where a model lies, and what it computes in."""

from __future__ import annotations

import torch

from evalkit.errors import InputError


def placement(
    device: str | torch.device | None, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype, torch.dtype | None]:
    """Where a model lies, what it computes in, and what its rows are rounded to: see `load`.

    Raises:
        InputError: torch does not see the device.
    """
    place = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {place} was asked for and torch sees no GPU: device=cpu runs here")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {place} was asked for and torch sees {torch.cuda.device_count()} GPUs")
    compute = dtype if dtype is not None else torch.bfloat16 if place.type == "cuda" else torch.float32
    rounding = torch.bfloat16 if dtype is None and place.type == "cpu" else None
    return place, compute, rounding
