"""Exact match of an exported checkpoint on held-out documents, teacher-forced.

An answer counts if every one of its tokens is the most likely one after the tokens before it, which is when greedy
generation gives exactly that answer.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from evalkit.train import checkpoint
from evalkit.train.model import Nano, Selection, probe_kernels
from evalkit.train.tokenizer import Encoder, train
from tasks import documents

EVALUATION_SEED, CHOICE_SEED = 20_000, 30_000
BATCH_TOKENS = 70_000


@dataclass(frozen=True, kw_only=True)
class Score:
    """`exact` of `n` documents; `label` names the task with its options."""

    label: str
    length: int
    selection: Selection
    exact: float
    n: int
    seed: int


@dataclass(frozen=True)
class Case:
    task: str
    options: tuple[tuple[str, int], ...] = ()

    @property
    def label(self) -> str:
        return " ".join([self.task, *(f"{name}={value}" for name, value in self.options)])


TASKS = (
    Case("needle"),
    Case("multi_key", (("keys", 120),)),
    Case("siblings", (("keys", 100),)),
    Case("variables", (("chains", 16), ("hops", 4))),
    Case("walk", (("steps", 32),)),
)
SHORT_TASKS = (
    Case("needle"),
    Case("multi_key", (("keys", 60),)),
    Case("siblings", (("keys", 40),)),
    *TASKS[3:],
)
LADDER = tuple(
    Case("registers", (("registers", registers), ("steps", steps)))
    for registers, steps in (
        (4, 16),
        (4, 32),
        (8, 8),
        (8, 16),
        (8, 24),
        (8, 32),
        (8, 40),
        (8, 48),
        (8, 60),
        (8, 72),
    )
)


@torch.no_grad()
def exact_match(
    model: Nano, encoder: Encoder, docs: list[documents.Document], selection: Selection, device: torch.device
) -> float:
    """Share of documents whose whole target is the model's greedy continuation."""
    rows = []
    for document in docs:
        prompt = [encoder.bos, *encoder(document.prompt)]
        rows.append((prompt, encoder(document.target)))
    longest = max(len(prompt) + len(target) for prompt, target in rows)
    # Kernels with a mask want rows that are multiples of 8.
    longest = -(-longest // 64) * 64
    size = max(1, BATCH_TOKENS // longest)
    right: list[Tensor] = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        tokens = torch.full((len(part), longest), encoder.pad, dtype=torch.int64)
        asked = torch.zeros(len(part), longest, dtype=torch.bool)
        for row, (prompt, target) in enumerate(part):
            end = len(prompt) + len(target)
            tokens[row, :end] = torch.tensor(prompt + target)
            asked[row, len(prompt) - 1 : end - 1] = True
        tokens, asked = tokens.to(device), asked.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            hidden, _ = model(tokens, selection)
            guessed = model.logits(hidden[asked]).argmax(-1)
        wrong = torch.zeros(len(part), device=device)
        wrong.index_add_(0, asked.nonzero()[:, 0], (guessed != tokens.roll(-1, 1)[asked]).float())
        right.append(wrong == 0)
    return float(torch.cat(right).float().mean())


def evaluate(
    directory: Path, device: torch.device, n: int = 256, lengths: tuple[int, ...] = (2048, 1024, 4096)
) -> Path:
    """Scores every task at every length, prints a table and writes evaluation.json beside the checkpoint."""
    model = checkpoint.load(directory).to(device).eval()
    model.use(probe_kernels(model.config, device))
    encoder = Encoder(train())
    scores: list[Score] = []
    began = time.monotonic()

    def score(case: Case, length: int, selections: tuple[Selection, ...], seed: int) -> None:
        try:
            docs = documents.generate(case.task, length=length, count=n, seed=seed, **dict(case.options))
        except ValueError as error:
            print(f"left out: {error}", flush=True)
            return
        for selection in selections:
            torch.manual_seed(seed)
            exact = exact_match(model, encoder, docs, selection, device)
            scores.append(
                Score(label=case.label, length=length, selection=selection, exact=exact, n=n, seed=seed)
            )

    for length in lengths:
        for case in TASKS if length >= 2048 else SHORT_TASKS:
            random = length == lengths[0]
            score(case, length, ("dense", "own", "random") if random else ("dense", "own"), EVALUATION_SEED)
    for case in LADDER:
        # The ladder chooses a task; it must not do so on the documents that the task is then scored on.
        score(case, lengths[0], ("dense", "own"), CHOICE_SEED)
        score(case, lengths[0], ("dense", "own"), EVALUATION_SEED)
    _print(scores)
    result = {
        "checkpoint": directory.name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "n": n,
        "wall_s": round(time.monotonic() - began, 1),
        "scores": [asdict(score) for score in scores],
    }
    path = directory / "evaluation.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def _print(scores: list[Score]) -> None:
    table = Table("task", "tokens", "documents", "dense", "own", "random", "n")
    cells: dict[tuple[str, int, int], dict[str, Score]] = {}
    for score in scores:
        cells.setdefault((score.label, score.length, score.seed), {})[score.selection] = score
    for (label, length, seed), row in cells.items():
        shown = [f"{100 * row[s].exact:.1f}" if s in row else "" for s in ("dense", "own", "random")]
        which = "choice" if seed == CHOICE_SEED else "held out"
        table.add_row(label, str(length), which, *shown, str(next(iter(row.values())).n))
    Console(width=110).print(table)
