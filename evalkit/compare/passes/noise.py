"""The noise floor: what bf16 differs from itself by, on the same tokens.

Four kinds, recorded apart as rungs: `floor:kernel` (another kernel reads the same bf16 rows), `floor:split` (that
kernel, each query's keys split over processors, against itself without), `floor:batch` (the same tokens in steps of
another size) and `floor:noise` (latent and rope times 1 + u, u uniform within 2^-9, half a unit in bf16's last
place, and stored as bf16: dithered where the model computes in bf16). A serving engine has `floor:start`: the same
kernel on an engine that was started afresh.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from evalkit.attention import backends
from evalkit.candidate import Candidate
from evalkit.compare.passes.variants import REFERENCE, Subject
from evalkit.errors import InputError

KERNEL, SPLIT, BATCH, NOISE = "floor:kernel", "floor:split", "floor:batch", "floor:noise"
START = "floor:start"
HALF_ULP: Final = 2.0**-9


def floors(model: Any, *, kernel_only: bool = False, frozen: bool = True) -> list[Subject]:
    """The floors that can be measured for a loaded model where it is; see `kernel_floor` and `split_floor` for those
    that may not.

    Only the kernel floor, the one that multiples are taken of, also runs frozen, if anything does. `kernel_only`
    leaves the others out.
    """
    other, _ = kernel_floor(model)
    kernel = [] if other is None else [Subject(candidate=other, rung=KERNEL, runs_frozen=frozen)]
    if kernel_only:
        return kernel
    found = [
        Subject(candidate=REFERENCE, rung=BATCH, prefill_chunks=3, runs_frozen=False),
        Subject(candidate=REFERENCE, rung=NOISE, noise=HALF_ULP, runs_frozen=False),
    ]
    split, _ = split_floor(model)
    if split is not None:
        found.insert(0, Subject(candidate=split, rung=SPLIT, splits=True, runs_frozen=False))
    return [*kernel, *found]


def kernel_floor(model: Any) -> tuple[Candidate | None, str]:
    """The first kernel that reads bf16 for this model here, or None with every kernel's reason."""
    reasons = []
    for name in backends.PREFERENCE:  # real kernels: what another backend models is no second opinion
        if name == REFERENCE.backend:
            continue
        try:
            found: Candidate = model.evalkit.resolve(Candidate(format=REFERENCE.format, backend=name))
        except InputError as refusal:
            reasons.append(str(refusal))
        else:
            return found, ""
    return None, "; ".join(reasons) or "no other backend is registered"


def split_floor(model: Any) -> tuple[Candidate | None, str]:
    """The kernel of `kernel_floor`, if it can split a bf16 query's keys, or None with the reason."""
    other, reason = kernel_floor(model)
    if other is not None and backends.get(other.backend).splitting() is None:
        return None, f"{other.backend}'s bf16 kernel never splits a query's keys"
    return other, reason


@contextmanager
def row_noise(layer: nn.Module, size: float, seed: int) -> Iterator[None]:
    """Within the block, a layer's latent (after its norm) and rope are multiplied by 1 + u, |u| <= `size`.

    The same seed gives the same noise, on one kind of device, for the same steps.
    """
    if size == 0:
        yield
        return
    attention: Any = layer.self_attn
    generator = torch.Generator(attention.kv_a_layernorm.weight.device).manual_seed(seed)

    def noisy(x: Tensor) -> Tensor:
        u = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float32)
        disturbed = x.float() * (1 + size * (2 * u - 1))
        return _dithered(disturbed, generator) if x.dtype == torch.bfloat16 else disturbed.to(x.dtype)

    def on_latent(_module: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
        return noisy(out)

    def on_rope(_module: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
        return torch.cat([out[..., : attention.latent], noisy(out[..., attention.latent :])], -1)

    hooks = [
        attention.kv_a_layernorm.register_forward_hook(on_latent),
        attention.kv_a_proj_with_mqa.register_forward_hook(on_rope),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _dithered(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 -> bf16, up or down with the probability that keeps the mean.

    Noise of up to half a unit in the last place on what is bf16 already would round back to where it came from.
    """
    low = torch.randint(1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    # The dropped bits carry into the kept ones; what is not finite must not turn into something else on the way.
    rounded = ((x.view(torch.int32) + low) & -(1 << 16)).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).bfloat16()
