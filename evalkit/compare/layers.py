"""Compares candidates with bf16@reference layer by layer, all of them advancing through one set of weights.

Layer-major: at each layer, for each document, the reference runs once with every probe captured, then each
arm runs and is compared, and its captures are dropped. What lives on from layer to layer is one hidden state
[T, D] for each arm and document, and, where layers share an indexer, its last selection.

Each document is processed as a prompt of T - D tokens followed by D tokens one at a time on the same cache,
by the reference as by the candidates; the records of phase `prefill` cover the former, of `decode` the
latter.

The weights are asked of `model.evalkit.weights_of`, so that a streamed checkpoint's are read once; scales that it
is to be calibrated with are found at each layer just before they are used, on documents that advance alongside.

A propagated arm whose input, selection and routing at a layer are its subject's isolated ones bit for bit (at
the first layer, and throughout for bf16 against itself) takes that pass's result: it would compute the same
again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from evalkit import kv
from evalkit.candidate import Candidate
from evalkit.compare.figures.magnitudes import Magnitudes
from evalkit.compare.figures.metrics import Accumulator
from evalkit.compare.figures.ranges import RangeAccumulator, tiles, within
from evalkit.compare.figures.tokens import TokenAccumulator
from evalkit.compare.found.accumulate import Cell, ReferencePass
from evalkit.compare.found.to_records import layer_record, missing_floor, range_record, token_record
from evalkit.compare.found.token_trace import Decode, Watch
from evalkit.compare.passes import noise
from evalkit.compare.passes.capture import ATTENTION_PROBES, FROZEN_PROBES, LayerPass, run_layer, sharing
from evalkit.compare.passes.resume import Keeper
from evalkit.compare.passes.rungs import Rungs, rungs
from evalkit.compare.passes.variants import (
    DECODE,
    ISOLATED,
    PREFILL,
    PROPAGATED,
    REFERENCE,
    Arm,
    Subject,
    arms_of,
)
from evalkit.errors import InputError
from evalkit.kv import RowFormat, Scales
from evalkit.records import FloorRecord, Record

LOGITS_AT_ONCE: Final = {"cpu": 1 << 24, "cuda": 1 << 28}  # logits of one tensor held at once
NOISE_SEED: Final = 20_240_501
PARTS: Final = ("latent", "rope")

Advance = Callable[[], None]


def compare(
    model: Any,
    documents: Sequence[Tensor],
    candidates: Sequence[Candidate],
    *,
    scales: Mapping[Candidate, Mapping[int, Scales]] | None = None,
    decode_tokens: int = 16,
    floors: Sequence[Subject] | None = None,
    advance: Advance = lambda: None,
    frozen: bool = True,
    calibration: Sequence[Tensor] = (),
    state: Keeper | None = None,
    decode: Decode | None = None,
) -> Iterator[Record]:
    """Every probe of every layer, for every candidate, each layer's records as soon as it is done.

    Args:
        model: what `evalkit.load` returns, on any device.
        documents: token ids [T] int64, T > `decode_tokens`, at least one.
        candidates: resolved ones (a backend that runs here), the bf16 control first.
        scales: each candidate's scales by layer; 1.0 where there are none.
        decode_tokens: how many of a document's last tokens are processed one at a time; 0 leaves that phase
            out.
        floors: None measures what `noise.floors` offers, () nothing.
        advance: called `count_passes(...)` times, for a progress bar.
        frozen: whether candidates also run with selection and routing frozen to the reference's.
        calibration: documents on which to find, layer by layer, the scales of `calibrated` candidates that come
            without.
        state: keeps what goes on from layer to layer; the comparison begins after the last layer that it holds.
        decode: token ids as text, for the tokens that lose most.

    Yields:
        LayerRecord, SelectionRecord, RangeRecord and what `Watch` finds, and TokenRecord at the end.

    Raises:
        InputError: there is no document or no candidate, or a document is too short.
    """
    _check(model, documents, candidates, decode_tokens)
    floors = noise.floors(model) if floors is None else floors
    given = scales or {}
    subjects = [
        Subject(candidate=candidate, scales=given.get(candidate, {}) or {}, runs_frozen=frozen)
        for candidate in candidates
    ]
    stream = LayerStream(model, documents, [*subjects, *floors], decode_tokens, advance, calibration)
    stream.watch.decode = decode or stream.watch.decode
    start = 0 if state is None else state.restore(stream)
    for _ in range(start * len(documents) * (1 + len(stream.arms))):
        stream.advance()
    for rung, measured in ((noise.KERNEL, noise.kernel_floor), (noise.SPLIT, noise.split_floor)):
        if start == 0 and floors and measured(model)[0] is None:
            yield missing_floor(rung)
            yield FloorRecord(rung=rung, candidate=None, reason=measured(model)[1])
    for floor in floors if start == 0 else ():
        yield FloorRecord(rung=floor.rung, candidate=str(floor.candidate), reason="")
    for layer in range(start, model.config.num_hidden_layers):
        yield from stream.layer(layer)
        if state is not None:
            state.keep(stream, layer)
    yield from stream.logits()


def count_passes(
    model: Any,
    documents: int,
    candidates: int,
    floors: Sequence[Subject] | None = None,
    frozen: bool = True,
) -> int:
    """How often `compare` calls `advance` for so many documents and candidates, and these floors."""
    floors = noise.floors(model) if floors is None else floors
    subject = Subject(candidate=REFERENCE, runs_frozen=frozen)
    arms = sum(len(arms_of(subject)) for subject in [subject] * candidates + list(floors))
    return int(model.config.num_hidden_layers) * documents * (1 + arms)


@torch.no_grad()
def calibrate(
    model: Any,
    documents: Sequence[Tensor],
    format: RowFormat,
    advance: Advance = lambda: None,
    percentile: float = 100,
    parts: Sequence[str] = PARTS,
) -> dict[int, Scales]:
    """Scales that saturate neither latent nor rope of these documents, by layer.

    `advance` is called once for each layer and document. With a `percentile` below 100, up to the rest of latent
    and of rope may saturate; with one of both in `parts`, all of the other.

    Raises:
        InputError: there is no document, a layer stores nothing but zeros or what is not finite, or the percentile
            is outside (0, 100].
    """
    _check(model, documents, [REFERENCE], decode_tokens=0)
    stream, found = LayerStream(model, documents, [], 0, advance), {}
    for layer in range(model.config.num_hidden_layers):
        sizes = stream.magnitudes(layer)
        fitted = [sizes[part].percentile(percentile) if part in parts else 0.0 for part in PARTS]
        found[layer] = format.calibrate(*fitted)
    return found


class LayerStream:
    """The state between layers: hidden states, shared selections, and the reference's current input."""

    def __init__(
        self,
        model: Any,
        documents: Sequence[Tensor],
        subjects: Sequence[Subject],
        decode_tokens: int,
        advance: Advance,
        calibration: Sequence[Tensor] = (),
    ) -> None:
        self.model, self.subjects, self.advance = model, subjects, advance
        # Formats, and the scales found so far.
        self.calibrated: list[tuple[RowFormat, dict[int, Scales]]] = []
        for subject in subjects if calibration else ():
            if subject.candidate.scales == "calibrated" and not subject.scales:
                assert isinstance(subject.scales, dict)
                self.calibrated.append((kv.get(subject.candidate.format), subject.scales))
        self.calibration: LayerStream | None = (
            LayerStream(model, calibration, [], 0, lambda: None) if self.calibrated else None
        )
        self.arms = [arm for subject in subjects for arm in arms_of(subject)]
        with torch.no_grad():
            embed = model.model.embed_tokens
            self.inputs = [embed(ids.to(model.device)[None]) for ids in documents]  # each [1, T, D]
        self.prefill = [len(ids) - decode_tokens for ids in documents]
        moving = [arm for arm in self.arms if arm.mode == PROPAGATED]
        self.hidden = {(arm, number): x for arm in moving for number, x in enumerate(self.inputs)}
        self.sharing = sharing(model)
        self.selections: dict[tuple[Arm | None, int], Tensor] = {}  # of the last layer with an indexer
        self.watch = Watch(documents, self.prefill, model.config.index_topk)
        self.unsplit: dict[str, LayerPass] = {}  # by mode, what a kernel that splits keys is compared with

    def layer(self, index: int) -> list[Record]:
        """Advance everything through one layer; its records."""
        with torch.no_grad(), self.model.evalkit.weights_of(index):
            if self.calibration is not None:
                sizes = self.calibration.magnitudes(index)
                for stored, scales in self.calibrated:
                    scales[index] = stored.calibrate(*(sizes[part].percentile(100) for part in PARTS))
            return self._layer(index)

    @torch.no_grad()
    def magnitudes(self, index: int) -> dict[str, Magnitudes]:
        """Advance the reference alone through one layer; how large its latent and its rope are."""
        sizes = {part: Magnitudes() for part in PARTS}
        with self.model.evalkit.weights_of(index):
            for document in range(len(self.inputs)):
                ref = self.reference(index, document).run
                self.inputs[document] = ref.hidden
                for part, counted in sizes.items():
                    counted.add(ref.probes[part])
        return sizes

    def _layer(self, index: int) -> list[Record]:
        cells = [Cell(arm, index) for arm in self.arms]
        ranges = self._range_accumulators(index)
        for document in range(len(self.inputs)):
            ref = self.reference(index, document)
            for (_, part), accumulator in ranges.items():
                accumulator.add(within(ref.run.probes["latent" if "latent" in part else part], part))
            isolated = None
            for cell in cells:
                isolated = self._advance_arm(cell, document, ref, isolated)
            self.inputs[document] = ref.run.hidden
        found: list[Record] = [record for cell in cells for record in cell.records()]
        for (candidate, part), values in ranges.items():
            found.append(range_record(candidate, index, part, values.scale, values.result()))
        found += self.watch.layer(index, cells)
        return found

    def reference(self, index: int, document: int) -> ReferencePass:
        """Run bf16@reference on its hidden state of one document; `inputs` is left for the arms to read."""
        shared = self.selections.get((None, document)) if self.sharing[index] else None
        arm = Arm(subject=Subject(candidate=REFERENCE), mode=PROPAGATED)
        run = self._run(arm, index, document, self.inputs[document], selection=shared, keep_call=True)
        if any(self.sharing):
            self.selections[None, document] = run.probes["selection"]
        return ReferencePass.of(run, self.prefill[document], self.model.config.index_topk)

    def _advance_arm(
        self, cell: Cell, document: int, ref: ReferencePass, isolated: LayerPass | None
    ) -> LayerPass | None:
        """Run one arm, compare it, and move it on. Takes and returns its subject's isolated pass."""
        arm, shared = cell.arm, self.sharing[cell.layer]
        if arm.mode == ISOLATED:
            # A selection made by an earlier layer is part of this layer's input.
            selection = ref.selection if shared else None
            split = not arm.subject.is_floor
            got = self._run(
                arm, cell.layer, document, self.inputs[document], selection=selection, keep_call=split
            )
            cell.add(got, self._counterpart(arm, ref), self._rungs(arm.subject, got, ref) if split else None)
            return self._kept(arm, LayerPass(got.hidden, got.probes, None))
        source, selection, routing = self.hidden[arm, document], None, None
        if arm.frozen:
            selection, routing = ref.selection, ref.run.probes.get("routing")
        elif shared:
            selection = self.selections[arm, document]
        same_input = torch.equal(source, self.inputs[document])
        if isolated is not None and same_input and isolated.has_chosen(selection, routing):
            got = isolated
            self.advance()
        else:
            got = self._run(arm, cell.layer, document, source, selection=selection, routing=routing)
        cell.add(self._kept(arm, got), self._counterpart(arm, ref), None)
        self.hidden[arm, document] = got.hidden
        if any(self.sharing) and not arm.frozen:
            self.selections[arm, document] = got.probes["selection"]
        return isolated

    def _kept(self, arm: Arm, got: LayerPass) -> LayerPass:
        """The same pass, kept while the document lasts if the splitting kernel is compared with it."""
        if arm.subject.rung == noise.KERNEL and not arm.frozen and any(x.splits for x in self.subjects):
            self.unsplit[arm.mode] = got
        return got

    def _counterpart(self, arm: Arm, ref: ReferencePass) -> ReferencePass:
        """What an arm is compared with: the reference, or its own kernel's pass without splits."""
        if not arm.subject.splits:
            return ref
        run = self.unsplit.pop(arm.mode)
        return replace(ref, run=run, selection=run.probes["selection"])

    def _rungs(self, subject: Subject, got: LayerPass, ref: ReferencePass) -> Rungs:
        assert ref.run.call is not None
        assert got.call is not None
        rounded = self.model.evalkit.new_cache(REFERENCE, {}).state.round
        return rungs(ref.run.call, got.call, subject.candidate.backend, rounded)

    def _run(
        self,
        arm: Arm,
        index: int,
        document: int,
        source: Tensor,
        *,
        selection: Tensor | None,
        routing: Tensor | None = None,
        keep_call: bool = False,
    ) -> LayerPass:
        """One arm through one layer on a cache of its own, which goes when the pass does."""
        subject = arm.subject
        here = subject.scales.get(index)  # the cache serves this layer only; others may not have theirs yet
        scales = {} if here is None else dict.fromkeys(range(self.model.config.num_hidden_layers), here)
        cache = self.model.evalkit.new_cache(candidate=subject.candidate, scales=scales)
        if subject.splits:
            cache.state.backend = cache.state.backend.splitting()
        spans = subject.spans(self.prefill[document], source.shape[1])
        seed = NOISE_SEED + 1000 * document + index
        probes = FROZEN_PROBES if arm.frozen else ATTENTION_PROBES
        with noise.row_noise(self.model.model.layers[index], subject.noise, seed):
            got = run_layer(
                self.model,
                index,
                source,
                cache,
                spans,
                probes=probes,
                keep_call=keep_call,
                selection=selection,
                routing=routing,
            )
        self.advance()
        return got

    def _range_accumulators(self, index: int) -> dict[tuple[str, str], RangeAccumulator]:
        """By candidate and part, for each whose format divides that part by a given scale."""
        found = {}
        for subject in self.subjects:
            stored, scales = kv.get(subject.candidate.format), subject.scales.get(index, Scales())
            for part in PARTS:
                if not subject.is_floor and _is_scaled(stored, part):
                    for piece in (part, *tiles(part, stored.latent_dim)):
                        found[str(subject.candidate), piece] = RangeAccumulator(getattr(scales, part))
        return found

    @torch.no_grad()
    def logits(self) -> Iterator[Record]:
        """What the last layer's hidden states make of the next token: logits, and their divergence."""
        for arm in self.arms:
            if arm.mode != PROPAGATED:
                continue
            metrics: dict[str, Accumulator] = {}
            tokens: dict[str, TokenAccumulator] = {}
            for document, ref in enumerate(self._last_hidden(arm)):
                for phase, span in _logit_spans(ref, self.prefill[document], self.model.config.vocab_size):
                    got, wanted = (self.head(x[:, span]) for x in (self.hidden[arm, document], ref))
                    metrics.setdefault(phase, Accumulator()).add(got, wanted)
                    tokens.setdefault(phase, TokenAccumulator()).add(
                        got, wanted, self.watch.place(document, span)
                    )
            for phase, accumulator in metrics.items():
                yield layer_record(arm, None, phase, "logits", arm.subject.rung, accumulator.result())
                if not arm.subject.is_floor:
                    yield token_record(arm, phase, tokens[phase].result())
            yield from self.watch.diverged(arm, tokens)
        yield from self.watch.end()

    def _last_hidden(self, arm: Arm) -> list[Tensor]:
        """What an arm's hidden states are compared with at the end, by document: see `_counterpart`."""
        if not arm.subject.splits:
            return self.inputs
        own = next(x for x in self.arms if x.subject.rung == noise.KERNEL and x.mode == PROPAGATED)
        return [self.hidden[own, document] for document in range(len(self.inputs))]

    def head(self, hidden: Tensor) -> Tensor:
        """hidden [1, T, D] after the last layer -> logits [T, V]."""
        logits: Tensor = self.model.lm_head(self.model.model.norm(hidden))[0]
        return logits


def _logit_spans(hidden: Tensor, prefill: int, vocabulary: int) -> Iterator[tuple[str, slice]]:
    """Each phase of a document in pieces whose logits fit in `LOGITS_AT_ONCE`."""
    total, step = hidden.shape[1], max(1, LOGITS_AT_ONCE[hidden.device.type] // vocabulary)
    for phase, first, end in ((PREFILL, 0, prefill), (DECODE, prefill, total)):
        for start in range(first, end, step):
            yield phase, slice(start, min(start + step, end))


def _is_scaled(format: RowFormat, part: str) -> bool:
    """Whether this part is e4m3 under a per-tensor scale: where another scale changes the bytes of a row."""
    if format.four_bit and part == "latent":
        return False  # its values saturate at a group's own scale, not at 448 of this one
    ones = torch.ones(1, format.latent_dim), torch.ones(1, format.rope_dim)
    stored = (format.encode(*ones, scales) for scales in (Scales(), Scales(**{part: 2.0})))
    return not torch.equal(*stored)


def _check(
    model: Any, documents: Sequence[Tensor], candidates: Sequence[Candidate], decode_tokens: int
) -> None:
    if not documents or not candidates:
        raise InputError(
            f"{len(documents)} documents and {len(candidates)} candidates: at least one of each is needed"
        )
    limit = model.config.max_position_embeddings
    for number, ids in enumerate(documents):
        if ids.dim() != 1 or not decode_tokens < len(ids) <= limit:
            raise InputError(
                f"document {number} has shape {list(ids.shape)}: [T] is needed, "
                f"{decode_tokens} (decode_tokens) < T <= {limit} (the model's max_position_embeddings)"
            )
