"""One arm's figures at one layer: adds documents, then turns into records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from evalkit.compare.figures.metrics import Accumulator
from evalkit.compare.figures.selection import SelectionAccumulator, kept, margin, mass_lost, recall
from evalkit.compare.found.to_records import layer_record, selection_record
from evalkit.compare.passes.capture import LayerPass
from evalkit.compare.passes.rungs import Rungs
from evalkit.compare.passes.variants import PROPAGATED, Arm, phase_spans
from evalkit.records import LayerRecord, SelectionRecord

PLAIN_PROBES: Final = ("latent", "rope", "attention", "values", "output")
MASS_TOKENS: Final = 256  # lost mass is measured on this many evenly spaced tokens at most
EVERY_TOKEN: Final = 8192  # and on this many of a propagated arm


@dataclass(eq=False)
class ReferencePass:
    """The reference at one layer over one document, with what every arm is compared on.

    selection: [T, K]. margins: see `selection.margin`, by phase; empty where the layer has no indexer.
    """

    run: LayerPass
    selection: Tensor
    margins: dict[str, Tensor]
    phases: dict[str, slice]

    @classmethod
    def of(cls, run: LayerPass, prefill: int, topk: int) -> ReferencePass:
        phases = phase_spans(prefill, run.hidden.shape[1])
        scores = run.probes.get("index_scores")
        margins = (
            {} if scores is None else {phase: margin(scores[span], topk) for phase, span in phases.items()}
        )
        return cls(run, run.probes["selection"], margins, phases)


class Cell:
    """One arm at one layer, over all documents."""

    def __init__(self, arm: Arm, layer: int) -> None:
        self.arm, self.layer = arm, layer
        self.metrics: dict[tuple[str, str, str], Accumulator] = {}  # by phase, probe, rung
        self.selections: dict[str, SelectionAccumulator] = {}
        # By phase, probe and rung: each document's [T, 2], norms of every token's error and reference.
        self.errors: dict[tuple[str, str, str], list[Tensor]] = {}
        # [T, 3] a document: keys dropped, keys of the reference, mass lost on them.
        self.dropped: list[Tensor] = []

    def add(self, got: LayerPass, ref: ReferencePass, rungs: Rungs | None) -> None:
        """Compare one document, phase by phase."""
        dropped = []
        for phase, span in ref.phases.items():
            for probe in PLAIN_PROBES:
                if probe != "attention" or rungs is None:
                    self._compare(phase, probe, got.probes[probe][span], ref.run.probes[probe][span])
            self._compare(phase, "hidden", got.hidden[0, span], ref.run.hidden[0, span])
            self._add_scores(phase, span, got, ref)
            self._add_routing(phase, span, got, ref)
            dropped.append(self._add_selection(phase, span, got, ref))
            for rung in ("format", "kernel", "total") if rungs is not None else ():
                given, wanted = (x[span] for x in getattr(rungs, rung))
                # A candidate's own rows may hold NaN: `format` counts those, and the kernel answers for the rest.
                where = None
                if rung == "kernel" and not bool((finite := torch.isfinite(wanted)).all()):
                    where = finite
                if where is None or bool(where.any()):
                    self._compare(phase, "attention", given, wanted, rung, where)
        self.dropped.append(torch.cat(dropped))
        for key, accumulator in self.metrics.items():
            self.errors.setdefault(key, []).append(accumulator.take_rows())

    def _compare(
        self,
        phase: str,
        probe: str,
        got: Tensor,
        ref: Tensor,
        rung: str | None = None,
        where: Tensor | None = None,
    ) -> None:
        key = (phase, probe, rung or self.arm.subject.rung)
        self.metrics.setdefault(key, Accumulator(keep_rows=True)).add(got, ref, where)

    def _add_scores(self, phase: str, span: slice, got: LayerPass, ref: ReferencePass) -> None:
        if "index_scores" not in ref.run.probes or self.arm.frozen:
            return
        scores, wanted = got.probes["index_scores"][span], ref.run.probes["index_scores"][span]
        hidden = torch.isneginf(wanted)
        if not bool(torch.isneginf(scores[hidden]).all()):
            raise ValueError(
                f"layer {self.layer}, {phase}: {self.arm.subject.candidate} scores keys of the future"
            )
        self._compare(phase, "index_scores", scores, wanted, where=~hidden)

    def _add_routing(self, phase: str, span: slice, got: LayerPass, ref: ReferencePass) -> None:
        """One number a token: 1 where its set of experts is the reference's, else 0, against 1."""
        if "routing" not in ref.run.probes:
            return
        chosen, wanted = (run.probes["routing"][span].sort(-1).values for run in (got, ref.run))
        same = (chosen == wanted).all(-1).double()
        self._compare(phase, "routing", same, torch.ones_like(same))

    def _add_selection(self, phase: str, span: slice, got: LayerPass, ref: ReferencePass) -> Tensor:
        """One number a token: the share of the reference's keys it kept, against 1; and its own figures.

        Returns a token's dropped keys, the reference's keys, and the mass lost, NaN where not measured: [t, 3].
        """
        chosen, wanted = got.probes["selection"][span], ref.selection[span]
        shares = recall(chosen, wanted)
        self._compare(phase, "selection", shares, torch.ones_like(shares))
        count = (wanted >= 0).sum(1).double()
        dropped = torch.stack([((1 - shares) * count).round(), count, torch.full_like(shares, torch.nan)], 1)
        if self.arm.frozen or self.arm.subject.is_floor:
            return dropped.cpu()
        # Propagated, any token may turn out to be one whose loss needs explaining.
        most = EVERY_TOKEN if self.arm.mode == PROPAGATED else MASS_TOKENS
        sample = torch.arange(0, len(wanted), -(-len(wanted) // most), device=wanted.device)
        mass = _mass_lost(chosen, ref, span, sample)
        dropped[sample, 2] = mass.double()
        self.selections.setdefault(phase, SelectionAccumulator()).add(shares, ref.margins.get(phase), mass)
        return dropped.cpu()

    def records(self) -> Iterator[LayerRecord | SelectionRecord]:
        """The layer's records of this arm."""
        for (phase, probe, rung), accumulator in self.metrics.items():
            yield layer_record(self.arm, self.layer, phase, probe, rung, accumulator.result())
        for phase, selection in self.selections.items():
            yield selection_record(self.arm, self.layer, phase, selection.result())


def _mass_lost(chosen: Tensor, ref: ReferencePass, span: slice, sample: Tensor) -> Tensor:
    """Of the tokens `sample` of a phase, the reference's attention on keys that were not chosen."""
    call = ref.run.call
    assert call is not None  # the reference is always run with its calls kept
    wanted, at = ref.selection[span][sample], sample + span.start
    columns = torch.arange(ref.run.hidden.shape[1], device=wanted.device)
    # One document in a fresh cache: column j of the key axis is slot j.
    latent, rope = call.format.load(call.cache, columns, call.scales)
    lost = ~kept(chosen[sample], wanted) & (wanted >= 0)
    return mass_lost(
        call.q_latent[at], call.q_rope[at], latent, rope, wanted, lost, call.lse[at], call.sm_scale
    )
