"""What a history shows of each candidate: its series, the nights on which they changed, and the layer that moved."""

import json
import math
import subprocess
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median

from evalkit.report import changes
from evalkit.report.history import History, StoredLayer, StoredResult, StoredRun, StoredScore

# A layer moved if its median error before and after differ by this factor.
MOVED = 1.05
MOST_COMMITS = 20
Key = tuple[str, str, str, str, str]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One number of one candidate, night by night; None where a night has none.

    kind: `score` in [0, 1], or `error`, which is compared on a logarithm.
    changes: their `at` and `found` count the tile's nights.
    """

    name: str
    kind: str
    unit: str
    values: tuple[float | None, ...]
    lower: tuple[float | None, ...]
    upper: tuple[float | None, ...]
    n: tuple[int | None, ...]
    changes: tuple[changes.Change, ...]


@dataclass(frozen=True, kw_only=True)
class Moved:
    """A layer's median attention error over the nights before and after an event."""

    layer: int
    before: float
    after: float

    @property
    def ratio(self) -> float:
        """After over before; infinite from zero."""
        return self.after / self.before if self.before else math.inf if self.after else 1.0


@dataclass(frozen=True, kw_only=True)
class Event:
    """A night from which on one or more series have another level.

    at, found: as in `changes.Change`; found is the first night on which any series knew.
    series: places of the series that changed, with each one's levels.
    commits: `<sha> <subject>` from the night before to this one, newest first; empty where the repository lacks them.
    packages: `<name> <before> → <after>` of those that differ.
    layers: for each mode, every layer, that which moved most first.
    """

    at: int
    found: int
    series: tuple[tuple[int, float, float], ...]
    commit_before: str | None
    commit_after: str | None
    commits: tuple[str, ...]
    packages: tuple[str, ...]
    layers: dict[str, tuple[Moved, ...]]

    @property
    def guilty(self) -> Moved | None:
        """The layer whose error on the reference's own input moved most; None where none did by `MOVED`."""
        first = next(iter(self.layers.get("isolated", ())), None)
        return first if first is not None and _distance(first) >= math.log(MOVED) else None


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One candidate on one checkpoint, with one profile of ranges, on one GPU.

    nights: its runs, oldest first; results: what each said of it.
    layers: for each mode, relative L2 by layer and night.
    """

    candidate: str
    checkpoint: str
    checkpoint_sha256: str
    profile: str
    gpu: str
    nights: tuple[StoredRun, ...]
    results: tuple[StoredResult, ...]
    series: tuple[Series, ...]
    layers: dict[str, dict[int, list[float | None]]]
    events: tuple[Event, ...]

    @property
    def verdict(self) -> str | None:
        """The newest night's."""
        return self.results[-1].verdict

    @property
    def since(self) -> int:
        """How many nights the newest verdict has stood."""
        return next(
            (age for age, r in enumerate(reversed(self.results)) if r.verdict != self.verdict),
            len(self.results),
        )


def tiles(history: History, repository: Path | None = None) -> list[Tile]:
    """Every candidate x checkpoint x profile x GPU of a store, those with the newest runs first.

    Args:
        history: the store.
        repository: a git checkout, to name the commits between two nights.
    """
    runs = {run.run: run for run in history.read(StoredRun)}
    nights: dict[Key, list[tuple[StoredRun, StoredResult]]] = defaultdict(list)
    for result in history.read(StoredResult):
        if result.run not in runs:
            continue  # added since
        run = runs[result.run]
        key = (run.checkpoint, run.checkpoint_sha256, run.profile, run.gpu, result.candidate)
        nights[key].append((run, result))
    layers: dict[tuple[str, str], list[StoredLayer]] = defaultdict(list)
    for layer in history.read(StoredLayer):
        layers[layer.run, layer.candidate].append(layer)
    scores: dict[tuple[str, str], list[StoredScore]] = defaultdict(list)
    for score in history.read(StoredScore):
        scores[score.run, score.candidate].append(score)
    made = []
    for (checkpoint, sha256, profile, gpu, candidate), found in nights.items():
        found.sort(key=lambda pair: (pair[0].started_utc, pair[0].name))
        keys = [(run.run, candidate) for run, _ in found]
        by_layer = _by_layer([layers[key] for key in keys])
        series = [
            *_scores([scores[key] for key in keys]),
            *_errors([result for _, result in found], by_layer.get("isolated", {})),
        ]
        made.append(
            Tile(
                candidate=candidate,
                checkpoint=checkpoint,
                checkpoint_sha256=sha256,
                profile=profile,
                gpu=gpu,
                nights=tuple(run for run, _ in found),
                results=tuple(result for _, result in found),
                series=tuple(series),
                layers=by_layer,
                events=_events([run for run, _ in found], series, by_layer, repository),
            )
        )
    made.sort(key=lambda t: (t.checkpoint, t.profile, t.gpu, t.candidate))
    return sorted(made, key=lambda t: t.nights[-1].started_utc[:10], reverse=True)


def _by_layer(nights: Sequence[Sequence[StoredLayer]]) -> dict[str, dict[int, list[float | None]]]:
    made: dict[str, dict[int, list[float | None]]] = {}
    for mode, layer in sorted({(r.mode, r.layer) for night in nights for r in night}):
        made.setdefault(mode, {})[layer] = [None] * len(nights)
    for place, night in enumerate(nights):
        for r in night:
            made[r.mode][r.layer][place] = r.relative_l2
    return made


def _scores(nights: Sequence[Sequence[StoredScore]]) -> list[Series]:
    names = dict.fromkeys((r.task, r.metric, r.filter) for night in nights for r in night)
    several = {name for name in names if sum(other[0] == name[0] for other in names) > 1}
    made = []
    for name in sorted(names):
        found = [next((r for r in night if (r.task, r.metric, r.filter) == name), None) for night in nights]
        measured = [(place, r) for place, r in enumerate(found) if r is not None]
        moved = changes.of_scores([r.score for _, r in measured], [r.n for _, r in measured])
        made.append(
            Series(
                name=", ".join(name) if name in several else name[0],
                kind="score",
                unit="%",
                values=tuple(None if r is None else r.score for r in found),
                lower=tuple(None if r is None else r.score_lower for r in found),
                upper=tuple(None if r is None else r.score_upper for r in found),
                n=tuple(None if r is None else r.n for r in found),
                changes=_placed(moved, [place for place, _ in measured]),
            )
        )
    return made


def _errors(results: Sequence[StoredResult], isolated: dict[int, list[float | None]]) -> list[Series]:
    nothing: tuple[None, ...] = (None,) * len(results)
    worst = tuple(
        max((value for value in night if value is not None), default=None)
        for night in zip(*isolated.values(), strict=True)
    )
    return [
        Series(
            name=name,
            kind="error",
            unit=unit,
            values=values,
            lower=lower,
            upper=upper,
            n=n,
            changes=_placed(
                changes.of_errors([v for v in values if v is not None]),
                [place for place, v in enumerate(values) if v is not None],
            ),
        )
        for name, unit, values, lower, upper, n in (
            (
                "KL divergence",
                "nats",
                tuple(r.kl_nats for r in results),
                tuple(r.kl_lower_nats for r in results),
                tuple(r.kl_upper_nats for r in results),
                tuple(r.kl_n or None for r in results),
            ),
            ("attention error, worst layer", "relative L2", worst, nothing, nothing, nothing),
        )
        if any(value is not None for value in values)
    ]


def _placed(found: Sequence[changes.Change], places: Sequence[int]) -> tuple[changes.Change, ...]:
    return tuple(
        changes.Change(at=places[c.at], found=places[c.found], before=c.before, after=c.after) for c in found
    )


def _events(
    nights: Sequence[StoredRun],
    series: Sequence[Series],
    layers: dict[str, dict[int, list[float | None]]],
    repository: Path | None,
) -> tuple[Event, ...]:
    at = sorted({change.at for one in series for change in one.changes})
    bounds = [0, *at, len(nights)]
    made = []
    for place, start in enumerate(at):
        moved = [(i, c) for i, one in enumerate(series) for c in one.changes if c.at == start]
        before, after = nights[start - 1], nights[start]
        made.append(
            Event(
                at=start,
                found=min(change.found for _, change in moved),
                series=tuple((i, change.before, change.after) for i, change in moved),
                commit_before=before.commit_sha,
                commit_after=after.commit_sha,
                commits=_commits(repository, before.commit_sha, after.commit_sha),
                packages=_packages(before.packages, after.packages),
                layers={
                    mode: _moved(by_layer, bounds[place], start, bounds[place + 2])
                    for mode, by_layer in layers.items()
                },
            )
        )
    return tuple(made)


def _moved(by_layer: dict[int, list[float | None]], start: int, at: int, end: int) -> tuple[Moved, ...]:
    found = []
    for layer, values in by_layer.items():
        before = [v for v in values[start:at] if v is not None]
        after = [v for v in values[at:end] if v is not None]
        if before and after:
            found.append(Moved(layer=layer, before=median(before), after=median(after)))
    rank: Callable[[Moved], tuple[float, int]] = lambda one: (-_distance(one), one.layer)
    return tuple(sorted(found, key=rank))


def _distance(one: Moved) -> float:
    return abs(math.log(one.ratio)) if 0 < one.ratio < math.inf else math.inf


def _packages(before: str, after: str) -> tuple[str, ...]:
    old, new = json.loads(before), json.loads(after)
    return tuple(
        f"{name} {old.get(name, 'none')} → {new.get(name, 'none')}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    )


@lru_cache(maxsize=1024)
def _commits(repository: Path | None, before: str | None, after: str | None) -> tuple[str, ...]:
    if repository is None or before is None or after is None:
        return ()
    span = f"{before.removesuffix('-dirty')}..{after.removesuffix('-dirty')}"
    try:
        found = subprocess.run(
            [
                "git",
                "-C",
                str(repository),
                "log",
                f"--max-count={MOST_COMMITS + 1}",
                "--format=%h %s",
                "--end-of-options",
                span,
            ],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return ()
    lines = found.stdout.splitlines() if found.returncode == 0 else []
    return tuple(lines[:MOST_COMMITS] + ["…"] * (len(lines) > MOST_COMMITS))
