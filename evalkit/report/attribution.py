"""Where each candidate's loss comes from: a sentence, a table, and the bars of a chart."""

from collections.abc import Sequence
from typing import Any

from evalkit.records import AttributionRecord, Record, only
from evalkit.report import tables
from evalkit.report.tables import NA, Table, number, share

WORDS = {
    "latent": "the stored latent",
    "rope": "the stored rope",
    "query": "the rounded query",
    "prob": "the rounded probabilities",
    "scale_rule": "the reader's scale rule",
    "index": "the indexer's keys",
}
# Of the whole squared error: how far all components together may be from the candidate's own attention. Only a kernel
# that is modelled is off at all: sums in another order move a few probabilities across a step of e4m3.
LARGEST_APART = 1e-2
# Where one component alone makes more than this many times the whole, flips decide and there are no shares.
DIVIDES = 1.5

Place = int | str  # a layer, or how KL was measured: what was frozen


class Shares:
    """One candidate's figures by place: a layer's squared relative L2, or a mean KL divergence in nats."""

    def __init__(self, records: Sequence[AttributionRecord]) -> None:
        self.candidate = records[0].candidate
        self.found = {(_place(r), r.arm, r.component): r for r in records}
        self.components = list(dict.fromkeys(r.component for r in records if r.component is not None))
        self.layers = sorted({r.layer for r in records if r.layer is not None})
        # Frozen first: there the parts add up.
        self.divergences = sorted({r.frozen for r in records if r.layer is None}, key=lambda x: x == "none")

    def value(self, place: Place, arm: str, component: str | None = None) -> float | None:
        """An arm's figure at a place, or None where there is none."""
        record = self.found.get((place, arm, component))
        if record is None:
            return None
        return record.kl_mean_nats if record.layer is None else record.squared_relative_l2

    def share(self, place: Place, arm: str, component: str | None = None) -> float | None:
        """An arm's part of what all components do there; None where that is nothing."""
        value, whole = self.value(place, arm, component), self.value(place, "all")
        return value / whole if value is not None and whole else None

    def guilty(self, place: Place) -> tuple[str, float] | None:
        """The component with the largest part of a place's error, and that part."""
        parts = [(name, self.share(place, "only", name)) for name in self.components]
        return max(
            ((name, part) for name, part in parts if part is not None), key=lambda x: x[1], default=None
        )

    def worst(self, arm: str, component: str | None = None) -> int | None:
        """The layer with the largest figure of an arm; None where there is no error or one is not a number."""
        values = [(self.value(layer, arm, component), layer) for layer in self.layers]
        known = [(value, layer) for value, layer in values if value is not None]
        worst = max(known, default=(0.0, 0)) if len(known) == len(values) else (0.0, 0)
        return worst[1] if worst[0] > 0 else None

    def doubt(self) -> str:
        """What speaks against the figures: a control that failed; empty where none did."""
        places: list[Place] = [*self.layers, *self.divergences]
        for place in places:
            if self.value(place, "none") != 0.0:
                return (
                    f"not to be relied on, since with nothing enabled {_name(place)} is not the reference's"
                )
            apart, whole = self.value(place, "apart"), self.value(place, "all")
            if apart is not None and whole is not None and not apart <= LARGEST_APART * whole:
                return (
                    f"not to be relied on, since all components together are not its own attention at {_name(place)}: "
                    f"relative L2 {number(apart**0.5)} between the two"
                )
        return ""


def all_shares(records: Sequence[Record]) -> list[Shares]:
    """Every candidate's, in the order of the other tables."""
    found = only(records, AttributionRecord)
    order = [row[0] for row in tables.candidates(records).rows]
    names = sorted(
        dict.fromkeys(r.candidate for r in found),
        key=lambda name: order.index(name) if name in order else len(order),
    )
    return [Shares([r for r in found if r.candidate == name]) for name in names]


def sentences(records: Sequence[Record]) -> list[str]:
    """One for each candidate: which component its loss comes from."""
    return [f"{shares.candidate}: {_sentence(shares)}." for shares in all_shares(records)]


def table(records: Sequence[Record]) -> Table:
    """A row a component: its worst layer, and what it does there and to the whole model."""
    found = all_shares(records)
    counts = sorted({r.n for r in only(records, AttributionRecord) if r.layer is None})
    tokens = f" KL over {counts[0]:,} tokens." if counts else ""
    return Table(
        key="attribution",
        title="Attribution",
        caption=(
            "Each component alone, the rest as the reference has it, and everything but that component. Relative L2 of the "
            "attention output on the reference's input, at the component's worst layer; shares there are of the squared error. KL of "
            "the next token in nats, with selection and routing frozen to the reference's and free. Interaction is what all do "
            "together less the sum of each alone; free, flips of selection and routing enlarge it either way."
            + tokens
        ),
        columns=(
            "candidate", "component", "worst layer", "alone", "share", "all but it", "KL frozen", "share", "all but it", "KL free",
            "share", "all but it",
        ),
        rows=tuple(row for shares in found for row in _rows(shares)),
        text_columns=2,
    )  # fmt: skip


def bars(records: Sequence[Record]) -> list[dict[str, Any]]:
    """For each candidate, each component's share of the whole, by layer and of KL, as percentages that add up to 100."""
    charts = []
    for shares in all_shares(records):
        places: list[Place] = [*shares.layers, *shares.divergences]
        series: list[tuple[str, str, str | None]] = [
            (WORDS.get(name, name), "only", name) for name in shares.components
        ]
        if len(series) > 1:
            series.append(("interaction", "interaction", None))
        charts.append(
            {
                "name": shares.candidate,
                "layers": shares.layers,
                "wholes": [_label(place) for place in shares.divergences],
                "series": [
                    {
                        "name": name,
                        "component": component or "interaction",
                        "share": [_percent(shares.share(place, arm, component)) for place in places],
                    }
                    for name, arm, component in series
                ],
            }
        )
    return charts


def _sentence(shares: Shares) -> str:
    if doubt := shares.doubt():
        return doubt
    for layer in shares.layers:
        if (broken := shares.found[layer, "all", None]).nonfinite:
            names = [
                WORDS.get(name, name)
                for name in shares.components
                if shares.found[layer, "only", name].nonfinite
            ]
            cause = " and ".join(names) or "no component alone"
            return (
                f"at layer {layer}, {broken.nonfinite:,} values of the attention are not finite, with {cause}"
            )
    worst, text = shares.worst("all"), "attention is the reference's at every layer"
    if worst is not None and (found := shares.guilty(worst)) is not None:
        error = shares.value(worst, "all") or 0.0
        text = (
            f"at layer {worst}, its worst (relative L2 {number(error**0.5)}), {share(found[1])} of the squared attention "
            f"error comes from {WORDS.get(found[0], found[0])}"
        )
        rest = shares.share(worst, "interaction")
        if rest is not None and abs(rest) >= 0.1:
            text += f", with an interaction of {share(rest)}"
    for frozen in shares.divergences:
        if (found := shares.guilty(frozen)) is not None:
            how = "free" if frozen == "none" else "with selection and routing frozen"
            part = WORDS.get(found[0], found[0])
            if found[1] > DIVIDES:
                text += f"; the KL divergence {how} does not divide, {part} alone makes {found[1]:.1f} times the whole"
            else:
                text += f"; of the KL divergence {how}, {share(found[1])} from {part}"
    return text


def _rows(shares: Shares) -> list[tuple[str, ...]]:
    arms: list[tuple[str, str, str | None]] = [(name, "only", name) for name in shares.components]
    if len(arms) > 1:
        arms += [("interaction", "interaction", None), ("all", "all", None)]
    rows = []
    for name, arm, component in arms:
        # An interaction belongs to the error that it is a part of, and what does nothing does so anywhere.
        own = shares.worst("all" if arm == "interaction" else arm, component)
        cells = [
            "none" if own is None else str(own),
            *_cells(shares, shares.worst("all") if own is None else own, arm, component),
        ]
        for frozen in (*shares.divergences, *[None] * (2 - len(shares.divergences))):
            cells += _cells(shares, frozen, arm, component)
        rows.append((shares.candidate, name, *cells))
    return rows


def _cells(shares: Shares, place: Place | None, arm: str, component: str | None) -> list[str]:
    """Alone, its share, and without it."""
    if place is None:  # no layer has an error, or it was not measured
        return [NA, NA, NA]
    squared = not isinstance(place, str)
    alone, without = shares.value(place, arm, component), shares.value(place, "without", component)
    return [
        NA if arm == "interaction" and squared else _figure(alone, squared),
        share(shares.share(place, arm, component)),
        _figure(without, squared) if arm == "only" else "",
    ]


def _figure(value: float | None, squared: bool) -> str:
    return number(None if value is None else value**0.5 if squared else value)


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _place(record: AttributionRecord) -> Place:
    return record.frozen if record.layer is None else record.layer


def _name(place: Place) -> str:
    return f"layer {place}" if isinstance(place, int) else f"the divergence ({_label(place)})"


def _label(place: Place) -> str:
    return str(place) if isinstance(place, int) else "KL free" if place == "none" else "KL frozen"
