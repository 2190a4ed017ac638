"""Where a candidate's loss comes from: each component alone, and all but it, against bf16@reference.

Every mixture of `mixing.components` that this needs runs over the same documents, one step a document. Isolated, layer
by layer on the reference's input: the squared relative L2 of the attention output, in which independent errors add.
Propagated through the whole model, with selection and routing free and frozen to the reference's: the mean KL divergence
of the next token in nats. The interaction is what all components do together less the sum of what each does alone: with
independent errors it is zero. Free, flips of selection and routing, which a small error starts, enlarge it.

Two controls: with no component enabled all is the reference's, to the last bit; with all of them the attention is exact
attention on the candidate's own rows (for `emulated`, its kernel's output), and `apart` is how far it is from that.
What a real kernel does beyond is the kernel rung, and not attributed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from evalkit.candidate import Candidate
from evalkit.compare.figures.tokens import kl_nats
from evalkit.compare.found.accumulate import ReferencePass
from evalkit.compare.layers import LayerStream
from evalkit.compare.passes.capture import LayerPass, run_layer
from evalkit.compare.passes.mixing import components, mix
from evalkit.compare.passes.rungs import exact
from evalkit.compare.passes.variants import FROZEN, ISOLATED, PROPAGATED
from evalkit.errors import InputError
from evalkit.kv import Scales
from evalkit.records import AttributionRecord

PROBES: Final = frozenset({"attention", "selection", "routing"})
SQUARED_AT_ONCE: Final = 1 << 24  # values that are float64 at once
LOGITS_AT_ONCE: Final = 1 << 22  # of which the divergence holds several copies in float64
NOBODY: Final = frozenset[str]()

Name = tuple[str, str | None]  # of an arm: none, all, only or without, and of which component


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixtures:
    """One candidate, and what is run of it."""

    candidate: Candidate
    scales: Mapping[int, Scales]

    def arms(self) -> dict[Name, frozenset[str]]:
        """Which components each arm has enabled."""
        every = frozenset(components(self.candidate))
        arms: dict[Name, frozenset[str]] = {("none", None): NOBODY, ("all", None): every}
        for component in components(self.candidate):
            arms["only", component] = frozenset({component})
            arms["without", component] = every - {component}
        return arms

    def distinct(self) -> list[frozenset[str]]:
        """The mixtures that these arms are: with two components, each alone is the other left out."""
        return list(dict.fromkeys(self.arms().values()))


@dataclass
class Squares:
    """Error and reference of attention outputs, squared and summed."""

    error: float = 0.0
    reference: float = 0.0
    nonfinite: int = 0
    n: int = 0

    def add(self, got: Tensor, ref: Tensor) -> None:
        """Add [T, H, C] of the same tokens."""
        step = max(1, SQUARED_AT_ONCE // ref[0].numel())
        for one, other in zip(got.split(step), ref.split(step), strict=True):
            finite = torch.isfinite(one)
            error = torch.where(finite, one.double() - other.double(), 0.0)
            self.error += float(error.square().sum())
            self.reference += float(other.double().square().sum())
            self.nonfinite += one.numel() - int(finite.sum())
            self.n += one.numel()

    @property
    def ratio(self) -> float | None:
        """Squared relative L2; None where a value is not finite, or the reference zero."""
        return self.error / self.reference if self.nonfinite == 0 and self.reference > 0 else None


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """One arm's figure at one place."""

    value: float | None
    nonfinite: int
    n: int


def attributed(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that do anything otherwise than the reference."""
    return [candidate for candidate in candidates if components(candidate)]


def count_passes(model: Any, documents: int, candidates: Sequence[Candidate]) -> int:
    """How often `attribute` calls `advance` for so many documents and these candidates."""
    found = [Mixtures(candidate=candidate, scales={}) for candidate in attributed(candidates)]
    # The reference; each candidate itself, isolated; each mixture isolated, free and frozen.
    passes = 1 + sum(1 + 3 * len(mixtures.distinct()) for mixtures in found)
    return int(model.config.num_hidden_layers) * documents * passes if found else 0


def attribute(
    model: Any,
    documents: Sequence[Tensor],
    candidates: Sequence[Candidate],
    *,
    scales: Mapping[Candidate, Mapping[int, Scales]] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Iterator[AttributionRecord]:
    """Attribute each candidate's loss to its components, those of a layer as soon as it is done.

    Args:
        model: what `evalkit.load` returns.
        documents: token ids [T] int64, at least one.
        candidates: resolved ones; those without a component are passed over.
        scales: each candidate's scales by layer; 1.0 where there are none.
        advance: called `count_passes(...)` times, for a progress bar.

    Raises:
        InputError: there is no document, one is empty or too long, or a candidate's scales are not known.
    """
    limit = model.config.max_position_embeddings
    if not documents:
        raise InputError("attribution of 0 documents: give at least one")
    for number, ids in enumerate(documents):
        if ids.dim() != 1 or not 0 < len(ids) <= limit:
            raise InputError(
                f"attribution: document {number} has shape {list(ids.shape)}: [T], 0 < T <= {limit} is right"
            )
    given = scales or {}
    subjects = [Mixtures(candidate=one, scales=given.get(one, {})) for one in attributed(candidates)]
    for subject in subjects:
        model.evalkit.new_cache(subject.candidate, subject.scales)  # refuses scales that do not fit
    if not subjects:
        return
    run = _Run(model, documents, subjects, advance)
    for layer in range(model.config.num_hidden_layers):
        yield from run.layer(layer)
    yield from run.divergences()


@dataclass(eq=False)
class _Moving:
    """A mixture on its way through the model: its hidden states, and its last selection where layers share one."""

    hidden: list[Tensor]  # by document, [1, T, D]
    selections: dict[int, Tensor] = field(default_factory=dict)


class _Run:
    """All mixtures of all candidates, advancing through one set of weights."""

    def __init__(
        self, model: Any, documents: Sequence[Tensor], subjects: list[Mixtures], advance: Callable[[], None]
    ) -> None:
        self.model, self.subjects, self.advance = model, subjects, advance
        self.reference = LayerStream(model, documents, [], 0, advance)
        self.sharing = self.reference.sharing
        self.moving = {
            (subject, enabled, frozen): _Moving(list(self.reference.inputs))
            for subject in subjects
            for enabled in subject.distinct()
            for frozen in (False, True)
        }

    @torch.no_grad()
    def layer(self, index: int) -> list[AttributionRecord]:
        """Advance everything through one layer; its records."""
        squares = {(s, enabled): Squares() for s in self.subjects for enabled in s.distinct()}
        apart = {subject: Squares() for subject in self.subjects}
        weights: AbstractContextManager[None] = self.model.evalkit.weights_of(index)
        with weights:
            for document in range(len(self.reference.inputs)):
                ref = self.reference.reference(index, document)
                for subject in self.subjects:
                    self._isolated(index, document, ref, subject, squares, apart[subject])
                self.reference.inputs[document] = ref.run.hidden
        found: list[AttributionRecord] = []
        for subject in self.subjects:
            measured = {
                enabled: _Measured(value=x.ratio, nonfinite=x.nonfinite, n=x.n)
                for (s, enabled), x in squares.items()
                if s is subject
            }
            own = apart[subject]
            extra = {"apart": _Measured(value=own.ratio, nonfinite=own.nonfinite, n=own.n)}
            found += _records(subject, index, ISOLATED, "none", measured, extra)
        return found

    def _isolated(
        self,
        index: int,
        document: int,
        ref: ReferencePass,
        subject: Mixtures,
        squares: dict[tuple[Mixtures, frozenset[str]], Squares],
        apart: Squares,
    ) -> None:
        """A candidate's mixtures on the reference's input, each followed by its propagated selves."""
        source = self.reference.inputs[document]
        # A selection made by an earlier layer is part of this layer's input.
        selection = ref.selection if self.sharing[index] else None
        own = self._run(subject, None, index, source, selection=selection, keep_call=True)
        aim = self._aim(subject.candidate, own)
        del own
        for enabled in subject.distinct():
            got = self._run(subject, enabled, index, source, selection=selection)
            squares[subject, enabled].add(got.probes["attention"], ref.run.probes["attention"])
            if enabled == subject.arms()["all", None]:
                apart.add(got.probes["attention"], aim)
            for frozen in (False, True):
                self._propagate(index, document, ref, (subject, enabled, frozen), got)

    def _propagate(
        self,
        index: int,
        document: int,
        ref: ReferencePass,
        key: tuple[Mixtures, frozenset[str], bool],
        isolated: LayerPass,
    ) -> None:
        """One mixture one layer on; `isolated` is its pass on the reference's input, and serves where that is its own."""
        (subject, enabled, frozen), moving = key, self.moving[key]
        selection, routing = None, None
        if frozen:
            selection, routing = ref.selection, ref.run.probes.get("routing")
        elif self.sharing[index]:
            selection = moving.selections[document]
        same = torch.equal(moving.hidden[document], self.reference.inputs[document])
        if same and isolated.has_chosen(selection, routing):
            got = isolated
            self.advance()
        else:
            source = moving.hidden[document]
            got = self._run(subject, enabled, index, source, selection=selection, routing=routing)
        moving.hidden[document] = got.hidden
        if any(self.sharing) and not frozen:
            moving.selections[document] = got.probes["selection"]

    def _aim(self, candidate: Candidate, own: LayerPass) -> Tensor:
        """What all components together are to give: the format rung's output, or the modelled kernel's, [T, H, C]."""
        assert own.call is not None  # it was asked for
        if candidate.backend in ("reference", "emulated"):
            return own.call.out
        found = exact(own.call, own.call.indices, candidate.backend)
        rounded: Tensor = self.model.evalkit.new_cache().state.round(found)
        return rounded

    def _run(
        self,
        subject: Mixtures,
        enabled: frozenset[str] | None,
        index: int,
        source: Tensor,
        *,
        selection: Tensor | None,
        routing: Tensor | None = None,
        keep_call: bool = False,
    ) -> LayerPass:
        """A mixture, or with None the candidate itself, through one layer on a cache of its own."""
        cache = self.model.evalkit.new_cache(subject.candidate, subject.scales)
        if enabled is not None:
            mix(cache.state, enabled)
        got = run_layer(
            self.model,
            index,
            source,
            cache,
            [slice(0, source.shape[1])],
            probes=PROBES,
            keep_call=keep_call,
            selection=selection,
            routing=routing,
        )
        self.advance()
        return got

    @torch.no_grad()
    def divergences(self) -> Iterator[AttributionRecord]:
        """What each mixture's last hidden states make of the next token."""
        for subject in self.subjects:
            for frozen in (False, True):
                measured = {
                    enabled: self._divergence(self.moving[subject, enabled, frozen])
                    for enabled in subject.distinct()
                }
                yield from _records(
                    subject, None, PROPAGATED, FROZEN if frozen else "none", measured, extra={}
                )

    def _divergence(self, moving: _Moving) -> _Measured:
        found, step = [], max(1, LOGITS_AT_ONCE // self.model.config.vocab_size)
        for got, ref in zip(moving.hidden, self.reference.inputs, strict=True):
            for one, other in zip(got.split(step, 1), ref.split(step, 1), strict=True):
                found.append(kl_nats(self.reference.head(one), self.reference.head(other)))
        values = torch.cat(found)
        nonfinite = len(values) - int(torch.isfinite(values).sum())
        return _Measured(
            value=None if nonfinite else float(values.mean()), nonfinite=nonfinite, n=len(values)
        )


def _records(
    subject: Mixtures,
    layer: int | None,
    mode: str,
    frozen: str,
    measured: Mapping[frozenset[str], _Measured],
    extra: Mapping[str, _Measured],
) -> Iterator[AttributionRecord]:
    """One place's arms, and what follows from them."""
    arms: dict[Name, _Measured] = {name: measured[enabled] for name, enabled in subject.arms().items()}
    arms.update({(name, None): value for name, value in extra.items()})
    whole = arms["all", None]
    alone = [arms["only", component] for component in components(subject.candidate)]
    values = [one.value for one in alone if one.value is not None]
    together = None if whole.value is None or len(values) < len(alone) else whole.value - sum(values)
    arms["interaction", None] = _Measured(
        value=together, nonfinite=sum(one.nonfinite for one in (whole, *alone)), n=whole.n
    )
    for (arm, component), one in arms.items():
        yield AttributionRecord(
            candidate=str(subject.candidate),
            layer=layer,
            mode=mode,
            frozen=frozen,
            arm=arm,
            component=component,
            squared_relative_l2=one.value if mode == ISOLATED else None,
            kl_mean_nats=one.value if mode == PROPAGATED else None,
            nonfinite=one.nonfinite,
            n=one.n,
        )
