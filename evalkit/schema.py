"""The kinds of record, and one record as a JSON line.

Fields are named as in the line; units end names. Reading refuses what it does not know, so that a report never
shows a number under a meaning that has changed.
"""

import json
import math
from dataclasses import asdict, dataclass, fields
from types import UnionType
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

from evalkit.errors import InputError

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line of records.jsonl. A number that does not exist is None, never 0 or NaN."""

    kind: ClassVar[str]


@dataclass(frozen=True, kw_only=True)
class EnvironmentRecord(Record):
    """Where and with what the run was made; `flags` are the numerics switches as they were set."""

    kind: ClassVar[str] = "environment"
    commit: str | None
    python: str
    packages: dict[str, str]
    device: str
    gpu: str | None
    dtype: str
    checkpoint: str
    checkpoint_sha256: str
    flags: dict[str, bool | str]
    command: str
    started_utc: str


@dataclass(frozen=True, kw_only=True)
class ProfileRecord(Record):
    """How large one part of a layer's rows was to be, was in the checkpoint, and is, over n tokens.

    `sha256` is the profile's file; `tail` the standard deviation over channels of ln(channel rms).
    """

    kind: ClassVar[str] = "profile"
    profile: str
    sha256: str
    layer: int
    part: str
    target_rms: float
    target_max: float
    target_tail: float
    own_rms: float
    own_max: float
    own_tail: float
    rms: float
    max_abs: float
    tail: float
    zero_channels: int
    n: int


@dataclass(frozen=True, kw_only=True)
class CandidateRecord(Record):
    """Proof of what ran: the resolved format and kernel, and the bytes read back for each token."""

    kind: ClassVar[str] = "candidate"
    candidate: str
    format: str
    scales: str
    backend: str
    kernel: str
    index: str
    read: str
    row_bytes_per_token: int
    bytes_per_token_read_back: int | None
    requested: str
    note: str


@dataclass(frozen=True, kw_only=True)
class LayerRecord(Record):
    """One probe at one layer against the reference; `rung` is format, kernel, total or `floor:<kind>`."""

    kind: ClassVar[str] = "layer"
    candidate: str
    layer: int | None
    phase: str
    mode: str
    probe: str
    rung: str
    cosine: float | None
    relative_l2: float | None
    symmetric_distance: float | None
    max_abs_error: float | None
    max_abs_token: int | None
    max_abs_got: float | None
    max_abs_ref: float | None
    sqnr_db: float | None
    abs_p50: float | None
    abs_p99: float | None
    abs_p999: float | None
    token_relative_l2_mean: float | None
    nonfinite: int
    frozen: str
    n: int


@dataclass(frozen=True, kw_only=True)
class SelectionRecord(Record):
    """Which of the reference's top-k keys a candidate kept, over n query tokens."""

    kind: ClassVar[str] = "selection"
    candidate: str
    layer: int
    phase: str
    mode: str
    recall_mean: float | None
    recall_min: float | None
    margin_p50: float | None
    mass_lost_mean: float | None
    n: int


@dataclass(frozen=True, kw_only=True)
class RangeRecord(Record):
    """How one part of a layer's rows fills its format; shares are of n values."""

    kind: ClassVar[str] = "range"
    candidate: str
    layer: int
    part: str
    max_abs: float | None
    saturated_share: float | None
    subnormal_share: float | None
    zero_share: float | None
    headroom: float | None
    scale: float | None
    n: int


@dataclass(frozen=True, kw_only=True)
class TokenRecord(Record):
    """KL divergence of the candidate's next-token distribution from the reference's, in nats."""

    kind: ClassVar[str] = "kld"
    candidate: str
    phase: str
    frozen: str
    kl_mean_nats: float | None
    kl_p50_nats: float | None
    kl_p90_nats: float | None
    kl_p99_nats: float | None
    kl_max_nats: float | None
    top1_agreement: float | None
    n: int


@dataclass(frozen=True, kw_only=True)
class TaskRecord(Record):
    """A task's score and its loss against the baseline on the same documents, with intervals."""

    kind: ClassVar[str] = "task"
    candidate: str
    baseline: str
    task: str
    metric: str
    filter: str
    n: int
    score: float
    score_lower: float | None
    score_upper: float | None
    baseline_score: float
    loss: float
    loss_lower: float | None
    loss_upper: float | None
    interval_method: str
    lost: int | None
    gained: int | None
    mcnemar_p: float | None
    wall_s: float
    mean_context_tokens: float | None
    share_over_topk: float | None


@dataclass(frozen=True, kw_only=True)
class SampleRecord(Record):
    """One document's answer; it lies in samples/, not in records.jsonl."""

    kind: ClassVar[str] = "sample"
    candidate: str
    task: str
    doc_id: int
    prompt_sha256: str
    target_sha256: str
    filter: str
    metric: str
    score: float
    response: str


@dataclass(frozen=True, kw_only=True)
class StageRecord(Record):
    """A stage ended; everything it wrote precedes this line."""

    kind: ClassVar[str] = "stage"
    stage: str
    wall_s: float


KINDS: dict[str, type[Record]] = {cls.kind: cls for cls in Record.__subclasses__()}
HINTS: dict[str, dict[str, Any]] = {
    kind: {name: hint for name, hint in get_type_hints(cls).items() if get_origin(hint) is not ClassVar}
    for kind, cls in KINDS.items()
}


def to_line(record: Record) -> str:
    """A record as its JSON line.

    Raises:
        ValueError: a number is NaN or infinite.
        TypeError: a value is not of its field's type (a tensor or numpy scalar is not a number here).
    """
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    for name, value in values.items():
        where = f"{type(record).__name__}.{name} is {value!r}"
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(
                f"{where}: count what is not finite in a field of its own and write None ({_label(record)})"
            )
        if not _fits(value, HINTS[record.kind][name]):
            raise TypeError(f"{where}, not {HINTS[record.kind][name]} ({_label(record)})")
    return json.dumps({"schema": SCHEMA, "kind": record.kind, **values}, allow_nan=False) + "\n"


def from_values(values: object, where: str) -> Record:
    """A parsed line as its record; `where` begins the message of the InputError that an unfit one raises."""
    if not isinstance(values, dict):
        raise InputError(f"{where}: not a JSON object")
    schema, kind = values.pop("schema", None), values.pop("kind", None)
    if schema != SCHEMA:
        raise InputError(
            f"{where}: schema {schema!r} is unknown; this version of evalkit reads schema {SCHEMA}"
        )
    if kind not in KINDS:
        raise InputError(f"{where}: kind {kind!r} is unknown; known are {', '.join(sorted(KINDS))}")
    cls = KINDS[kind]
    hints = HINTS[kind]
    if values.keys() != hints.keys():
        missing, unknown = sorted(hints.keys() - values.keys()), sorted(values.keys() - hints.keys())
        raise InputError(
            f"{where}: a {kind} record lacks {missing or 'nothing'} and has unknown {unknown or 'nothing'}"
        )
    for name, hint in hints.items():
        if not _fits(values[name], hint):
            raise InputError(f"{where}: {kind}.{name} is {values[name]!r}, not {hint}")
    return cls(**values)


def _fits(value: object, hint: Any) -> bool:
    if isinstance(hint, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is dict:
        key, item = get_args(hint)
        return isinstance(value, dict) and all(_fits(k, key) and _fits(v, item) for k, v in value.items())
    if hint in (int, float):  # bool is an int to Python, and JSON writes 2.0 and 2 alike
        return type(value) in ((int,) if hint is int else (int, float))
    return isinstance(value, hint)


def _label(record: Record) -> str:
    """The fields that say which record it is, for messages."""
    return ", ".join(f"{name}={value!r}" for name, value in asdict(record).items() if isinstance(value, str))
