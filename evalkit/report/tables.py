"""Records as tables of text: the one place where a number gets its digits, its unit and its n.

The terminal, summary.md and report.html print these same tables. Rows keep the order in which candidates were
recorded, with bf16 against itself first.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from evalkit.records import (
    CandidateRecord,
    EnvironmentRecord,
    FloorRecord,
    LayerRecord,
    PolicyRecord,
    ProfileRecord,
    RangeRecord,
    Record,
    SelectionRecord,
    StageRecord,
    TaskRecord,
    TokenRecord,
    last_judgement,
    only,
    output_probe,
)


class OfCandidate(Protocol):
    """A record of one candidate."""

    @property
    def candidate(self) -> str: ...


Named = TypeVar("Named", bound=OfCandidate)
Phased = TypeVar("Phased", LayerRecord, TokenRecord)

NA = "n/a"
MARKS = {"ANOMALOUS": "!", "WORSE": "▼", "INCONCLUSIVE": "?", "NON-INFERIOR": "✓"}
PHASES = ("decode", "prefill")


@dataclass(frozen=True, kw_only=True)
class Table:
    """A title, one line on what it shows, and rows of text; `text_columns` are aligned left, numbers right."""

    key: str
    title: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int


def verdicts(records: Sequence[Record]) -> Table:
    """The last judgement: overall, then each candidate with what decided and what it would take."""
    last = [r for r in last_judgement(records) if r.check in ("overall", "candidate")]
    policy = (
        f"Policy {last[0].policy} ({last[0].policy_sha256[:12]}), judged {without_fraction(last[0].judged_utc)}"
        + (", POST-HOC" if last[0].post_hoc else "")
        + (f", against {last[0].against}" if last[0].against else "")
        if last
        else ""
    )
    return Table(
        key="verdicts",
        title="Verdict",
        caption=policy,
        columns=("candidate", "verdict", "why", "what it would take"),
        rows=tuple((r.candidate, r.verdict, r.reason, r.needs or "nothing") for r in last),
        text_columns=4,
    )


def unjudged(records: Sequence[Record]) -> str:
    """What stands at the top of a report where tasks were scored and nobody judged them; empty elsewhere."""
    tasks = only(records, TaskRecord)
    if not tasks or last_judgement(records):
        return ""
    stored = only(records, PolicyRecord)
    said = (
        f"Not judged yet: evalkit gate judges this run under the policy that it stored, {stored[0].name}."
        if stored
        else "Not judged: this run was made for no policy and decides nothing; a loss of zero says that none was seen, and not "
        "that one would have been."
    )
    scores: dict[str, set[float]] = {}
    for record in tasks:
        scores.setdefault(record.task, set()).update((record.score, record.baseline_score))
    for score, why in ((1.0, "easy"), (0.0, "hard")):
        if same := [name for name, found in scores.items() if found == {score}]:
            said += f" Every candidate scores {share(score)} on {', '.join(same)}: too {why} to show a loss."
    return said


def candidates(records: Sequence[Record]) -> Table:
    """Candidates first: what each costs, how far its attention lies from the reference, what it loses on tasks."""
    layers, tokens, tasks = only(records, LayerRecord), only(records, TokenRecord), only(records, TaskRecord)
    names = sorted({record.task for record in tasks})
    timed = _most_timed(tasks)
    rows = []
    for record in _candidates(records):
        mine = [
            task
            for name in names
            for task in tasks
            if (task.task, task.candidate) == (name, record.candidate)
        ]
        # The phase with the most tokens: a mean over few of them says little.
        kl = max(
            (token for token in tokens if (token.candidate, token.frozen) == (record.candidate, "none")),
            key=lambda token: token.n,
            default=None,
        )
        rows.append(
            (
                record.candidate,
                f"{record.row_bytes_per_token:,}",
                *([_step(next((task for task in mine if task.task == timed), None))] if timed else []),
                worst_layer(layers, record.candidate, "isolated"),
                worst_layer(layers, record.candidate, "propagated"),
                NA if kl is None else f"{number(kl.kl_mean_nats)} ({kl.n:,})",
                *(_loss(next((task for task in mine if task.task == name), None)) for name in names),
            )
        )
    return Table(
        key="candidates",
        title="Candidates",
        caption=(
            "Relative L2 of the attention output against the reference at its worst layer, in decode where there is one; mean KL "
            "divergence of the next token in nats, over the n tokens of the phase or text that has most"
            + ("; loss of score in points against the baseline, with its interval" if names else "")
            + (
                f"; mean time of a decode step, with its interval, on {timed}, the task with most steps timed."
                if timed
                else "."
            )
            + _under_profile(records)
            + seen_inside(records)
        ),
        columns=(
            "candidate",
            "bytes/token",
            *(["decode step, ms"] if timed else []),
            "attention, isolated",
            "attention, propagated",
            "KL nats (n)",
            *(f"loss: {name}" for name in names),
        ),
        rows=tuple(rows),
        text_columns=1,
    )


def provenance(records: Sequence[Record]) -> Table:
    """What each candidate resolved to."""
    return Table(
        key="provenance",
        title="What ran",
        caption=(
            "What was asked for, what it resolved to, how indexer keys were stored and rows read, and the bytes that the "
            "kernel read back for each token."
        ),
        columns=(
            "asked for", "candidate", "format", "scales", "backend", "kernel", "index", "read", "note", "bytes/token", "read back",
        ),
        rows=tuple(
            (
                c.requested, c.candidate, c.format, c.scales, c.backend, c.kernel, c.index, c.read, c.note or "none",
                f"{c.row_bytes_per_token:,}",
                NA if c.bytes_per_token_read_back is None else f"{c.bytes_per_token_read_back:,}",
            )
            for c in _candidates(records)
        ),
        text_columns=9,
    )  # fmt: skip


def layers(records: Sequence[Record]) -> Table:
    """Relative L2 of the attention output, a row a layer and a column a candidate, for the terminal."""
    probe = output_probe(records)
    found = [
        r
        for r in only(records, LayerRecord)
        if (r.probe, r.frozen, r.rung) == (probe, "none", "total") and r.layer is not None
    ]
    # Inside a serving engine no layer can be fed another's input.
    mode = next((mode for mode in ("isolated", "propagated") if any(r.mode == mode for r in found)), "")
    found = [r for r in found if r.mode == mode]
    phase = next((phase for phase in PHASES if any(r.phase == phase for r in found)), "")
    found = [r for r in found if r.phase == phase]
    names = [c.candidate for c in _candidates(records) if any(r.candidate == c.candidate for r in found)]
    values = {(r.layer, r.candidate): number(r.relative_l2) + _mark(r) for r in found}
    return Table(
        key="layers",
        title="Layers",
        caption=f"Relative L2 of the attention output against the reference, {mode}, {phase}"
        f"{_n_of(sorted({r.n for r in found}))}.{seen_inside(records)}",
        columns=("layer", *names),
        rows=tuple(
            (str(layer), *(values.get((layer, name), NA) for name in names))
            for layer in sorted({k[0] for k in values if k[0] is not None})
        ),
        text_columns=1,
    )


def probes(records: Sequence[Record]) -> Table:
    """Every total of every probe, layer by layer."""
    return Table(
        key="probes",
        title="Every probe",
        caption="Candidate against reference at every probe, over n values; positions are query tokens; SQNR in dB.",
        columns=(
            "candidate", "phase", "mode", "probe", "frozen", "layer", "relative L2", "cosine", "1−2⟨x,y⟩/(‖x‖²+‖y‖²)", "SQNR dB",
            "max |error|", "at token", "got", "reference", "|error| p50", "p99", "p99.9", "per token, mean", "non-finite", "n",
        ),
        rows=tuple(
            (
                r.candidate, r.phase, r.mode, r.probe, r.frozen, layer_name(r.layer), number(r.relative_l2), cosine(r.cosine),
                number(r.symmetric_distance), NA if r.sqnr_db is None else f"{r.sqnr_db:.1f}", number(r.max_abs_error),
                NA if r.max_abs_token is None else str(r.max_abs_token), number(r.max_abs_got), number(r.max_abs_ref),
                number(r.abs_p50), number(r.abs_p99), number(r.abs_p999), number(r.token_relative_l2_mean),
                f"{r.nonfinite:,}", f"{r.n:,}",
            )
            for r in ordered(records, only(records, LayerRecord))
            if r.rung == "total"
        ),
        text_columns=5,
    )  # fmt: skip


def rungs(records: Sequence[Record]) -> Table:
    """Format gap, kernel gap and total: three numbers, beside the floors of the same probe and layer."""
    found = [r for r in only(records, LayerRecord) if r.frozen == "none"]
    kinds = [rung for rung in dict.fromkeys(r.rung for r in found) if rung.startswith("floor:")]
    values = {(r.candidate, r.phase, r.mode, r.probe, r.layer, r.rung): r for r in found}
    floors = {(r.phase, r.mode, r.probe, r.layer, r.rung): r for r in found if r.rung in kinds}
    rows = []
    for r in ordered(records, found):
        where = (r.phase, r.mode, r.probe, r.layer)
        split = [values.get((r.candidate, *where, rung)) for rung in ("format", "kernel")]
        if r.rung == "total" and any(split):
            figures = [*split, r, *(floors.get((*where, kind)) for kind in kinds)]
            cells = [NA if figure is None else number(figure.relative_l2) for figure in figures]
            rows.append((r.candidate, r.phase, r.mode, r.probe, layer_name(r.layer), *cells, f"{r.n:,}"))
    return Table(
        key="rungs",
        title="Where it arises",
        caption=(
            "Relative L2. Format: exact attention on the candidate's rows against the reference. Kernel: the candidate's kernel "
            "against exact attention on the same rows. Floors: bf16 against itself. All over n values."
        ),
        columns=("candidate", "phase", "mode", "probe", "layer", "format", "kernel", "total", *kinds, "n"),
        rows=tuple(rows),
        text_columns=4,
    )


def selection(records: Sequence[Record]) -> Table:
    """Which of the reference's keys were kept."""
    return Table(
        key="selection",
        title="Selection",
        caption=(
            "Recall of the reference's top-k, the median margin at the k-th score, and the attention mass on dropped keys; n query tokens."
        ),
        columns=("candidate", "phase", "mode", "layer", "recall, mean", "recall, least", "margin, median", "mass lost, mean", "n"),
        rows=tuple(
            (
                r.candidate, r.phase, r.mode, str(r.layer), share(r.recall_mean), share(r.recall_min), number(r.margin_p50),
                share(r.mass_lost_mean), f"{r.n:,}",
            )
            for r in ordered(records, only(records, SelectionRecord))
        ),
        text_columns=3,
    )  # fmt: skip


def ranges(records: Sequence[Record]) -> Table:
    """How the stored values fill their format."""
    return Table(
        key="ranges",
        title="Ranges",
        caption="What was stored: largest magnitude, scale, and the shares of n values that saturate, are subnormal, or round to zero.",
        columns=("candidate", "part", "layer", "max |x|", "scale", "headroom", "saturated", "subnormal", "to zero", "n"),
        rows=tuple(
            (
                r.candidate, r.part, str(r.layer), number(r.max_abs), number(r.scale), number(r.headroom), share(r.saturated_share),
                share(r.subnormal_share), share(r.zero_share), f"{r.n:,}",
            )
            for r in ordered(records, only(records, RangeRecord))
        ),
        text_columns=2,
    )  # fmt: skip


def tokens(records: Sequence[Record]) -> Table:
    """Divergence of next-token distributions."""
    return Table(
        key="tokens",
        title="Next-token divergence",
        caption=(
            "KL(reference ‖ candidate) in nats over n tokens, and how often both rank the same token first. The mean's 95 % interval "
            "is a studentised bootstrap by document, from 40 documents on; p99.9 from 100 documents and 25,000 tokens on."
            + seen_inside(records)
        ),
        columns=(
            "candidate", "tokens of", "frozen", "mean", "p50", "p90", "p99", "p99.9", "max", "same top-1", "documents", "n",
        ),
        rows=tuple(
            (
                r.candidate, tokens_of(r), r.frozen, f"{number(r.kl_mean_nats)} {interval(r.kl_mean_lower_nats, r.kl_mean_upper_nats, number)}",
                number(r.kl_p50_nats), number(r.kl_p90_nats), number(r.kl_p99_nats), number(r.kl_p999_nats), number(r.kl_max_nats),
                share(r.top1_agreement), f"{r.documents:,}", f"{r.n:,}",
            )
            for r in ordered(records, only(records, TokenRecord))
            if not r.again
        ),
        text_columns=3,
    )  # fmt: skip


def reference(records: Sequence[Record]) -> str:
    """What layers and next tokens are told from: this project's own, or of a serving engine its bf16."""
    of_engine = [r.candidate for r in only(records, FloorRecord) if r.rung == "floor:start" and r.candidate]
    return of_engine[0] if of_engine else "bf16@reference"


def seen_inside(records: Sequence[Record]) -> str:
    """What a caption adds where a serving engine showed its layers; begins with a space."""
    told_from = reference(records)
    if told_from == "bf16@reference":
        return ""
    kernel = next((r.kernel for r in only(records, CandidateRecord) if r.candidate == told_from), "an engine")
    return (
        f" Seen inside {' '.join(kernel.split(' ')[:2])}, whose own {told_from} (first start) is the reference, not "
        "bf16@reference; the attention output is `values`, after W_UV."
    )


def tokens_of(record: TokenRecord) -> str:
    """Which tokens a divergence is over: a phase, or what part of which text."""
    return f"{record.phase}, {record.source}" if record.source else record.phase


def tasks(records: Sequence[Record]) -> Table:
    """Scores and paired losses."""
    return Table(
        key="tasks",
        title="Tasks",
        caption=(
            "Score with its interval, and the loss against the baseline on the same documents, in percentage points; documents lost "
            "(baseline right, candidate wrong) and gained; exact McNemar p. A loss whose interval holds zero is not a finding."
        ),
        columns=(
            "task", "candidate", "n", "score", "loss, points", "lost", "gained", "McNemar p",
        ),
        rows=tuple(
            (
                r.task, r.candidate, f"{r.n:,}", f"{share(r.score)} {interval(r.score_lower, r.score_upper)}", _loss(r),
                NA if r.lost is None else str(r.lost), NA if r.gained is None else str(r.gained),
                NA if r.mcnemar_p is None else f"{r.mcnemar_p:.3g}",
            )
            for r in sorted(ordered(records, only(records, TaskRecord)), key=lambda r: r.task)
            if not r.again
        ),
        text_columns=2,
    )  # fmt: skip


def scoring(records: Sequence[Record]) -> Table:
    """How each row of `tasks` was scored, and against what."""
    return Table(
        key="scoring",
        title="How tasks were scored",
        caption=(
            "What each score was held against; the mean number of tokens before the scored ones; the share of scored tokens with "
            "more context than top-k, for which the indexer had to choose; mean time of a decode step with its interval, the sequences "
            "that it advances, the steps timed (in a CUDA graph, where it says so), on this machine; seconds of everything."
        ),
        columns=(
            "task", "candidate", "against", "metric", "interval by", "its score", "mean context, tokens", "over top-k",
            "decode step, ms", "of sequences", "steps", "seconds",
        ),
        rows=tuple(
            (
                r.task, r.candidate, r.baseline, f"{r.metric} ({r.filter})", r.interval_method, share(r.baseline_score),
                NA if r.mean_context_tokens is None else f"{r.mean_context_tokens:,.0f}", share(r.share_over_topk),
                _step(r), NA if r.decode_sequences is None else f"{r.decode_sequences:,}", _steps(r), f"{r.wall_s:.1f}",
            )
            for r in sorted(ordered(records, only(records, TaskRecord)), key=lambda r: r.task)
        ),
        text_columns=5,
    )  # fmt: skip


def environment(records: Sequence[Record]) -> Table:
    """Where it ran, a row a fact."""
    rows: list[tuple[str, str]] = []
    for r in only(records, EnvironmentRecord):
        rows += [
            ("checkpoint", r.checkpoint),
            ("checkpoint SHA-256", r.checkpoint_sha256),
            ("device", r.device),
            ("GPU", r.gpu or "none"),
            ("dtype", r.dtype),
            *_profile(records),
            ("started", r.started_utc),
            ("commit", r.commit or "not a checkout"),
            ("Python", r.python),
            ("packages", ", ".join(f"{name} {version}" for name, version in r.packages.items())),
            *([("packages untested", "; ".join(r.untested))] if r.untested else []),
            ("numerics", ", ".join(f"{name} = {value}" for name, value in r.flags.items())),
        ]
    rows += [(f"stage {stage.stage}", f"{stage.wall_s:.1f} s") for stage in only(records, StageRecord)]
    return Table(
        key="environment",
        title="Environment",
        caption="Where and with what the run was made.",
        columns=("what", "value"),
        rows=tuple(rows),
        text_columns=2,
    )


def _profile(records: Sequence[Record]) -> list[tuple[str, str]]:
    """What the ranges of latent and rope are, a row a part."""
    found = only(records, ProfileRecord)
    rows = [("range profile", f"{found[0].profile} ({found[0].sha256})" if found else "native")]
    for part in dict.fromkeys(r.part for r in found):
        mine = [r for r in found if r.part == part]
        figures = (
            ("max|x|", [r.max_abs for r in mine], [r.target_max for r in mine]),
            ("rms", [r.rms for r in mine], [r.target_rms for r in mine]),
            ("tail", [r.tail for r in mine], [r.target_tail for r in mine]),
        )
        text = "; ".join(f"{name} {_span(got)}, asked for {_span(asked)}" for name, got, asked in figures)
        zeros = sum(r.zero_channels for r in mine)
        rows.append((f"ranges of {part}", f"{text}; {zeros} channels of zeros"))
    return rows


def _under_profile(records: Sequence[Record]) -> str:
    found = only(records, ProfileRecord)
    if not found:
        return ""
    return (
        f" Ranges as in profile {found[0].profile}; they weigh the channels of the attention output, so that between profiles "
        "only `values` and what follows it compare."
    )


def _span(values: Sequence[float]) -> str:
    """The least and the most over layers."""
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"


def worst_layer(records: Sequence[LayerRecord], candidate: str, mode: str) -> str:
    """The largest relative L2 of the attention output over layers, with the layer; decode where there is one."""
    probe = output_probe(records)
    found = [
        r
        for r in _by_phase(records)
        if (r.candidate, r.mode, r.probe, r.rung, r.frozen) == (candidate, mode, probe, "total", "none")
    ]
    found = [r for r in found if r.phase == found[0].phase]
    if any(r.nonfinite for r in found):
        return f"non-finite (layer {next(r.layer for r in found if r.nonfinite)})"
    measured = [(r.relative_l2, r.layer) for r in found if r.relative_l2 is not None]
    if not measured:
        return NA
    worst, layer = max(measured, key=lambda pair: pair[0])
    return f"{number(worst)} (layer {layer})" if worst else "0"


def without_fraction(utc: str) -> str:
    """A time in whole seconds."""
    return re.sub(r"\.\d+", "", utc)


def number(value: float | None) -> str:
    """Three significant digits."""
    if value is None:
        return NA
    return "0" if value == 0 else f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"


def share(value: float | None) -> str:
    """A share as a percentage; what is not quite none or all does not read as none or all."""
    if value is None:
        return NA
    text = f"{value:.1%}"
    return (
        f"{value:.2e}"
        if text == "0.0%" and value > 0
        else f"{value:.4%}"
        if text == "100.0%" and value < 1
        else text
    )


def cosine(value: float | None) -> str:
    """Cosines crowd below one: six decimals."""
    return NA if value is None else f"{value:.6f}"


def interval(
    lower: float | None, upper: float | None, scale: Callable[[float], str] = lambda x: f"{100 * x:.1f}"
) -> str:
    """`[low, high]`, or n/a where there is none."""
    return f"[{NA}]" if lower is None or upper is None else f"[{scale(lower)}, {scale(upper)}]"


def layer_name(layer: int | None) -> str:
    """A layer's number; records without one stand after the last."""
    return "model" if layer is None else str(layer)


def is_control(candidate: str) -> bool:
    """Whether a candidate stores bf16: the row that every table begins with."""
    return candidate.startswith("bf16")


def _candidates(records: Sequence[Record]) -> list[CandidateRecord]:
    return sorted(only(records, CandidateRecord), key=lambda record: not is_control(record.candidate))


def ordered(records: Sequence[Record], found: Sequence[Named]) -> list[Named]:
    """In the order of the candidates, bf16 first."""
    rank = {record.candidate: place for place, record in enumerate(_candidates(records))}
    return sorted(found, key=lambda record: rank.get(record.candidate, len(rank)))


def _by_phase(found: Sequence[Phased]) -> list[Phased]:
    return sorted(found, key=lambda r: PHASES.index(r.phase) if r.phase in PHASES else len(PHASES))


def _loss(record: TaskRecord | None) -> str:
    if record is None:
        return NA
    return f"{100 * record.loss:+.1f} {interval(record.loss_lower, record.loss_upper, lambda x: f'{100 * x:+.1f}')}"


def _step(record: TaskRecord | None) -> str:
    if record is None or record.decode_step_ms is None:
        return NA
    return f"{number(record.decode_step_ms)} {interval(record.decode_step_lower_ms, record.decode_step_upper_ms, number)}"


def _steps(record: TaskRecord) -> str:
    return (
        NA
        if record.decode_steps is None
        else f"{record.decode_steps:,}{' (graph)' if record.decode_graph else ''}"
    )


def _most_timed(tasks: Sequence[TaskRecord]) -> str | None:
    """The task with most steps timed, over all candidates: steps of different tasks see different contexts."""
    steps: dict[str, int] = {}
    for record in tasks:
        if record.decode_step_ms is not None:
            steps[record.task] = steps.get(record.task, 0) + (record.decode_steps or 0)
    return max(steps, key=lambda task: steps[task], default=None)


def _mark(record: LayerRecord) -> str:
    return f" ({record.nonfinite} non-finite)" if record.nonfinite else ""


def _n_of(counts: Sequence[int]) -> str:
    """How many values were compared, since layers may differ."""
    most = f" to {counts[-1]:,}" if len(counts) > 1 else ""
    return f", n = {counts[0]:,}{most} values" if counts else ""
