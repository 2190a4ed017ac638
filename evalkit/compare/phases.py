"""The same tokens arriving in five ways, each against the reference's own same way: a phase that departs is named.

A kernel, a scale or a block table may be right in one way of serving and wrong in another. Over one window of tokens,
the end of the document, each way makes the same queries and rows:

    prefill          the whole document in one step
    decode           what precedes the window in one step, then each token alone
    cached_prefix    the same, with the rows handed to another sequence's pages before the window
    second_turn      a first turn that ends in decoded tokens; then the window's first half as a prompt over its rows,
                     its second half decoded
    chunked_prefill  the whole document in four steps

Isolated, a layer is fed what the reference had there in the same way; propagated, the whole model runs so. The error
of a sound format hardly depends on the way, so a phase departs where its error is above that of the least other one
by more than phases differ by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from evalkit.candidate import Candidate
from evalkit.compare.figures.tokens import kl_nats
from evalkit.compare.passes.capture import run_layer, sharing
from evalkit.compare.passes.variants import ISOLATED, PROPAGATED, REFERENCE
from evalkit.errors import InputError
from evalkit.kv import Scales
from evalkit.records import PhaseRecord
from evalkit.stats.ratios import by_units

PHASES: Final = ("prefill", "decode", "cached_prefix", "second_turn", "chunked_prefill")
WINDOW: Final = 32  # tokens compared, at most
CHUNKS: Final = 4
DEPARTS: Final = 1.5  # the lower end of a multiple that phases of a sound candidate stay under
PROBES: Final = frozenset({"attention", "selection"})
FEWEST_TOKENS: Final = 2 * CHUNKS


@dataclass(frozen=True, kw_only=True)
class Way:
    """One phase over a document of `total` tokens, the last from `first` on its window."""

    phase: str
    first: int
    total: int

    @classmethod
    def all_of(cls, total: int) -> list[Way]:
        """Every phase of a document."""
        window = min(WINDOW, total // CHUNKS)
        return [cls(phase=phase, first=total - window, total=total) for phase in PHASES]

    @property
    def steps(self) -> list[slice]:
        """Which tokens go through the model together, in order."""
        first, total = self.first, self.total
        half = (first + total) // 2
        answer = first - (total - half)  # where the first turn's own decoding begins
        if self.phase == "prefill":
            return [slice(0, total)]
        if self.phase == "second_turn":
            return [slice(0, answer), *_singly(answer, first), slice(first, half), *_singly(half, total)]
        if self.phase == "chunked_prefill":
            size = -(-total // CHUNKS)
            return [slice(start, min(start + size, total)) for start in range(0, total, size)]
        return [slice(0, first), *_singly(first, total)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Pass:
    """One layer over one document in one way: hidden [1, T, D], attention [T, H, C], selection [T, K]."""

    hidden: Tensor
    attention: Tensor
    selection: Tensor


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A candidate in one mode, or the reference, which has none."""

    candidate: Candidate
    mode: str


def compare_phases(
    model: Any,
    documents: Sequence[Tensor],
    candidates: Sequence[Candidate],
    *,
    scales: Mapping[Candidate, Mapping[int, Scales]] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Iterator[PhaseRecord]:
    """Every phase of every candidate at every layer, and of its next-token distributions.

    Args:
        model: what `evalkit.load` returns.
        documents: token ids [T] int64, at least one.
        candidates: resolved ones. The reference itself, equal by definition, is left out.
        scales: each candidate's scales by layer.
        advance: called `count_phase_passes(...)` times.

    Raises:
        InputError: a document is too short to be processed in so many ways.
    """
    refuse_short(documents)
    others = [candidate for candidate in candidates if candidate != REFERENCE]
    stream = _Stream(model, documents, others, scales or {}, advance)
    for layer in range(model.config.num_hidden_layers):
        errors: dict[Subject, dict[str, list[Tensor]]] = {}
        with torch.no_grad(), model.evalkit.weights_of(layer):
            for document in range(len(documents)):
                for way in stream.ways[document]:
                    for subject, rows in stream.step(layer, document, way):
                        errors.setdefault(subject, {}).setdefault(way.phase, []).append(rows)
        for subject, phases in errors.items():
            yield from _layer_records(subject, layer, phases)
    for candidate in others:
        yield from _kl_records(candidate, stream.divergence(candidate))


def refuse_short(documents: Sequence[Tensor]) -> None:
    """Refuse documents that are too short.

    Raises:
        InputError: one has fewer than `FEWEST_TOKENS`.
    """
    for number, ids in enumerate(documents):
        if len(ids) < FEWEST_TOKENS:
            raise InputError(
                f"document {number} has {len(ids)} tokens: phases take {FEWEST_TOKENS} at least, and phase_tokens=0 "
                "leaves them out"
            )


def count_phase_passes(model: Any, documents: int, candidates: Sequence[Candidate]) -> int:
    """How often `compare_phases` calls `advance`."""
    others = sum(candidate != REFERENCE for candidate in candidates)
    return int(model.config.num_hidden_layers) * documents * len(PHASES) * (1 + 2 * others)


class _Stream:
    """Hidden states between layers, of the reference (None) and of every propagated candidate, by document and phase."""

    def __init__(
        self,
        model: Any,
        documents: Sequence[Tensor],
        candidates: Sequence[Candidate],
        scales: Mapping[Candidate, Mapping[int, Scales]],
        advance: Callable[[], None],
    ) -> None:
        self.model, self.candidates, self.scales, self.advance = model, candidates, scales, advance
        self.ways = [Way.all_of(len(ids)) for ids in documents]
        self.hidden: dict[tuple[Candidate | None, int, str], Tensor] = {}
        self.sharing = sharing(model)
        self.selections: dict[tuple[Candidate | None, int, str], Tensor] = {}  # of the last full indexer
        with torch.no_grad():
            for number, ids in enumerate(documents):
                start = model.model.embed_tokens(ids.to(model.device)[None])
                for candidate in (None, *candidates):
                    self.hidden |= {(candidate, number, phase): start for phase in PHASES}

    def step(self, layer: int, document: int, way: Way) -> Iterator[tuple[Subject, Tensor]]:
        """Advance everything; each subject's norms of error and reference over the window, [t, 2]."""
        here = document, way.phase
        source = self.hidden[None, *here]
        ref = self._run(REFERENCE, layer, source, way, self._shared(layer, None, here))
        for candidate in self.candidates:
            shared = ref.selection if self.sharing[layer] else None
            alone = self._run(candidate, layer, source, way, shared)
            yield Subject(candidate=candidate, mode=ISOLATED), _norms(alone, ref, way)
            moved = self._run(
                candidate, layer, self.hidden[candidate, *here], way, self._shared(layer, candidate, here)
            )
            yield Subject(candidate=candidate, mode=PROPAGATED), _norms(moved, ref, way)
            self.hidden[candidate, *here], self.selections[candidate, *here] = moved.hidden, moved.selection
        self.hidden[None, *here], self.selections[None, *here] = ref.hidden, ref.selection

    def _shared(self, layer: int, whose: Candidate | None, here: tuple[int, str]) -> Tensor | None:
        return self.selections[whose, *here] if self.sharing[layer] else None

    def _run(
        self, candidate: Candidate, layer: int, source: Tensor, way: Way, selection: Tensor | None
    ) -> Pass:
        given = self.scales.get(candidate, {}).get(layer)
        every = {} if given is None else dict.fromkeys(range(self.model.config.num_hidden_layers), given)
        cache = self.model.evalkit.new_cache(candidate=candidate, scales=every)
        parts = [way.steps]
        if way.phase == "cached_prefix":
            parts = [way.steps[:1], way.steps[1:]]
        passes = []
        for number, steps in enumerate(parts):
            if number:
                cache.batch_select_indices(torch.zeros(1, dtype=torch.int64))
            passes.append(
                run_layer(self.model, layer, source, cache, steps, probes=PROBES, selection=selection)
            )
        self.advance()
        columns = [one.probes["selection"] for one in passes]
        width = max(one.shape[1] for one in columns)
        return Pass(
            hidden=torch.cat([one.hidden for one in passes], 1),
            attention=torch.cat([one.probes["attention"] for one in passes]),
            selection=torch.cat(
                [torch.nn.functional.pad(one, (0, width - one.shape[1]), value=-1) for one in columns]
            ),
        )

    @torch.no_grad()
    def divergence(self, candidate: Candidate) -> dict[str, list[Tensor]]:
        """KL of each window's tokens in nats, [t] a document, by phase."""
        found: dict[str, list[Tensor]] = {}
        for document, ways in enumerate(self.ways):
            for way in ways:
                logits = [
                    self.model.lm_head(
                        self.model.model.norm(self.hidden[whose, document, way.phase][0, way.first :])
                    )
                    for whose in (candidate, None)
                ]
                found.setdefault(way.phase, []).append(kl_nats(*logits).cpu())
        return found


def _norms(got: Pass, ref: Pass, way: Way) -> Tensor:
    """Norm of the attention's error and of the reference, a token of the window: [t, 2] float64."""
    mine, theirs = (one.attention[way.first :].double().flatten(1) for one in (got, ref))
    return torch.stack([(mine - theirs).norm(dim=1), theirs.norm(dim=1)], 1).cpu()


def _layer_records(subject: Subject, layer: int, phases: Mapping[str, list[Tensor]]) -> Iterator[PhaseRecord]:
    squares = {phase: [rows[:, 0] ** 2 for rows in parts] for phase, parts in phases.items()}
    power = {phase: sum(float((rows[:, 1] ** 2).sum()) for rows in parts) for phase, parts in phases.items()}
    for phase, fields in _against_least(squares, root=True).items():
        total = sum(float(rows[rows.isfinite()].sum()) for rows in squares[phase])
        yield PhaseRecord(
            candidate=str(subject.candidate),
            layer=layer,
            mode=subject.mode,
            probe="attention",
            phase=phase,
            relative_l2=(total / power[phase]) ** 0.5 if power[phase] > 0 else None,
            kl_mean_nats=None,
            **fields,
        )


def _kl_records(candidate: Candidate, phases: Mapping[str, list[Tensor]]) -> Iterator[PhaseRecord]:
    for phase, fields in _against_least(phases, root=False).items():
        joined = _joined(phases[phase])
        yield PhaseRecord(
            candidate=str(candidate),
            layer=None,
            mode=PROPAGATED,
            probe="kl",
            phase=phase,
            relative_l2=None,
            kl_mean_nats=float(joined.mean()) if bool(joined.isfinite().all()) else None,
            **fields,
        )


def _against_least(errors: Mapping[str, list[Tensor]], *, root: bool) -> dict[str, dict[str, Any]]:
    """Each phase against the one of the others whose finite errors sum to least, paired token by token."""
    sums = {phase: float(_joined(parts).nansum()) for phase, parts in errors.items()}
    lost = {phase: int((~_joined(parts).isfinite()).sum()) for phase, parts in errors.items()}
    found = {}
    for phase, parts in errors.items():
        least = min(
            (other for other in errors if other != phase), key=lambda other: (lost[other], sums[other])
        )
        compared = by_units([x.numpy() for x in parts], [x.numpy() for x in errors[least]], root=root)
        departs: bool | None = None
        if lost[phase] > lost[least]:
            departs = True
        elif compared is None:
            departs = sums[phase] > 0
        elif compared.value == 0:
            departs = False
        elif compared.lower is not None:
            departs = compared.lower > DEPARTS
        found[phase] = {
            "least_other": least,
            "multiple": None if compared is None else compared.value,
            "lower": None if compared is None else compared.lower,
            "upper": None if compared is None else compared.upper,
            "interval_method": "none (the other phase has no error)" if compared is None else compared.method,
            "departs": departs,
            "nonfinite": lost[phase],
            "n": len(_joined(parts)),
        }
    return found


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts))


def _singly(start: int, end: int) -> list[slice]:
    return [slice(number, number + 1) for number in range(start, end)]
