"""The report's figures as data: which curves and intervals there are; the page's script gives them its colours."""

from collections.abc import Sequence
from typing import Any

from plotly.offline import get_plotlyjs

from evalkit.records import (
    CandidateRecord,
    LayerRecord,
    Record,
    TaskRecord,
    TokenRecord,
    only,
)
from evalkit.report import tables


def library() -> str:
    """plotly.js itself, to stand in the page once, so that it opens without a network."""
    return str(get_plotlyjs())


def layer_views(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Relative L2 by layer: a view for each probe, phase and freezing, with the curves of each mode.

    A logarithmic axis has no zero: curves that are zero throughout are named so, and single zeros leave a gap.
    """
    found = [r for r in only(records, LayerRecord) if r.layer is not None]
    drawn = [r for r in found if r.rung == "total" or r.rung.startswith("floor:")]
    order = [row[0] for row in tables.candidates(records).rows]
    views = []
    for probe, phase, frozen in dict.fromkeys((r.probe, r.phase, r.frozen) for r in drawn):
        here = [r for r in drawn if (r.probe, r.phase, r.frozen) == (probe, phase, frozen)]
        modes = {
            mode: _curves([r for r in here if r.mode == mode], order)
            for mode in dict.fromkeys(r.mode for r in here)
        }
        views.append({"probe": probe, "phase": phase, "frozen": frozen, "modes": modes})
    return sorted(views, key=_view_rank)


def loss_points(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Loss of score in points with its interval, for each candidate; the first candidate is at the top."""
    order = [row[0] for row in tables.candidates(records).rows]
    found = only(records, TaskRecord)
    return [
        {
            "name": name,
            "control": tables.is_control(name),
            "index": place,
            "points": [
                {
                    "task": r.task,
                    "n": r.n,
                    "loss": 100 * r.loss,
                    "lower": _points(r.loss_lower),
                    "upper": _points(r.loss_upper),
                }
                for r in found
                if r.candidate == name
            ],
        }
        for place, name in enumerate(order)
        if any(r.candidate == name for r in found)
    ]


def tradeoff(records: Sequence[Record]) -> dict[str, Any]:
    """What each candidate costs in bytes and in decode time, against what it loses on each task and in KL divergence.

    A task's time is that of a decode step, as `TaskRecord` has it.
    """
    order = [row[0] for row in tables.candidates(records).rows]
    scores = only(records, TaskRecord)
    tokens = [r for r in only(records, TokenRecord) if r.frozen == "none"]
    found = []
    for record in sorted(only(records, CandidateRecord), key=lambda r: order.index(r.candidate)):
        name = record.candidate
        most = max((r for r in tokens if r.candidate == name), key=lambda r: r.n, default=None)
        mine = [r for r in scores if r.candidate == name]
        kl = None
        if most is not None and most.kl_mean_nats is not None:
            interval = {"lower": most.kl_mean_lower_nats, "upper": most.kl_mean_upper_nats}
            kl = {"value": most.kl_mean_nats, "n": most.n, "of": tables.tokens_of(most), **interval}
        found.append(
            {
                "name": name,
                "control": tables.is_control(name),
                "index": order.index(name),
                "bytes": record.row_bytes_per_token,
                "kl": kl,
                "tasks": [_trade(r) for r in mine],
            }
        )
    names = list(dict.fromkeys(r.task for r in scores))
    return {"tasks": names, "candidates": [one for one in found if one["kl"] or one["tasks"]]}


def _trade(record: TaskRecord) -> dict[str, Any]:
    time = {
        "value": record.decode_step_ms,
        "lower": record.decode_step_lower_ms,
        "upper": record.decode_step_upper_ms,
        "sequences": record.decode_sequences,
        "columns": record.decode_columns,
        "steps": record.decode_steps,
        "graph": record.decode_graph,
    }
    return {
        "task": record.task,
        "value": 100 * record.loss,
        "lower": _points(record.loss_lower),
        "upper": _points(record.loss_upper),
        "n": record.n,
        "time": None if record.decode_step_ms is None else time,
    }


def _curves(found: Sequence[LayerRecord], order: Sequence[str]) -> list[dict[str, Any]]:
    curves = []
    for candidate, rung in dict.fromkeys((r.candidate, r.rung) for r in found):
        line = sorted(
            (r for r in found if (r.candidate, r.rung) == (candidate, rung)), key=lambda r: r.layer or 0
        )
        values = [r.relative_l2 for r in line]
        floor = rung.startswith("floor:")
        name = f"{rung.replace(':', ': ')} ({candidate})" if floor else candidate
        if not any(values):
            name += " (not measured)" if all(value is None for value in values) else " (0 throughout)"
        curves.append(
            {
                "name": name,
                "role": "floor" if floor else "control" if tables.is_control(candidate) else "candidate",
                "index": order.index(candidate) if candidate in order else len(order),
                "layer": [r.layer for r in line],
                "value": [value or None for value in values],
                "n": [r.n for r in line],
            }
        )
    return sorted(curves, key=lambda curve: (curve["role"] == "floor", curve["index"]))


def _view_rank(view: dict[str, Any]) -> tuple[int, bool, bool]:
    """Attention, decode and nothing frozen come first: that view stands when the page opens."""
    first = {"attention": 0, "values": 1}  # a serving engine shows no attention before W_UV
    return first.get(view["probe"], 2), view["phase"] != "decode", view["frozen"] != "none"


def _points(value: float | None) -> float | None:
    return None if value is None else 100 * value
