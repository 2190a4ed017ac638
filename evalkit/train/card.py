"""The checkpoint's README.md, every number of it read from training.json and evaluation.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from evalkit.train.evaluate import EVALUATION_SEED

_HEAD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# dsa-nano

A small DeepSeek-V3.2 model ({parameters:.2f} M parameters, bf16) with multi-head latent attention, a trained sparse
attention indexer (top-{topk}) and a mixture of experts, for measuring what KV-cache formats cost. It solves
long-context tasks over generated facts and knows nothing else: it is an instrument, not an assistant.

{layers} layers, hidden {hidden}, {heads} heads, latent {latent} + rope {rope}, indexer {index_heads} x {index_dim},
{experts} experts with {active} active and one shared. Byte-level BPE of {vocab} entries.
"""


def write(directory: Path) -> Path:
    """README.md in the checkpoint's directory, from the records beside it or, of the training, one level up."""
    training = directory / "training.json"
    if not training.exists():
        training.write_text((directory.parent / "training.json").read_text())
    record = json.loads(training.read_text())
    model = record["config"]["model"]
    text = _HEAD.format(
        parameters=record["parameters"] / 1e6,
        topk=model["index_topk"],
        layers=model["num_hidden_layers"],
        hidden=model["hidden_size"],
        heads=model["num_attention_heads"],
        latent=model["kv_lora_rank"],
        rope=model["qk_rope_head_dim"],
        index_heads=model["index_n_heads"],
        index_dim=model["index_head_dim"],
        experts=model["n_routed_experts"],
        active=model["num_experts_per_tok"],
        vocab=model["vocab_size"],
    )
    text += _training(record)
    evaluation = directory / "evaluation.json"
    if evaluation.exists():
        text += _evaluation(json.loads(evaluation.read_text()))
    path = directory / "README.md"
    path.write_text(text)
    return path


def _training(record: dict[str, Any]) -> str:
    runs = [record]
    while (origin := runs[0].get("origin")) is not None:
        runs.insert(0, origin)
    lines = [
        f"\n## Training\n\nOn one {record['device']}, torch {record['torch']}, with seed {record['config']['seed']}; the",
        "phases are bounded by the seconds below (`--minutes` sets them). Documents and tokenizer come from that seed and",
        "the generators in `tasks/documents`.\n",
        "| run | phase | steps | tokens | seconds |",
        "|---|---|---|---|---|",
    ]
    for number, run in enumerate(runs, 1):
        refines = f" --refine RUN{number - 1}/export" if number > 1 else ""
        at = f" at commit {commit}" if (commit := run.get("commit")) is not None else ""
        name = f"{number}: `python -m evalkit.train run --out RUN{number}{refines}`{at}"
        for phase in run["phases"]:
            lines.append(
                f"| {name} | {phase['phase']} | {phase['step']} | {phase['tokens'] / 1e6:.1f} M | {phase['seconds']} |"
            )
            name = ""
    return "\n".join(lines) + "\n"


def _evaluation(record: dict[str, Any]) -> str:
    rows: dict[tuple[str, int], dict[str, float]] = {}
    for score in record["scores"]:
        if score["seed"] == EVALUATION_SEED:
            rows.setdefault((score["label"], score["length"]), {})[score["selection"]] = score["exact"]
    lines = [
        "\n## Exact match\n",
        f"% of {record['n']} held-out documents whose whole answer is the greedy continuation, weights in bf16, on",
        f"{record['device']}: dense attention, the model's own top-k, and random keys in place of its indexer's.\n",
        "| task | tokens | dense | own top-k | random |",
        "|---|---|---|---|---|",
    ]
    for (label, length), row in rows.items():
        shown = [f"{100 * row[name]:.1f}" if name in row else "" for name in ("dense", "own", "random")]
        lines.append(f"| {label} | {length:,} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"
