"""A made-up run whose candidates answer, some differently from the baseline: what the report's page is tested on."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from evalkit.evaluate.answers import compare_answers
from evalkit.records import Record, RunDirectory, SampleRecord, TaskRecord, TokenRecord, read_samples
from evalkit.report import html
from tests.report.browser import Browser
from tests.report.conftest import CANDIDATES, _layers, _opening
from tests.report.nights import filled

BASELINE = "bf16@reference"
CONTROL = f"{BASELINE}, batches of 4"
DAMAGED = f"{BASELINE}, rows times 1 + 0.3 N(0, 1)"
TASKS = ("registers", "walk")
DOCUMENTS = 48
# What would run if the page did not escape it.
HOSTILE = "</script><img src=x onerror=alert(1)>\u2028<b>&amp;</b>"


def token_text(token: int) -> str:
    return f"r{token}={token % 7}\n" if token % 3 == 0 else f" step {token},"


def answer(candidate: str, task: str, document: int, ids: list[int], *, right: bool, limited: bool = False) -> SampleRecord:  # fmt: skip
    chars = [len(token_text(token)) for token in ids]
    if not limited:
        ids, chars = [*ids, 0], [*chars, 0]
    text = "".join(map(token_text, ids if limited else ids[:-1]))
    return filled(
        SampleRecord,
        candidate=candidate, task=task, doc_id=document, prompt_sha256=f"{document:064d}", target_sha256="t" * 64,
        filter="answer", metric="exact_match", score=float(right), generated_tokens=len(ids), truncated=limited, response=text,
        target="r9=4" + HOSTILE, prompt_end="… trace the registers.\n" + HOSTILE, generated_text=text, generated_ids=ids, generated_chars=chars,
    )  # fmt: skip


def answers(rng: random.Random, candidates: list[str]) -> Iterator[SampleRecord]:
    """Candidate number k differs on about k of 12 documents, half of these wrong; the damaged arm on all."""
    for task in TASKS:
        for document in range(DOCUMENTS):
            own = [rng.randrange(1, 60) for _ in range(rng.randrange(40, 90))]
            wrong = document % 16 == 0
            for candidate in (BASELINE, CONTROL):
                yield answer(candidate, task, document, own, right=not wrong)
            for number, candidate in enumerate([*candidates, DAMAGED], 1):
                place = rng.randrange(5, 35)
                if candidate == DAMAGED:
                    ids = own[:place] + [place] * 60
                    yield answer(candidate, task, document, ids, right=False, limited=True)
                elif rng.random() < number / 12:
                    ids = [*own[:place], own[place] + 1, *own[place + 1 :]]
                    yield answer(
                        candidate, task, document, ids, right=wrong if rng.random() < 0.5 else not wrong
                    )
                else:
                    yield answer(candidate, task, document, own, right=not wrong)


def score(candidate: str, baseline: str, task: str, samples: list[SampleRecord]) -> TaskRecord:
    def right(name: str) -> list[bool]:
        return [s.score == 1 for s in samples if (s.candidate, s.task) == (name, task)]

    before, after = right(baseline), right(candidate)
    lost = sum(b and not a for b, a in zip(before, after, strict=True))
    gained = sum(a and not b for b, a in zip(before, after, strict=True))
    loss = (lost - gained) / len(before)
    step = 2.0 + 0.1 * len(candidate) + TASKS.index(task) if task in TASKS else 3.0
    return filled(
        TaskRecord,
        candidate=candidate, baseline=baseline, task=task, metric="exact_match", filter="answer", n=len(before),
        score=sum(after) / len(after), score_lower=0.7, score_upper=0.99, baseline_score=sum(before) / len(before), loss=loss,
        loss_lower=loss - 0.05, loss_upper=loss + 0.06, interval_method="tango", lost=lost, gained=gained, mcnemar_p=0.5,
        wall_s=100.0 + 7 * len(candidate), decode_step_ms=step, decode_step_lower_ms=0.97 * step, decode_step_upper_ms=1.04 * step,
        decode_sequences=8, decode_columns=1024.5, decode_steps=1234, decode_graph=candidate != BASELINE,
    )  # fmt: skip


def make_run(folder: Path) -> RunDirectory:
    """A whole run: layers, divergence with intervals, tasks, answers."""
    rng = random.Random(7)
    made = RunDirectory.create(folder, "answered", {"seed": 0}, "evalkit run")
    others = [name for name in CANDIDATES if name != BASELINE]
    tokens = [
        filled(
            TokenRecord,
            candidate=name, phase="prefill", frozen="none", kl_mean_nats=0.0 if name == BASELINE else kl, kl_mean_lower_nats=None if name == BASELINE else kl / 2,
            kl_mean_upper_nats=None if name == BASELINE else kl * 3, interval_method="made up", documents=40, top1_agreement=0.99, n=2048, disagreed=9,
        )
        for name in CANDIDATES
        for kl in [rng.uniform(1e-4, 0.02)]
    ]  # fmt: skip
    samples = list(answers(rng, others))
    pairs = [(BASELINE, CONTROL), *((other, BASELINE) for other in others)]
    scores = [score(*pair, task, samples) for pair in pairs for task in TASKS]
    stages: dict[str, list[Record]] = {
        "start": list(_opening()),
        "layers": [*_layers(rng), *tokens],
        "tasks": [*samples, *scores],
        "answers": list(compare_answers(scores, samples)),
    }
    for stage, records in stages.items():
        with made.stage(stage) as write:
            for record in records:
                write.write(record)
    return made


Changed = TypeVar("Changed", bound=Record)


def rewritten(
    run: RunDirectory, folder: Path, kind: type[Changed], change: Callable[[Changed], Changed]
) -> Path:
    """The report of the same run with records of one kind changed."""
    made = RunDirectory.create(folder, "rewritten", {}, "evalkit run")
    with made.stage("all") as write:
        for record in [*run.read(), *read_samples(run.path)]:
            if record.kind != "stage":
                write.write(change(record) if isinstance(record, kind) else record)
    return html.write(made.path)


def charted(browse: Callable[..., Browser], page: Path, **options: Any) -> Browser:
    """A browser at a report whose chart of cost and loss is drawn."""
    browser = browse(page, **options)
    browser.wait("document.querySelectorAll('#trade-chart .main-svg').length > 0")
    return browser
