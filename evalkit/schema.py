"""The kinds of record, and one record as a JSON line.

Fields are named as in the line; units end names. Reading refuses what it does not know, so that a report never
shows a number under a meaning that has changed.
"""

import json
import math
import reprlib
from dataclasses import MISSING, asdict, dataclass, fields
from types import UnionType
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

from evalkit.arm_names import is_later_start
from evalkit.errors import InputError

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line of records.jsonl. A number that does not exist is None, never 0 or NaN."""

    kind: ClassVar[str]


@dataclass(frozen=True, kw_only=True)
class EnvironmentRecord(Record):
    """Where and with what the run was made; `flags` are the numerics switches as they were set.

    `untested`: a line for each package of a version that this evalkit was not tested with; None in a run from before
    that was recorded.
    """

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
    untested: list[str] | None = None


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
    heads: int
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
    """KL divergence of the candidate's next-token distribution from the reference's, in nats.

    Over `targets` tokens whose successor the document holds: `delta_p` is the candidate's probability of it minus the
    reference's. Of the `disagreed` top-1s, those where the reference or the candidate names it. `phase` text, prompt
    and response are of a whole text at once, and `source` is the file or task that it comes from.
    """

    kind: ClassVar[str] = "kld"
    candidate: str
    phase: str
    frozen: str
    kl_mean_nats: float | None
    kl_p50_nats: float | None
    kl_p90_nats: float | None
    kl_p99_nats: float | None
    kl_p999_nats: float | None
    kl_max_nats: float | None
    kl_mean_lower_nats: float | None
    kl_mean_upper_nats: float | None
    interval_method: str
    documents: int
    top1_agreement: float | None
    disagreed: int
    reference_right: int
    candidate_right: int
    delta_p_mean: float | None
    delta_p_rms: float | None
    targets: int
    n: int
    source: str = ""

    @property
    def again(self) -> bool:
        """Whether it is of a later fresh start of its candidate."""
        return is_later_start(self.candidate)


@dataclass(frozen=True, kw_only=True)
class AttributionRecord(Record):
    """A candidate's error with some of its components, the rest as the reference has it.

    With a layer, of its attention output on the reference's input; without, of the whole model's next token. `arm`:
    `only` a component, all `without` it, `none`, `all`, their `interaction` (all less the sum of only, may be below
    0), or `apart` (not from the reference, but from the candidate's own rows and numerics).
    """

    kind: ClassVar[str] = "attribution"
    candidate: str
    layer: int | None
    mode: str
    frozen: str
    arm: str
    component: str | None
    squared_relative_l2: float | None
    kl_mean_nats: float | None
    nonfinite: int
    n: int


@dataclass(frozen=True, kw_only=True)
class FloorRecord(Record):
    """A floor that was to be measured: the candidate that measures it, or why there is none."""

    kind: ClassVar[str] = "floor"
    rung: str
    candidate: str | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class MultipleRecord(Record):
    """A candidate's error over `floor`'s on the same n tokens, with its paired 95 % interval.

    Layer None and probe `kl` is the KL divergence; every other probe's error is relative L2.
    """

    kind: ClassVar[str] = "multiple"
    candidate: str
    layer: int | None
    phase: str
    mode: str
    probe: str
    frozen: str
    floor: str
    multiple: float
    lower: float | None
    upper: float | None
    interval_method: str
    n: int


@dataclass(frozen=True, kw_only=True)
class DivergenceRecord(Record):
    """The first layer whose attention error leaves a floor: the lower end of its multiple is above 1.

    `first_layer` is None where none of `layers` does. Where a layer has no interval, the multiple itself is taken.
    """

    kind: ClassVar[str] = "divergence"
    candidate: str
    phase: str
    mode: str
    probe: str
    floor: str
    first_layer: int | None
    relative_l2: float | None
    multiple: float | None
    multiple_lower: float | None
    interval_method: str
    layers: int


@dataclass(frozen=True, kw_only=True)
class PositionRecord(Record):
    """An error by position (`axis` position, or generated: tokens since the prompt); see compare/positions.py.

    Probe `attention` is relative L2 a token, probe `kl` nats (layer None). `starts` are the bins' first positions.
    """

    kind: ClassVar[str] = "position"
    candidate: str
    rung: str
    layer: int | None
    mode: str
    probe: str
    axis: str
    starts: list[int]
    means: list[float | None]
    counts: list[int]
    slope_per_1000_tokens: float | None
    slope_lower: float | None
    slope_upper: float | None
    slope_method: str
    topk: int
    below_topk_mean: float | None
    above_topk_mean: float | None
    cliff: bool | None
    nonfinite: int
    n: int


@dataclass(frozen=True, kw_only=True)
class PhaseRecord(Record):
    """One way for the same n tokens to arrive, against the reference's own same way.

    Layer None and probe `kl` has `kl_mean_nats`, a layer's attention `relative_l2`. `multiple` is of the least of the
    other phases; `departs` says that its lower end is beyond what phases differ by.
    """

    kind: ClassVar[str] = "phase"
    candidate: str
    layer: int | None
    mode: str
    probe: str
    phase: str
    relative_l2: float | None
    kl_mean_nats: float | None
    least_other: str
    multiple: float | None
    lower: float | None
    upper: float | None
    interval_method: str
    departs: bool | None
    nonfinite: int
    n: int


@dataclass(frozen=True, kw_only=True)
class ConfidenceRecord(Record):
    """KL divergence and disagreement over n tokens where the reference's top-1 probability lies in [from_p, to_p)."""

    kind: ClassVar[str] = "confidence"
    candidate: str
    phase: str
    frozen: str
    from_p: float
    to_p: float
    kl_mean_nats: float | None
    disagreed_share: float | None
    n: int


@dataclass(frozen=True, kw_only=True)
class WorstTokenRecord(Record):
    """One of the tokens with the largest KL divergence of a candidate, free and propagated.

    `position` is the query's: both distributions are of the token after it, `next_token`. `text` is what precedes.
    `first_divergent_layer`: the first where the token's attention error is above the 99th percentile of the floor's
    over all tokens. `dropped_keys` of `reference_keys`, and the reference's attention mass on them, at `mass_layer`,
    where that mass is largest.
    """

    kind: ClassVar[str] = "worst_token"
    candidate: str
    rank: int
    document: int
    position: int
    phase: str
    kl_nats: float
    text: str
    next_token: str | None
    reference_top: list[str]
    reference_p: list[float]
    candidate_top: list[str]
    candidate_p: list[float]
    floor: str
    first_divergent_layer: int | None
    mass_layer: int | None
    dropped_keys: int | None
    reference_keys: int | None
    mass_lost: float | None


@dataclass(frozen=True, kw_only=True)
class MissingScaleRecord(Record):
    """A layer whose rows are divided by 1.0: `carried` is what the checkpoint has for it, None where nothing."""

    kind: ClassVar[str] = "missing_scale"
    candidate: str
    layer: int
    carried: float | None


@dataclass(frozen=True, kw_only=True)
class TaskRecord(Record):
    """A task's score and its loss against the baseline on the same documents, with intervals.

    `decode_step_ms` is the mean time of a step that advances `decode_sequences` sequences by a token each, over
    `decode_steps` steps that saw `decode_columns` columns of context on average, after those that warm up; prompts,
    tokenising and scoring are not in it. Its 95 % interval is Student's t over runs of consecutive calls (see
    evaluate/engines/timing.py) and holds for this process on this machine; None below 8 calls. `decode_graph`: a CUDA
    graph replayed the steps. All of these are None where nothing was generated, or the engine does not tell.
    """

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
    share_stored_rows: float | None
    decode_step_ms: float | None = None
    decode_step_lower_ms: float | None = None
    decode_step_upper_ms: float | None = None
    decode_sequences: int | None = None
    decode_columns: float | None = None
    decode_steps: int | None = None
    decode_graph: bool | None = None

    @property
    def again(self) -> bool:
        """Whether the candidate is its baseline once more, on an engine that was started afresh."""
        return is_later_start(self.candidate)


@dataclass(frozen=True, kw_only=True)
class SampleRecord(Record):
    """One document's answer; it lies in samples/, not in records.jsonl.

    `truncated`: it ended at its length limit instead of a stop. `generated_text` precedes the stop and any filter,
    `generated_ids` end in the stop, and `generated_chars` says how many characters each of these adds to the text. All
    of these are None where nothing was generated. `prompt_end` is the end of what was sent.
    """

    kind: ClassVar[str] = "sample"
    candidate: str
    task: str
    doc_id: int
    prompt_sha256: str
    target_sha256: str
    filter: str
    metric: str
    score: float
    generated_tokens: int | None
    truncated: bool | None
    response: str
    target: str | None = None
    prompt_end: str | None = None
    generated_text: str | None = None
    generated_ids: list[int] | None = None
    generated_chars: list[int] | None = None


@dataclass(frozen=True, kw_only=True)
class AnswerShareRecord(Record):
    """How many of n answers are `measure`: degenerate, empty or length-limited (evaluate/answers.py defines them).

    `difference` is the candidate's share less the baseline's on the same documents; `share` has Wilson's interval.
    """

    kind: ClassVar[str] = "answer_share"
    candidate: str
    baseline: str
    task: str
    measure: str
    count: int
    share: float
    share_lower: float | None
    share_upper: float | None
    baseline_count: int
    difference: float
    difference_lower: float | None
    difference_upper: float | None
    interval_method: str
    n: int


@dataclass(frozen=True, kw_only=True)
class AnswerLengthRecord(Record):
    """Generated tokens of n answers, their stop included, and the mean difference from the baseline's."""

    kind: ClassVar[str] = "answer_length"
    candidate: str
    baseline: str
    task: str
    mean_tokens: float
    baseline_mean_tokens: float
    difference_tokens: float
    lower_tokens: float | None
    upper_tokens: float | None
    interval_method: str
    n: int


@dataclass(frozen=True, kw_only=True)
class FirstDifferenceRecord(Record):
    """How often an answer leaves the baseline's: `differing` of n, over the tokens up to there and of all others.

    `per_1000_tokens` is 1,000 * differing / tokens_at_risk; a token after the first that differs is not at risk.
    """

    kind: ClassVar[str] = "first_difference"
    candidate: str
    baseline: str
    task: str
    differing: int
    tokens_at_risk: int
    per_1000_tokens: float
    lower: float | None
    upper: float | None
    interval_method: str
    n: int


@dataclass(frozen=True, kw_only=True)
class PolicyRecord(Record):
    """The policy that a run was made for, written before anything was scored; `text` is all of it, as JSON."""

    kind: ClassVar[str] = "policy"
    name: str
    sha256: str
    text: str


@dataclass(frozen=True, kw_only=True)
class VerdictRecord(Record):
    """One check of one candidate under a policy; `check` is `overall`, `candidate` or the name of what was looked at.

    `post_hoc`: the run had not stored this policy. `against`: the run whose baselines it was compared with, if another.
    """

    kind: ClassVar[str] = "verdict"
    candidate: str
    check: str
    verdict: str
    reason: str
    needs: str
    policy: str
    policy_sha256: str
    post_hoc: bool
    against: str | None
    judged_utc: str


@dataclass(frozen=True, kw_only=True)
class StageRecord(Record):
    """A stage ended; everything it wrote precedes this line."""

    kind: ClassVar[str] = "stage"
    stage: str
    wall_s: float


KINDS: dict[str, type[Record]] = {cls.kind: cls for cls in Record.__subclasses__()}
# Fields that records of earlier versions lack.
DEFAULTS: dict[str, dict[str, Any]] = {
    kind: {field.name: field.default for field in fields(cls) if field.default is not MISSING}
    for kind, cls in KINDS.items()
}
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
        if _fits(value, HINTS[record.kind][name]):
            continue
        where = f"{type(record).__name__}.{name} is {value!r}"
        numbers = value if isinstance(value, list) else (value,)
        if any(isinstance(one, float) and not math.isfinite(one) for one in numbers):
            raise ValueError(
                f"{where}: count what is not finite in a field of its own and write None ({_label(record)})"
            )
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
    values = DEFAULTS[kind] | values
    if values.keys() != hints.keys():
        missing, unknown = sorted(hints.keys() - values.keys()), sorted(values.keys() - hints.keys())
        raise InputError(
            f"{where}: a {kind} record lacks {missing or 'nothing'} and has unknown {unknown or 'nothing'}"
        )
    for name, hint in hints.items():
        if not _fits(values[name], hint):
            raise InputError(f"{where}: {kind}.{name} is {reprlib.repr(values[name])}, not {hint}")
    if kind == TaskRecord.kind and values["n"] < 1:
        raise InputError(f"{where}: task.n is {values['n']}: a score is over one document at least")
    return cls(**values)


def _fits(value: object, hint: Any) -> bool:
    if isinstance(hint, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is list:
        (item,) = get_args(hint)
        if item is int:  # thousands of tokens each: as below, without a call for each
            return (
                isinstance(value, list)
                and set(map(type, value)) <= {int}
                and max(map(abs, value), default=0) < 2**63
            )
        return isinstance(value, list) and all(_fits(one, item) for one in value)
    if get_origin(hint) is dict:
        key, item = get_args(hint)
        return isinstance(value, dict) and all(_fits(k, key) and _fits(v, item) for k, v in value.items())
    if (
        type(value) is int
    ):  # bool is none; JSON writes 2.0 and 2 alike; a wider one overflows where it is used
        return hint in (int, float) and abs(value) < 2**63
    if type(value) is float:
        return hint is float and math.isfinite(value)
    return hint not in (int, float) and isinstance(value, hint)


def _label(record: Record) -> str:
    """The fields that say which record it is, for messages."""
    return ", ".join(f"{name}={value!r}" for name, value in asdict(record).items() if isinstance(value, str))
