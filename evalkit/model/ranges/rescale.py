"""Gives a checkpoint the ranges of a profile, without changing what it computes.

Latent channel c becomes 2^k times as large in its row: kv_a_layernorm's gain takes 2^k and kv_b_proj's column c, in
both of its halves, 2^-k. Rope pair j becomes 2^m times as large: its two rows of kv_a_proj_with_mqa take 2^m, and its
two rows of every head in q_b_proj 2^-m; the members of a pair share a factor, because rotation mixes them. A power of
two changes an exponent and no digit, and every sum of the attention keeps its terms, so bf16 and float32 results are
bit-identical as long as nothing overflows or turns subnormal: of the weights this is checked; activations are scaled
by the same few powers of two. The indexer reads the hidden state and q_resid, neither of which is touched.

What is compared after attention in latent space (probe `attention`) is scaled channel by channel, too: large channels
then weigh more in its relative L2. `values`, `output`, logits and tasks are the model's own, and can be compared
across profiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evalkit.attention.path import SparseMLA
from evalkit.errors import InputError
from evalkit.model.ranges.profile import PARTS, Profile, Range
from evalkit.model.ranges.spread import Spread, measure
from evalkit.records import ProfileRecord

EXACT_DTYPES = (torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, kw_only=True)
class Rescaled:
    """One part of one layer: what was asked for, what the checkpoint had, and what it has now, measured again.

    zero_channels: channels (of rope: pairs) that hold nothing but zeros, which no factor changes.
    """

    layer: int
    part: str
    target: Range
    own: Range
    found: Range
    zero_channels: int
    tokens: int


def apply(
    model: Any, profile: Profile, documents: Sequence[Tensor], advance: Callable[[], None] | None = None
) -> list[Rescaled]:
    """Bring latent and rope of every layer nearest to the profile, by powers of two, in place.

    The same profile again changes nothing, and of two profiles the last alone counts. Scales made before no longer
    fit.

    Args:
        model: what `evalkit.load` returns.
        profile: with another layer count than the model's, interpolated over relative depth.
        documents: token ids [T], on which the checkpoint's own ranges are measured, and then the ones it has.
        advance: called twice for each document, for a progress bar; never for `native`.

    Returns:
        Layer by layer what each part was to have and has; nothing for `native`.

    Raises:
        InputError: a layer stores only zeros, the profile contradicts itself, or the model's dtype cannot hold the
            scaled weights; the model is as it was.
    """
    layers = len(model.evalkit.layers)
    targets = profile.targets(layers)
    if profile.is_native:
        return []
    own = measure(model, documents, advance)
    factors: list[dict[str, Tensor]] = []
    for layer in range(layers):
        chosen = {}
        for number, part in enumerate(PARTS):
            if part in targets[layer]:
                spread = own[layer][part]
                if spread.zero_channels == len(spread.rms):
                    raise InputError(
                        f"layer {layer} stores a {part} of zeros only: no factor brings it to profile {profile.name}"
                    )
                draw = torch.Generator().manual_seed(profile.seed + 2 * layer + number)
                chosen[part] = exponents(spread, targets[layer][part], draw)
        factors.append(chosen)
    multiply(model, factors)
    now = measure(model, documents, advance)
    return [
        Rescaled(
            layer=layer,
            part=part,
            target=target,
            own=own[layer][part].range(),
            found=now[layer][part].range(),
            zero_channels=own[layer][part].zero_channels,
            tokens=sum(map(len, documents)),
        )
        for layer, parts in enumerate(targets)
        for part, target in parts.items()
    ]


def record(profile: Profile, one: Rescaled) -> ProfileRecord:
    """What a run keeps of it."""
    return ProfileRecord(
        profile=profile.name,
        sha256=profile.sha256,
        layer=one.layer,
        part=one.part,
        target_rms=one.target.rms,
        target_max=one.target.max,
        target_tail=one.target.tail,
        own_rms=one.own.rms,
        own_max=one.own.max,
        own_tail=one.own.tail,
        rms=one.found.rms,
        max_abs=one.found.max,
        tail=one.found.tail,
        zero_channels=one.zero_channels,
        n=one.tokens,
    )


def exponents(own: Spread, target: Range, draw: torch.Generator) -> Tensor:
    """Each channel's power of two [n] int64: which brings its rms nearest to its goal without passing the max.

    The goals are lognormal: the normal quantiles, times the tail, in an order that `draw` gives, scaled to the rms
    asked for. The largest goes to the channel whose own max|x| a power of two brings nearest below the target's max,
    and is made to reach it there. Channels of zeros get 0.
    """
    alive = own.rms > 0
    rms, (digits, power) = own.rms[alive], torch.frexp(own.max[alive])
    limit, limit_power = torch.frexp(torch.tensor(target.max, dtype=torch.float64))
    # By digits alone, so that what a power of two has moved is judged as it was before.
    slack = torch.where(digits <= limit, limit, 2 * limit) / digits  # in [1, 2): 1 reaches the max exactly
    most = limit_power - power - (digits > limit).int()
    count = len(rms)
    places = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    order = torch.randperm(count, generator=draw)
    deviates = torch.special.ndtri(places)[order]
    largest, fitting = int(deviates.argmax()), int(slack.argmin())
    deviates[[largest, fitting]] = deviates[[fitting, largest]]
    goal = (target.tail * deviates).exp()
    goal *= target.rms / goal.square().mean().sqrt()
    nearest = (goal / rms).log2().round().long().minimum(most.long())
    nearest[fitting] = most[fitting]
    found = torch.zeros(len(own.rms), dtype=torch.int64)
    found[alive] = nearest
    return found


@torch.no_grad()
def multiply(model: Any, factors: Sequence[Mapping[str, Tensor]]) -> None:
    """Make each layer's channels 2^exponent times as large: `latent` [512] and `rope` [32], either left out.

    Raises:
        InputError: a weight cannot be scaled exactly; nothing has been changed.
    """
    steps = [
        (f"layer {layer}: {name}", weight, factor)
        for layer, (path, given) in enumerate(zip(model.evalkit.layers, factors, strict=True))
        for name, weight, factor in _steps(path, given)
    ]
    for where, weight, factor in steps:
        _refuse_inexact(where, weight, factor)
    for _, weight, factor in steps:
        weight.mul_(factor)


def _steps(path: SparseMLA, given: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Views of a layer's weights and what to multiply them by."""
    if "latent" in given:
        gain, up = path.kv_a_layernorm.weight, path.kv_b_proj.weight
        assert isinstance(gain, Tensor)
        yield "kv_a_layernorm", gain, _powers(given["latent"], gain)
        yield "kv_b_proj", up, _powers(-given["latent"], up)
    if "rope" in given:
        rows = given["rope"].repeat_interleave(2)  # [R]
        down, query = path.kv_a_proj_with_mqa, path.q_b_proj.weight
        yield "kv_a_proj_with_mqa", down.weight[path.latent :], _powers(rows, down.weight)[:, None]
        if down.bias is not None:
            yield "kv_a_proj_with_mqa.bias", down.bias[path.latent :], _powers(rows, down.bias)
        heads = query.view(path.heads, path.nope + path.rope, -1)[:, path.nope :]  # [H, R, Q]
        yield "q_b_proj", heads, _powers(-rows, query)[:, None]


def _powers(exponent: Tensor, like: Tensor) -> Tensor:
    # From Python's numbers: exp2 on a GPU need not be exact.
    return torch.tensor([2.0**power for power in exponent.tolist()], dtype=like.dtype, device=like.device)


def _refuse_inexact(where: str, weight: Tensor, factor: Tensor) -> None:
    if weight.dtype not in EXACT_DTYPES:
        raise InputError(
            f"{where} is {weight.dtype}: bfloat16 and float32 have the exponents for a range profile"
        )
    scaled = weight * factor
    changed = int(((scaled / factor != weight) | ~torch.isfinite(scaled)).sum())
    if changed:
        raise InputError(
            f"{where}: {changed} of {weight.numel()} weights leave what {weight.dtype} holds exactly; a profile closer "
            "to the checkpoint's own ranges is needed"
        )
