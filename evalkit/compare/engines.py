"""Compares what serving engines showed of their layers and logits with what the baseline's own engine showed.

Each start of a candidate's engine left one safetensors file a document (evaluate/engines/inside.py writes them), of the
same tokens: a prompt in one piece, then what was decoded token by token. The reference is the baseline's first start, and
everything is propagated: each engine ran the whole model on its candidate. The floors are `floor:kernel`, the first
candidate that stores bf16 on another backend, and `floor:start`, the baseline's second start.

Latent and rope are those that the stored rows hold. An engine shows no latent attention output: `values`, which is after
W_UV, stands for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open
from torch import Tensor

from evalkit import kv
from evalkit.candidate import Candidate
from evalkit.compare.figures.metrics import Accumulator
from evalkit.compare.figures.selection import SelectionAccumulator, recall
from evalkit.compare.figures.tokens import TokenAccumulator
from evalkit.compare.found.accumulate import Cell
from evalkit.compare.found.to_records import layer_record, token_record
from evalkit.compare.found.token_trace import Decode, Watch
from evalkit.compare.passes import noise
from evalkit.compare.passes.variants import PROPAGATED, Arm, Subject, phase_spans
from evalkit.errors import InputError
from evalkit.kv import Scales
from evalkit.kv.scales import identity
from evalkit.records import FloorRecord, Record

SHOWN: Final = ("rows", "values", "output", "selection")
PROBES: Final = ("latent", "rope", "values", "output")
OUTPUT: Final = "values"

Shown = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of a candidate's engine.

    name: what its records carry: the candidate, or `candidate, start N`. files: one a document, with logits [T, V]; of
    first starts and of the baseline's second also with every layer's tensors [T, ...]. scales: by layer, as the engine
    says that it uses them.
    """

    name: str
    candidate: Candidate
    files: Sequence[Path]
    scales: Mapping[int, float] = field(default_factory=dict)

    @property
    def is_first(self) -> bool:
        return self.name == str(self.candidate)

    def layers(self) -> list[int]:
        """The layers that every file has.

        Raises:
            InputError: there is none.
        """
        found = set.intersection(*(set(_layers_in(file)) for file in self.files))
        if not found:
            raise InputError(f"{self.files[0]} holds no layer: the engine showed none of {', '.join(PROBES)}")
        return sorted(found)

    def shown(self, document: int, layer: int, device: str) -> Shown:
        """What one layer showed of one document, by probe."""
        with safe_open(self.files[document], framework="pt", device=device) as file:
            found = {name: file.get_tensor(f"{layer}.{name}") for name in SHOWN}
        scale = self.scales.get(layer, 1.0)
        stored = kv.get(self.candidate.format)
        rows = found.pop("rows").flatten(1)
        latent, rope = stored.decode(rows, Scales(latent=scale, rope=scale), identity)
        return {**found, "latent": latent, "rope": rope}

    def logits(self, document: int, device: str) -> Tensor:
        """[T, V], what predicts the token after each."""
        with safe_open(self.files[document], framework="pt", device=device) as file:
            found: Tensor = file.get_tensor("logits")
        return found


class ShownCell(Cell):
    """A cell of what an engine shows: without the layer's output, scores, routing and lost mass, which it does not."""

    def add_shown(self, got: Shown, ref: Shown, phases: Mapping[str, slice]) -> None:
        """Compare one document, phase by phase."""
        shares = recall(got["selection"], ref["selection"])
        for phase, span in phases.items():
            for probe in PROBES:
                self._compare(phase, probe, got[probe][span], ref[probe][span])
            self._compare(phase, "selection", shares[span], torch.ones_like(shares[span]))
            if not self.arm.subject.is_floor:
                self.selections.setdefault(phase, SelectionAccumulator()).add(shares[span])
        count = (ref["selection"] >= 0).sum(1).double()
        lost = ((1 - shares) * count).round()
        self.dropped.append(torch.stack([lost, count, torch.full_like(lost, torch.nan)], 1).cpu())
        for key, accumulator in self.metrics.items():
            self.errors.setdefault(key, []).append(accumulator.take_rows())


def compare(
    documents: Sequence[Tensor],
    starts: Sequence[Start],
    *,
    topk: int,
    decode_tokens: int = 0,
    device: str = "cpu",
    decode: Decode | None = None,
    advance: Callable[[], None] | None = None,
) -> Iterator[Record]:
    """Every probe of every layer, selections and next tokens of every candidate; of later starts the next tokens.

    Args:
        documents: token ids [T] int64.
        starts: the baseline's first one first; each candidate's first start is there.
        topk: keys that the indexer selects.
        decode_tokens: how many of each document's last tokens were decoded.
        device: where figures are computed.
        decode: token ids as text.
        advance: called `count_steps(...)` times.

    Yields:
        FloorRecord, LayerRecord, SelectionRecord, TokenRecord and what `Watch` finds.

    Raises:
        InputError: files hold no layer, or not the same ones.
    """
    step = advance or (lambda: None)
    baseline = starts[0]
    arms = _arms(starts)
    for kind, reason in (
        (noise.KERNEL, "no candidate stores bf16 on another backend"),
        (noise.START, "engine_starts is 1"),
    ):
        found = next((start for arm, start in arms if arm.subject.rung == kind), None)
        if found is not None:
            yield FloorRecord(rung=kind, candidate=str(found.candidate), reason="")
        else:
            # It is the reference all the same, and a report says so by this record.
            named = str(baseline.candidate) if kind == noise.START else None
            yield FloorRecord(rung=kind, candidate=named, reason=reason)
    layers = baseline.layers()
    for _, start in arms:
        if start.layers() != layers:
            raise InputError(f"{start.files[0]} holds layers {start.layers()}, the baseline's {layers}")
    watch = Watch(documents, [len(ids) - decode_tokens for ids in documents], topk, decode, output=OUTPUT)
    for layer in layers:
        cells = [ShownCell(arm, layer) for arm, _ in arms]
        for document in range(len(documents)):
            read = {start.name: start.shown(document, layer, device) for _, start in arms}
            for cell, (_, start) in zip(cells, arms, strict=True):
                cell.add_shown(read[start.name], read[baseline.name], _phases(watch, document))
                step()
        for cell in cells:
            yield from cell.records()
        yield from watch.layer(layer, cells)
    yield from _next_tokens(starts, arms, watch, device, step)


def count_steps(starts: Sequence[Start], documents: int) -> int:
    """How often `compare` calls `advance`."""
    return documents * (len(starts[0].layers()) * len(_arms(starts)) + len(starts))


def _next_tokens(
    starts: Sequence[Start],
    arms: Sequence[tuple[Arm, Start]],
    watch: Watch,
    device: str,
    step: Callable[[], None],
) -> Iterator[Record]:
    phases = list(_phases(watch, 0))
    metrics = {start.name: {phase: Accumulator() for phase in phases} for start in starts}
    tokens = {start.name: {phase: TokenAccumulator() for phase in phases} for start in starts}
    for document in range(len(watch.documents)):
        ref = starts[0].logits(document, device)
        for start in starts:
            got = start.logits(document, device)
            for phase, span in _phases(watch, document).items():
                metrics[start.name][phase].add(got[span], ref[span])
                tokens[start.name][phase].add(got[span], ref[span], watch.place(document, span))
            step()
    for arm, start in arms:
        for phase, added in metrics[start.name].items():
            yield layer_record(arm, None, phase, "logits", arm.subject.rung, added.result())
            if not arm.subject.is_floor:
                yield token_record(arm, phase, tokens[start.name][phase].result())
        yield from watch.diverged(arm, tokens[start.name])
    for start in starts:
        for phase, again in tokens[start.name].items() if not start.is_first else ():
            yield replace(token_record(_total(start), phase, again.result()), candidate=start.name)
    yield from watch.end()


def _phases(watch: Watch, document: int) -> dict[str, slice]:
    return phase_spans(watch.prefill[document], len(watch.documents[document]))


def _arms(starts: Sequence[Start]) -> list[tuple[Arm, Start]]:
    """Every candidate's first start as the candidate, then the floors, each with the start that shows it."""
    baseline, firsts = starts[0], [start for start in starts if start.is_first]
    same, own = baseline.candidate.format, baseline.candidate.backend
    kernel = [s for s in firsts if s.candidate.format == same and s.candidate.backend != own]
    again = [s for s in starts[1:] if s.candidate == baseline.candidate]
    floors = [(kind, found[0]) for kind, found in ((noise.KERNEL, kernel), (noise.START, again)) if found]
    return [(_total(start), start) for start in firsts] + [
        (Arm(subject=Subject(candidate=start.candidate, rung=kind), mode=PROPAGATED), start)
        for kind, start in floors
    ]


def _total(start: Start) -> Arm:
    return Arm(subject=Subject(candidate=start.candidate), mode=PROPAGATED)


def _layers_in(file: Path) -> Iterator[int]:
    with safe_open(file, framework="pt") as opened:
        names: list[str] = list(opened.keys())
    yield from (int(name.split(".")[0]) for name in names if name.endswith(f".{OUTPUT}"))
