"""What a decode step takes: the calls that were timed, and their mean with its interval.

A call advances all sequences by some tokens; a decoder leaves out those that warm up. What one call takes resembles
what the next takes (contexts grow, clocks drift, neighbours come and go), so the interval is by runs of calls.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from evalkit.stats.ratios import ratio

RUNS = 20


@dataclass(frozen=True, kw_only=True)
class Call:
    """One advance of `sequences` sequences by `steps` tokens, each of which saw `columns` columns of context.

    graph: whether a CUDA graph replayed every step.
    """

    seconds: float
    steps: int
    sequences: int
    columns: int
    graph: bool


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Mean milliseconds of a decode step with a 95 % interval, None where calls are too few for one.

    sequences, columns: what a step advances, and the context it sees, its padding included (a mean over steps).
    steps: how many were timed. graph: whether a CUDA graph replayed them.
    """

    ms: float
    lower_ms: float | None
    upper_ms: float | None
    sequences: int
    columns: float
    steps: int
    graph: bool


def step_time(calls: Sequence[Call]) -> StepTime | None:
    """Seconds of all calls over their steps; None without a call.

    The interval is Student's t of that ratio of sums (`stats.ratios`), over at most `RUNS` runs of consecutive calls of
    about the same number; None below `stats.ratios.FEWEST_UNITS` calls. It holds for this process on this machine. Where
    a backend could be recorded in a graph at some contexts only, the kind of step counts that most steps were.

    Raises:
        ValueError: calls advance different numbers of sequences, whose steps have no time in common.
    """
    if not calls:
        return None
    if len(counts := {call.sequences for call in calls}) > 1:
        raise ValueError(f"calls that advance {sorted(counts)} sequences have no step time in common")
    graph = 2 * sum(call.steps for call in calls if call.graph) > sum(call.steps for call in calls)
    counted = [call for call in calls if call.graph == graph]
    runs = [part.tolist() for part in np.array_split(np.arange(len(counted)), min(len(counted), RUNS))]
    seconds = [sum(counted[place].seconds for place in run) for run in runs]
    steps = [sum(counted[place].steps for place in run) for run in runs]
    found = ratio(seconds, steps)
    assert found is not None  # no call without a step
    return StepTime(
        ms=1e3 * found.value,
        lower_ms=None if found.lower is None else 1e3 * found.lower,
        upper_ms=None if found.upper is None else 1e3 * found.upper,
        sequences=counted[0].sequences,
        columns=sum(call.columns * call.steps for call in counted) / sum(steps),
        steps=sum(steps),
        graph=graph,
    )


class Clock(Protocol):
    """Marks moments in a device's work; the seconds between two of them exclude what was asked for before the first."""

    def mark(self) -> Any: ...

    def seconds(self, start: Any, end: Any) -> float: ...


class HostClock:
    """The host's clock, for a device whose work is done when the call that asked for it returns."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class StreamClock:
    """CUDA events in the stream that does the work: reached when all before them is over, so that no mark waits."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def clock(device: torch.device) -> Clock:
    """What tells time on this device."""
    return StreamClock(device) if device.type == "cuda" else HostClock()
