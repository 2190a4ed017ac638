"""Tables of where the loss shows: against the floor, by layer, phase, position and token."""

from collections.abc import Sequence
from typing import Any

from evalkit.arm_names import is_control_arm
from evalkit.records import (
    CandidateRecord,
    ConfidenceRecord,
    DivergenceRecord,
    FloorRecord,
    LayerRecord,
    MissingScaleRecord,
    MultipleRecord,
    PhaseRecord,
    PositionRecord,
    Record,
    TaskRecord,
    TokenRecord,
    WorstTokenRecord,
    only,
    output_probe,
)
from evalkit.report.tables import (
    NA,
    Table,
    interval,
    is_control,
    layer_name,
    number,
    ordered,
    reference,
    seen_inside,
    share,
    tokens_of,
)
from evalkit.spans import spans

KERNEL = "floor:kernel"
FLOOR_NAMES = {
    "floor:kernel": "another kernel",
    "floor:split": "the same kernel, keys split",
    "floor:batch": "steps of another size",
    "floor:start": "the same kernel, started afresh",
    "floor:noise": "2^-9 noise on rows",
}
WORST_SHOWN = 5


def floor_state(records: Sequence[Record]) -> Table:
    """Each floor: what measured it, or why nothing did, and what it came to."""
    found, layers, probe = only(records, FloorRecord), only(records, LayerRecord), output_probe(records)
    rows = []
    for floor in found:
        worst = [
            max((r.relative_l2 for r in layers if _is_output(r, probe, floor.rung, mode) and r.relative_l2 is not None), default=None)
            for mode in ("isolated", "propagated")
        ]  # fmt: skip
        rows.append(
            (
                FLOOR_NAMES.get(floor.rung, floor.rung),
                floor.candidate or NA,
                floor.reason or "measured",
                *map(number, worst),
            )
        )
    multiples = any(r.floor == KERNEL for r in only(records, MultipleRecord))
    return Table(
        key="floors",
        title="The noise floor",
        caption=(
            "bf16 against itself: relative L2 of the attention output at its worst layer and phase. "
            + (
                "Multiples are of another kernel's, on the same tokens."
                if multiples
                else "No multiple is printed: another kernel's floor is zero or was not measured, and the others are shown by name."
            )
            + seen_inside(records)
        ),
        columns=("floor", "measured by", "state", "attention, isolated", "attention, propagated"),
        rows=tuple(rows),
        text_columns=3,
    )


def multiples(records: Sequence[Record]) -> Table:
    """Errors in multiples of the other-kernel floor; nothing where that floor is zero or was not measured."""
    found = [r for r in only(records, MultipleRecord) if r.floor == KERNEL and r.frozen == "none"]
    return Table(
        key="multiples",
        title="In multiples of the floor",
        caption=(
            "A candidate's error over another bf16 kernel's on the same n tokens, with a paired 95 % interval: relative L2, and for "
            "kl the mean divergence. Below the floor: the interval's upper end is at most 1."
        ),
        columns=("candidate", "phase", "mode", "probe", "layer", "multiple", "95 %", "in words", "interval by", "n"),
        rows=tuple(
            (
                r.candidate, r.phase, r.mode, r.probe, layer_name(r.layer), number(r.multiple), interval(r.lower, r.upper, number),
                in_words(r), r.interval_method, f"{r.n:,}",
            )
            for r in ordered(records, found)
        ),
        text_columns=4,
    )  # fmt: skip


def in_words(record: MultipleRecord) -> str:
    """What a multiple's interval allows to say."""
    if record.multiple == 0:
        return "no error"
    if record.lower is None or record.upper is None:
        return NA
    if record.upper <= 1:
        return "below the floor"
    return "above the floor" if record.lower > 1 else "not told from the floor"


def divergence(records: Sequence[Record]) -> Table:
    """The first layer whose attention error leaves the floor."""
    return Table(
        key="divergence",
        title="First divergence",
        caption=(
            "The first layer whose attention error is above the named floor on the same tokens (the multiple's lower end above 1), "
            "each layer fed the reference's input (isolated) and the whole model run (propagated); of another kernel's floor also "
            "the multiple there, and the lower end of its 95 % interval."
        ),
        columns=("candidate", "phase", "mode", "floor", "first layer", "relative L2 there", "multiple there", "its lower end"),
        rows=tuple(
            (
                r.candidate, r.phase, r.mode, FLOOR_NAMES.get(r.floor, r.floor),
                f"none of {r.layers}" if r.first_layer is None else str(r.first_layer), number(r.relative_l2),
                *((number(r.multiple), number(r.multiple_lower)) if r.floor == KERNEL else (NA, NA)),
            )
            for r in ordered(records, only(records, DivergenceRecord))
        ),
        text_columns=4,
    )  # fmt: skip


def amplification(records: Sequence[Record]) -> Table:
    """How much of a layer's error it was handed: propagated over isolated."""
    probe, told_from = output_probe(records), reference(records)
    found = {
        (r.candidate, r.phase, r.layer, r.mode): r
        for r in only(records, LayerRecord)
        if _is_output(r, probe, "total", r.mode) and r.layer is not None
    }
    rows = []
    for (candidate, phase, layer, mode), alone in found.items():
        moved = found.get((candidate, phase, layer, "propagated"))
        if mode == "isolated" and moved is not None and candidate != told_from:
            both = alone.relative_l2, moved.relative_l2
            factor = both[1] / both[0] if both[0] and both[1] is not None else None
            rows.append((candidate, phase, str(layer), *map(number, both), number(factor), f"{alone.n:,}"))
    return Table(
        key="amplification",
        title="Amplification",
        caption="Relative L2 of a layer's attention output on the reference's input and on its own, and their ratio: 1 adds nothing.",
        columns=("candidate", "phase", "layer", "isolated", "propagated", "amplification", "n"),
        rows=tuple(rows),
        text_columns=2,
    )


def phases(records: Sequence[Record]) -> Table:
    """Ways for the same tokens to arrive; those that depart first."""
    found = ordered(records, only(records, PhaseRecord))
    found.sort(key=lambda r: r.departs is not True)
    return Table(
        key="phases",
        title="Phases",
        caption=(
            "The same n tokens arriving in different ways, each against the reference's own same way; the multiple is of the least of "
            "the other ways, token by token. A way departs when the multiple's lower end is above 1.5. "
            + _departing(found)
        ),
        columns=("candidate", "layer", "mode", "phase", "departs", "relative L2", "KL nats", "multiple", "95 %", "of", "non-finite", "n"),
        rows=tuple(
            (
                r.candidate, layer_name(r.layer), r.mode, r.phase, {True: "DEPARTS", False: "no", None: NA}[r.departs],
                number(r.relative_l2), number(r.kl_mean_nats), number(r.multiple), interval(r.lower, r.upper, number), r.least_other,
                f"{r.nonfinite:,}", f"{r.n:,}",
            )
            for r in found
        ),
        text_columns=5,
    )  # fmt: skip


def _departing(found: Sequence[PhaseRecord]) -> str:
    names = dict.fromkeys(f"{r.candidate} in {r.phase}" for r in found if r.departs)
    untold = sum(r.departs is None for r in found)
    told = f"Departing: {', '.join(names)}." if names else "None departs."
    return told + (f" Of {untold} of {len(found)} rows it is not told: too few tokens." if untold else "")


def positions(records: Sequence[Record]) -> Table:
    """Slopes over positions, and steps at top-k; those with a step first."""
    # Where bf16's own floor has the step too, it is not the candidate's: propagated, selections flip from top-k on.
    common = {
        (r.layer, r.mode, r.probe, r.axis)
        for r in only(records, PositionRecord)
        if r.rung != "total" and r.cliff
    }

    def own(r: PositionRecord) -> bool:
        return r.cliff is True and (r.layer, r.mode, r.probe, r.axis) not in common

    told_from = reference(records)
    found = [r for r in only(records, PositionRecord) if r.rung == "total"]
    found = sorted(ordered(records, found), key=lambda r: not own(r))
    steep = dict.fromkeys(r.candidate for r in found if own(r))
    return Table(
        key="positions",
        title="By position",
        caption=(
            "Error of a token by its position (context length less one) and by tokens generated since the prompt: relative L2 of "
            "attention, nats of kl. Slope per 1,000 tokens with a 95 % interval. A cliff: the mean from top-k on is above 1.5 times that "
            "just below it. " + (f"Cliff at top-k: {', '.join(steep)}." if steep else "No cliff at top-k.")
        ),
        columns=("candidate", "probe", "mode", "axis", "layer", "cliff", "below top-k", "from top-k", "slope/1,000", "95 %", "slope by", "non-finite", "n"),
        rows=tuple(
            (
                r.candidate, r.probe, r.mode, r.axis, layer_name(r.layer), f"CLIFF at {r.topk:,}" if own(r) else {True: "as a floor", False: "no", None: NA}[r.cliff],
                number(r.below_topk_mean), number(r.above_topk_mean), number(r.slope_per_1000_tokens),
                interval(r.slope_lower, r.slope_upper, number), r.slope_method, f"{r.nonfinite:,}", f"{r.n:,}",
            )
            for r in found
            if r.candidate != told_from or r.cliff
        ),
        text_columns=6,
    )  # fmt: skip


def direction(records: Sequence[Record]) -> Table:
    """Volume and direction of disagreement, and what became of the token that follows."""
    return Table(
        key="direction",
        title="Disagreement",
        caption=(
            "Volume: tokens whose top-1 differs. Direction: of those, how often the text bears out the reference, the candidate, or "
            "neither. Δp: the candidate's probability of the following token less the reference's, in points, over the tokens that "
            "have one."
        ),
        columns=("candidate", "tokens of", "frozen", "top-1 differs", "reference right", "candidate right", "neither", "Δp mean", "Δp rms", "documents", "n"),
        rows=tuple(
            (
                r.candidate, tokens_of(r), r.frozen, f"{r.disagreed:,} ({share(r.disagreed / r.n)})", f"{r.reference_right:,}",
                f"{r.candidate_right:,}", f"{r.disagreed - r.reference_right - r.candidate_right:,}", _signed(r.delta_p_mean),
                NA if r.delta_p_rms is None else number(100 * r.delta_p_rms), f"{r.documents:,}", f"{r.n:,}",
            )
            for r in ordered(records, only(records, TokenRecord))
            if not r.again
        ),
        text_columns=3,
    )  # fmt: skip


def confidence(records: Sequence[Record]) -> Table:
    """Divergence by how sure the reference is."""
    told_from = reference(records)
    return Table(
        key="confidence",
        title="By confidence of the reference",
        caption="Mean KL divergence, and the share of tokens whose top-1 differs, by the reference's probability of its own top-1.",
        columns=("candidate", "phase", "frozen", "reference's top-1", "KL nats, mean", "top-1 differs", "n"),
        rows=tuple(
            (
                r.candidate, r.phase, r.frozen, f"{r.from_p:g} to {r.to_p:g}", number(r.kl_mean_nats), share(r.disagreed_share), f"{r.n:,}",
            )
            for r in ordered(records, only(records, ConfidenceRecord))
            if r.candidate != told_from
        ),
        text_columns=4,
    )  # fmt: skip


def missing_scales(records: Sequence[Record]) -> Table:
    """Candidates whose scale is 1.0, layer by layer."""
    found = only(records, MissingScaleRecord)
    rows = []
    for candidate in dict.fromkeys(r.candidate for r in found):
        mine = [r for r in found if r.candidate == candidate]
        none = [r.layer for r in mine if r.carried is None]
        ignored = [r for r in mine if r.carried is not None]
        if none:
            rows.append((candidate, spans(none), "the checkpoint carries none"))
        rows += [
            (candidate, str(r.layer), f"the checkpoint carries {number(r.carried)}, not used")
            for r in ignored
        ]
    return Table(
        key="missing-scales",
        title="Missing scales",
        caption="Layers whose rows are divided by a scale of 1.0 and not by one fitted to them: values may saturate, or fall below what e4m3 holds.",
        columns=("candidate", "layers", "scale"),
        rows=tuple(rows),
        text_columns=3,
    )


def worst(records: Sequence[Record]) -> list[WorstTokenRecord]:
    """The tokens that each candidate loses most at."""
    return [r for r in ordered(records, only(records, WorstTokenRecord)) if r.rank <= WORST_SHOWN]


def place_curves(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Errors by position as curves, for the figures; floors among them. The middle of each bin stands for it."""
    names, told_from = [c.candidate for c in only(records, CandidateRecord)], reference(records)
    curves = []
    for r in ordered(records, only(records, PositionRecord)):
        width = r.starts[1] - r.starts[0] if len(r.starts) > 1 else 1
        floor = r.rung != "total"
        curves.append(
            {
                "name": FLOOR_NAMES.get(r.rung, r.rung) if floor else r.candidate,
                "role": "floor" if floor else "control" if r.candidate == told_from else "candidate",
                "index": names.index(r.candidate) if r.candidate in names else len(names),
                "probe": r.probe,
                "mode": r.mode,
                "axis": r.axis,
                "layer": layer_name(r.layer),
                "middle": [start + width // 2 for start in r.starts],
                "value": [mean or None for mean in r.means],
                "n": r.counts,
                "topk": r.topk,
            }
        )
    return curves


def task_floor(records: Sequence[Record]) -> Table:
    """Documents whose score differs, beside what batches of another size differ by."""
    found = [r for r in only(records, TaskRecord) if r.lost is not None and r.gained is not None]
    floors = {
        (r.task, r.filter, r.metric): r
        for r in found
        if is_control(r.candidate) and is_control_arm(r.baseline)
    }
    rows = []
    for r in ordered(records, found):
        floor = floors.get((r.task, r.filter, r.metric))
        if floor is not None and floor is not r:
            rows.append(
                (r.task, r.candidate, *(f"{(x.lost or 0) + (x.gained or 0)} of {x.n}" for x in (r, floor)))
            )
    return Table(
        key="task-floor",
        title="Tasks and the batch floor",
        caption=(
            "Documents whose score differs from the baseline's, and from the baseline to itself in batches of another size. That is not "
            "another kernel's floor, so no multiple is taken of it."
        ),
        columns=("task", "candidate", "differ", "batch floor"),
        rows=tuple(rows),
        text_columns=2,
    )


def _is_output(record: LayerRecord, probe: str, rung: str, mode: str) -> bool:
    return (record.probe, record.rung, record.mode, record.frozen) == (probe, rung, mode, "none")


def _signed(value: float | None) -> str:
    return NA if value is None else f"{100 * value:+.3g}"
