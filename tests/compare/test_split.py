"""floor:split: a kernel that splits a query's keys against the same kernel without, not against the reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from evalkit.attention import backends
from evalkit.attention.backends.base import Backend
from evalkit.attention.backends.base import backends as registry
from evalkit.compare.layers import compare, count_passes
from evalkit.compare.passes import noise
from evalkit.records import LayerRecord, only

OWN, SPLIT = 2.0**-7, 2.0**-12  # what the kernel is off by, and what its splits add


class Kernel(Backend):
    """Exact attention made larger by a known factor."""

    name = kernel = "off"
    takes_float32 = True
    factor = 1 + OWN

    def attend(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        out, lse = backends.get("reference").attend(*arguments)
        return out.double().mul(self.factor).to(out.dtype), lse

    def unavailable_because(self, *_: Any) -> str | None:
        return None

    def splitting(self) -> Backend | None:
        return Splitting()


class Splitting(Kernel):
    factor = (1 + OWN) * (1 + SPLIT)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, model: Any) -> Iterator[None]:
    registry.register(Kernel)
    monkeypatch.setattr(backends, "PREFERENCE", ("off", "reference"))
    # The splits are finer than bf16: the attention output is kept as the kernel gives it.
    monkeypatch.setattr(model.evalkit, "rounding", None)
    yield
    registry.remove("off")


@pytest.mark.usefixtures("kernel")
def test_what_splits_change_is_measured_apart_from_the_kernel(
    model: Any, documents: list[torch.Tensor]
) -> None:
    assert [x.rung for x in noise.floors(model)][:2] == [noise.KERNEL, noise.SPLIT]
    calls: list[None] = []
    candidates = [noise.REFERENCE]
    found = list(compare(model, documents, candidates, decode_tokens=6, advance=lambda: calls.append(None)))
    assert len(calls) == count_passes(model, len(documents), 1)
    for rung, size in ((noise.KERNEL, OWN), (noise.SPLIT, SPLIT)):
        records = [r for r in only(found, LayerRecord) if r.rung == rung]
        assert {r.candidate for r in records} == {"bf16@off"}
        here = [r for r in records if r.probe == "attention" and r.layer == 0]
        assert {(r.phase, r.mode) for r in here if r.frozen == "none"} == {
            (phase, mode) for phase in ("prefill", "decode") for mode in ("isolated", "propagated")
        }
        for record in here:
            assert record.relative_l2 == pytest.approx(size, rel=1e-2), record
    logits = {r.rung: r.relative_l2 for r in only(found, LayerRecord) if r.probe == "logits" and r.n}
    assert 0 < logits[noise.SPLIT] < logits[noise.KERNEL] / 4  # type: ignore[operator]


@pytest.mark.usefixtures("kernel")
def test_a_kernel_that_never_splits_has_no_such_floor(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kernel, "splitting", lambda self: None)
    found, reason = noise.split_floor(model)
    assert found is None
    assert reason == "off's bf16 kernel never splits a query's keys"
    assert [x.rung for x in noise.floors(model)] == [noise.KERNEL, noise.BATCH, noise.NOISE]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a kernel runs there")
def test_without_a_kernel_the_floor_is_recorded_as_not_measured(
    model: Any, documents: list[torch.Tensor]
) -> None:
    found, reason = noise.split_floor(model)
    assert found is None
    assert "flashinfer" in reason
    records = compare(model, documents[:1], [noise.REFERENCE], decode_tokens=0)
    missing = [r for r in only(list(records), LayerRecord) if r.rung == noise.SPLIT]
    assert [(r.n, r.relative_l2) for r in missing] == [(0, None)]
